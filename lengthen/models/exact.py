"""How near a layer computed here is to the truth: the model's own code in a wider dtype, beside it in the model's own.

Two roundings of one layer may differ by more than any bound would allow: with key biases of 200 (Qwen2.5) attention is
so sharp that bf16 is a tenth apart from bf16; in fp32 a gradient may all but cancel. What both can be held to is their
distance from fp32, or from fp64.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

# dtype of a model -> (that of the truth, the share of the truth that an error may always have)
WIDER = {
    **dict.fromkeys((torch.bfloat16, torch.float16), (torch.float32, 1e-3)),
    **dict.fromkeys((torch.float32, torch.float64), (torch.float64, 1e-4)),
}


def dense_weight(linear: Any) -> Tensor:
    """The weight [out, in] of an nn.Linear, dequantised where it is stored in 4 bits (bitsandbytes' Linear4bit)."""
    weight = linear.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes import functional as bnb

    if getattr(state, "packing_format_for_cpu", False):  # 0.50, after an evaluation on a CPU with AVX512-BF16
        weight.data, weight.quant_state = bnb._convert_weight_packed_for_cpu_inverse(weight.data, state)
    return bnb.dequantize_4bit(weight.data, weight.quant_state)


def in_dtype(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a decoder layer; 4-bit weights are dense in it."""
    twins: dict[int, Any] = {}  # what copy.deepcopy takes as copied already: every tensor, so that none is held twice

    def wide(x: Tensor, trained: bool = False) -> nn.Parameter:
        return nn.Parameter(x.detach().to(dtype), requires_grad=trained)

    for module in layer.modules():
        if isinstance(module, nn.Linear):  # or bitsandbytes' Linear4bit, which is one
            twin = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            twin.weight = wide(dense_weight(module))
            twin.bias = None if module.bias is None else wide(module.bias)
            twins[id(module)] = twin
        else:
            twins |= {id(p): wide(p, p.requires_grad) for p in module.parameters(recurse=False)}
    return copy.deepcopy(layer, twins)


def given_in(dtype: torch.dtype, given: Any) -> Any:
    """Arguments with their floating-point tensors in that dtype."""
    return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, given)


def squared_errors(ours: Sequence[Tensor], own: Sequence[Tensor], exact: Sequence[Tensor]) -> Tensor:
    """fp64 [tensors, 3]: of each the squares of our error, of the own code's, and of the truth."""
    parts = [
        [x.double().square().sum() for x in (a.double() - truth, b.double() - truth, truth)]
        for a, b, truth in zip(ours, own, exact, strict=True)
    ]
    return torch.stack([torch.stack(part) for part in parts])


def as_near(squares: Tensor, share: float) -> bool:
    """Whether all our errors are at most a quarter above the own code's, and `share` of the truth. squares: as above,
    perhaps sums of several draws: a few tokens make most of an error, and by chance one code's is twice the other's."""
    error, bound, size = squares.sqrt().T
    return bool((error <= 1.25 * bound + share * size + 1e-30).all())

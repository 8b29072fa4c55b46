"""A decoder layer in few operations, for decoding on a CPU.

Decoding a handful of texts, a step multiplies each weight by a few columns: it takes what reading the weights from
memory takes, if nothing else is in the way. Two things are, in the model's own code. nn.Linear's layout is the slow
one for so few rows, and a layer is about a hundred small operations, each of which costs a CPU 5 to 50 us however
small it is. So, for fp32 and bf16 on a CPU:

1. Weights are laid out once, as the processor multiplies them fastest (sampling/layouts.py).
2. A layer of the Llama, Mistral, Qwen2 and Qwen3 kind runs as `Layer` below: query, key and value as one product,
   gate and up as one, RMSNorm and RoPE in as few passes as torch has. Other layers keep their code, with 1.

Nothing is installed in the model: `forwards` stand in for one pass (hook.Hook does that, and compares the logits with
the model's own before the first). The copies take as much memory as the weights they stand for, so they are only made
of models that take a quarter of the machine's memory or less.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lengthen.models.cards import physical_memory
from lengthen.models.families import is_known
from lengthen.sampling.batch import Batch, Rule
from lengthen.sampling.layouts import Product, lay_out, layout_of

DTYPES = {torch.float32, torch.bfloat16}  # of models that it serves; norms and RoPE are computed in fp32

# T packed tokens, H hidden size, Hq and Hkv heads of size D, I size of the MLP.


def product(layers: Sequence[nn.Linear], norm: nn.Module | None = None, order: Tensor | None = None) -> Product:
    """x -> the outputs of linear layers with the same input, side by side: [..., in] -> [..., sum of outs].

    `norm`: the RMSNorm in front of them, whose weight is multiplied into theirs; `unit` does the rest of it.
    `order` [sum of outs]: which output comes where.
    """
    weight: Tensor = torch.cat(tuple(layer.weight for layer in layers))
    dtype = weight.dtype
    if norm is not None:
        weight = (weight * scale_of(norm)).to(dtype)  # [out, in] * [in]: norm(x) W^T = unit(x) (W * scale)^T
    zeros = [weight.new_zeros(len(layer.weight)) for layer in layers]
    biases: list[Tensor] = [zero if x.bias is None else x.bias for x, zero in zip(layers, zeros, strict=True)]
    bias = torch.cat(biases) if any(layer.bias is not None for layer in layers) else None
    if order is not None:
        weight, bias = weight[order], None if bias is None else bias[order]
    return lay_out(layout_of(len(weight), weight.shape[1], dtype), weight, bias)


class Layer:
    """Stands in for a decoder layer's forward: h = x + attention(norm(x)); h + MLP(norm(h))."""

    def __init__(self, layer: Any, window: int, rope: "Rope"):
        attention, mlp = layer.self_attn, layer.mlp
        self.index, self.rule, self.rope = attention.layer_idx, Rule(attention.scaling, window), rope
        self.head, self.heads = attention.head_dim, attention.q_proj.out_features // attention.head_dim
        self.values = attention.v_proj.out_features // self.head  # Hkv
        self.keys = self.heads + self.values  # where the keys end, counted in heads
        # What RoPE turns together, dimensions i and i + D/2, lies side by side in q and k: a complex number. The order
        # of dimensions in a head is free, as long as q and k agree.
        place = torch.arange((self.keys + self.values) * self.head).view(-1, self.head)
        place[: self.keys] = place[: self.keys, (pairs := in_pairs(self.head))]
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.qkv = product(qkv, layer.input_layernorm, place.flatten())
        self.out = product([attention.o_proj])
        self.gate_up = product([mlp.gate_proj, mlp.up_proj], layer.post_attention_layernorm)
        self.down, self.activation = product([mlp.down_proj]), mlp.act_fn
        self.floors = floor_of(layer.input_layernorm), floor_of(layer.post_attention_layernorm)
        norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else ()  # Qwen3
        self.head_norms = [(floor_of(norm), scale_of(norm)[pairs]) for norm in norms]

    def __call__(
        self, x: Tensor, position_embeddings: tuple[Tensor, Tensor], lengthen_batch: Batch, **_: object
    ) -> Tensor:
        """x [1, T, H], (cos, sin) [1, T, D] each -> [1, T, H]. Called as the model calls its own layer."""
        qkv = self.qkv(unit(x[0], self.floors[0])).view(x.shape[1], -1, self.head)
        qk = qkv[:, : self.keys]  # [T, Hq + Hkv, D]: both get the same rotation
        if self.head_norms:
            parts = zip(self.head_norms, qk.split([self.heads, self.values], 1), strict=True)
            qk = torch.cat([unit(part, floor) * scale for (floor, scale), part in parts], 1)
        turned = torch.view_as_complex(qk.float().unflatten(-1, (-1, 2))).mul_(self.rope(position_embeddings))
        qk = torch.view_as_real(turned).flatten(-2).to(qkv.dtype)
        out = lengthen_batch.attend(
            self.index, qk[:, : self.heads], qk[:, self.heads :], qkv[:, self.keys :], self.rule
        )
        h = self.out(out.flatten(1)).add_(x[0])  # [T, H]
        gate, up = self.gate_up(unit(h, self.floors[1])).chunk(2, -1)  # [T, I] each
        return self.down(self.activation(gate).mul_(up)).add_(h)[None]


class Rope:
    """cos + i sin [T, 1, D/2], as `Layer` wants them: made once for all layers of a pass."""

    def __init__(self) -> None:
        self.source: tuple[Tensor, Tensor] | None = None
        self.made: Tensor

    def __call__(self, source: tuple[Tensor, Tensor]) -> Tensor:
        # The model computes cos and sin once a pass and hands the same tuple to every layer.
        if self.source is not source:
            cos, sin = (x[0, :, None, : x.shape[-1] // 2].float() for x in source)  # the other half is the same again
            self.source, self.made = source, torch.complex(cos, sin)
        return self.made


def in_pairs(size: int) -> Tensor:
    """[size] 0, size / 2, 1, size / 2 + 1, ..."""
    return torch.arange(size).view(2, -1).t().flatten()


def unit(x: Tensor, floor: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + floor^2) over the last dimension: with `scale_of`, an RMSNorm in fewer passes than torch's."""
    wide = x.float()
    return (wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True).hypot_(floor)).to(x.dtype)


def floor_of(norm: Any) -> Tensor:
    """An RMSNorm of H numbers is x / sqrt((|x|^2 + H eps) / H)."""
    return torch.tensor((len(norm.weight) * norm.variance_epsilon) ** 0.5)


def scale_of(norm: Any) -> Tensor:
    """[H] what is left of an RMSNorm after `unit`."""
    return norm.weight.float() * len(norm.weight) ** 0.5


def known(layer: nn.Module) -> bool:
    """Whether `Layer` can stand in for it: of a known kind, and nobody has put other modules inside (LoRA, 4 bits)."""
    inside = (module for name, module in layer.named_modules() if name.endswith("_proj"))
    return is_known(layer) and all(type(module) is nn.Linear for module in inside)


def forwards(model: nn.Module, windows: dict[int, int]) -> list[tuple[nn.Module, Callable]]:
    """Modules and what stands in for their forward. windows: the sliding window of each layer, 0 = none."""
    replaced: list[tuple[nn.Module, Callable]] = []
    covered: set[nn.Module] = set()
    rope = Rope()
    if sum(p.numel() * p.itemsize for p in model.parameters()) > physical_memory() // 4:
        return []
    for module in model.modules():  # parents come before their children
        if module in covered or "forward" in vars(module) or not served(module):  # replaced by others: stays
            continue
        if known(module):
            covered.update(module.modules())  # what is inside is never called by its own forward
            attention: Any = module.self_attn
            replaced.append((module, Layer(module, windows[attention.layer_idx], rope)))
        elif type(module) is nn.Linear:
            replaced.append((module, product([module])))
    return replaced


def served(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    dtypes = {p.dtype for p in parameters}
    return len(dtypes) < 2 and dtypes < DTYPES and all(p.device.type == "cpu" for p in parameters)

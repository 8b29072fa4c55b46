"""A decoder layer in few operations, for sampling.

transformers' own layer is 45 to 60 kernels or operations: each norm is six, rotary positions are ten. A decoding step
of a small model or of few texts takes as long as they take to start: on a GPU, captured in a CUDA graph or not, and on
a CPU, where each costs 5 to 50 us however small it is: the weights that stream past leave nothing in the caches.
Here, for layers of the Llama, Mistral, Qwen2 and Qwen3 kind:

     1  n = norm(x)                                                 6  n = norm(x)
     2  q, k, v = n [Wq Wk Wv]     one product                      7  g, u = n [Wg Wu]      one product
     3  norms and positions of q and k, k and v to their pages      8  a = silu(g) * u
    4-5 attention (two where a text's keys are split)               9  x += a Wd
    5-6 x += attention Wo

The parts are kernels/attention.py's and kernels/layer_passes.py's. On a GPU the products add to x themselves, and the
joint matrices take no memory: the model's weights become views of them, with the same numbers. On a CPU weights are
laid out as the processor multiplies them fastest (sampling/layouts.py), also those outside of such layers. These are
copies, so they are only made of models that take a quarter of the machine's memory or less. An adapter merged into the
weights is in them. A step of one to four texts waits for its weights alone: there a plain layer is one call of
kernels/cpu.Layer, by the weights as they are.

What is not plain is called as it is: a 4-bit layer is a product of its own, whose result one more kernel adds to x.
LoRA over it adds a product for each group of layers with the same input and one for each layer; its matrices are copied
in the dtype of x. Over NF4 a layer of Qwen2.5 is 18 kernels, with LoRA 29; one of Qwen3 or Llama 15 and 26.

A change of the weights needs a new Sampler: what is lent is dropped when it is closed. Nothing else is installed in the
model: `forwards` stand in for one pass (hook.Hook does that, and compares the logits with the model's own before the
first). No GPU has run this yet: there it is the kernels' torch references and Triton's interpreter that were compared
with the model's own code (tests/test_layer.py).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import HAS_NUMBA
from kernels.attention import Turn
from kernels.layer_passes import rms_norm, swiglu
from lengthen.errors import out_of_memory
from lengthen.models.cards import physical_memory
from lengthen.models.families import is_known
from lengthen.models.lora import LoraLinear
from lengthen.sampling.attend import TableBatch
from lengthen.sampling.batch import Rule
from lengthen.sampling.layouts import lay_out, layout_of

DTYPES = {torch.float32, torch.bfloat16}  # of what a CPU has layouts for

# T packed tokens, H hidden size, Hq and Hkv heads of size D, I size of the MLP, r rank.


class Product:
    """Linear layers with the same input, LoRA included. dtype: of x. laid_out: plain ones are, in a copy."""

    def __init__(self, layers: Sequence[Any], dtype: torch.dtype, laid_out: bool):
        self.bases: list[Any] = [layer.base if isinstance(layer, LoraLinear) else layer for layer in layers]
        self.weight = self.bias = None  # [sum of outs, in], [sum of outs]: of plain layers
        self.times: Callable[[Tensor], Tensor] | None = None  # x -> x W^T + bias, of plain layers that are laid out
        if all(type(base) is nn.Linear for base in self.bases):
            self.sizes = [base.out_features for base in self.bases]
            if any(base.bias is not None for base in self.bases):
                biases = [b.weight.new_zeros(len(b.weight)) if b.bias is None else b.bias for b in self.bases]
                self.bias = torch.cat(biases)
            if laid_out and all(map(has_layouts, self.bases)):
                self.times = laid(torch.cat([base.weight for base in self.bases]), self.bias)
            else:
                self.weight = as_one(self.bases)
        loras = [(i, layer) for i, layer in enumerate(layers) if isinstance(layer, LoraLinear)]
        self.A = torch.cat([m.A for _, m in loras]).to(dtype).t() if loras else None  # [in, sum of ranks]
        self.B = [(i, m.rank, (m.B * m.scale).to(dtype).t()) for i, m in loras]  # (which layer, r, [r, out])

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """x [T, in] -> [T, out] each; of plain layers the parts of one matrix."""
        if self.times:
            ys: Sequence[Tensor] = self.times(x).split(self.sizes, 1)
        elif self.weight is not None:
            ys = F.linear(x, self.weight, self.bias).split(self.sizes, 1)
        else:
            ys = [base(x) for base in self.bases]
        self._add_updates(x, ys)
        return ys

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """y [T, out] += x W^T + bias, of a single layer; on a GPU the sum is rounded once."""
        if self.weight is None:
            y += self.times(x) if self.times else self.bases[0](x)
        else:
            y.addmm_(x, self.weight.t())
            if self.bias is not None:
                y += self.bias
        self._add_updates(x, [y])

    def _add_updates(self, x: Tensor, ys: Sequence[Tensor]) -> None:
        if self.A is not None:
            z = (x @ self.A).split([rank for _, rank, _ in self.B], 1)  # [T, r] each
            for (i, _, B), part in zip(self.B, z, strict=True):
                ys[i].addmm_(part, B)


def as_one(layers: Sequence[nn.Linear]) -> Tensor | None:
    """[sum of outs, in]: the layers' weights, which become its rows. Not again where they are that already.

    None where no memory is left to join them: each is a product of its own then.
    """
    weights = [layer.weight.data for layer in layers]
    first, rows, width = weights[0], sum(map(len, weights)), weights[0].shape[1]
    ends, end = [], first.data_ptr()
    for weight in weights:
        ends.append(weight.data_ptr() == end and weight.is_contiguous())
        end += weight.numel() * weight.itemsize
    if all(ends) and first.untyped_storage().data_ptr() + first.untyped_storage().nbytes() >= end:
        return first.as_strided((rows, width), (width, 1))
    try:
        joint = torch.cat(weights)  # [rows, width]
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return None
    for layer, part in zip(layers, joint.split([len(weight) for weight in weights]), strict=True):
        layer.weight.data = part
    return joint


def laid(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x -> x W^T + bias, by a copy of weight [out, in] that lies as this machine wants it."""
    return lay_out(layout_of(len(weight), weight.shape[1], weight.dtype), weight, bias)


class Layer:
    """Stands in for a decoder layer's forward: x += attention(norm(x)); x += MLP(norm(x))."""

    def __init__(self, layer: Any, window: int, laid_out: bool):
        attention, mlp = layer.self_attn, layer.mlp
        self.index, self.head = attention.layer_idx, attention.head_dim
        self.rule = Rule(attention.scaling, window)
        norms = layer.input_layernorm, layer.post_attention_layernorm
        self.norm1, self.norm2 = ((norm.weight, norm.variance_epsilon) for norm in norms)
        dtype = norms[0].weight.dtype
        together = [attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj]
        self.qkv, self.out = (Product(some, dtype, laid_out) for some in together)
        together = [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]
        self.gate_up, self.down = (Product(some, dtype, laid_out) for some in together)
        self.head_norms: tuple[Tensor, Tensor] | None = None
        self.eps = 0.0
        if hasattr(attention, "q_norm"):  # Qwen3
            self.head_norms = attention.q_norm.weight, attention.k_norm.weight
            self.eps = attention.q_norm.variance_epsilon
        self.for_few: Any = None  # cpu.Layer: all of it, for a step of few texts
        linears = [getattr(attention, f"{name}_proj") for name in "qkvo"] + [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        if HAS_NUMBA and all(type(m) is nn.Linear and m.weight.is_contiguous() and has_layouts(m) for m in linears):
            from kernels import cpu

            given = [(m.weight, m.bias) for m in linears], (self.norm1, self.norm2), self.head_norms, self.eps
            self.for_few = cpu.Layer(*given, *self.rule[:2])

    @torch.no_grad()
    def __call__(
        self, x: Tensor, position_embeddings: tuple[Tensor, Tensor], lengthen_batch: TableBatch, **_: object
    ) -> Tensor:
        """x [1, T, H], changed in place, (cos, sin) [1, T, D] each -> x. Called as the model calls its own layer."""
        h = x[0]
        cos, sin = (codes[0].contiguous() for codes in position_embeddings)
        batch, pages = lengthen_batch, lengthen_batch.layers[self.index]
        decodes = batch.counts is not None and not batch.bounds and pages.keys.dtype == h.dtype
        if self.for_few and decodes and len(h) <= self.for_few.most:
            self.for_few(h, cos, sin, pages, batch.slots, (batch.counts, batch.table, batch.lengths))
            return x
        q, k, v = (y.unflatten(1, (-1, self.head)) for y in self.qkv(rms_norm(h, *self.norm1)))  # [T, heads, D]
        out = batch.turn_and_attend(self.index, q, k, v, self.rule, Turn(cos, sin, self.head_norms, self.eps))
        self.out.add_to(h, out.flatten(1))
        gate, up = self.gate_up(rms_norm(h, *self.norm2))  # [T, I] each
        self.down.add_to(h, swiglu(gate, up))
        return x


@torch.no_grad()
def forwards(model: Any, windows: dict[int, int], gpu: bool) -> list[tuple[nn.Module, Callable]]:
    """Modules and what stands in for their forward. windows: the sliding window of each layer, 0 = none."""
    laid_out = not gpu and sum(p.numel() * p.itemsize for p in model.parameters()) <= physical_memory() // 4
    text = model.config.get_text_config()
    layers: list[Any] = []
    if getattr(text, "hidden_act", "silu") in ("silu", "swish"):  # one whose forward somebody has replaced stays
        layers = [module for module in model.modules() if is_known(module) and "forward" not in vars(module)]
    try:
        replaced: list[tuple[nn.Module, Callable]] = [
            (m, Layer(m, windows[m.self_attn.layer_idx], laid_out)) for m in layers
        ]
    except (AttributeError, ValueError):  # a model's own code, whose classes only have the names
        replaced, layers = [], []
    norm: Any = getattr(model.get_decoder(), "norm", None)
    listened = norm is not None and (norm._forward_hooks or norm._forward_pre_hooks)
    if layers and len(layers) == text.num_hidden_layers and hasattr(norm, "variance_epsilon") and not listened:
        replaced.append((norm, partial(rms_norm, weight=norm.weight, eps=norm.variance_epsilon)))
    if laid_out:
        inside = {module for layer in layers for module in layer.modules()}
        plain = [m for m in model.modules() if type(m) is nn.Linear and m not in inside and "forward" not in vars(m)]
        replaced += [(m, laid(m.weight, m.bias)) for m in plain if has_layouts(m)]
    return replaced


def has_layouts(linear: nn.Linear) -> bool:
    return linear.weight.device.type == "cpu" and linear.weight.dtype in DTYPES

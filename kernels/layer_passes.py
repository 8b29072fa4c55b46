"""The passes of a decoder layer between its matrix products: RMSNorm, SwiGLU and rotary positions, and their gradients.

It replaces, for the Llama, Mistral, Qwen2 and Qwen3 families,
    n = weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    a = F.silu(gate) * up
    q = q * cos + rotate_half(q) * sin
and what autograd makes of them. Each is one pass over its data on a GPU (layer_passes_triton.py), computes in fp32 and
rounds once; gradients are written over what is no longer needed. On a 16K step of Qwen2.5-7B torch's own passes for
these take about as long as a tenth of the matrix products: an I-vector (18,944 numbers) read and written once more per
token and layer is 0.6 % of the step on a 4090, 1.1 % on an H100. On a CPU each is one pass as well (cpu.py).

The mathematics, with r = (mean(x^2) + eps)^(-1/2) and s = sigmoid(g):
    RMSNorm  n = r x w          dx = r (dn w) - x r^3 mean(dn w x)
    SwiGLU   a = g s u          dg = da u s (1 + g (1 - s))          du = da g s
    RoPE     (x1, x2) -> (x1 c - x2 s, x2 c + x1 s), its gradient the rotation by the negative angle
x1 and x2 are the halves of a head, c and s the first halves of cos and sin (the second halves repeat them). Norm
weights are frozen: they get no gradient. The residual after a norm is added by its backward pass (`dx +=`), the one
before it by the matrix product that makes x.

Shapes: x, n, dn, dx [..., N]; weight [N]; gate, up, da [T, I]; heads [T, heads, D]; cos, sin [T, D]. All contiguous
(but SwiGLU's inputs, which may be the halves of one matrix), of one dtype (bf16, fp16 or fp32; fp64 on a CPU) and on
one device. Not supported: trained norm weights, other activations.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

from . import HAS_NUMBA, HAS_TRITON


def _fast(x: Tensor) -> bool:
    return HAS_TRITON and x.is_cuda and x.dtype != torch.float64


def _on_numba(x: Tensor) -> bool:
    return HAS_NUMBA and not x.is_cuda and x.dtype in (torch.float32, torch.bfloat16)


def _wide(x: Tensor) -> Tensor:
    """In fp32, or fp64 for fp64; not copied if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- RMSNorm ---------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., N], weight [N] -> [..., N]."""
    if _fast(x):
        from . import layer_passes_triton

        return layer_passes_triton.rms_norm(x, weight, eps)
    if _on_numba(x):
        from . import cpu

        return cpu.rms_norm(x, weight, eps)
    x32 = _wide(x)
    return (x32 * _inverse_size(x32, eps)).mul_(weight).to(x.dtype)


def rms_norm_backward_(dn: Tensor, x: Tensor, weight: Tensor, eps: float, dx: Tensor | None = None) -> Tensor:
    """dn [..., N] -> dx: added to `dx` in place where one is given, else written over dn."""
    increment_version(dn if dx is None else dx)  # of what kernels change, autograd would not know
    if _fast(x):
        from . import layer_passes_triton

        return layer_passes_triton.rms_norm_backward_(dn, x, weight, eps, dx)
    if _on_numba(x) and all(y is None or y.is_contiguous() for y in (dn, x, dx)):
        from . import cpu

        return cpu.rms_norm_backward_(dn, x, weight, eps, dx)
    x32, d = _wide(x), _wide(dn) * weight
    r = _inverse_size(x32, eps)
    inner = (d * x32).sum(-1, keepdim=True).mul_(r**3).mul_(-1 / x.shape[-1])
    if dx is None:
        return dn.copy_(d.mul_(r).addcmul_(x32, inner))
    if dx.dtype == d.dtype:
        return dx.addcmul_(d, r).addcmul_(x32, inner)
    return dx.copy_(_wide(dx).addcmul_(d, r).addcmul_(x32, inner))


def _inverse_size(x: Tensor, eps: float) -> Tensor:
    """r [..., 1]. (The norm is one pass; the square of its root costs no accuracy.)"""
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return size.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()


# ---- SwiGLU ----------------------------------------------------------------------------------------------------------


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, a new tensor [T, I]."""
    if _fast(gate):
        from . import layer_passes_triton

        return layer_passes_triton.swiglu(gate, up)
    if _on_numba(gate) and gate.stride() == up.stride() and gate[:1].is_contiguous():
        from . import cpu

        return cpu.swiglu(gate, up)
    return F.silu(_wide(gate)).mul_(up).to(gate.dtype)


def swiglu_backward_(gate: Tensor, up: Tensor, da: Tensor) -> Tensor:
    """gate becomes its gradient, up becomes its; returns a = silu(gate) * up. da is used up."""
    increment_version([gate, up, da])
    if _fast(gate):
        from . import layer_passes_triton

        return layer_passes_triton.swiglu_backward_(gate, up, da)
    if _on_numba(gate) and all(y.is_contiguous() for y in (gate, up, da)):
        from . import cpu

        return cpu.swiglu_backward_(gate, up, da)
    g, u, d = _wide(gate), _wide(up), _wide(da)
    silu, a = F.silu(g), d * u
    dg = torch.ops.aten.silu_backward.grad_input(a, g, grad_input=g)
    torch.mul(silu, u, out=a)
    torch.mul(silu, d, out=u)
    if dg.dtype != gate.dtype:
        gate.copy_(dg)
        up.copy_(u)
    return a.to(gate.dtype)


# ---- rotary positions ------------------------------------------------------------------------------------------------


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """heads [T, n, D] turned by their positions' angles, in place; `back`: by the negative angles, the gradient."""
    increment_version(heads)
    if _fast(heads):
        from . import layer_passes_triton

        return layer_passes_triton.rotate_(heads, cos, sin, back)
    if _on_numba(heads) and heads[0].is_contiguous():
        from . import cpu

        cpu.rotate_(heads, cos, -sin if back else sin, cos[0, :0])
        return heads
    half = heads.shape[-1] // 2
    c, s = (_wide(one[:, None, :half]) for one in (cos, sin))
    s = -s if back else s
    x1, x2 = heads[..., :half], heads[..., half:]
    first = torch.addcmul(x1 * c, x2, s, value=-1)
    x2.copy_(torch.addcmul(x2 * c, x1, s))
    x1.copy_(first)
    return heads

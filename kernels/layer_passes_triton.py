"""layer_passes.py on NVIDIA GPUs: five kernels, each one pass over its data.

The mathematics and the contract are in layer_passes.py. All are limited by memory: what counts is that each number is
read once and written once. No GPU has run this yet: it is checked in Triton's interpreter, and by compiling for sm_80,
86, 89, 90 and 120.
"""

from collections.abc import Callable
from functools import wraps

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.linear_cross_entropy_triton import INTERPRET, _to_bf16

FLAT = 1024  # elements per program of the elementwise kernels
ROW_ELEMENTS = 4096  # of RMSNorm, per program: one row of a hidden state, or many short ones (a head's)
HEADS = 16  # heads per program of the rotation
FLOATS = {torch.float32, torch.bfloat16, torch.float16}


@triton.jit
def _narrow(x, ptr, EMULATE: tl.constexpr):
    """fp32 -> the type that the pointer points to."""
    if ptr.dtype.element_ty == tl.bfloat16:
        return _to_bf16(x, EMULATE)
    else:
        return x.to(ptr.dtype.element_ty)


@triton.jit
def _rms_norm_kernel(
    # pointers
    x_ptr,  # [rows, N]
    w_ptr,  # [N]
    n_ptr,  # [rows, N], out
    # shapes
    rows,
    N,
    # meta
    eps,
    EMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # int64: T * H passes 2^31 at 600K tokens of Qwen2.5-7B
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_N)
    inside = (m < rows)[:, None] & (k < N)[None, :]
    at = m[:, None] * N + k[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + k, mask=k < N, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, axis=1) / N + eps)
    n = x * r[:, None] * w[None, :]
    tl.store(n_ptr + at, _narrow(n, n_ptr, EMULATE), mask=inside)


@triton.jit
def _rms_norm_backward_kernel(
    # pointers
    dn_ptr,  # [rows, N]
    x_ptr,  # [rows, N]
    w_ptr,  # [N]
    dx_ptr,  # [rows, N], in and out where ADD; may be dn_ptr where not
    # shapes
    rows,
    N,
    # meta
    eps,
    ADD: tl.constexpr,
    EMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_N)
    inside = (m < rows)[:, None] & (k < N)[None, :]
    at = m[:, None] * N + k[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + k, mask=k < N, other=0.0).to(tl.float32)
    d = tl.load(dn_ptr + at, mask=inside, other=0.0).to(tl.float32) * w[None, :]
    r = tl.rsqrt(tl.sum(x * x, axis=1) / N + eps)
    inner = r * r * r * tl.sum(d * x, axis=1) / N
    dx = d * r[:, None] - x * inner[:, None]
    if ADD:
        dx += tl.load(dx_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + at, _narrow(dx, dx_ptr, EMULATE), mask=inside)


@triton.jit
def _swiglu_kernel(
    # pointers
    g_ptr,  # [T, N]
    u_ptr,  # [T, N]
    a_ptr,  # [T, N], out
    # shapes
    N,
    # strides
    stride_g,
    stride_u,
    # meta
    EMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK numbers of one token."""
    token = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(g_ptr + token * stride_g + k, mask=k < N, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + token * stride_u + k, mask=k < N, other=0.0).to(tl.float32)
    tl.store(a_ptr + token * N + k, _narrow(g * tl.sigmoid(g) * u, a_ptr, EMULATE), mask=k < N)


@triton.jit
def _swiglu_backward_kernel(
    # pointers
    g_ptr,  # [n], gate in, its gradient out
    u_ptr,  # [n], up in, its gradient out
    d_ptr,  # [n], da in, a out
    # shapes
    n,
    # meta
    EMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(g_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    d = tl.load(d_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    silu = g * s
    tl.store(g_ptr + at, _narrow(d * u * s * (1 + g * (1 - s)), g_ptr, EMULATE), mask=at < n)
    tl.store(u_ptr + at, _narrow(d * silu, u_ptr, EMULATE), mask=at < n)
    tl.store(d_ptr + at, _narrow(silu * u, d_ptr, EMULATE), mask=at < n)


@triton.jit
def _rotate_kernel(
    # pointers
    x_ptr,  # [T, heads, 2 * half], in and out
    cos_ptr,  # [T, 2 * half]
    sin_ptr,  # [T, 2 * half]
    # shapes
    heads,
    half,
    # meta
    BACK: tl.constexpr,
    EMULATE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token, BLOCK_H of its heads."""
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    k = tl.arange(0, BLOCK_D)
    inside = (h < heads)[:, None] & (k < half)[None, :]
    first = token * heads * 2 * half + h[:, None] * 2 * half + k[None, :]
    c = tl.load(cos_ptr + token * 2 * half + k, mask=k < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin_ptr + token * 2 * half + k, mask=k < half, other=0.0).to(tl.float32)[None, :]
    if BACK:
        s = -s
    x1 = tl.load(x_ptr + first, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + first + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(x_ptr + first, _narrow(x1 * c - x2 * s, x_ptr, EMULATE), mask=inside)
    tl.store(x_ptr + first + half, _narrow(x2 * c + x1 * s, x_ptr, EMULATE), mask=inside)


# ---- launches --------------------------------------------------------------------------------------------------------


def row_blocks(N: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of an RMSNorm program."""
    columns = triton.next_power_of_2(N)
    rows = max(1, ROW_ELEMENTS // columns)
    return rows, columns, min(16, max(4, rows * columns // 1024))


def _on_its_device(launch: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Triton launches on the current device: it becomes that of the first argument."""

    @wraps(launch)
    def guarded(x: Tensor, *more, **named) -> Tensor:
        with torch.cuda.device_of(x):
            return launch(x, *more, **named)

    return guarded


def _check(*tensors: Tensor) -> None:
    assert all(t.is_contiguous() and t.dtype in FLOATS for t in tensors), [(t.shape, t.dtype) for t in tensors]


@_on_its_device
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check(x, weight)
    n, N = torch.empty_like(x), x.shape[-1]
    rows, columns, warps = row_blocks(N)
    count = x.numel() // N
    _rms_norm_kernel[(triton.cdiv(count, rows),)](
        *(x, weight, n, count, N, eps), EMULATE=INTERPRET, BLOCK_M=rows, BLOCK_N=columns, num_warps=warps
    )
    return n


@_on_its_device
def rms_norm_backward_(dn: Tensor, x: Tensor, weight: Tensor, eps: float, dx: Tensor | None = None) -> Tensor:
    out = dn if dx is None else dx
    _check(dn, x, weight, out)
    N = x.shape[-1]
    rows, columns, warps = row_blocks(N)
    count = x.numel() // N
    meta = {"ADD": dx is not None, "EMULATE": INTERPRET, "BLOCK_M": rows, "BLOCK_N": columns, "num_warps": warps}
    _rms_norm_backward_kernel[(triton.cdiv(count, rows),)](dn, x, weight, out, count, N, eps, **meta)
    return out


@_on_its_device
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    (T, N), dtypes = gate.shape, {gate.dtype, up.dtype}
    assert gate.stride(1) == up.stride(1) == 1 and dtypes <= FLOATS, (gate.stride(), up.stride(), dtypes)
    a = torch.empty(T, N, dtype=gate.dtype, device=gate.device)
    _swiglu_kernel[(T, triton.cdiv(N, FLAT))](
        *(gate, up, a, N, gate.stride(0), up.stride(0)), EMULATE=INTERPRET, BLOCK=FLAT, num_warps=4
    )
    return a


@_on_its_device
def swiglu_backward_(gate: Tensor, up: Tensor, da: Tensor) -> Tensor:
    _check(gate, up, da)
    n = gate.numel()
    _swiglu_backward_kernel[(triton.cdiv(n, FLAT),)](gate, up, da, n, EMULATE=INTERPRET, BLOCK=FLAT, num_warps=4)
    return da


@_on_its_device
def rotate_(heads: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    _check(heads, cos, sin)
    T, count, D = heads.shape
    blocks = {"BLOCK_H": HEADS, "BLOCK_D": triton.next_power_of_2(D // 2)}
    _rotate_kernel[(T, triton.cdiv(count, HEADS))](
        *(heads, cos, sin, count, D // 2), BACK=back, EMULATE=INTERPRET, **blocks, num_warps=4
    )
    return heads

"""linear_cross_entropy for bf16 on NVIDIA GPUs: two ways to get E = exp(z - z_t), four small kernels.

The mathematics and the contract are in linear_cross_entropy.py. Per chunk of R rows:
    1  z_t = h . W_t                           _target_kernel, a dot product per row, fp32
    2  E (bf16), S = sum_j E_j (fp32)          "fused": _gemm_exp_kernel, the exponential in the epilogue of h W^T;
                                               "split": cuBLAS h W^T with fp32 output, then _exp_kernel writes the
                                               bf16 E over the bytes of the fp32 logits it has just read
    3  U = E W                                 cuBLAS with fp32 output: few output tiles, V-long sums, its split-K case
    4  dh = (U - S W_t) / (1 + S)              _finish_kernel, which also adds up the partial sums in a fixed order
"fused" touches E twice (2 bytes out, 2 in) and no logit ever; "split" moves 8 bytes more per logit and holds half the
rows, but its first product is cuBLAS's. E keeps bf16's relative precision at any magnitude, so the reference z_t need
not be the maximum; S is summed from the fp32 values before they are rounded.

Memory, Qwen2.5-7B (V = 152,064, H = 3,584): fused 1024 rows: E 311 MB + U 15 MB; split 512 rows: z/E 311 MB +
U 7 MB. V <= 160K stays below 0.35 GB; the rows per chunk shrink for larger vocabularies.

No GPU has run this yet: it is checked in Triton's interpreter and by compiling for sm_80, 86, 89, 90 and 120.
"""

import os
import sys
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# The interpreter (chosen when a kernel is decorated) multiplies bf16 wrongly and truncates instead of rounding to it.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


class Tile(NamedTuple):
    """Tile of the fused product: rows, vocabulary, hidden; warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# Chosen by compiling: no spills, and the shared memory of the card (test_kernels_aot.py). Ada, consumer
# Ampere and consumer Blackwell have 99 KB per block, A100 163 KB, Hopper 227 KB.
TILES = {
    80: Tile(128, 256, 64, 8, 4),
    86: Tile(128, 256, 64, 8, 3),
    89: Tile(128, 256, 64, 8, 3),
    90: Tile(128, 256, 64, 8, 4),
    120: Tile(128, 256, 64, 8, 3),
}
# With a softcap the epilogue needs more registers: half the tile, or it spills.
SMALL_TILE = Tile(128, 128, 64, 8, 3)
# By estimate, until bench/loss.py has run on each: Triton's mma.sync products keep up with cuBLAS on sm_8x and 12x; on
# Hopper the memory traffic that the epilogue saves is worth about what cuBLAS's faster product is; datacenter Blackwell
# (sm_100) needs tcgen05, which these pointer loads do not feed well.
PATHS = {80: "fused", 86: "fused", 89: "fused", 90: "fused", 100: "split", 103: "split", 120: "fused"}
EXP_BLOCK = 4096  # logits per step of _exp_kernel
WARPS = 8  # of the row kernels


# ---- kernels ---------------------------------------------------------------------------------------------------------
#
# Triton compiles a variant for an integer of 1 and one for multiples of 16. The number of rows is either by chance, so
# it is not looked at; sizes of the model are, so that its vectors are read 16 bytes at a time.


@triton.jit
def _cap(x, softcap):
    """softcap * tanh(x / softcap), from exp: libdevice's tanh does not exist in the interpreter."""
    t = tl.exp(-2 * tl.abs(x) / softcap)
    tanh = (1 - t) / (1 + t)
    return softcap * tl.where(x < 0, -tanh, tanh)


@triton.jit
def _to_bf16(x, EMULATE: tl.constexpr):
    if EMULATE:  # round to nearest even by hand, so that the truncation that follows finds nothing to cut
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def _exponentials(z, zt, others, softcap, HAS_CAP: tl.constexpr):
    """Scaled logits z -> (E = exp(capped z - z_t), E times the slope of the cap); 0 outside `others`."""
    slope = 1.0
    if HAS_CAP:
        z = _cap(z, softcap)
        slope = 1 - (z / softcap) * (z / softcap)
    e = tl.where(others, tl.exp(z - zt), 0.0)
    return e, e * slope


@triton.jit
def _target_kernel(
    # pointers
    h_ptr,  # bf16 [R, H]
    w_ptr,  # bf16 [V, H]
    bias_ptr,  # bf16 [V]
    t_ptr,  # int64 [R]
    zt_ptr,  # fp32 [R]
    # shapes
    H,
    # strides
    stride_h,
    stride_w,
    # meta
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """z_t = cap(scale * (h . W_t + bias_t)): one program per row."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(t_ptr + row)
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, H, BLOCK):
        k = start + tl.arange(0, BLOCK)
        h = tl.load(h_ptr + row * stride_h + k, mask=k < H, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + t * stride_w + k, mask=k < H, other=0.0).to(tl.float32)
        acc += h * w
    z = tl.sum(acc, axis=0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + t).to(tl.float32)
    z *= scale
    if HAS_CAP:
        z = _cap(z, softcap)
    tl.store(zt_ptr + row, z)


@triton.jit(do_not_specialize=["R"])
def _gemm_exp_kernel(
    # pointers
    h_ptr,  # bf16 [R, H]
    w_ptr,  # bf16 [V, H]
    bias_ptr,  # bf16 [V]
    t_ptr,  # int64 [R]
    zt_ptr,  # fp32 [R]
    e_ptr,  # bf16 [R, >= V], out
    part_ptr,  # fp32 [2, R, P], out: sum E and max E of each of the P vocabulary tiles
    # shapes
    R,
    V,
    H,
    # strides
    stride_h,
    stride_w,
    stride_e,
    # meta
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    STORE: tl.constexpr,
    EVEN_H: tl.constexpr,
    EMULATE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One [BM, BN] tile of E = exp(cap(scale * (h W^T + bias)) - z_t) and its row sums."""
    # 1) row tiles vary fastest: programs in flight share tiles of W, which is read from memory once per chunk
    tiles_m = tl.cdiv(R, BM)
    tile_m = tl.program_id(0) % tiles_m
    tile_n = tl.program_id(0) // tiles_m
    parts = tl.cdiv(V, BN)
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)

    # 2) the product. Rows past the end read row 0.. again instead of being masked: their results are dropped below.
    #    int64 offsets: V * H passes 2^31 at V = 262,144, H = 8,192, and hidden may be a view with a long stride
    h_ptrs = h_ptr + (m % R).to(tl.int64)[:, None] * stride_h + k[None, :]
    w_ptrs = w_ptr + (n % V).to(tl.int64)[None, :] * stride_w + k[:, None]
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for start in range(0, H, BK):
        if EVEN_H:
            h = tl.load(h_ptrs)
            w = tl.load(w_ptrs)
        else:
            h = tl.load(h_ptrs, mask=(start + k)[None, :] < H, other=0.0)
            w = tl.load(w_ptrs, mask=(start + k)[:, None] < H, other=0.0)
        if EMULATE:
            h = h.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(h, w, acc)
        h_ptrs += BK
        w_ptrs += BK

    # 3) exponentials, from the fp32 sums
    row = m < R
    zt = tl.load(zt_ptr + m, mask=row, other=0.0)
    t = tl.load(t_ptr + m, mask=row, other=-1).to(tl.int32)
    z = acc
    if HAS_BIAS:
        z += tl.load(bias_ptr + n, mask=n < V, other=0.0).to(tl.float32)[None, :]
    others = (n < V)[None, :] & (n[None, :] != t[:, None])
    e, e_slope = _exponentials(z * scale, zt[:, None], others, softcap, HAS_CAP)

    # 4) partial sums and E; no atomics, so the order of summation is fixed
    part = part_ptr + m * parts + tile_n
    tl.store(part, tl.sum(e, axis=1), mask=row)
    tl.store(part + R * parts, tl.max(e, axis=1), mask=row)
    if STORE:
        e_ptrs = e_ptr + m.to(tl.int64)[:, None] * stride_e + n[None, :]
        tl.store(e_ptrs, _to_bf16(e_slope, EMULATE), mask=row[:, None] & (n < V)[None, :])


@triton.jit(do_not_specialize=["R"])
def _exp_kernel(
    # pointers
    z_ptr,  # fp32 [R, V], in
    e_ptr,  # bf16 [R, 2 V], out: the same memory; the first V of each row are written
    bias_ptr,  # bf16 [V]
    t_ptr,  # int64 [R]
    zt_ptr,  # fp32 [R]
    part_ptr,  # fp32 [2, R, 1], out, as in _gemm_exp_kernel
    # shapes
    R,
    V,
    # strides, in fp32 elements
    stride_z,
    # meta
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    STORE: tl.constexpr,
    EMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """E over the bytes of the logits: one program per row, left to right, so that a write never passes a read."""
    row = tl.program_id(0).to(tl.int64)  # int64: R * V * 2 passes 2^31 where the budget is raised
    t = tl.load(t_ptr + row)
    zt = tl.load(zt_ptr + row)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, V, BLOCK):
        n = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + row * stride_z + n, mask=n < V, other=0.0)
        if HAS_BIAS:
            z += tl.load(bias_ptr + n, mask=n < V, other=0.0).to(tl.float32)
        others = (n < V) & (n != t)
        e, e_slope = _exponentials(z * scale, zt, others, softcap, HAS_CAP)
        total += e
        largest = tl.maximum(largest, e)
        if STORE:
            # Block j is read at bytes 4jB.. and written at 2jB..: before everything still to be read, except within
            # the first block. So all threads must have read theirs before any writes.
            tl.debug_barrier()
            tl.store(e_ptr + row * 2 * stride_z + n, _to_bf16(e_slope, EMULATE), mask=n < V)
    tl.store(part_ptr + row, tl.sum(total, axis=0))
    tl.store(part_ptr + R + row, tl.max(largest, axis=0))


@triton.jit(do_not_specialize=["R", "stride_sums"])
def _finish_kernel(
    # pointers
    u_ptr,  # fp32 [R, H]: E W
    w_ptr,  # bf16 [V, H]
    t_ptr,  # int64 [R]
    zt_ptr,  # fp32 [R]
    part_ptr,  # fp32 [2, R, P]
    sums_ptr,  # fp32 [2, stride_sums], out: S, largest
    dh_ptr,  # bf16 [R, H], out
    # shapes
    R,
    H,
    parts,
    # strides
    stride_w,
    stride_dh,
    stride_sums,
    # meta
    scale,
    softcap,
    HAS_CAP: tl.constexpr,
    GRAD: tl.constexpr,
    EMULATE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Row sums, then dh = scale * (U - S slope_t W_t) / (1 + S): one program per row."""
    row = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, BLOCK_P)
    part = part_ptr + row * parts + p
    total = tl.sum(tl.load(part, mask=p < parts, other=0.0), axis=0)
    tl.store(sums_ptr + row, total)
    largest = tl.max(tl.load(part + R * parts, mask=p < parts, other=0.0), axis=0)
    tl.store(sums_ptr + stride_sums + row, largest)
    if GRAD:
        t = tl.load(t_ptr + row)
        target = total
        if HAS_CAP:
            x = tl.load(zt_ptr + row) / softcap
            target = total * (1 - x * x)
        factor = scale / (1 + total)
        for start in range(0, H, BLOCK_H):
            k = start + tl.arange(0, BLOCK_H)
            u = tl.load(u_ptr + row * H + k, mask=k < H, other=0.0)
            w = tl.load(w_ptr + t * stride_w + k, mask=k < H, other=0.0).to(tl.float32)
            dh = factor * (u - target * w)
            tl.store(dh_ptr + row * stride_dh + k, _to_bf16(dh, EMULATE), mask=k < H)


# ---- launchers -------------------------------------------------------------------------------------------------------


@cache
def architecture(device: torch.device) -> int:
    """90 for sm_90; without a GPU the tests run the interpreter on tiles as small as can be."""
    if INTERPRET:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def choose_path(device: torch.device, vocab: int) -> str:
    """ "fused", "split", or "torch" for cards before Ampere; said once on stderr.

    A table rather than a timing: two paths that differ in the last bits must not be chosen by chance.
    """
    arch = architecture(device)
    path = PATHS.get(arch, "split" if arch > 90 else "torch")
    if path == "split" and vocab % 8:
        path = "fused"  # E's rows would not be aligned for cuBLAS
    print(f"linear_cross_entropy: {path} path for sm_{arch}, vocabulary {vocab}", file=sys.stderr)
    return path


def tile_for(arch: int, small: bool) -> Tile:
    if arch == 0:
        return Tile(32, 64, 32, 4, 2)
    return SMALL_TILE if small else TILES.get(arch, TILES[89])  # 99 KB fit every card since Ampere


def bytes_per_row(path: str, vocab: int, dim: int) -> int:
    """Workspace of one row of a chunk: E (fp32 logits), U fp32, partial sums."""
    return (2 * _padded(vocab) + 8 * -(-vocab // 128) if path == "fused" else 4 * vocab + 8) + 4 * dim


def _padded(vocab: int) -> int:
    return -(-vocab // 64) * 64  # 128-byte rows of E


def _mm_fp32(a: Tensor, b: Tensor) -> Tensor:
    """bf16 [M, K] @ [K, N] -> fp32, never rounded to bf16 on the way."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def run_chunk(path: str, h: Tensor, head, t: Tensor, sums: Tensor, dh: Tensor | None):
    """One chunk: h bf16 [R, H] (last stride 1), t int64 [R]; head as in linear_cross_entropy.Head.

    Writes sums fp32 [2, R] (a slice of columns: S, max E) and, unless it is None, dh bf16 [R, H].
    """
    weight, bias, softcap, scale = head
    (num_rows, dim), vocab = h.shape, len(weight)
    assert h.dtype == weight.dtype == torch.bfloat16, (h.dtype, weight.dtype)
    assert h.stride(1) == 1 and weight.stride(1) == 1, (h.stride(), weight.stride())
    assert t.dtype == torch.int64 and t.is_contiguous(), (t.dtype, t.stride())
    grad = dh is not None
    scale, cap = float(scale), float(softcap or 1.0)
    flags = dict(HAS_BIAS=bias is not None, HAS_CAP=softcap is not None)
    store = dict(flags, STORE=grad, EMULATE=INTERPRET)
    bias = weight if bias is None else bias  # a pointer that is not read

    with torch.cuda.device_of(h):  # Triton launches on the current device
        block_h = min(1024, triton.next_power_of_2(dim))
        zt = torch.empty(num_rows, dtype=torch.float32, device=h.device)
        _target_kernel[(num_rows,)](
            h, weight, bias, t, zt, dim, h.stride(0), weight.stride(0), scale, cap, **flags, BLOCK=block_h, num_warps=4
        )
        if path == "fused":
            tile = tile_for(architecture(h.device), small=softcap is not None)
            parts = triton.cdiv(vocab, tile.n)
            e = torch.empty(num_rows, _padded(vocab) if grad else 1, dtype=torch.bfloat16, device=h.device)
            part = torch.empty(2, num_rows, parts, dtype=torch.float32, device=h.device)
            _gemm_exp_kernel[(triton.cdiv(num_rows, tile.m) * parts,)](
                *(h, weight, bias, t, zt, e, part),
                *(num_rows, vocab, dim),
                *(h.stride(0), weight.stride(0), e.stride(0)),
                *(scale, cap),
                **store,
                EVEN_H=dim % tile.k == 0,
                BM=tile.m,
                BN=tile.n,
                BK=tile.k,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
        else:
            parts = 1
            z = _mm_fp32(h, weight.T)
            e = z.view(torch.bfloat16)  # [R, 2 V], the same bytes
            part = torch.empty(2, num_rows, parts, dtype=torch.float32, device=h.device)
            _exp_kernel[(num_rows,)](
                *(z, e, bias, t, zt, part),
                *(num_rows, vocab, z.stride(0), scale, cap),
                **store,
                BLOCK=EXP_BLOCK,
                num_warps=WARPS,
                num_stages=1,  # reads ahead of the barrier would be safe, but buy nothing
            )
        u = _mm_fp32(e[:, :vocab], weight) if grad else part
        _finish_kernel[(num_rows,)](
            *(u, weight, t, zt, part, sums, dh if grad else part),
            *(num_rows, dim, parts),
            *(weight.stride(0), 0 if dh is None else dh.stride(0), sums.stride(0)),
            *(scale, cap),
            HAS_CAP=softcap is not None,
            GRAD=grad,
            EMULATE=INTERPRET,
            BLOCK_P=triton.next_power_of_2(parts),
            BLOCK_H=block_h,
            num_warps=4,
        )

"""Paged attention on NVIDIA GPUs: the placing of new keys, a split decode kernel, and the kernel that joins the splits.

The mathematics and the contract are in attention.py. One program of the decode kernel takes one text, one key head and
one split of the text's keys. The rows of its tile are all G query heads of that key head times all Q new tokens
(padded to 16, what a tensor core takes), so each key and value is read from memory once. Softmax as in FlashAttention:
running maximum and sum in fp32, exponentials in base 2.

    1  place           new keys and values (quantised for fp8 pages) to their slots; before that, for layers that leave
                       it to this kernel, norms and rotary positions of queries and keys
    2  decode          per split: m = max s, l = sum 2^(s - m), acc = sum 2^(s - m) v, all fp32
    3  join            out = sum_i 2^(m_i - m) acc_i / (sum_i 2^(m_i - m) l_i + 2^(sink - m))

How the keys are split is decided on the device, from the lengths of all texts: a split takes
    max(all blocks / workers, the text's blocks / splits)
blocks of keys, `workers` being what fills the card a few times over. So a 16K text beside short ones is spread over
many programs, and no length is baked into a captured graph: the host fixes only `splits`, the height of the grid.
Programs whose split is empty return at once, and their partial results are neither written nor read.

fp8 pages hold e4m3 bytes. From sm_89 on the hardware converts; before, the bits are moved into place by hand, which is
also what the interpreter runs. Every e4m3 number is exact in bf16.

No GPU has run this yet: it is checked in Triton's interpreter and by compiling for sm_80, 86, 89, 90 and 120.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layer_passes_triton import _narrow
from .linear_cross_entropy_triton import INTERPRET, _cap, _to_bf16, architecture

LOG2E = tl.constexpr(1.4426950408889634)
PROGRAMS_PER_SM = 8  # enough that a program more or less than others have does not show
MAX_PROGRAMS = 4096  # of a grid: many of them are empty, and an empty one still takes its place for a microsecond
MAX_SPLITS = 128
PARTIAL_BYTES = 64_000_000  # of a call, for the accumulators of the splits
PLACED = 4  # heads per program of the placing kernel
# Triton compiles a variant for an integer that is 1 and one for multiples of 16. These change from batch to batch.
VARY = ["B", "R", "stride_table", "window", "workers", "splits"]


class Tile(NamedTuple):
    """Most rows (queries), keys per step, warps and pipeline stages."""

    m: int
    n: int
    warps: int
    stages: int


def tile_for(arch: int, dim: int, itemsize: int) -> Tile:
    """By padded head size and bytes per number of q. Chosen by compiling (test_kernels_aot.py): no spills, and the
    shared memory of the card. Of its pipeline stages Triton spends two on the page numbers, so five are two buffers of
    keys and values; with 99 KB, sm_86 and 89 keep several blocks per multiprocessor only if those are smaller."""
    if arch == 0:
        return Tile(64, 16, 4, 2)
    if itemsize == 4:  # exact, so not on tensor cores: for comparisons, not for speed
        return Tile(16, 16, 8, 2)
    if dim <= 128:
        return Tile(64, 32 if arch in (86, 89, 120) else 64, 4, 5)
    return Tile(32, 32, 4, 5)


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _first_block(length, window, Q: tl.constexpr, BN: tl.constexpr):
    """The first block of keys that any of the Q queries sees."""
    seen = tl.maximum(length - Q - window + 1, 0)
    return tl.where(window > 0, seen, 0) // BN


@triton.jit
def _split_size(lengths_ptr, B, length, window, workers, splits, Q: tl.constexpr, BN: tl.constexpr):
    """-> (first block of the text, its number of blocks, blocks per split): the same in both kernels."""
    total = 0
    for start in range(0, B, 256):
        b = start + tl.arange(0, 256)
        lengths = tl.load(lengths_ptr + b, mask=b < B, other=0)
        total += tl.sum(tl.cdiv(lengths, BN) - _first_block(lengths, window, Q, BN), axis=0)
    first = _first_block(length, window, Q, BN)
    blocks = tl.cdiv(length, BN) - first
    return first, blocks, tl.maximum(tl.cdiv(total, workers), tl.cdiv(blocks, splits))


@triton.jit
def _number(x, FP8: tl.constexpr, DTYPE: tl.constexpr):
    """What a page holds, in the dtype of a product. FP8: 0 = pages in q's dtype, 1 = e4m3, 2 = e4m3 as bytes."""
    if FP8 == 2:
        # sign, and exponent and mantissa to where fp32 has them; its exponent counts from 120 further down
        bits = ((x.to(tl.int32) & 0x80) << 24) | ((x.to(tl.int32) & 0x7F) << 20)
        x = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return x.to(DTYPE)


@triton.jit(do_not_specialize=VARY)
def _decode_kernel(
    # pointers
    q_ptr,  # [B, Q, Hq, D]
    k_ptr,  # [P, Hkv, S, D]
    v_ptr,  # [P, Hkv, S, DV]
    k_scale_ptr,  # fp32 [P, Hkv, S], FP8 only
    v_scale_ptr,
    table_ptr,  # int32 [B, W]
    lengths_ptr,  # int32 [B]
    sinks_ptr,  # fp32 [Hq]
    out_ptr,  # [B, Q, Hq, DV], out: SINGLE only
    acc_ptr,  # fp32 [splits, R, DV], out: R = B * Q * Hq
    stat_ptr,  # fp32 [2, splits, R], out: m and l
    # shapes
    B,
    R,
    # strides
    stride_qb,
    stride_qj,
    stride_qh,
    stride_table,
    # meta
    scale,
    softcap,
    window,
    workers,
    splits,
    HKV: tl.constexpr,
    G: tl.constexpr,
    Q: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    S: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SINGLE: tl.constexpr,  # one split: the result is final
    FP8: tl.constexpr,
    EMULATE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
):
    """One split of one text's keys, for [BM] of the G * Q queries of one key head."""
    # 1) who this is
    TILES: tl.constexpr = (G * Q + BM - 1) // BM
    tile = tl.program_id(0) % TILES
    head = tl.program_id(0) // TILES % HKV
    b = tl.program_id(0) // (TILES * HKV)
    split = tl.program_id(1)
    length = tl.load(lengths_ptr + b)
    first, blocks, size = _split_size(lengths_ptr, B, length, window, workers, splits, Q, BN)
    start = first + split * size
    stop = tl.minimum(start + size, first + blocks)
    if not SINGLE:
        if start >= stop:
            return  # nothing was asked of this program; _join_kernel will not look for it

    # 2) the queries: row i of the tile is token i // G, head i % G. int64: rows may be views with long strides
    i = tile * BM + tl.arange(0, BM)
    j, h = i // G, head * G + i % G
    used = i < G * Q
    d, dv = tl.arange(0, BD), tl.arange(0, BDV)
    q_rows = q_ptr + b.to(tl.int64) * stride_qb + j.to(tl.int64) * stride_qj + h.to(tl.int64) * stride_qh
    q = tl.load(q_rows[:, None] + d[None, :], mask=used[:, None] & (d < D)[None, :], other=0.0)
    DTYPE: tl.constexpr = tl.float32 if EMULATE else q_ptr.dtype.element_ty
    # fp8 values times their scales want a wide exponent more than a long mantissa
    V_DTYPE: tl.constexpr = tl.bfloat16 if FP8 > 0 and DTYPE == tl.float16 else DTYPE
    q = q.to(DTYPE)
    position = length - Q + j
    below = tl.where(window > 0, position - window, -1)

    # 3) the keys, a block at a time; a block lies within one page
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)
    n = tl.arange(0, BN)
    for block in range(start, stop):
        page = tl.load(table_ptr + b * stride_table + block * BN // S).to(tl.int64)
        place = (page * HKV + head) * S + block * BN % S + n  # int64: a pool has more than 2^31 numbers
        key = block * BN + n
        valid = key < length
        k = tl.load(k_ptr + place[:, None] * D + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0)
        s = tl.dot(q, tl.trans(_number(k, FP8, DTYPE)), input_precision="ieee") * scale
        if FP8 > 0:
            s *= tl.load(k_scale_ptr + place, mask=valid, other=0.0)[None, :]
        if HAS_CAP:
            s = _cap(s, softcap)
        seen = (key[None, :] <= position[:, None]) & valid[None, :]
        seen &= key[None, :] > below[:, None]
        s = tl.where(seen, s * LOG2E, float("-inf"))
        higher = tl.maximum(top, tl.max(s, axis=1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # no key yet: inf - inf would be nan
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(p, axis=1)
        top = higher
        v = tl.load(v_ptr + place[:, None] * DV + dv[None, :], mask=valid[:, None] & (dv < DV)[None, :], other=0.0)
        if FP8 > 0:
            p *= tl.load(v_scale_ptr + place, mask=valid, other=0.0)[None, :]
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(V_DTYPE), _number(v, FP8, V_DTYPE), acc, input_precision="ieee")

    # 4) the result, or this split's part of it
    row = (b.to(tl.int64) * Q + j) * (HKV * G) + h
    if SINGLE:
        out = _finish(acc, top, total, sinks_ptr + h, used, HAS_SINKS)
        if out_ptr.dtype.element_ty == tl.bfloat16:
            out = _to_bf16(out, EMULATE)
        tl.store(out_ptr + row[:, None] * DV + dv[None, :], out, mask=used[:, None] & (dv < DV)[None, :])
    else:
        at = split.to(tl.int64) * R + row
        tl.store(stat_ptr + at, top, mask=used)
        tl.store(stat_ptr + splits.to(tl.int64) * R + at, total, mask=used)
        tl.store(acc_ptr + at[:, None] * DV + dv[None, :], acc, mask=used[:, None] & (dv < DV)[None, :])


@triton.jit
def _finish(acc, top, total, sink_ptrs, used, HAS_SINKS: tl.constexpr):
    """acc / total with the sink in it, [BM, BDV]; 0 for a query that sees nothing."""
    sees = total > 0
    if HAS_SINKS:
        sink = tl.load(sink_ptrs, mask=used, other=0.0) * LOG2E
        higher = tl.maximum(top, sink)
        acc = acc * tl.exp2(top - higher)[:, None]
        total = total * tl.exp2(top - higher) + tl.exp2(sink - higher)
    return tl.where(sees[:, None], acc / tl.where(sees, total, 1.0)[:, None], 0.0)


@triton.jit(do_not_specialize=[x for x in VARY if x != "stride_table"])
def _join_kernel(
    # pointers
    acc_ptr,  # fp32 [splits, R, DV]
    stat_ptr,  # fp32 [2, splits, R]
    lengths_ptr,  # int32 [B]
    sinks_ptr,  # fp32 [Hq]
    out_ptr,  # [R, DV], out
    # shapes
    B,
    R,
    # meta
    window,
    workers,
    splits,
    HQ: tl.constexpr,
    Q: tl.constexpr,
    DV: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    EMULATE: tl.constexpr,
    BN: tl.constexpr,
    BDV: tl.constexpr,
    BS: tl.constexpr,  # >= splits
    STEP: tl.constexpr,
):
    """Adds up the splits of one query head of one token: one program per row of the output."""
    r = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths_ptr + r // (Q * HQ))
    _, blocks, size = _split_size(lengths_ptr, B, length, window, workers, splits, Q, BN)
    parts = tl.cdiv(blocks, tl.maximum(size, 1))  # those that were written

    # 1) the maximum and the sum
    every = tl.arange(0, BS)
    stats = stat_ptr + every.to(tl.int64) * R + r
    tops = tl.load(stats, mask=every < parts, other=float("-inf"))
    top = tl.max(tops, axis=0)
    safe = tl.where(top == float("-inf"), 0.0, top)
    totals = tl.load(stats + splits.to(tl.int64) * R, mask=every < parts, other=0.0)
    total = tl.sum(totals * tl.exp2(tops - safe), axis=0)

    # 2) the values, STEP splits at a time
    dv = tl.arange(0, BDV)
    acc = tl.zeros([BDV], tl.float32)
    for start in range(0, parts, STEP):
        i = start + tl.arange(0, STEP)
        at = i.to(tl.int64) * R + r
        weight = tl.exp2(tl.load(stat_ptr + at, mask=i < parts, other=float("-inf")) - safe)
        written = (i < parts)[:, None] & (dv < DV)[None, :]
        part = tl.load(acc_ptr + at[:, None] * DV + dv[None, :], mask=written, other=0.0)
        acc += tl.sum(weight[:, None] * part, axis=0)

    # 3) the same end as in one split, as a tile of one row
    one = tl.zeros([1], tl.float32)
    sink_ptrs = sinks_ptr + r % HQ + tl.arange(0, 1)
    out = _finish(acc[None, :], one + top, one + total, sink_ptrs, tl.arange(0, 1) == 0, HAS_SINKS)
    if out_ptr.dtype.element_ty == tl.bfloat16:
        out = _to_bf16(out, EMULATE)
    tl.store(out_ptr + r * DV + dv[None, :], out, mask=(dv < DV)[None, :])


@triton.jit
def _load_halves(x_ptr, stride, h, HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Heads h of a token, [BH, BD] fp32 each: numbers 0 to D / 2, and the others."""
    HALF: tl.constexpr = (D + 1) // 2
    i = tl.arange(0, BD)
    first = x_ptr + h[:, None] * stride + i[None, :]
    inside = (h < HEADS)[:, None] & (i < HALF)[None, :]
    x1 = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(first + HALF, mask=inside & (HALF + i < D)[None, :], other=0.0).to(tl.float32)
    return x1, x2


@triton.jit
def _turn(
    x_ptr,
    stride,
    h,
    cos_ptr,
    sin_ptr,
    norm_ptr,
    eps,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    NORM: tl.constexpr,
    EMULATE: tl.constexpr,
    BD: tl.constexpr,
):
    """Heads h of a token get their norm and their position, in place -> their halves, rounded as they were stored."""
    HALF: tl.constexpr = D // 2
    i = tl.arange(0, BD)
    x1, x2 = _load_halves(x_ptr, stride, h, HEADS, D, BD)
    if NORM:
        r = tl.rsqrt((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / D + eps)[:, None]
        x1 *= r * tl.load(norm_ptr + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
        x2 *= r * tl.load(norm_ptr + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    c = tl.load(cos_ptr + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin_ptr + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    y1, y2 = _narrow(x1 * c - x2 * s, x_ptr, EMULATE), _narrow(x2 * c + x1 * s, x_ptr, EMULATE)
    # A thread writes what it has read itself: both halves have one layout.
    first = x_ptr + h[:, None] * stride + i[None, :]
    inside = (h < HEADS)[:, None] & (i < HALF)[None, :]
    tl.store(first, y1, mask=inside)
    tl.store(first + HALF, y2, mask=inside)
    return y1.to(tl.float32), y2.to(tl.float32)


@triton.jit
def _e4m3(x):
    """fp32 -> the bits of the nearest e4m3, ties to even: its exponent and mantissa are bits 20 to 26 of x * 2^-120."""
    bits = (x * 7.52316384526264e-37).to(tl.int32, bitcast=True)
    small = bits & 0x7FFFFFFF
    small = (small + 0x7FFFF + ((small >> 20) & 1)) >> 20
    return (small | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _put(
    x1,
    x2,
    h,
    slot,
    pool_ptr,
    scale_ptr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    FP8: tl.constexpr,
    EMULATE: tl.constexpr,
    BD: tl.constexpr,
):
    """Heads h of a token to its slot."""
    HALF: tl.constexpr = (D + 1) // 2
    i = tl.arange(0, BD)
    place = ((slot // S).to(tl.int64) * HEADS + h) * S + slot % S  # int64: a pool has more than 2^31 numbers
    first = pool_ptr + place[:, None] * D + i[None, :]
    inside = (h < HEADS)[:, None] & (i < HALF)[None, :]
    second = inside & (HALF + i < D)[None, :]
    if FP8:
        # rounded as torch does: `/` is an approximation
        factor = tl.div_rn(tl.maximum(tl.max(tl.abs(x1), axis=1), tl.max(tl.abs(x2), axis=1)), 448.0)
        tl.store(scale_ptr + place, factor, mask=h < HEADS)
        factor = tl.where(factor > 0, factor, 1.0)[:, None]
        tl.store(first, _e4m3(tl.div_rn(x1, factor)), mask=inside)
        tl.store(first + HALF, _e4m3(tl.div_rn(x2, factor)), mask=second)
    else:
        tl.store(first, _narrow(x1, pool_ptr, EMULATE), mask=inside)
        tl.store(first + HALF, _narrow(x2, pool_ptr, EMULATE), mask=second)


@triton.jit
def _place_kernel(
    # pointers
    q_ptr,  # [T, HQ, D], in and out
    k_ptr,  # [T, HKV, D], in; out too if TURN
    v_ptr,  # [T, HKV, DV]
    slots_ptr,  # int32 [T]
    k_pool_ptr,  # [P, HKV, S, D], out; bytes if FP8
    v_pool_ptr,  # [P, HKV, S, DV], out
    k_scale_ptr,  # fp32 [P, HKV, S], out: FP8 only
    v_scale_ptr,
    cos_ptr,  # [T, D]: TURN only
    sin_ptr,
    q_norm_ptr,  # [D]: NORM only
    k_norm_ptr,
    # strides
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    # meta
    eps,
    HQ: tl.constexpr,  # 0 = there are no queries to turn
    HKV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    S: tl.constexpr,
    TURN: tl.constexpr,
    NORM: tl.constexpr,
    FP8: tl.constexpr,
    EMULATE: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
):
    """BH heads of one token: of its queries, else of its keys, else of its values."""
    QUERIES: tl.constexpr = (HQ + BH - 1) // BH
    KEYS: tl.constexpr = QUERIES + (HKV + BH - 1) // BH
    t = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    slot = tl.load(slots_ptr + t)
    cos_ptr += t * D
    sin_ptr += t * D
    if TURN:
        if block < QUERIES:
            h = block * BH + tl.arange(0, BH)
            _turn(q_ptr + t * stride_qt, stride_qh, h, cos_ptr, sin_ptr, q_norm_ptr, eps, HQ, D, NORM, EMULATE, BD)
    if (block >= QUERIES) & (block < KEYS):
        h = (block - QUERIES) * BH + tl.arange(0, BH)
        k_ptr += t * stride_kt
        if TURN:
            x1, x2 = _turn(k_ptr, stride_kh, h, cos_ptr, sin_ptr, k_norm_ptr, eps, HKV, D, NORM, EMULATE, BD)
        else:
            x1, x2 = _load_halves(k_ptr, stride_kh, h, HKV, D, BD)
        if slot >= 0:
            _put(x1, x2, h, slot, k_pool_ptr, k_scale_ptr, HKV, D, S, FP8, EMULATE, BD)
    if (block >= KEYS) & (slot >= 0):
        h = (block - KEYS) * BH + tl.arange(0, BH)
        x1, x2 = _load_halves(v_ptr + t * stride_vt, stride_vh, h, HKV, DV, BDV)
        _put(x1, x2, h, slot, v_pool_ptr, v_scale_ptr, HKV, DV, S, FP8, EMULATE, BDV)


# ---- launchers -------------------------------------------------------------------------------------------------------


@cache
def multiprocessors(device: torch.device) -> int:
    return 1 << 20 if INTERPRET else torch.cuda.get_device_properties(device).multi_processor_count


def fp8_kind(pages, arch: int) -> int:
    """FP8 of the kernels: 0 = pages in q's dtype, 1 = converted by the hardware, 2 = by hand."""
    return 0 if pages.key_scales is None else 1 if arch >= 89 else 2


def choose_splits(programs: int, blocks: int, rows: int, value_dim: int) -> int:
    """The height of the grid: what the longest text may be divided into, within the workspace."""
    most = min(MAX_SPLITS, MAX_PROGRAMS // programs, PARTIAL_BYTES // (4 * rows * value_dim), blocks)
    return max(1, most)


def decode(q: Tensor, pages, table: Tensor, lengths: Tensor, *, scale, window, softcap, sinks, splits: int) -> Tensor:
    """The kernels behind attention.paged_attention, whose arguments these are; checked there."""
    (B, Q, Hq, D), (_, Hkv, S, Dv) = q.shape, pages.values.shape
    q = q if q.stride(3) == 1 else q.contiguous()
    arch, group = architecture(q.device), Hq // Hkv
    block_d, block_dv = (max(16, triton.next_power_of_2(x)) for x in (D, Dv))
    tile = tile_for(arch, max(block_d, block_dv), q.itemsize)
    block_m = max(16, min(tile.m, triton.next_power_of_2(group * Q)))
    block_n = min(tile.n, S)
    programs, rows = B * Hkv * triton.cdiv(group * Q, block_m), B * Q * Hq
    splits = min(splits, MAX_SPLITS) or choose_splits(programs, table.shape[1] * S // block_n, rows, Dv)
    workers = max(1, PROGRAMS_PER_SM * multiprocessors(q.device) // max(1, programs // B))
    fp8, single = fp8_kind(pages, arch), splits == 1
    keys, values = (x.view(torch.uint8) if fp8 == 2 else x for x in (pages.keys, pages.values))
    out = torch.empty(B, Q, Hq, Dv, dtype=q.dtype, device=q.device)
    acc = out if single else torch.empty(splits, rows, Dv, dtype=torch.float32, device=q.device)
    stat = out if single else torch.empty(2, splits, rows, dtype=torch.float32, device=q.device)
    flags = {"HAS_SINKS": sinks is not None, "EMULATE": INTERPRET}
    sinks = q if sinks is None else sinks.float().contiguous()  # q: a pointer that is not read
    window, cap = int(window), float(softcap or 1.0)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        _decode_kernel[(programs, splits)](
            *(q, keys, values, pages.key_scales if fp8 else q, pages.value_scales if fp8 else q),
            *(table, lengths, sinks, out, acc, stat),
            *(B, rows),
            *(*q.stride()[:3], table.stride(0)),
            *(float(scale), cap, window, workers, splits),
            **{"HKV": Hkv, "G": group, "Q": Q, "D": D, "DV": Dv, "S": S},
            **{"HAS_CAP": softcap is not None, "SINGLE": single, "FP8": fp8, **flags},
            **{"BM": block_m, "BN": block_n, "BD": block_d, "BDV": block_dv},
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        if not single:
            _join_kernel[(rows,)](
                *(acc, stat, lengths, sinks, out),
                *(B, rows),
                *(window, workers, splits),
                **{"HQ": Hq, "Q": Q, "DV": Dv, **flags},
                **{"BN": block_n, "BDV": block_dv, "BS": triton.next_power_of_2(splits), "STEP": 8},
                num_warps=2,
            )
    return out


def place(q: Tensor | None, k: Tensor, v: Tensor, pages, slots: Tensor, turn) -> None:
    """The kernel behind attention.place and attention.store_pages, whose arguments these are; checked there."""
    fp8, (T, Hkv, D), Dv = pages.key_scales is not None, k.shape, v.shape[2]
    if turn is None:  # nothing is written in place
        k = k if k.stride(2) == 1 else k.contiguous()
    v = v if v.stride(2) == 1 else v.contiguous()
    q = k if q is None else q  # as for all that follow: a pointer that is not read
    cos, sin, norms = (turn.cos, turn.sin, turn.norms) if turn else (k, k, None)
    pools = (x.view(torch.uint8) if fp8 else x for x in (pages.keys, pages.values))
    scales = (pages.key_scales, pages.value_scales) if fp8 else (slots, slots)
    queries = q.shape[1] if turn else 0
    blocks = triton.cdiv(queries, PLACED) + 2 * triton.cdiv(Hkv, PLACED)
    with torch.cuda.device_of(k):
        _place_kernel[(T, blocks)](
            *(q, k, v, slots, *pools, *scales, cos, sin, *(norms or (k, k))),
            *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2]),
            float(turn.eps if turn else 0),
            **{"HQ": queries, "HKV": Hkv, "D": D, "DV": Dv, "S": pages.keys.shape[2]},
            **{"TURN": turn is not None, "NORM": norms is not None, "FP8": fp8, "EMULATE": INTERPRET, "BH": PLACED},
            **{"BD": triton.next_power_of_2((D + 1) // 2), "BDV": triton.next_power_of_2((Dv + 1) // 2)},
            num_warps=2,
        )

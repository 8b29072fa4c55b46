"""sampling_tail.py on NVIDIA GPUs: two kernels, and the noise of candidates in a third.

The contract is in sampling_tail.py. _tail_kernel takes a row of logits in tiles of 64 ids times BLOCK columns, so that
the maximum of a column is a program's own; it serves as `tail`, which reads the model's logits, and as `draw_above`,
which reads what `tail` wrote. What remains of a row are W / (64 * BLOCK) winners, which torch compares.

_lowest_kernel reads a row once for each bit of a score, 32 times for top-k and 32 for top-p, out of the second-level
cache while a batch's rows fit (50 MB on an H100: 80 rows of 152,064). A sort of the row takes an order of magnitude
longer.

fp64 for the noise: a fp32 uniform number has 24 bits, and its largest Gumbel, 17, would be too small a surprise among
152,064 tokens. No GPU has run this yet: it is checked in Triton's interpreter and by compiling for sm_80, 86, 89, 90
and 120.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMN = 64  # ids that share a maximum, as sampling_tail.py has it
COLDEST = 1e-5  # a temperature is never taken for less
BLOCK = 32  # columns of a tile: 64 bytes of bf16 side by side
SCAN = 4096  # scores at a time of _lowest_kernel


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _gumbel(seed, position, ids):
    """sampling_tail.gumbel: seed and position [1, 1], ids [64, BLOCK] -> fp64."""
    GOLDEN: tl.constexpr = 0x9E3779B97F4A7C15
    state = _mix(_mix(seed.to(tl.uint64) + GOLDEN) + position.to(tl.uint64) * GOLDEN)
    bits = _mix(_mix(state + (ids.to(tl.uint64) + 1) * GOLDEN)) >> 11
    return -tl.log(-tl.log((bits.to(tl.float64) + 0.5) * 1.1102230246251565e-16))  # 2^-53


@triton.jit(do_not_specialize=["V", "C"])
def _tail_kernel(
    # pointers
    x_ptr,  # [n, V] the model's logits; fp32 [n, 64 C] as `tail` wrote them where not PREPARE
    kinds_ptr,  # uint8 [V]: PREPARE only, as all up to penalty_ptr
    early_ptr,  # uint8 [n]
    seen_ptr,  # uint8 [L, V]
    line_ptr,  # int64 [n]
    drafts_ptr,  # int64 [n / Q, Q]
    penalty_ptr,  # fp32 [n]
    free_ptr,  # uint8 [n]: which draws have noise
    temperature_ptr,  # fp32 [n]
    seeds_ptr,  # int64 [n]
    positions_ptr,  # int64 [n]
    floors_ptr,  # fp32 [n]: not PREPARE
    y_ptr,  # fp32 [n, 64 C], out: STORE only
    maxima_ptr,  # fp32 [n, C], out: STORE only
    best_ptr,  # fp64 [n, blocks], out
    token_ptr,  # int64 [n, blocks], out
    # shapes
    V,
    C,
    # strides
    stride_x,
    # meta
    coldest,
    Q: tl.constexpr,
    PREPARE: tl.constexpr,
    STORE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile of one draw's logits."""
    n = tl.program_id(0).to(tl.int64)  # int64: n * V passes 2^31 at 14K draws
    free = tl.load(free_ptr + n) != 0
    if not PREPARE:
        if free == 0:
            return  # nothing is asked of this row
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.arange(0, ROWS)[:, None] * C + c[None, :]
    inside = (c < C)[None, :] & (ids < V)
    x = tl.load(x_ptr + n * stride_x + ids, mask=inside, other=float("-inf")).to(tl.float32)

    # 1) what must not be drawn, and the repetition penalty
    if PREPARE:
        kinds = tl.load(kinds_ptr + ids, mask=inside, other=1)
        early = tl.load(early_ptr + n) != 0
        x = tl.where((kinds == 1) | ((kinds == 2) & early), float("-inf"), x)
        seen = tl.load(seen_ptr + tl.load(line_ptr + n) * V + ids, mask=inside, other=0) != 0
        for draft in tl.static_range(1, Q):
            seen |= (ids == tl.load(drafts_ptr + n // Q * Q + draft)) & (draft <= n % Q)
        penalty = tl.load(penalty_ptr + n)
        x = tl.where(seen, tl.where(x > 0, tl.div_rn(x, penalty), x * penalty), x)
        x = tl.where(x != x, float("inf"), x)
    if STORE:
        tl.store(y_ptr + n * ROWS * C + ids, x, mask=(c < C)[None, :])
        tl.store(maxima_ptr + n * C + c, tl.max(x, axis=0), mask=c < C)

    # 2) the tile's winner, of equal ones the lowest id
    score = x.to(tl.float64)
    if free:
        s = tl.div_rn(x, tl.maximum(tl.load(temperature_ptr + n), coldest))
        if not PREPARE:
            s = tl.where(s >= tl.load(floors_ptr + n), s, float("-inf"))
        one = tl.arange(0, 1)[:, None]
        noise = _gumbel(tl.load(seeds_ptr + n + one), tl.load(positions_ptr + n + one), ids)
        score = s.to(tl.float64) + noise
    best = tl.max(tl.max(score, axis=1), axis=0)
    token = tl.min(tl.min(tl.where(score == best, ids, V), axis=1), axis=0)
    at = n * tl.num_programs(1) + tl.program_id(1)
    tl.store(best_ptr + at, best)
    tl.store(token_ptr + at, token.to(tl.int64))


@triton.jit
def _ordered(x):
    """fp32 -> uint32 with the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits | -2147483648).to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=["W"])
def _lowest_kernel(
    # pointers
    x_ptr,  # fp32 [n, W]
    wide_ptr,  # uint8 [n]
    temperature_ptr,  # fp32 [n]
    top_k_ptr,  # int64 [n]
    top_p_ptr,  # fp32 [n]
    floors_ptr,  # fp32 [n], out
    # shapes
    W,
    # meta
    coldest,
    BLOCK: tl.constexpr,
):
    """A row: the highest threshold with top-k scores at or above it, then the highest with top-p of their weight."""
    n = tl.program_id(0).to(tl.int64)
    if tl.load(wide_ptr + n) == 0:
        return
    temperature = tl.maximum(tl.load(temperature_ptr + n), coldest)
    top_k, top_p = tl.load(top_k_ptr + n), tl.load(top_p_ptr + n)
    row, i = x_ptr + n * W, tl.arange(0, BLOCK)

    # 1) top-k, bit by bit from the highest
    kth = tl.full([], 0, tl.uint32)
    if top_k > 0:
        for bit in range(32):
            trial = kth | (tl.full([], 2147483648, tl.uint32) >> bit)
            count = tl.zeros([BLOCK], tl.int32)
            for start in range(0, W, BLOCK):
                inside = start + i < W
                s = tl.div_rn(tl.load(row + start + i, mask=inside, other=0.0), temperature)
                count += ((_ordered(s) >= trial) & inside).to(tl.int32)
            kth = tl.where(tl.sum(count, axis=0) >= top_k, trial, kth)

    # 2) top-p of what is left, which is all of it at thresholds below top-k's
    least = kth
    if top_p < 1:
        least = tl.full([], 0, tl.uint32)
        top = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, W, BLOCK):
            top = tl.maximum(top, tl.load(row + start + i, mask=start + i < W, other=float("-inf")))
        highest = tl.div_rn(tl.max(top, axis=0), temperature)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, W, BLOCK):
            s = tl.div_rn(tl.load(row + start + i, mask=start + i < W, other=float("-inf")), temperature)
            total += tl.where(_ordered(s) >= kth, tl.exp(s - highest), 0.0)
        wanted = top_p * tl.sum(total, axis=0)
        for bit in range(32):
            trial = least | (tl.full([], 2147483648, tl.uint32) >> bit)
            weight = tl.zeros([BLOCK], tl.float32)
            for start in range(0, W, BLOCK):
                s = tl.div_rn(tl.load(row + start + i, mask=start + i < W, other=float("-inf")), temperature)
                key = _ordered(s)
                weight += tl.where((key >= trial) & (key >= kth), tl.exp(s - highest), 0.0)
            sum_ = tl.sum(weight, axis=0)
            least = tl.where((sum_ >= wanted) & (sum_ > 0), trial, least)

    # 3) back to a score
    bits = least.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits & 0x7FFFFFFF, ~bits)
    floor = bits.to(tl.float32, bitcast=True)
    tl.store(floors_ptr + n, tl.where(least == 0, float("-inf"), floor))


@triton.jit
def _gumbel_kernel(
    # pointers
    seeds_ptr,  # int64 [n]
    positions_ptr,  # int64 [n]
    tokens_ptr,  # int64 [n, C]
    out_ptr,  # fp64 [n, C], out
    # shapes
    C,
    # meta
    BLOCK: tl.constexpr,
):
    """The noise of BLOCK ids of one draw."""
    n = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)[:, None]
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    ids = tl.load(tokens_ptr + n * C + c, mask=c < C, other=0)
    noise = _gumbel(tl.load(seeds_ptr + n), tl.load(positions_ptr + n), ids)
    tl.store(out_ptr + n * C + c, noise, mask=c < C)


# ---- launches --------------------------------------------------------------------------------------------------------


def _launch(x: Tensor, V: int, C: int, rules: Any, noise: Any, free: Tensor, floors: Any, out: Any) -> tuple:
    """-> (the winners [n] int64, their scores [n] fp64). out: where penalised logits and their maxima go, or None."""
    n, blocks, Q = len(x), triton.cdiv(C, BLOCK), 1
    best = torch.empty(n, blocks, dtype=torch.float64, device=x.device)
    tokens = torch.empty(n, blocks, dtype=torch.long, device=x.device)
    spare = x  # a pointer that is not read
    prepare: tuple = (spare,) * 6
    dense = [*noise, free]
    if rules is not None:
        drafts = spare if rules.drafts is None else rules.drafts
        Q = 1 if rules.drafts is None else drafts.shape[1]
        early, seen = rules.early.view(torch.uint8), rules.seen.view(torch.uint8)
        prepare = rules.kinds, early, seen, rules.line, drafts, rules.penalty
        dense += [t for t in prepare[:5] if t is not spare]
    assert x.stride(1) == 1 and all(t.is_contiguous() for t in dense), x.stride()
    with torch.cuda.device_of(x):
        _tail_kernel[(n, blocks)](
            *(x, *prepare, free.view(torch.uint8), *noise, spare if floors is None else floors),
            *(out or (spare, spare)),
            *(best, tokens),
            *(V, C, x.stride(0), COLDEST),
            **{"Q": Q, "PREPARE": rules is not None, "STORE": out is not None, "ROWS": COLUMN, "BLOCK": BLOCK},
            num_warps=4,
        )
    top = best.amax(1, keepdim=True)
    return torch.where(best == top, tokens, V).amin(1), top[:, 0]


def tail(logits: Tensor, rules: Any, noise: Any, free: Tensor, ranked: bool) -> tuple:
    (n, V), device = logits.shape, logits.device
    C, out = triton.cdiv(V, COLUMN), None
    if ranked:
        out = tuple(torch.empty(n, width, device=device) for width in (COLUMN * C, C))
    tokens, best = _launch(logits, V, C, rules, noise, free, None, out)
    return tokens, best.isfinite(), *(out or (logits, None))


def gumbel(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    tokens = tokens.expand(len(seeds), -1).contiguous()
    out = torch.empty(tokens.shape, dtype=torch.float64, device=tokens.device)
    n, C = tokens.shape
    with torch.cuda.device_of(tokens):
        _gumbel_kernel[(n, triton.cdiv(C, COLUMN))](
            seeds.contiguous(), positions.contiguous(), tokens, out, C, BLOCK=COLUMN, num_warps=1
        )
    return out


def draw_above(logits: Tensor, floors: Tensor, noise: Any, wide: Tensor) -> Tensor:
    W = logits.shape[1]
    return _launch(logits, W, triton.cdiv(W, COLUMN), None, noise, wide, floors, None)[0]


def lowest(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, wide: Tensor) -> Tensor:
    n, W = logits.shape
    floors = torch.empty(n, device=logits.device)
    assert logits.is_contiguous() and all(x.is_contiguous() for x in (temperature, top_k, top_p, wide))
    with torch.cuda.device_of(logits):
        _lowest_kernel[(n,)](
            *(logits, wide.view(torch.uint8), temperature, top_k, top_p, floors, W, COLDEST), BLOCK=SCAN, num_warps=16
        )
    return floors

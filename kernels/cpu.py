"""The CPU kernels behind attention.py and layer_passes.py, compiled by Numba: those files say what they compute.

Attention: a thread takes (text, key head) pairs, as many as have a fair share of the pages. It reads each page once for
the M = Q * G queries of the pair, with a running maximum and sum (the online softmax of FlashAttention), and needs no
memory that grows with the text:

    for each page:  scores [M, S] = queries keys^T;  rescale what was summed so far;  sums [M, Dv] += e^(scores) values

`_dots` adds along a head, three queries at a time, so that a key is loaded once for three; `_sums` adds four values at
a time to a row, so that the row is loaded once for four. Loops over a head of 64 or 128 numbers are compiled for that
length: they are unrolled, with the row in registers.

NumPy has no bf16, so a bf16 tensor comes as its bits, uint16 (`as_array`). `wide` and `narrow` are compiled for either
dtype: the first returns fp32, the second what an array holds, rounded to nearest, ties to even.

A layer of few tokens is one call for all of it (`Layer`).

Compiled once for each machine and dtype, some ten seconds, and kept beside this file (or in NUMBA_CACHE_DIR). All
kernels are in one file: Numba notices a change of the file that a kernel stands in, and of no other.
"""

import functools
from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange, types
from numba.extending import overload
from torch import Tensor

# Sums may be taken in any order, and a product added in one step. No promise about nan is given away: it must arrive.
OPTIONS: Any = {
    "fastmath": {"reassoc", "nsz", "arcp", "contract"},
    "error_model": "numpy",
    "nogil": True,
    "cache": True,
}
f32 = np.float32
LOG2E = f32(1.4426950408889634)
HIGH, LOW = f32(0.693359375), f32(-2.12194440e-4)  # ln 2 in two parts: n * HIGH is exact
C2, C3, C4, C5, C6 = (f32(1 / n) for n in (2, 6, 24, 120, 720))
LEAST, MOST, HALF, ONE = f32(-87), f32(87), f32(0.5), f32(1)
UNSEEN, ZERO = f32(-1e30), f32(0)
NO_SINKS = np.empty(0, f32)
# What one thread does sooner than a second one is woken: pages of all pairs; numbers of a pass.
ALONE, SMALL = 24, 20_000
# Tokens up to which a whole layer is one call: with more, MKL's or oneDNN's products are faster.
FEW = {torch.float32: 4, torch.bfloat16: 1}


# ---- numbers ---------------------------------------------------------------------------------------------------------


def as_array(x: Tensor) -> np.ndarray:
    """The same memory; bf16 as uint16."""
    x = x.detach() if x.requires_grad else x
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def as_rows(x: Tensor) -> tuple[np.ndarray, int]:
    """x [T, ...] as (one line of numbers, how far its rows are apart), where a row's numbers lie side by side.

    So a part of a matrix is compiled like a whole one: with the numbers of a row beside each other.
    """
    width = x[0].numel()
    return as_array(x.as_strided(((len(x) - 1) * x.stride(0) + width,), (1,))), x.stride(0)


def in_rows(x: Tensor) -> bool:
    return x[0].is_contiguous()


def wide(x: Any) -> Any:
    """In a kernel: fp32 of a number of an array."""


def narrow(array: Any, x: Any) -> Any:
    """In a kernel: fp32 as the array has it."""


@overload(wide, inline="always")
def _wide(x):
    if isinstance(x, types.Float):
        return lambda x: x
    return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)


@overload(narrow, inline="always")
def _narrow(array, x):
    if array.dtype == types.float32:
        return lambda array, x: x

    def rounded(array, x):
        bits = f32(x).view(np.uint32)
        return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    return rounded


@njit(fastmath={"contract"}, error_model="numpy")  # its sums keep their order: the parts of ln 2 must not be joined
def exp(x: Any) -> Any:
    """e^x to 2e-7 of its value; outside of -87..87 as at the nearer end. Compiled to vector instructions.

    e^x = 2^n e^r with n the integer nearest to x / ln 2, |r| <= ln 2 / 2, and six terms of the series for e^r.
    """
    x = min(max(x, LEAST), MOST)
    n = np.floor(x * LOG2E + HALF)
    r = x - n * HIGH - n * LOW
    power = ONE + r + r * r * (C2 + r * (C3 + r * (C4 + r * (C5 + r * C6))))
    return power * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


# ---- attention over pages --------------------------------------------------------------------------------------------


@njit(inline="always")
def _dots(q: Any, k: Any, scores: Any, M: int, n: int, D: int) -> None:
    """scores [M, n] = q [M, D] k [n, D]^T; of a product q are rows of the weight, k the tokens."""
    m = 0
    while m + 3 <= M:
        for s in range(n):
            x, y, z = ZERO, ZERO, ZERO
            for d in range(D):
                key = wide(k[s, d])
                x += wide(q[m, d]) * key
                y += wide(q[m + 1, d]) * key
                z += wide(q[m + 2, d]) * key
            scores[m, s], scores[m + 1, s], scores[m + 2, s] = x, y, z
        m += 3
    while m < M:
        for s in range(n):
            x = ZERO
            for d in range(D):
                x += wide(q[m, d]) * wide(k[s, d])
            scores[m, s] = x
        m += 1


@njit(inline="always")
def _sums(weights: Any, v: Any, out: Any, M: int, n: int, D: int) -> None:
    """out [M, D] += weights [M, n] v [n, D]."""
    for m in range(M):
        s = 0
        while s + 4 <= n:
            a, b, c, e = weights[m, s], weights[m, s + 1], weights[m, s + 2], weights[m, s + 3]
            for d in range(D):
                more = a * wide(v[s, d]) + b * wide(v[s + 1, d]) + c * wide(v[s + 2, d]) + e * wide(v[s + 3, d])
                out[m, d] += more
            s += 4
        while s < n:
            a = weights[m, s]
            for d in range(D):
                out[m, d] += a * wide(v[s, d])
            s += 1


@njit(**OPTIONS)
def _dots_of(q: Any, k: Any, scores: Any, M: int, n: int) -> None:
    if k.shape[1] == 64:
        _dots(q, k, scores, M, n, 64)
    elif k.shape[1] == 128:
        _dots(q, k, scores, M, n, 128)
    else:
        _dots(q, k, scores, M, n, k.shape[1])


@njit(**OPTIONS)
def _sums_of(weights: Any, v: Any, out: Any, M: int, n: int) -> None:
    if v.shape[1] == 64:
        _sums(weights, v, out, M, n, 64)
    elif v.shape[1] == 128:
        _sums(weights, v, out, M, n, 128)
    else:
        _sums(weights, v, out, M, n, v.shape[1])


@njit(**OPTIONS)
def _exponentials(row: Any, n: int, highest: Any) -> Any:
    """row[:n] becomes e^(row - highest); returns its sum."""
    total = ZERO
    for s in range(n):
        row[s] = exp(row[s] - highest)
        total += row[s]
    return total


@njit(**OPTIONS)
def _widen(page: Any, out: Any, n: int) -> None:
    for s in range(n):
        for d in range(out.shape[1]):
            out[s, d] = wide(page[s, d])


@njit(**OPTIONS)
def _work(length: int, count: int, S: int) -> int:
    """What a pair costs, in halves of reading a page: each query more is another half."""
    return ((length + S - 1) // S + 1) * (1 + count)


@njit(**OPTIONS)
def _pairs(first: int, last: int, given: Any) -> None:
    """Pairs first..last of B * Hkv. `given`: q, rows of Hq * D, as_rows; sinks [Hq] or [0], softcap 0 = none; out
    [n, Hq, Dv]; the others as in `paged_attention`."""
    q, apart, counts, keys, values, table, lengths, sinks, scale, window, softcap, out = given
    (_, Hkv, S, D), (_, Hq, Dv) = keys.shape, out.shape
    G, Q = Hq // Hkv, 0
    for b in range(len(counts)):
        Q = max(Q, counts[b])
    M = Q * G
    # Of pages that several queries meet, made once: a number of 16 bits costs two operations each time it is read.
    wide_keys, wide_values = np.empty((S, D), f32), np.empty((S, Dv), f32)
    queries, scores, sums = np.empty((M, D), np.float32), np.empty((M, S), np.float32), np.empty((M, Dv), np.float32)
    highest, total = np.empty(M, np.float32), np.empty(M, np.float32)
    text = row = 0  # row: of the first query of `text`
    for pair in range(first, last):
        b, h = pair // Hkv, pair % Hkv
        while text < b:
            row += counts[text]
            text += 1
        start, M = lengths[b] - counts[b], counts[b] * G  # position of the first query; negative ones see nothing
        for m in range(M):
            head = (row + m // G) * apart + (h * G + m % G) * D
            for d in range(D):
                queries[m, d] = wide(q[head + d]) * scale
            for d in range(Dv):
                sums[m, d] = ZERO
            highest[m] = sinks[h * G + m % G] if len(sinks) else UNSEEN
            total[m] = f32(1 if len(sinks) else 0)  # e^(sink - highest)
        for nth in range(max(0, start + 1 - window) // S if window else 0, (lengths[b] + S - 1) // S):
            page, n = table[b, nth], min(S, lengths[b] - nth * S)
            if M > 3 and keys.itemsize == 2:
                _widen(keys[page, h], wide_keys, n)
                _widen(values[page, h], wide_values, n)
                _dots_of(queries, wide_keys, scores, M, n)
            else:
                _dots_of(queries, keys[page, h], scores, M, n)
            for m in range(M):
                if softcap:
                    for s in range(n):
                        scores[m, s] = softcap * np.tanh(scores[m, s] / softcap)
                seen = start + 1 + m // G - nth * S  # keys of this page before the first that it doesn't see
                for s in range(max(seen, 0), n):
                    scores[m, s] = UNSEEN
                if window:
                    for s in range(min(seen - window, n)):
                        scores[m, s] = UNSEEN
                top = highest[m]
                for s in range(n):
                    top = max(top, scores[m, s])
                if top == UNSEEN:  # nothing seen yet: no weight either
                    for s in range(n):
                        scores[m, s] = ZERO
                    continue
                before = exp(highest[m] - top)
                total[m] = total[m] * before + _exponentials(scores[m], n, top)
                highest[m] = top
                for d in range(Dv):
                    sums[m, d] *= before
            if M > 3 and keys.itemsize == 2:
                _sums_of(scores, wide_values, sums, M, n)
            else:
                _sums_of(scores, values[page, h], sums, M, n)
        for m in range(M):
            divisor = total[m] if total[m] != ZERO else ONE
            for d in range(Dv):
                out[row + m // G, h * G + m % G, d] = narrow(out, sums[m, d] / divisor)


@njit(**OPTIONS)
def _ends(parts: int, counts: Any, lengths: Any, Hkv: int, S: int) -> Any:
    """[parts + 1]: where the shares of the B * Hkv pairs end; a part's last is the next one's first."""
    work = 0
    for b in range(len(lengths)):
        work += _work(lengths[b], counts[b], S) * Hkv
    ends = np.empty(parts + 1, np.int64)
    done = part = 0
    for pair in range(len(lengths) * Hkv):
        while part < parts and done * parts >= part * work:
            ends[part] = pair
            part += 1
        done += _work(lengths[pair // Hkv], counts[pair // Hkv], S)
    ends[part:] = len(lengths) * Hkv
    return ends


@njit(parallel=True, **OPTIONS)
def _shared_out(parts: int, given: Any) -> None:
    ends = _ends(parts, given[2], given[6], given[3].shape[1], given[3].shape[2])
    for i in prange(parts):
        _pairs(ends[i], ends[i + 1], given)


def threads() -> int:
    """How many threads to share work out to: torch's."""
    _start(wanted := torch.get_num_threads())
    return wanted


@functools.cache
def _start(wanted: int) -> None:
    """Numba's threads, before they are used: their start sets torch's number, too, to that of the processors."""
    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]  # there only once numba is imported
    numba.set_num_threads(min(wanted, most))
    torch.set_num_threads(wanted)


def parts_of(x: Tensor) -> int:
    """In how many parts a pass over x is shared out."""
    most = threads()  # asked also where one is enough: what is compiled as parallel starts Numba's threads
    return most if x.numel() >= SMALL else 1


def decode(q: Tensor, pages: Any, table: Tensor, lengths: Tensor, *, splits: int, **settings: Any) -> Tensor:
    """As attention.paged_attention, for fp32 and bf16 on a CPU; a text is not split."""
    counts = torch.full((len(q),), q.shape[1], dtype=torch.int32)
    return decode_packed(q.flatten(0, 1), pages, table, lengths, counts, **settings).unflatten(0, q.shape[:2])


def decode_packed(
    q: Tensor,
    pages: Any,
    table: Tensor,
    lengths: Tensor,
    counts: Tensor,
    *,
    scale: float,
    window: int,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The same with counts[b] queries of text b: q [n, Hq, D] -> [n, Hq, Dv]."""
    Hkv, S = pages.keys.shape[1:3]
    out = q.new_empty(*q.shape[:2], pages.values.shape[3])
    given = (
        *as_rows(q if in_rows(q) else q.contiguous()),
        counts.numpy(),
        *map(as_array, pages[:2]),
        table.contiguous().numpy(),
    )
    given += (ends := lengths.numpy()), NO_SINKS if sinks is None else sinks.float().numpy()
    given += f32(scale), window, f32(softcap or 0), as_array(out)
    if int(ends.sum()) * Hkv < ALONE * S or (parts := threads()) == 1:
        _pairs(0, len(ends) * Hkv, given)
    else:
        _shared_out(parts, given)
    return out


@njit(**OPTIONS)
def _turn(x: Any, apart: int, heads: int, cos: Any, sin: Any, norm: Any, eps: Any) -> None:
    """x: T rows of `heads` heads, as_rows, in place: RMSNorm by norm [D] (or [0]), then cos and sin [T, D] turn it."""
    T, D = cos.shape
    half = D // 2
    row = np.empty(D, f32)
    for t in range(T):
        for h in range(heads):
            head, size = x[t * apart + h * D : t * apart + (h + 1) * D], ZERO
            for d in range(D):
                row[d] = wide(head[d])
                size += row[d] * row[d]
            if len(norm):
                factor = ONE / np.sqrt(size / f32(D) + eps)
                for d in range(D):
                    row[d] = wide(narrow(x, row[d] * factor * wide(norm[d])))
            for d in range(half):
                c, s = wide(cos[t, d]), wide(sin[t, d])
                head[d] = narrow(x, row[d] * c - row[half + d] * s)
                head[half + d] = narrow(x, row[half + d] * c + row[d] * s)


@njit(parallel=True, **OPTIONS)
def _turn_shared(parts: int, x: Any, apart: int, heads: int, cos: Any, sin: Any, norm: Any, eps: Any) -> None:
    T = len(cos)
    for i in prange(parts):
        first, last = i * T // parts, (i + 1) * T // parts
        _turn(x[first * apart :], apart, heads, cos[first:last], sin[first:last], norm, eps)


@njit(**OPTIONS)
def _store(k: Any, k_apart: int, v: Any, v_apart: int, keys: Any, values: Any, slots: Any) -> None:
    """k and v: T rows of Hkv heads, as_rows; into keys [P, Hkv, S, D], values [P, Hkv, S, Dv]."""
    (_, Hkv, S, D), Dv = keys.shape, values.shape[3]
    for t in range(len(slots)):
        if slots[t] >= 0:
            page, slot = slots[t] // S, slots[t] % S
            for h in range(Hkv):
                key, value = k[t * k_apart + h * D :], v[t * v_apart + h * Dv :]
                for d in range(D):
                    keys[page, h, slot, d] = key[d]
                for d in range(Dv):
                    values[page, h, slot, d] = value[d]


def place(q: Tensor | None, k: Tensor, v: Tensor, pages: Any, slots: Tensor, turn: Any) -> None:
    """As attention.place, or store_pages without `turn` and q; fp32 and bf16 on a CPU, heads side by side."""
    if turn is not None and q is not None:
        for x, norm in zip((q, k), turn.norms or (turn.cos[0, :0],) * 2, strict=True):
            rotate_(x, turn.cos, turn.sin, norm, turn.eps)
    k, v = (x if in_rows(x) else x.contiguous() for x in (k, v))
    _store(*as_rows(k), *as_rows(v), as_array(pages.keys), as_array(pages.values), slots.numpy())


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor, norm: Tensor, eps: float = 0.0) -> None:
    """heads [T, n, D], a row's numbers side by side: RMSNorm of each by norm [D], or none by [0], then turned."""
    given = *as_rows(heads), heads.shape[1], *map(as_array, (cos, sin, norm)), f32(eps)
    if (parts := parts_of(heads)) == 1:
        _turn(*given)
    else:
        _turn_shared(parts, *given)


# ---- between the matrix products -------------------------------------------------------------------------------------


@njit(**OPTIONS)
def _rms_norm(x: Any, weight: Any, eps: Any, out: Any) -> None:
    T, N = x.shape
    for t in range(T):
        size = ZERO
        for i in range(N):
            y = wide(x[t, i])
            size += y * y
        factor = ONE / np.sqrt(size / f32(N) + eps)
        for i in range(N):
            out[t, i] = narrow(out, wide(x[t, i]) * factor * wide(weight[i]))


@njit(parallel=True, **OPTIONS)
def _rms_norm_shared(parts: int, x: Any, weight: Any, eps: Any, out: Any) -> None:
    T = len(x)
    for i in prange(parts):
        first, last = i * T // parts, (i + 1) * T // parts
        _rms_norm(x[first:last], weight, eps, out[first:last])


@njit(**OPTIONS)
def _swiglu(gate: Any, up: Any, apart: int, first: int, last: int, out: Any) -> None:
    N = out.shape[1]
    for t in range(first, last):
        # Rows of their own: an index that could be negative is checked for each number, and nothing is vectorised.
        gates, ups = gate[t * apart : t * apart + N], up[t * apart : t * apart + N]
        for i in range(N):
            g = wide(gates[i])
            out[t, i] = narrow(out, g / (ONE + exp(-g)) * wide(ups[i]))


@njit(parallel=True, **OPTIONS)
def _swiglu_shared(parts: int, gate: Any, up: Any, apart: int, out: Any) -> None:
    T = len(out)
    for i in prange(parts):
        _swiglu(gate, up, apart, i * T // parts, (i + 1) * T // parts, out)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As layer_passes.rms_norm; fp32 and bf16 on a CPU."""
    x = x.contiguous()
    out = torch.empty_like(x)
    given = *(as_array(y) for y in (x.flatten(0, -2), weight)), f32(eps), as_array(out.flatten(0, -2))
    if (parts := parts_of(x)) == 1:
        _rms_norm(*given)
    else:
        _rms_norm_shared(parts, *given)
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As layer_passes.swiglu; fp32 and bf16 on a CPU, rows as far apart in both."""
    out = gate.new_empty(gate.shape)
    (g, apart), (u, _) = as_rows(gate), as_rows(up)
    if (parts := parts_of(out)) == 1:
        _swiglu(g, u, apart, 0, len(out), as_array(out))
    else:
        _swiglu_shared(parts, g, u, apart, as_array(out))
    return out


# ---- their gradients -------------------------------------------------------------------------------------------------


@njit(**OPTIONS)
def _rms_norm_backward(dn: Any, x: Any, weight: Any, eps: Any, dx: Any, adds: bool) -> None:
    """dx may be dn, where nothing is added."""
    T, N = x.shape
    for t in range(T):
        size, inner = ZERO, ZERO
        for i in range(N):
            y = wide(x[t, i])
            size += y * y
            inner += wide(dn[t, i]) * wide(weight[i]) * y
        r = ONE / np.sqrt(size / f32(N) + eps)
        inner *= r * r * r / f32(N)
        for i in range(N):
            more = wide(dn[t, i]) * wide(weight[i]) * r - wide(x[t, i]) * inner
            dx[t, i] = narrow(dx, wide(dx[t, i]) + more if adds else more)


@njit(parallel=True, **OPTIONS)
def _rms_norm_backward_shared(parts: int, dn: Any, x: Any, weight: Any, eps: Any, dx: Any, adds: bool) -> None:
    T = len(x)
    for i in prange(parts):
        rows = slice(i * T // parts, (i + 1) * T // parts)
        _rms_norm_backward(dn[rows], x[rows], weight, eps, dx[rows], adds)


@njit(**OPTIONS)
def _swiglu_backward(gate: Any, up: Any, da: Any) -> None:
    """gate and up become their gradients, da silu(gate) * up."""
    for i in range(len(gate)):
        g, u, d = wide(gate[i]), wide(up[i]), wide(da[i])
        s = ONE / (ONE + exp(-g))
        gate[i] = narrow(gate, d * u * s * (ONE + g * (ONE - s)))
        up[i] = narrow(up, d * g * s)
        da[i] = narrow(da, g * s * u)


@njit(parallel=True, **OPTIONS)
def _swiglu_backward_shared(parts: int, gate: Any, up: Any, da: Any) -> None:
    n = len(gate)
    for i in prange(parts):
        some = slice(i * n // parts, (i + 1) * n // parts)
        _swiglu_backward(gate[some], up[some], da[some])


def rms_norm_backward_(dn: Tensor, x: Tensor, weight: Tensor, eps: float, dx: Tensor | None) -> Tensor:
    """As layer_passes.rms_norm_backward_; fp32 and bf16 on a CPU, contiguous."""
    into = dn if dx is None else dx
    d, rows, out = (as_array(y.flatten(0, -2)) for y in (dn, x, into))
    _rms_norm_backward_shared(parts_of(x), d, rows, as_array(weight), f32(eps), out, dx is not None)
    return into


def swiglu_backward_(gate: Tensor, up: Tensor, da: Tensor) -> Tensor:
    """As layer_passes.swiglu_backward_; fp32 and bf16 on a CPU, contiguous. a takes da's memory."""
    _swiglu_backward_shared(parts_of(gate), *(as_array(y.flatten()) for y in (gate, up, da)))
    return da


# ---- a whole decoder layer, for few tokens ---------------------------------------------------------------------------
# A product with few rows takes as long as its weights take to come from memory, and what Python does between two of
# them as long as that. So a layer is one call, and its weights are read as they lie.


@njit(**OPTIONS)
def _times(x: Any, w: Any, bias: Any, y: Any, apart: int, part: int, parts: int) -> None:
    """y += x W^T + bias, this part of its columns. x [T, in] fp32, W [out, in], bias or [0]; y: T rows, as_rows."""
    first, last, T = part * len(w) // parts, (part + 1) * len(w) // parts, len(x)
    more = np.empty((last - first, T), f32)
    _dots(w[first:last], x, more, last - first, T, x.shape[1])  # a second token finds the weights in the first cache
    for t in range(T):
        for o in range(first, last):
            if len(bias):
                more[o - first, t] += wide(bias[o])
            y[t * apart + o] = narrow(y, wide(y[t * apart + o]) + more[o - first, t])


@njit(parallel=True, **OPTIONS)
def _products(parts: int, x: Any, weights: Any, biases: Any, ys: Any, apart: int) -> None:
    """`_times` for layers with the same input, by all threads."""
    for i in prange(parts):
        for j in range(len(weights)):
            _times(x, weights[j], biases[j], ys[j], apart, i, parts)


@njit(**OPTIONS)
def _layer(parts: int, x: Any, linears: Any, norms: Any, turn: Any, slots: Any, given: Any) -> None:
    """See Layer; x [T, H] is changed."""
    weights, biases = linears
    norm1, eps1, norm2, eps2 = norms
    cos, sin, q_norm, k_norm, eps = turn
    keys, values = given[1:3]
    (T, H), (_, Hkv, _, D), Dv, M = x.shape, keys.shape, values.shape[3], len(weights[4])
    at_k = len(weights[0])
    at_v = at_k + Hkv * D
    width, Hq = at_v + Hkv * Dv, at_k // D

    n, rows = np.empty((T, H), f32), x.reshape(T * H)
    _rms_norm(x, norm1, eps1, n)
    q = np.zeros(T * width, x.dtype)
    k, v = q[at_k:], q[at_v:]
    _products(parts, n, weights[:3], biases[:3], (q, k, v), width)
    _turn(q, width, Hq, cos, sin, q_norm, eps)
    _turn(k, width, Hkv, cos, sin, k_norm, eps)
    _store(k, width, v, width, keys, values, slots)
    out = np.empty((T, Hq, Dv), f32)
    _shared_out(parts, (q, width) + given + (out,))
    _products(parts, out.reshape(T, Hq * Dv), weights[3:4], biases[3:4], (rows,), H)

    _rms_norm(x, norm2, eps2, n)
    gate, up, act = np.zeros(T * M, x.dtype), np.zeros(T * M, x.dtype), np.empty((T, M), f32)
    _products(parts, n, weights[4:6], biases[4:6], (gate, up), M)
    _swiglu(gate, up, M, 0, T, act)
    _products(parts, act, weights[6:], biases[6:], (rows,), H)


class Layer:
    """A decoder layer of the Llama, Mistral, Qwen2 and Qwen3 kind, for up to `most` tokens on a CPU; fp32 and bf16.

    linears: (weight [out, in], bias or None) of q, k, v, o, gate, up and down. norms: (weight [H], eps) of the layer's
    two. head_norms: of q and k, [D] each, or None, with their eps. The weights are read where they lie.
    """

    def __init__(self, linears: Any, norms: Any, head_norms: Any, eps: float, scale: float, window: int):
        none = linears[0][0][0, :0]
        self.most = FEW[none.dtype]
        biases = (as_array(none if bias is None else bias) for _, bias in linears)
        self.linears = tuple(as_array(weight) for weight, _ in linears), tuple(biases)
        self.norms = tuple(x for weight, e in norms for x in (as_array(weight), f32(e)))
        self.head_norms = (*map(as_array, head_norms or (none, none)), f32(eps))
        self.rule = NO_SINKS, f32(scale), window, ZERO

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, pages: Any, slots: Tensor, batch: Any) -> None:
        """x [T, H] += attention, then the MLP, of decoding texts. cos, sin [T, D]; slots [T]; batch: counts, table and
        lengths, as attention.paged_attention has them."""
        counts, table, lengths = (one.numpy() for one in batch)
        given = (counts, as_array(pages.keys), as_array(pages.values), table, lengths, *self.rule)
        turn = (as_array(cos), as_array(sin), *self.head_norms)
        _layer(threads(), as_array(x), self.linears, self.norms, turn, slots.numpy(), given)

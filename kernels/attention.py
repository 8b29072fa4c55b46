"""Attention of a few new tokens per text over keys and values that lie in pages, and what fills the pages.

It replaces, for every text b of a batch whose lengths are ragged,
    k = keys[table[b]].transpose(0, 1).flatten(1, 2)[:, : lengths[b]]      # [Hkv, L, D], gathered out of the pages
    v = values[table[b]].transpose(0, 1).flatten(1, 2)[:, : lengths[b]]
    out[b] = F.scaled_dot_product_attention(q[b], k, v, mask, enable_gqa=True)
and neither gathers nor pads: every page is read once, where it lies. Decoding asks with Q = 1 new token per text,
verification of drafted tokens with Q up to 8, causal among themselves.

The mathematics, for the query at position i of a text of L tokens (its own key is in the pages already):
    s_n = scale * (q_i . k_n)               softcap: s_n = c tanh(s_n / c)
    seen: n <= i, and n > i - window        (window 0 = every earlier token)
    out = sum_n e^(s_n) v_n / (sum_n e^(s_n) + e^(sink))
The sink is a learned logit per query head that takes weight and gives nothing (GPT-OSS); without one its term is 0.
Query j of the Q stands at position lengths[b] - Q + j. So a row with fewer than Q drafts is filled up in front: a query
at a negative position sees nothing and gets 0, and so does every query of a text of length 0 (the padding rows of a
captured CUDA graph), for which no page is read.

Layout: keys [P, Hkv, S, D] and values [P, Hkv, S, Dv], S tokens in a page (a power of two, for Triton from 16; 256 on
a GPU, 64 on a CPU). The S tokens of one key head are one piece of memory, 64 KB for S = 256, D = 128 in 16 bits, so a
thread block streams whole DRAM rows; FlashAttention's [P, S, Hkv, D] would give it 256-byte bites. All G = Hq / Hkv
query heads of a key head and all Q tokens are the rows of one matrix product: a key is read once for G * Q queries.
Reading is what decoding costs: Qwen2.5-7B has 57,344 bytes per token, 7.5 GB for 64 texts of 2,048 tokens, 2.2 ms at
3.35 TB/s.

fp8: pages in float8_e4m3fn with an fp32 scale per token and key head, [P, Hkv, S]: finer than one per page or per head,
and nothing has to be calibrated or requantised when a page fills; 3 % more bytes at D = 128. scale = amax / 448.

dtypes: q in fp16, bf16 or fp32; pages in q's dtype or e4m3; scores, exponentials and sums in fp32. The Triton kernels
(attention_triton.py) run for CUDA tensors, Numba's (cpu.py) for bf16 and fp32 on a CPU, the plain-torch
references below elsewhere, one contract.
Not supported: gradients, more than 8 queries per text, key heads with different page tables.
"""

from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import HAS_NUMBA, HAS_TRITON
from .layer_passes import rms_norm, rotate_

MAX_QUERIES = 8
E4M3_MAX = 448.0
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# B texts, Q queries each, Hq query heads, Hkv key heads, G = Hq / Hkv, P pages of S tokens, W pages in a table's row.


class Pages(NamedTuple):
    """Keys and values of one layer."""

    keys: Tensor  # [P, Hkv, S, D]
    values: Tensor  # [P, Hkv, S, Dv]
    key_scales: Tensor | None = None  # fp32 [P, Hkv, S], with fp8 pages only
    value_scales: Tensor | None = None


# ---- the specification -----------------------------------------------------------------------------------------------


def paged_attention_reference(
    q: Tensor,
    pages: Pages,
    table: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The definition in plain torch, over gathered keys -> [B, Q, Hq, Dv]; arguments as `paged_attention`'s."""
    (B, Q, Hq, D), (_, Hkv, S, Dv) = q.shape, pages.values.shape
    longest = int(lengths.max()) if B else 0  # a host read: this is a reference, not what a graph captures
    if not longest:
        return q.new_zeros(B, Q, Hq, Dv)
    width = -(-longest // S)
    at = torch.arange(width * S, device=q.device)
    valid = at < lengths[:, None]  # [B, N]
    here = table[:, :width].long().clamp(min=0)

    def gather(pool: Tensor, scales: Tensor | None) -> Tensor:
        x = read_pool(pool, scales, here).float()
        x = x.transpose(1, 2).flatten(2, 3)  # [B, Hkv, N, D]
        return x.masked_fill(~valid[:, None, :, None], 0)  # what nobody stored may be nan

    k, v = gather(pages.keys, pages.key_scales), gather(pages.values, pages.value_scales)
    grouped = q.float().view(B, Q, Hkv, Hq // Hkv, D).permute(0, 2, 3, 1, 4)  # [B, Hkv, G, Q, D]
    scores = grouped.flatten(2, 3) @ k.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    position = (lengths[:, None] - Q + torch.arange(Q, device=q.device))[:, :, None]  # [B, Q, 1]
    seen = (at <= position) & valid[:, None]
    if window:
        seen &= at > position - window
    scores = scores.view(B, Hkv, -1, Q, width * S).masked_fill(~seen[:, None, None], float("-inf"))
    sink = scores.new_full((1, Hkv, Hq // Hkv, 1), float("-inf"))
    if sinks is not None:
        sink = sinks.float().view(1, Hkv, -1, 1)
    highest = torch.maximum(scores.amax(-1), sink)
    terms = (scores - highest.where(highest > float("-inf"), 0)[..., None]).exp()
    total = terms.sum(-1) + (sink - highest).exp().nan_to_num(0)
    out = (terms.flatten(2, 3) @ v).view(B, Hkv, -1, Q, Dv)
    out = out / total.where(total > 0, 1)[..., None]
    return out.permute(0, 3, 1, 2, 4).reshape(B, Q, Hq, Dv).to(q.dtype)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] -> (float8_e4m3fn [..., D], fp32 scales [...]): the largest magnitude of a row becomes 448."""
    scales = x.float().abs().amax(-1) / E4M3_MAX
    return (x.float() / scales.where(scales > 0, 1)[..., None]).to(torch.float8_e4m3fn), scales


def read_pool(pool: Tensor, scales: Tensor | None, index: Any) -> Tensor:
    """pool[index], the whole last dimension of it; fp8 numbers come multiplied by their scales, in fp32."""
    if scales is None:
        return pool[index]
    return pool.view(torch.uint8)[index].view(pool.dtype).float() * scales[index][..., None]  # torch indexes bytes


class Turn(NamedTuple):
    """What queries and keys get before they are compared: a norm over each head where there is one, and a position."""

    cos: Tensor  # [T, D]
    sin: Tensor
    norms: tuple[Tensor, Tensor] | None = None  # RMSNorm's weights [D] of queries and of keys
    eps: float = 0.0


def place_reference(q: Tensor, k: Tensor, v: Tensor, pages: Pages, slots: Tensor, turn: Turn) -> None:
    """The definition in plain torch; arguments as `place`'s."""
    for x, norm in zip((q, k), turn.norms or (None, None), strict=True):
        y = x.clone(memory_format=torch.contiguous_format)
        y = y if norm is None else rms_norm(y, norm, turn.eps)
        x.copy_(rotate_(y, turn.cos, turn.sin))
    store_pages_reference(k, v, pages, slots)


def store_pages_reference(k: Tensor, v: Tensor, pages: Pages, slots: Tensor) -> None:
    """The definition in plain torch; arguments as `store_pages`'s."""
    keep = slots >= 0
    page, slot = slots[keep].long() // pages.keys.shape[2], slots[keep].long() % pages.keys.shape[2]
    for new, pool, scales in ((k, pages.keys, pages.key_scales), (v, pages.values, pages.value_scales)):
        if scales is None:
            pool[page, :, slot] = new[keep]
        else:
            numbers, factors = quantise(new[keep])
            pool.view(torch.uint8)[page, :, slot] = numbers.view(torch.uint8)
            scales[page, :, slot] = factors


# ---- the public functions --------------------------------------------------------------------------------------------


def _need(ok: bool, what: str) -> None:
    if not ok:
        raise ValueError(f"paged attention: {what}")


def _check_pages(pages: Pages, heads: int, dims: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    keys, values = pages.keys, pages.values
    _need(keys.ndim == 4 and values.ndim == 4, "keys and values must be [P, Hkv, S, D] and [P, Hkv, S, Dv]")
    shape = keys.shape[:3]
    _need(values.shape[:3] == shape, f"keys are {list(keys.shape)}, values {list(values.shape)}")
    _need(shape[1] == heads, f"the pages have {shape[1]} key heads, not {heads}")
    _need((keys.shape[3], values.shape[3]) == dims, f"the pages have head sizes {keys.shape[3]}, {values.shape[3]}")
    size = shape[2]
    least = 16 if device.type == "cuda" else 1
    _need(
        size >= least and size & (size - 1) == 0,
        f"a page must hold a power of two of tokens, {least} or more, not {size}",
    )
    fp8 = keys.dtype == torch.float8_e4m3fn
    _need(dtype in DTYPES, f"fp16, bf16 or fp32 is needed, not {dtype}")
    _need(keys.dtype == values.dtype and (fp8 or keys.dtype == dtype), f"pages of {keys.dtype} for {dtype}")
    for scales in (pages.key_scales, pages.value_scales):
        _need((scales is not None) == fp8, "fp8 pages, and only those, have scales")
        _need(
            scales is None or (scales.shape == shape and scales.dtype == torch.float32),
            "scales must be fp32 [P, Hkv, S]",
        )
    for x in pages:
        _need(x is None or (x.is_contiguous() and x.device == device), f"pages must be contiguous and on {device}")


def _int32(x: Tensor, shape: tuple[int, ...], name: str, device: torch.device) -> None:
    _need(
        x.shape == shape and x.dtype == torch.int32,
        f"{name} must be int32 {list(shape)}, not {x.dtype} {list(x.shape)}",
    )
    _need(x.device == device and x.stride(-1) == 1, f"{name} must lie on {device}, entry beside entry")


@cache
def _kernels(path: str, cuda: bool, dtype: torch.dtype) -> ModuleType | None:
    """The kernels that run, None = the references: what "auto" means here, or the path that was named, or an error."""
    _need(path in ("auto", "torch", "triton", "numba"), f"path must be auto, torch, triton or numba, not {path!r}")
    served = dtype in (torch.float32, torch.bfloat16)  # of the pages
    if HAS_TRITON and (path == "triton" or (path == "auto" and cuda)):
        from . import attention_triton as triton

        if cuda or triton.INTERPRET:
            return triton
    if HAS_NUMBA and not cuda and served and path in ("auto", "numba"):
        from . import cpu as numba

        return numba
    _need(path != "triton", "path 'triton' needs triton and a GPU (or TRITON_INTERPRET=1)")
    _need(path != "numba", "path 'numba' needs numba, a CPU, and pages in fp32 or bf16")
    return None


def paged_attention(
    q: Tensor,
    pages: Pages,
    table: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    splits: int = 0,
    path: str = "auto",
    check: bool = True,
    counts: Tensor | None = None,
) -> Tensor:
    """q [B, Q, Hq, D] against the pages of each text -> [B, Q, Hq, Dv] in q's dtype. Nothing is read on the host.

    counts: on a CPU, int32 [B]: each text has so many queries, and q is [sum of counts, Hq, D], text by text; so is
    what is returned.

    table: int32 [B, W], the pages of each text in order; entries after its last page are not looked at (-1, say).
    lengths: int32 [B], keys of each text, those of its Q queries included; at most W * S. The kernels take every bound
    from it on the device: a graph captured with short texts serves long ones.
    window: keys a query sees, its own included, 0 = all. softcap: bound c of the scores, or None. sinks: [Hq] or None.
    splits: the most parts that one text's keys are divided into, 0 = by the card and the shapes.
    path: "auto", or for tests "torch", "triton", "numba". Raises ValueError, one line, for shapes, dtypes and devices,
    which check=False takes as right: in a decoding step of few texts that is a tenth of the time.
    """
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
    if check:
        _check(q, pages, table, lengths, window, softcap, sinks, splits, counts)
    kernels = _kernels(path, q.is_cuda, pages.keys.dtype) if len(q) else None
    if kernels and counts is None:
        return kernels.decode(q, pages, table, lengths, splits=splits, **options)
    if kernels:
        return kernels.decode_packed(q, pages, table, lengths, counts, **options)
    if counts is None:
        return paged_attention_reference(q, pages, table, lengths, **options)
    texts = zip(q.split(counts.tolist()), table[:, None], lengths[:, None], strict=True)
    outs = [paged_attention_reference(some[None], pages, pages_of, n, **options)[0] for some, pages_of, n in texts]
    return torch.cat(outs)


def _check(
    q: Tensor,
    pages: Pages,
    table: Tensor,
    lengths: Tensor,
    window: int,
    softcap: float | None,
    sinks: Tensor | None,
    splits: int,
    counts: Tensor | None,
) -> None:
    B = len(lengths)
    if counts is None:
        _need(q.ndim == 4, f"q must be [B, Q, Hq, D], not {list(q.shape)}")
        _need(1 <= q.shape[1] <= MAX_QUERIES, f"1 to {MAX_QUERIES} queries per text, not {q.shape[1]}")
        B = len(q)
    else:
        _int32(counts, (B,), "counts", q.device)
        _need(not q.is_cuda, "counts are for a CPU")
        _need(q.ndim == 3 and len(q) == int(counts.sum()), f"q is {list(q.shape)} for {int(counts.sum())} queries")
    Hq, D = q.shape[-2:]
    Hkv = pages.keys.shape[1]
    _need(Hq % Hkv == 0, f"{Hq} query heads do not divide over {Hkv} key heads")
    _check_pages(pages, Hkv, (D, pages.values.shape[-1]), q.dtype, q.device)
    _int32(lengths, (B,), "lengths", q.device)
    _int32(table, (B, table.shape[-1]), "table", q.device)
    _need(window >= 0 and splits >= 0, f"window {window} and splits {splits} must not be negative")
    _need(softcap is None or softcap > 0, f"softcap must be positive, not {softcap}")
    _need(sinks is None or sinks.shape == (Hq,), f"sinks must be [{Hq}]")


def store_pages(k: Tensor, v: Tensor, pages: Pages, slots: Tensor, *, path: str = "auto", check: bool = True) -> None:
    """Puts k [T, Hkv, D] and v [T, Hkv, Dv] into their places; fp8 pages get quantised numbers and their scales.

    slots: int32 [T], page * S + place in the page, -1 = nowhere. No place may be named twice. check: as above.
    """
    if check:
        _check_new(k, v, pages, slots)
    if len(k) and (kernels := _kernels(path, k.is_cuda, pages.keys.dtype)):
        kernels.place(None, k, v, pages, slots, None)
    else:
        store_pages_reference(k, v, pages, slots)


def place(
    q: Tensor, k: Tensor, v: Tensor, pages: Pages, slots: Tensor, turn: Turn, *, path: str = "auto", check: bool = True
) -> None:
    """Norms and positions for q [T, Hq, D] and k [T, Hkv, D], in place, then `store_pages`: one pass over the three.

    They may be parts of one matrix: only the numbers of a head must lie side by side. D is even. check: as above.
    """
    if check:
        _check_new(k, v, pages, slots)
        _check_turn(q, k, turn)
    adjacent = all(x.stride(1) == x.shape[2] for x in (q, k))  # heads; what Numba's kernel takes
    kernels = _kernels(path, k.is_cuda, pages.keys.dtype)
    if len(k) and (adjacent or k.is_cuda or path == "triton") and kernels:
        kernels.place(q, k, v, pages, slots, turn)
    else:
        place_reference(q, k, v, pages, slots, turn)


def _check_turn(q: Tensor, k: Tensor, turn: Turn) -> None:
    shape = (len(k), k.shape[2])
    _need(q.ndim == 3 and (q.shape[0], q.shape[2]) == shape, f"q is {list(q.shape)}, k {list(k.shape)}")
    _need(q.dtype == k.dtype and q.device == k.device, f"q is {q.dtype} on {q.device}, k {k.dtype} on {k.device}")
    _need(q.stride(2) == k.stride(2) == 1 and shape[1] % 2 == 0, "a head must be an even number of neighbours")
    for x in (turn.cos, turn.sin):
        _need(x.shape == shape and x.is_contiguous() and x.device == k.device, f"cos and sin must be {list(shape)}")
    for x in turn.norms or ():
        _need(x.shape == shape[1:] and x.is_contiguous() and x.device == k.device, f"norms must be [{shape[1]}]")


def _check_new(k: Tensor, v: Tensor, pages: Pages, slots: Tensor) -> None:
    _need(k.ndim == 3 and v.ndim == 3 and k.shape[:2] == v.shape[:2], f"k {list(k.shape)}, v {list(v.shape)}")
    _need(k.dtype == v.dtype and k.device == v.device, f"k is {k.dtype} on {k.device}, v {v.dtype} on {v.device}")
    _check_pages(pages, k.shape[1], (k.shape[2], v.shape[2]), k.dtype, k.device)
    _int32(slots, (len(k),), "slots", k.device)

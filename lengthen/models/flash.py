"""Causal attention of pieces of prompts, each over all keys that its text has so far.

On a GPU all pieces go through one call of FlashAttention with variable lengths: flash-attn's if it is installed, else
the one in torch itself (its operator directly: the function around it takes other arguments in torch 2.11 than later).
Neither is given page tables: torch 2.11 has none, and later ones are wrong with FlashAttention 2 (pytorch#194167). What
FlashAttention does not carry goes through `dense`, piece by piece, as everything does on a CPU: fp32, softcaps without
flash-attn, head sizes above 256 or other ones for values. Sinks need no kernel of their own: with the log of the sum of
a query's exponentials, out * sigmoid(lse - sink) puts the sink into the sum.

No GPU has run the two FlashAttention calls yet; tests play the part of the first with a float64 stand-in.
"""

import importlib.util
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES = 1024  # of a piece at a time where scores or masks are held

# N pieces, Tq queries and Tk keys of all of them, n and total of one, D head size, G query heads per key head.


class Bounds(NamedTuple):
    """Where the pieces begin and end in packed queries and keys; the end of the one is the beginning of the next."""

    queries: list[int]  # N + 1
    keys: list[int]
    cu_queries: Tensor  # the same on the device, int32
    cu_keys: Tensor

    @classmethod
    def make(cls, counts: list[int], totals: list[int], device: torch.device) -> "Bounds":
        lists = [[0, *accumulate(x)] for x in (counts, totals)]
        return cls(*lists, *(torch.tensor(x, dtype=torch.int32, device=device) for x in lists))

    @property
    def longest(self) -> tuple[int, int]:
        """Most queries and most keys of a piece."""
        return tuple(max(b - a for a, b in zip(x, x[1:], strict=False)) for x in (self.queries, self.keys))


def attend_pieces(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Bounds,
    scaling: float,
    window: int,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """q [Tq, Hq, D], k [Tk, Hkv, D], v [Tk, Hkv, Dv] -> [Tq, Hq, Dv]. A piece's last query sees its last key."""
    kernel = flash_kernel(q, v, softcap)
    if kernel:
        out, lse = kernel(q, k, v, bounds, scaling, window, softcap)  # lse fp32 [Hq, Tq]
        return out if sinks is None else out * torch.sigmoid(lse - sinks.float()[:, None]).T[..., None].to(out.dtype)
    out = q.new_empty(*q.shape[:2], v.shape[2])
    for i in range(len(bounds.queries) - 1):
        first, last = bounds.queries[i : i + 2]
        keys = slice(*bounds.keys[i : i + 2])
        start = keys.stop - keys.start - (last - first)
        for at in range(first, last, QUERIES):
            here = slice(at, min(at + QUERIES, last))
            seen = slice(keys.start, keys.start + start + here.stop - first)
            some_q, some_k, some_v = (x.transpose(0, 1) for x in (q[here], k[seen], v[seen]))
            some = dense(some_q, some_k, some_v, start + at - first, scaling, window, softcap, sinks)
            out[here] = some.transpose(0, 1)
    return out


def flash_kernel(q: Tensor, v: Tensor, softcap: float | None):
    """The FlashAttention that can serve these inputs, or None."""
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16):
        return None
    if q.shape[2] != v.shape[2] or q.shape[2] > 256 or q.shape[2] % 8 or not _ampere(q.device):
        return None
    if _has_flash_attn():
        return _flash_attn
    return None if softcap else _torch_flash


@cache
def _ampere(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _flash_attn(q, k, v, bounds: Bounds, scaling: float, window: int, softcap: float | None) -> tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_varlen_func

    out, lse, _ = flash_attn_varlen_func(
        *(q, k, v, bounds.cu_queries, bounds.cu_keys, *bounds.longest),
        softmax_scale=scaling,
        causal=True,
        window_size=(window - 1, 0) if window else (-1, -1),
        softcap=softcap or 0.0,
        return_attn_probs=True,
    )
    return out, lse


def _torch_flash(q, k, v, bounds: Bounds, scaling: float, window: int, softcap: None) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(q, k, v, bounds.cu_queries, bounds.cu_keys, *bounds.longest),
        *(0.0, True, False),  # no dropout, causal, no debug mask
        scale=scaling,
        window_size_left=window - 1 if window else -1,
        window_size_right=0,
    )
    return out, lse


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: int,
    scaling: float,
    window: int,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Causal attention of one text's tokens start..start+n over its keys 0..start+n: q [Hq, n, D] -> [Hq, n, Dv]."""
    n, total = q.shape[1], k.shape[1]
    if not start and softcap is None and sinks is None and (not window or n <= window):
        return F.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, scale=scaling, enable_gqa=q.shape[0] != k.shape[0]
        )[0]
    at = torch.arange(start, total, device=q.device)[:, None]
    key = torch.arange(total, device=q.device)[None]
    seen = key <= at
    if window:
        seen &= key > at - window
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=seen, scale=scaling, enable_gqa=q.shape[0] != k.shape[0]
        )[0]
    Hkv, G = k.shape[0], q.shape[0] // k.shape[0]
    scores = (q.reshape(Hkv, G * n, -1) @ k.transpose(1, 2)).float().view(Hkv, G, n, total) * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill_(~seen, float("-inf"))
    if sinks is not None:  # a column that takes weight and gives nothing
        column = sinks.float().view(Hkv, G, 1, 1).expand(Hkv, G, n, 1)
        weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights.to(v.dtype).view(Hkv, G * n, total) @ v).view(q.shape[0], n, -1)

"""Every call of FlashAttention, under one convention: packed samples, causal, with a window that counts its own token.

Samples are packed one after the other: q [Tq, Hq, D], k [Tk, Hkv, D], v [Tk, Hkv, Dv], and the last query of a sample
sees its last key. window = w: a query sees itself and the w - 1 keys before it, 0 = all; FlashAttention gets it as
window_left = w - 1, window_right = 0, always with causal. Query heads share key heads in order (grouped queries).

    attend_chunks      no gradient: prefill of the sampler, new tokens over all keys of their text
    flash_autograd     packed training through autograd, for the models' own layers
    attend_saving_lse  the memory-lean layer: the output and its log-sum-exp, which `attend_backward` takes back
    dense              one sample by torch's SDPA or, with softcaps and sinks, from its scores: any device and dtype

On a GPU that is flash-attn where it is installed, else the FlashAttention inside torch, by its operator (the function
around it has other arguments in torch 2.11 than later), whose kernels flash_hopper.py may have exchanged for newer
ones. None is given page tables: torch 2.11 has none, and later ones are wrong with FlashAttention 2 (pytorch#194167).
What FlashAttention does not carry goes sample by sample through torch, as everything does on a CPU: fp32, softcaps
without flash-attn, head sizes above 256 or other ones for values.
Sinks need no kernel of their own: with the log of the sum of a query's exponentials, out * sigmoid(lse - sink) puts the
sink into the sum.

No GPU has run the FlashAttention calls yet; the tests put float64 stand-ins in their place.
"""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lengthen.models import flash_hopper
from lengthen.models.upload import upload

QUERIES = 1024  # of a sample at a time where scores or masks are held

# N samples, Tq queries and Tk keys of all of them, n and total of one, D head size, G query heads per key head.


class Varlen(NamedTuple):
    """Where N packed samples begin and end, as FlashAttention takes it."""

    cu_queries: Tensor  # int32 [N + 1]: the end of a sample is the beginning of the next
    cu_keys: Tensor
    longest_queries: int
    longest_keys: int


class Bounds(NamedTuple):
    """The same for new tokens over their texts, on the host as well. `attend_chunks` takes it."""

    queries: list[int]  # N + 1
    keys: list[int]
    varlen: Varlen

    @classmethod
    def make(cls, counts: list[int], totals: list[int], device: torch.device) -> "Bounds":
        """counts: new tokens of each text; totals: keys of each, the new ones included."""
        queries, keys = ([0, *accumulate(lengths)] for lengths in (counts, totals))
        cu_queries, cu_keys = (upload(ends, torch.int32, device) for ends in (queries, keys))
        return cls(queries, keys, Varlen(cu_queries, cu_keys, max(counts), max(totals)))


# ---------------------------------------------------------------------------------------------------------
# The two FlashAttentions

Kernel = Callable[..., tuple[Tensor, Tensor]]  # -> out [Tq, Hq, D], log-sum-exp fp32 [Hq, Tq]


def flash_kernel(q: Tensor, v: Tensor, softcap: float | None) -> Kernel | None:
    """The FlashAttention that can serve these inputs, or None."""
    if q.device.type != "cuda" or q.shape[2] != v.shape[2] or unserved(q.shape[2], q.dtype, q.device):
        return None
    if not softcap and flash_hopper.activated(q.device, q.shape[2]):
        return _torch_flash
    if _has_flash_attn():
        return _flash_attn
    return None if softcap else _torch_flash


def unserved(head: int, dtype: torch.dtype, device: torch.device) -> str:
    """Why no FlashAttention serves such heads on a GPU, "" = one does; without an index a recent GPU is meant."""
    if dtype not in (torch.float16, torch.bfloat16):
        return "FlashAttention takes bf16 and fp16 only"
    if head > 256 or head % 8:
        return f"FlashAttention takes head sizes up to 256 in steps of 8, not {head}"
    return "" if device.index is None or _ampere(device) else "FlashAttention needs an Ampere GPU or a later one"


@cache
def _ampere(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _has_flash_attn() -> bool:
    # FlashAttention 4 puts itself into a package of that name, too
    return flash_hopper.importable("flash_attn.flash_attn_interface")


def _flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    samples: Varlen,
    scaling: float,
    window: int,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_varlen_func

    out, lse, _ = flash_attn_varlen_func(
        *(q, k, v, *samples),
        softmax_scale=scaling,
        causal=True,
        window_size=(window - 1, 0) if window else (-1, -1),
        softcap=softcap or 0.0,
        return_attn_probs=True,
        **({"dropout_p": dropout} if dropout else {}),
    )
    return out, lse


def _torch_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    samples: Varlen,
    scaling: float,
    window: int,
    softcap: None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(q, k, v, *samples),
        *(dropout, True, False),  # causal, no debug mask
        scale=scaling,
        window_size_left=window - 1 if window else -1,
        window_size_right=0,
    )
    return out, lse


def _torch_flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    samples: Varlen,
    scaling: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq, dk, dv, of the shapes of q, k, v. Also of what flash-attn computed: it saves the same two."""
    # torch's own forward pass hands out the state of a generator, which only dropout needs
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        *(dout, q, k, v, out, lse, *samples, 0.0, True),
        *no_dropout,
        scale=scaling,
        window_size_left=window - 1 if window else -1,
        window_size_right=0,
    )


# ---------------------------------------------------------------------------------------------------------
# Training: packed samples whose queries have no earlier keys


def flash_autograd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seq_lens: Tensor,
    longest: int,
    scaling: float,
    window: int,
    softcap: float | None,
    dropout: float,
) -> Tensor | None:
    """q [T, Hq, D], k and v [T, Hkv, D] -> [T, Hq, D] with a gradient; None where no FlashAttention serves that."""
    kernel = flash_kernel(q, v, softcap)
    if kernel is None or (dropout and flash_hopper.activated(q.device, q.shape[2])):
        return None
    return kernel(q, k, v, Varlen(cu_seq_lens, cu_seq_lens, longest, longest), scaling, window, softcap, dropout)[0]


def attend_saving_lse(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, longest: int, scaling: float, window: int
) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D], k and v [T, Hkv, D] -> (out [T, Hq, D], log-sum-exp of the scores, [Hq, T] fp32). No gradient."""
    if q.device.type != "cpu":
        flash_hopper.activated(q.device, q.shape[2])
        return _torch_flash(q, k, v, Varlen(cu_seq_lens, cu_seq_lens, longest, longest), scaling, window)
    outs, sums = [], []
    for sample, band in _samples(cu_seq_lens, window, q):
        of_sample = (x[sample].transpose(0, 1)[None] for x in (q, k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *of_sample, 0.0, band is None, attn_mask=band, scale=scaling
        )
        outs.append(out[0].transpose(0, 1))
        sums.append(lse[0])
    if len(outs) == 1:
        return outs[0], sums[0].contiguous()
    return torch.cat(outs), torch.cat(sums, 1)


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seq_lens: Tensor,
    longest: int,
    scaling: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """From what attend_saving_lse took and gave -> dq [T, Hq, D], dk and dv [T, Hkv, D]."""
    if q.device.type != "cpu":
        samples = Varlen(cu_seq_lens, cu_seq_lens, longest, longest)
        return _torch_flash_backward(dout, q, k, v, out, lse, samples, scaling, window)
    # torch's backward pass on a CPU has no grouped heads: the query heads of a key are a batch, which expands it
    gradients, heads = [], (k.shape[1], q.shape[1] // k.shape[1])
    for sample, band in _samples(cu_seq_lens, window, q):
        dout_s, q_s, out_s = (x[sample].unflatten(1, heads).permute(2, 1, 0, 3) for x in (dout, q, out))
        k_s, v_s = (x[sample].transpose(0, 1).expand(len(q_s), -1, -1, -1) for x in (k, v))  # [G, Hkv, n, D]
        lse_s = lse[:, sample].unflatten(0, heads).transpose(0, 1)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(dout_s, q_s, k_s, v_s, out_s, lse_s, 0.0, band is None), attn_mask=band, scale=scaling
        )
        dk, dv = (x.sum(0).transpose(0, 1).contiguous() for x in (dk, dv))
        gradients.append((dq.permute(2, 1, 0, 3).flatten(1, 2).contiguous(), dk, dv))  # token by token
    if len(gradients) == 1:
        return gradients[0]
    dqs, dks, dvs = zip(*gradients, strict=True)
    return torch.cat(dqs), torch.cat(dks), torch.cat(dvs)


def _samples(cu_seq_lens: Tensor, window: int, like: Tensor) -> Iterator[tuple[slice, Tensor | None]]:
    """Each sample's tokens, and the mask [n, n] (0 and -inf) of a window that is shorter than the sample."""
    bounds = cu_seq_lens.tolist()
    for start, stop in zip(bounds, bounds[1:], strict=False):
        band, n = None, stop - start
        if 0 < window < n:
            seen = torch.ones(n, n, dtype=torch.bool, device=like.device).tril().triu(1 - window)
            band = torch.zeros(n, n, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))
        yield slice(start, stop), band


# ---------------------------------------------------------------------------------------------------------
# Sampling: new tokens over all keys of their texts


def attend_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Bounds,
    scaling: float,
    window: int,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """q [Tq, Hq, D], k [Tk, Hkv, D], v [Tk, Hkv, Dv] -> [Tq, Hq, Dv]. sinks: logits [Hq], a key that gives nothing."""
    kernel = flash_kernel(q, v, softcap)
    if kernel:
        out, lse = kernel(q, k, v, bounds.varlen, scaling, window, softcap)  # lse fp32 [Hq, Tq]
        return out if sinks is None else out * torch.sigmoid(lse - sinks.float()[:, None]).T[..., None].to(out.dtype)
    out = q.new_empty(*q.shape[:2], v.shape[2])
    for i in range(len(bounds.queries) - 1):
        first, last = bounds.queries[i : i + 2]
        keys = slice(*bounds.keys[i : i + 2])
        earlier = keys.stop - keys.start - (last - first)  # keys of the text before its new tokens
        for start in range(first, last, QUERIES):
            new = slice(start, min(start + QUERIES, last))
            seen = slice(keys.start, keys.start + earlier + new.stop - first)
            q_new, k_seen, v_seen = (x.transpose(0, 1) for x in (q[new], k[seen], v[seen]))
            here = dense(q_new, k_seen, v_seen, earlier + start - first, scaling, window, softcap, sinks)
            out[new] = here.transpose(0, 1)
    return out


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: int,
    scaling: float,
    window: int,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention of one text's tokens start..start+n over its keys 0..start+n: q [Hq, n, D] -> [Hq, n, Dv]."""
    n, total = q.shape[1], k.shape[1]
    options: dict[str, Any] = {"scale": scaling, "dropout_p": dropout, "enable_gqa": q.shape[0] != k.shape[0]}
    if not start and softcap is None and sinks is None and (not window or n <= window):
        return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, **options)[0]
    query = torch.arange(start, total, device=q.device)[:, None]
    key = torch.arange(total, device=q.device)[None]
    seen = key <= query
    if window:
        seen &= key > query - window
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=seen, **options)[0]
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
    weights = F.dropout(weights, dropout)
    return (weights.to(v.dtype).view(Hkv, G * n, total) @ v).view(q.shape[0], n, -1)

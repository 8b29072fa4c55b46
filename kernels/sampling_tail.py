"""The end of a decoding step: from a model's logits to the numbers that are drawn from, in one pass over them.

It replaces, for n draws from V logits each,
    x = logits.float()
    x[:, never] = -inf;  x[early][:, ends] = -inf                      # ids without a text; an end that comes too early
    x = where(seen, where(x > 0, x / penalty, x * penalty), x)         # repetition penalty
    token = (x / temperature + gumbel).argmax(1)                       # where top-k and top-p leave everything
    token = x.argmax(1)                                                # greedy
    maxima = x.view(n, 64, -1).amax(1)                                 # for the ranking of 64 candidates (draw.py)
which are twelve passes over n * V numbers in fp32: 0.6 ms for 256 rows of Qwen2.5's 152,064 on an H100.

Two more passes draw exactly where top-p, or a large top-k, has to look at everything, without a sort:
    lowest       the score down to which a row's tokens stay, by bisection over the bits of the scores
    draw_above   (x / temperature + gumbel).argmax(1) over what is no lower
A token stays if top-k of 0 or fewer than top-k scores are higher, and then if those higher sum to less than top-p of
the rest. Equal scores stay together.

The noise is a hash of (seed, position, token id): the same whatever is beside a row, and the same on every device.

dtypes: logits in fp16, bf16 or fp32; penalised logits in fp32, noise and noisy scores in fp64. NaN counts as +inf, so
that a row that has one is seen not to be finite. The Triton kernels (sampling_tail_triton.py) run for CUDA tensors, the
plain-torch references below elsewhere, one contract.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import HAS_TRITON

PLAIN, NEVER, END = 0, 1, 2  # of an id: may be drawn; may not; may where a text may end
COLUMN = 64  # ids that share a maximum: column c of an output of W numbers has ids c, c + W / 64, c + 2 W / 64, ...
COLDEST = 1e-5  # a temperature is never taken for less

# n draws, V vocabulary, W = V or V rounded up to whole columns, L lines of the table of ids, Q draws of a text in a
# pass.


class Rules(NamedTuple):
    """What becomes of the logits before a draw."""

    kinds: Tensor  # uint8 [V]: PLAIN, NEVER or END
    early: Tensor  # bool [n]: no END yet
    seen: Tensor  # bool [L, V]: the penalty applies
    line: Tensor  # int64 [n]: of `seen`
    penalty: Tensor  # fp32 [n]
    drafts: Tensor | None = None  # int64 [n / Q, Q]: draw j of a text also has seen ids 1 to j of it; -1 = none


class Noise(NamedTuple):
    """What makes scores of logits: x / temperature + gumbel(seed, position, token id)."""

    temperature: Tensor  # fp32 [n]
    seeds: Tensor  # int64 [n]
    positions: Tensor  # int64 [n]


class Tail(NamedTuple):
    tokens: Tensor  # int64 [n]: of free draws the drawn one, else the highest logit's; the lowest of equal ones
    finite: Tensor  # bool [n]: the winner is a number
    logits: Tensor  # fp32 [n, W], -inf beyond V: only if asked for
    maxima: Tensor | None  # fp32 [n, W / 64] of its columns; None = not computed


def _fast(x: Tensor) -> bool:
    return HAS_TRITON and x.is_cuda


# ---- the noise -------------------------------------------------------------------------------------------------------


def gumbel(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise fp64 [n, C], a pure function of int64 seeds [n], positions [n] and token ids [n, C]."""
    if _fast(tokens):
        from . import sampling_tail_triton

        return sampling_tail_triton.gumbel(seeds, positions, tokens)
    return gumbel_reference(seeds, positions, tokens)


def gumbel_reference(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """The definition in plain torch, about sixty operations.

    splitmix64's finaliser over the three numbers; torch's int64 products wrap as its unsigned ones do.
    """

    def mix(x: Tensor) -> Tensor:
        x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9; the masks make >> logical
        x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
        return x ^ (x >> 31 & 0x1FFFFFFFF)

    golden = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15
    state = mix(mix(seeds + golden) + positions * golden)[:, None]
    bits = mix(mix(state + (tokens + 1) * golden)) >> 11 & 0x1FFFFFFFFFFFFF  # 53 bits
    return -torch.log(-torch.log((bits.double() + 0.5) * 2.0**-53))


def scores_of(logits: Tensor, temperature: Tensor) -> Tensor:
    """[n, W] after the temperature."""
    return logits / temperature.clamp(min=COLDEST)[:, None]


# ---- one pass over the logits ----------------------------------------------------------------------------------------


def tail(logits: Tensor, rules: Rules, noise: Noise, free: Tensor, ranked: bool = True) -> Tail:
    """logits [n, V]; free bool [n]: draws with noise from all tokens. ranked: the penalised logits are asked for."""
    if _fast(logits):
        from . import sampling_tail_triton

        return Tail(*sampling_tail_triton.tail(logits, rules, noise, free, ranked))
    return tail_reference(logits, rules, noise, free)


def tail_reference(logits: Tensor, rules: Rules, noise: Noise, free: Tensor) -> Tail:
    """The definition in plain torch."""
    kinds, early, seen, line, penalty, drafts = rules
    x = logits.float()
    x = x.masked_fill((kinds == NEVER) | (kinds == END) & early[:, None], float("-inf"))
    hit = seen.index_select(0, line)  # [n, V]
    if drafts is not None:
        Q, V = drafts.shape[1], x.shape[1]
        at = torch.arange(Q, device=x.device)
        later = (at > at[:, None]) | (at == 0)  # [Q, Q]: not before the draw
        ids = drafts[:, None].expand(-1, Q, Q).masked_fill(later, -1).flatten(0, 1)  # [n, Q]
        ids = torch.where(ids < 0, V, ids)
        hit = F.pad(hit, (0, 1)).scatter(1, ids, True)[:, :V]
    factor = penalty[:, None]
    x = torch.where(hit, torch.where(x > 0, x / factor, x * factor), x)
    x = torch.where(x.isnan(), float("inf"), x)
    tokens = torch.where(free, _winner(x, noise), x.argmax(1))
    return Tail(tokens, x.gather(1, tokens[:, None])[:, 0].isfinite(), x, None)


def _winner(x: Tensor, noise: Noise, floors: Tensor | None = None) -> Tensor:
    """[n] the highest of the noisy scores, of those that are no lower than floors [n]."""
    scores = scores_of(x, noise.temperature)
    ids = torch.arange(x.shape[1], device=x.device)[None]
    noisy = scores.double() + gumbel_reference(noise.seeds, noise.positions, ids)
    if floors is not None:
        noisy = noisy.masked_fill_(scores < floors[:, None], float("-inf"))
    return noisy.argmax(1)


# ---- draws that have to look at everything ---------------------------------------------------------------------------


def lowest(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, wide: Tensor) -> Tensor:
    """fp32 [n]: the lowest score (after the temperature) that top-k and top-p leave, of the draws where `wide`.

    logits fp32 [n, W]; temperature and top_p fp32, top_k int64 (0 = all), wide bool: [n]. Elsewhere it is undefined.
    """
    if _fast(logits):
        from . import sampling_tail_triton

        return sampling_tail_triton.lowest(logits, temperature, top_k, top_p, wide)
    return lowest_reference(logits, temperature, top_k, top_p)


def lowest_reference(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The definition in plain torch, which sorts."""
    values = scores_of(logits, temperature).sort(descending=True).values
    last = torch.where(top_k == 0, values.shape[1], top_k).clamp(max=values.shape[1])[:, None] - 1
    stays = values >= values.gather(1, last)
    probabilities = values.masked_fill(~stays, float("-inf")).softmax(-1)
    higher = probabilities.cumsum(1) - probabilities  # of all that come before it
    stays &= (higher < top_p[:, None]) | (top_p[:, None] >= 1)
    stays[:, 0] = True  # the best always stays
    return values.masked_fill(~stays, float("inf")).amin(1)


def draw_above(logits: Tensor, floors: Tensor, noise: Noise, wide: Tensor) -> Tensor:
    """int64 [n]: drawn from the scores that are no lower than floors [n], where `wide`; elsewhere it is undefined."""
    if _fast(logits):
        from . import sampling_tail_triton

        return sampling_tail_triton.draw_above(logits, floors, noise, wide)
    return _winner(logits, noise, floors)

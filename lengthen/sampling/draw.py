"""From logits to a token, as Hugging Face's processors and vLLM have it, for many rows at once and without a generator.

fp32 logits, repetition penalty over distinct ids, temperature, top-k (ties at the edge stay), top-p, draw. The draw is
the argmax of logits plus Gumbel noise, which follows softmax(logits) exactly; the noise is a hash of (seed, position,
token id), so a row's token does not depend on which rows are beside it.

n rows, V vocabulary, W distinct ids seen, C candidates.
"""

import torch
from torch import Tensor

CANDIDATES = 64  # highest logits looked at for a draw; top-k above this (or off) sorts the whole vocabulary


def penalise(logits: Tensor, seen: Tensor, counts: Tensor, penalty: Tensor) -> None:
    """Repetition penalty, in place: logits [n, V] fp32, seen [n, W] ids, of which the first counts [n] are valid.

    They are distinct. Whatever stands behind them counts as the row's first one: the same value is written again.
    """
    valid = torch.arange(seen.shape[1], device=seen.device) < counts[:, None]
    seen = torch.where(valid, seen, seen[:, :1])
    values = logits.gather(1, seen)
    factor = penalty[:, None]
    changed = torch.where(values > 0, values / factor, values * factor)
    logits.scatter_(1, seen, torch.where(counts[:, None] > 0, changed, values))


def gumbel(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise, fp64 [n, C], a pure function of seeds [n], positions [n] and token ids [n, C], all int64.

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


def top_candidates(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The CANDIDATES highest logits of each row and their ids, descending: [n, C] each. Which of equal ones is open.

    A plain topk over V = 49,152 costs a CPU as much as a tenth of the model. The maxima of V/64 blocks come first:
    the C highest logits lie in the C blocks with the highest maxima.
    """
    n, V = logits.shape
    if V % CANDIDATES or V < CANDIDATES**2:
        return logits.topk(min(CANDIDATES, V))
    blocks = logits.view(n, CANDIDATES, V // CANDIDATES)  # block j = ids j, j + V/64, ...: a fast vertical maximum
    columns = blocks.amax(1).topk(CANDIDATES).indices  # [n, C]
    few = blocks.gather(2, columns[:, None].expand(n, CANDIDATES, CANDIDATES)).flatten(1)
    values, at = few.topk(CANDIDATES)
    return values, columns.gather(1, at & CANDIDATES - 1) + (at >> CANDIDATES.bit_length() - 1) * (V // CANDIDATES)


def draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """One token per row, [n] int64. logits [n, V] fp32, penalised; the others [n], temperature, top_p fp32."""
    greedy = (temperature < 1e-5) | (top_k == 1)
    if greedy.all():
        return logits.argmax(-1)
    V = logits.shape[1]
    values, ids = top_candidates(logits)
    scores, kept, whole = keep(values, temperature, top_k, top_p)
    short = ~whole & ~greedy & (values.shape[1] < V)
    tokens = ids.gather(1, race(scores, kept, ids, seeds, positions))[:, 0]
    for few in short.nonzero()[:, 0].split(32):  # rare: top-k off or very large, or more than 64 ties
        values, ids = logits[few].sort(descending=True)
        scores, kept, _ = keep(values, temperature[few], top_k[few], top_p[few])
        tokens[few] = ids.gather(1, race(scores, kept, ids, seeds[few], positions[few]))[:, 0]
    return torch.where(greedy, logits.argmax(-1), tokens) if greedy.any() else tokens


def keep(values: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k, then top-p, on values [n, C], descending.

    Returns the scores behind the temperature, which of them stay, and [n] whether top-k left nothing but candidates:
    not so if the lowest candidate ties with the k-th (or top-k is off), for then others like it were never looked at.
    """
    C = values.shape[1]
    scores = values / temperature.clamp(min=1e-5)[:, None]
    last = torch.where(top_k == 0, C, top_k).clamp(max=C)[:, None] - 1
    kept = scores >= scores.gather(1, last)  # `>=`: ties at the edge stay
    whole = ~kept[:, -1]
    # Hugging Face sums from the least likely up and removes while the sum is <= 1 - p; the best always stays.
    probabilities = scores.masked_fill(~kept, float("-inf")).softmax(-1)
    tail = probabilities.flip(1).cumsum(1).flip(1)
    nucleus = (tail > 1 - top_p[:, None]) | (top_p[:, None] >= 1)
    nucleus[:, 0] = True
    return scores, kept & nucleus, whole


def race(scores: Tensor, kept: Tensor, ids: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """The Gumbel-max draw from softmax(scores) over the kept: column index [n, 1]."""
    noisy = scores.double() + gumbel(seeds, positions, ids)
    return noisy.masked_fill_(~kept, float("-inf")).argmax(1, keepdim=True)

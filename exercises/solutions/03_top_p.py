"""The proof: log p + Gumbel noise is minus the logarithm of an exponential waiting time with rate p. Of several such
times the smallest belongs to token i with probability p_i / sum p.
"""

import torch
from torch import Tensor


def penalise(logits: Tensor, seen: list[int], penalty: float) -> Tensor:
    index = torch.tensor(sorted(set(seen)))
    values = logits[index]
    logits[index] = torch.where(values > 0, values / penalty, values * penalty)
    return logits


def probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    scores = logits / temperature
    if top_k:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], float("-inf"))
    p = scores.softmax(-1)
    if top_p < 1:
        order = p.argsort()  # the least likely first
        gone = p[order].cumsum(0) <= 1 - top_p
        gone[-1] = False
        scores[order[gone]] = float("-inf")
    return scores.softmax(-1)


def draw(logits: Tensor, temperature: float, top_k: int, top_p: float, uniform: Tensor) -> int:
    noise = -torch.log(-torch.log(uniform.double()))
    return int((probabilities(logits, temperature, top_k, top_p).double().log() + noise).argmax())

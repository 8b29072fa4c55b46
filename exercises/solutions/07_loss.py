"""-log softmax_t = log sum_j e^(z_j) - z_t = log(1 + S): near p = 1 nothing is subtracted from something as large.
Relative to r: with o = z_t - r, loss = log(e^o + S) - o and dh = (U - S W_t) / (e^o + S), U and S relative to r.
"""

import torch
from torch import Tensor


def relative_to(r: Tensor, zt: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, tile: int):
    S, U = torch.zeros_like(zt), torch.zeros_like(hidden)
    for start in range(0, len(weight), tile):
        W = weight[start : start + tile]
        E = (hidden @ W.T - r[:, None]).exp()
        inside = (targets >= start) & (targets < start + len(W))
        E[inside.nonzero()[:, 0], targets[inside] - start] = 0
        S += E.sum(1)
        U += E @ W
    offset = zt - r
    total = offset.exp() + S
    return torch.log1p(torch.expm1(offset) + S) - offset, (U - S[:, None] * weight[targets]) / total[:, None]

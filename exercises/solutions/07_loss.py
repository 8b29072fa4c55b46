"""loss = -log softmax_t = log sum_j e^(z_j) - z_t = log(1 + S). With p = softmax, dloss/dz_j = p_j for j != t, which is
E_j / (1 + S), and p_t - 1 = -S / (1 + S): times W_j and added up that is dh. Near p_t = 1, S is tiny and log1p keeps
its digits, where logsumexp(z) - z_t is the difference of two nearly equal numbers.

Relative to r, with o = z_t - r: the 1 becomes e^o, so loss = log(e^o + S) - o and dh = (U - S W_t) / (e^o + S). e^o + S
is 1 + (expm1(o) + S): for r = z_t that is log1p(S) again.
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

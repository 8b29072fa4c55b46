"""Parts are put together as pages are: each is multiplied by e^(its top - the largest top). A part without a key has
the top -inf, and its factor is 0.
"""

import torch
from torch import Tensor


def partial(q: Tensor, keys: Tensor, values: Tensor, table: list[int], first: int, length: int, scale: float):
    (Hq, D), (Hkv, S) = q.shape, keys.shape[1:3]
    grouped = q.view(Hkv, Hq // Hkv, D)
    acc = torch.zeros_like(grouped)
    top = torch.full((Hkv, Hq // Hkv), float("-inf"))
    total = torch.zeros_like(top)
    for nth, page in enumerate(table):
        count = min(S, length - first - nth * S)
        if count <= 0:
            break
        k, v = keys[page, :, :count], values[page, :, :count]  # [Hkv, count, D]
        scores = grouped @ k.transpose(1, 2) * scale  # [Hkv, G, count]
        higher = torch.maximum(top, scores.amax(-1))
        shrink = (top - higher).exp()
        terms = (scores - higher[..., None]).exp()
        total = total * shrink + terms.sum(-1)
        acc = acc * shrink[..., None] + terms @ v
        top = higher
    return acc.reshape(Hq, D), top.flatten(), total.flatten()


def join(parts) -> Tensor:
    acc, top, total = (torch.stack(tensors) for tensors in zip(*parts, strict=True))  # [n, Hq, D], [n, Hq], [n, Hq]
    factor = (top - top.amax(0)).exp()
    return (factor[..., None] * acc).sum(0) / (factor * total).sum(0)[:, None]

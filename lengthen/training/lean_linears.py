"""Linear layers with one input, for the memory-lean layer: products and gradients by hand, LoRA inside.

    y_i = x W_i^T + b_i + z_i B_i^T        z = drop(x) A^T

W is frozen, so there is no dW. 4-bit weights are dequantised once per layer and pass. A holds the A of all layers that
read x (three for q, k, v), so that x is read once; one dropout mask serves them all.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lengthen.models.exact import dense_weight
from lengthen.models.lora import LoraLinear

MASK_ROWS = 1024  # dropout masks are drawn by blocks of rows, so that tiles of any size see the same ones

# R rows of a tile: tokens; r the sum of the ranks.


class Linears:
    """They are opened for one pass: dense weights, LoRA's matrices in the dtype of x, B scaled already."""

    def __init__(self, modules: Sequence[nn.Module], dtype: torch.dtype):
        self.bases: list[Any] = [m.base if isinstance(m, LoraLinear) else m for m in modules]
        self.weights = [dense_weight(base).to(dtype) for base in self.bases]
        self.loras = [(i, m) for i, m in enumerate(modules) if isinstance(m, LoraLinear)]
        width = self.bases[0].in_features
        As: list[Tensor] = [m.A for _, m in self.loras]
        self.A = torch.cat(As).to(dtype) if As else self.weights[0].new_empty(0, width)  # [r, in]
        self.B = [(m.B * m.scale).to(dtype) for _, m in self.loras]  # [out, rank] each
        ends = [0]
        for _, m in self.loras:
            ends.append(ends[-1] + m.rank)
        self.columns = [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]  # of z, for each layer with LoRA
        self.dA: Tensor | None = None  # fp32 (fp64) like A and B
        self.dB: list[Tensor] = []  # transposed, [rank, out]: with the few rows first, a third of the time on a CPU

    def __call__(
        self,
        x: Tensor,
        mask: Tensor | None,
        residual: Tensor | None = None,
        out: Sequence[Tensor | None] | None = None,
    ) -> list[Tensor]:
        """x [R, in] -> [R, out] each, written into `out` where given; `residual` [R, out] is added to each."""
        ys = []
        for i, (weight, base) in enumerate(zip(self.weights, self.bases, strict=True)):
            into = None if out is None else out[i]
            start = base.bias if residual is None else residual
            turned = weight.t()
            if start is None:
                y = torch.mm(x, turned, out=into)
            else:
                y = torch.addmm(start.to(x.dtype), x, turned, out=into)
            if residual is not None and base.bias is not None:
                y += base.bias
            ys.append(y)
        if self.loras:
            z = _dropped(x, mask) @ self.A.t()  # [R, r]
            for (i, _), B, columns in zip(self.loras, self.B, self.columns, strict=True):
                ys[i].addmm_(z[:, columns], B.t())
        return ys

    def rank_gradient(self, dys: Sequence[Tensor]) -> Tensor | None:
        """dy_i [R, out] each -> dz [R, r]; None without LoRA."""
        if not self.loras:
            return None
        dz = dys[0].new_empty(len(dys[0]), len(self.A))
        for (i, _), B, columns in zip(self.loras, self.B, self.columns, strict=True):
            dz[:, columns] = dys[i] @ B
        return dz

    def input_gradient(
        self, dys: Sequence[Tensor], dz: Tensor | None, mask: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        """-> dx [R, in]."""
        dx = torch.mm(dys[0], self.weights[0], out=out)
        for dy, weight in zip(dys[1:], self.weights[1:], strict=True):
            dx.addmm_(dy, weight)
        if dz is not None:
            dx = dx.addmm_(dz, self.A) if mask is None else dx.addcmul_(dz @ self.A, mask)
        return dx

    def adapter_gradient(self, x: Tensor, dys: Sequence[Tensor], dz: Tensor | None, mask: Tensor | None) -> None:
        """Adds this tile's share to dA and dB."""
        if dz is None:
            return
        if self.dA is None:
            self.dA = torch.zeros_like(self.A, dtype=self.loras[0][1].A.dtype)
            self.dB = [torch.zeros_like(m.B.t(), memory_format=torch.contiguous_format) for _, m in self.loras]
        dropped = _dropped(x, mask)
        z = dropped @ self.A.t()
        _add_outer(self.dA, dz, dropped)
        for (i, _), dB, columns in zip(self.loras, self.dB, self.columns, strict=True):
            _add_outer(dB, z[:, columns], dys[i])

    def gradients(self) -> list[Tensor]:
        """[dA, dB] of each layer that has LoRA, in their order."""
        if self.dA is None:
            return []
        matrices = []
        for (_, m), dB, columns in zip(self.loras, self.dB, self.columns, strict=True):
            matrices += [self.dA[columns], dB.mul_(m.scale).t()]
        return matrices


def _add_outer(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [m, n] += a^T b for a [R, m], b [R, n]: tiles add up in the dtype of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a.t(), b)
    elif a.is_cuda:
        total += torch.mm(a.t(), b, out_dtype=total.dtype)
    else:
        total.addmm_(a.t().to(total.dtype), b.to(total.dtype))


def _dropped(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def dropout_mask(seed: int, first: int, rows: int, width: int, share: float, like: Tensor) -> Tensor:
    """[rows, width] for the tokens from `first` on: 0 for a share of them, 1 / (1 - share) for the others."""
    blocks = []
    for block in range(first // MASK_ROWS, -(-(first + rows) // MASK_ROWS)):
        generator = torch.Generator(like.device).manual_seed(seed + 7919 * block)
        empty = torch.empty(MASK_ROWS, width, dtype=like.dtype, device=like.device)
        blocks.append(empty.bernoulli_(1 - share, generator=generator))
    start = first % MASK_ROWS
    return torch.cat(blocks)[start : start + rows] / (1 - share)

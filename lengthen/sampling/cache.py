"""The paged KV cache: pages with their tensors, which kernels read through block tables (sampling/attend.py).

Pages may lie anywhere, be shared with the prefix cache, and hold anything before their use, also nan. On a GPU keys and
values may be fp8. The memory is num_pages * page_tokens * bytes_per_token; a CPU's system commits it only when touched.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention import Pages
from lengthen.models.upload import upload
from lengthen.records import UserError
from lengthen.sampling import attend
from lengthen.sampling.pages import Chunk, PagePool

FP8 = torch.float8_e4m3fn


@dataclass
class LayerShape:
    """What one layer hands to attention: observed by running the model once (sampling/hook.py)."""

    heads: int  # key heads
    key_dim: int
    value_dim: int
    window: int  # 0 = sees everything


Shapes = Mapping[int, LayerShape]  # by layer


class PagedCache(PagePool):
    """`layers[layer]` are the keys [P, Hkv, S, D] and values [P, Hkv, S, Dv] of a layer, with their scales for fp8."""

    def __init__(
        self, shapes: Shapes, num_pages: int, page_tokens: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(num_pages, page_tokens)
        if dtype == FP8 and not on_gpu(device):  # torch's products on a CPU multiply no fp8
            raise UserError("keys and values in fp8 are for a GPU, this is a CPU", "--kv-cache auto")
        self.device, self.shapes, self.dtype = device, shapes, dtype
        self.layers = {layer: self._allocate(shape) for layer, shape in shapes.items()}

    def _allocate(self, shape: LayerShape) -> Pages:
        P, H, S, device = self.num_pages, shape.heads, self.page_tokens, self.device
        pools = [torch.empty(P, H, S, dim, device=device, dtype=self.dtype) for dim in (shape.key_dim, shape.value_dim)]
        scales = [torch.empty(P, H, S, device=device) for _ in pools] if self.dtype == FP8 else []
        return Pages(*pools, *scales)

    def batch(self, decode: Sequence[Chunk], prefill: Sequence[Chunk]) -> attend.TableBatch:
        """The batch of decoding texts, each with its newest token and its drafts, followed by prefill chunks."""
        return attend.make_batch(
            self.layers, self.page_tokens, self.device, decode, prefill, padded=on_gpu(self.device)
        )

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Page contents, all layers, from one page to another."""
        if not source:
            return
        here, there = upload([list(target), list(source)], torch.long, self.device)
        for layer in self.layers:
            for pool in self._tensors(layer):
                pool[here] = pool[there]  # a gather, then a scatter: overlapping pages are safe

    def _tensors(self, layer: int) -> list[Tensor]:
        """All that a layer's pages hold, page by page; fp8 as bytes, which is what torch can index."""
        pools = [pool for pool in self.layers[layer] if pool is not None]
        return [pool.view(torch.uint8) if pool.dtype == FP8 else pool for pool in pools]

    def close(self) -> None:
        self.layers.clear()  # the tensors go with the last reference


def on_gpu(device: torch.device) -> bool:
    """Whether a GPU's code serves a device: graphs, its layers, fp8. Tests say so of a CPU."""
    return device.type == "cuda"


def least_page_tokens(device: torch.device) -> int:
    """The fewest tokens in a page: 16 are the least block of a matrix product in a GPU's kernels."""
    return 16 if on_gpu(device) else 4


def bytes_per_token(shapes: Shapes, dtype: torch.dtype) -> int:
    """Of keys and values in all layers; fp8 has two fp32 scales per token and key head beside them."""
    scales = 2 * torch.float32.itemsize if dtype == FP8 else 0
    return sum(s.heads * ((s.key_dim + s.value_dim) * dtype.itemsize + scales) for s in shapes.values())

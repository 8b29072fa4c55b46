"""The paged KV cache: one interface, two backends, chosen once by device.

StreamedCache     On a CPU. Attention streams the pages (sampling/attend_cpu.py), so they are handed out lowest first,
                  moved together when holes appear, and have one owner each; the prefix cache has copies.
BlockTableCache   On a GPU. Kernels read pages through block tables (sampling/attend_gpu.py), so pages may lie anywhere
                  and be shared with the prefix cache; keys and values may be fp8, decoding captured in CUDA graphs.

The memory is num_pages * page_tokens * bytes_per_token; on a CPU the system commits it only when touched.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention import Pages
from lengthen.models.upload import upload
from lengthen.records import UserError
from lengthen.sampling import attend_cpu, attend_gpu
from lengthen.sampling.batch import Batch
from lengthen.sampling.pages import Chunk, PagePool
from lengthen.sampling.prefix_cache import CopiedPages, PrefixPages, SharedPages

FP8 = torch.float8_e4m3fn
CLEARED = 16  # pages that are zeroed at a time before their first use


@dataclass
class LayerShape:
    """What one layer hands to attention: observed by running the model once (sampling/hook.py)."""

    heads: int  # key heads
    key_dim: int
    value_dim: int
    window: int  # 0 = sees everything


Shapes = Mapping[int, LayerShape]  # by layer


class PagedCache(PagePool, ABC):
    """Pages with their tensors: layers[layer] are the keys and values of a layer. See the module for the backends."""

    least_page_tokens: int

    def __init__(
        self, shapes: Shapes, num_pages: int, page_tokens: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(num_pages, page_tokens)
        self.device, self.shapes, self.dtype = device, shapes, dtype
        self.layers = {layer: self._allocate(shape) for layer, shape in shapes.items()}

    @abstractmethod
    def _allocate(self, shape: LayerShape) -> Pages:
        """The pages of one layer, their contents undefined."""

    @abstractmethod
    def batch(self, decode: Sequence[Chunk], prefill: Sequence[Chunk]) -> Batch:
        """The batch of decoding texts, each with its newest token and its drafts, followed by prefill chunks."""

    @abstractmethod
    def prefix_pages(self, num_pages: int) -> PrefixPages:
        """Where the prefix cache keeps at most so many pages."""

    def compact(self, tables: Sequence[list[int]]) -> None:
        """Called before a pass with the block tables of all texts; may move pages, and edits the tables in place."""

    def copy(self, source: Sequence[int], target: Sequence[int], of: PagePool | None = None) -> None:
        """Page contents, all layers, from one page to another; `of` is the pool of the source where it is not this."""
        theirs = of or self
        assert isinstance(theirs, PagedCache)
        if not source:
            return
        here, there = upload([list(target), list(source)], torch.long, self.device)
        for layer in self.layers:
            for ours, others in zip(self._tensors(layer), theirs._tensors(layer), strict=True):
                ours[here] = others[there]  # a gather, then a scatter: overlapping pages are safe

    def _tensors(self, layer: int) -> list[Tensor]:
        """All that a layer's pages hold, page by page; fp8 as bytes, which is what torch can index."""
        pools = [pool for pool in self.layers[layer] if pool is not None]
        return [pool.view(torch.uint8) if pool.dtype == FP8 else pool for pool in pools]

    def close(self) -> None:
        self.layers.clear()  # the tensors go with the last reference


class StreamedCache(PagedCache):
    """Keys [P, Hkv, S, D], values [P, Hkv, S, Dv]. Pages below `clean` hold finite numbers: where all are streamed, a
    masked nan would still poison a sum."""

    least_page_tokens = 4  # small, so that the probe crosses pages
    clean = 0

    def _allocate(self, shape: LayerShape) -> Pages:
        if self.dtype == FP8:  # its products are computed by torch on a CPU, which multiplies no fp8
            raise UserError("keys and values in fp8 are for a GPU, this is a CPU", "--kv-cache auto")
        P, S, device, dtype = self.num_pages, self.page_tokens, self.device, self.dtype
        keys = torch.empty(P, shape.heads, S, shape.key_dim, device=device, dtype=dtype)
        return Pages(keys, torch.empty(P, shape.heads, S, shape.value_dim, device=device, dtype=dtype))

    def take(self) -> int:
        page = super().take()  # the lowest free one, so what is clean is a range from 0
        if page >= self.clean:
            end = min(self.num_pages, page + CLEARED)
            for pages in self.layers.values():
                pages.keys[self.clean : end].zero_()
                pages.values[self.clean : end].zero_()
            self.clean = end
        return page

    def batch(self, decode: Sequence[Chunk], prefill: Sequence[Chunk]) -> attend_cpu.StreamedBatch:
        return attend_cpu.make_batch(self.layers, self.page_tokens, self.device, decode, prefill)

    def prefix_pages(self, num_pages: int) -> CopiedPages:
        copies = StreamedCache(self.shapes, num_pages, self.page_tokens, self.device, self.dtype)
        return CopiedPages(copies, self)

    def compact(self, tables: Sequence[list[int]]) -> None:
        """Moves pages down when more than an eighth of the streamed range is holes."""
        used = sorted(page for table in tables for page in table)  # one owner each: no page comes twice
        # Up to there masking the holes costs less than moving pages; the +1 spares pools of a few pages.
        if not used or used[-1] + 1 <= len(used) + len(used) // 8 + 1:
            return
        holes = sorted(set(range(len(used))) - set(used))
        high = [page for page in used if page >= len(used)]  # as many as there are holes
        self.copy(high, holes)
        moved = dict(zip(high, holes, strict=True))
        for table in tables:
            table[:] = [moved.get(page, page) for page in table]
        self.free = list(range(len(used), self.num_pages))  # sorted, so a heap
        self.holders = [int(page < len(used)) for page in range(self.num_pages)]


class BlockTableCache(PagedCache):
    """Keys [P, Hkv, S, D], values [P, Hkv, S, Dv], as kernels/attention.py wants them, with its scales for fp8. Pages
    may hold anything before their use, also nan."""

    least_page_tokens = 16  # of a kernel: the least block of a matrix product

    def _allocate(self, shape: LayerShape) -> Pages:
        P, H, S, device = self.num_pages, shape.heads, self.page_tokens, self.device
        pools = [torch.empty(P, H, S, dim, device=device, dtype=self.dtype) for dim in (shape.key_dim, shape.value_dim)]
        scales = [torch.empty(P, H, S, device=device) for _ in pools] if self.dtype == FP8 else []
        return Pages(*pools, *scales)

    def batch(self, decode: Sequence[Chunk], prefill: Sequence[Chunk]) -> attend_gpu.TableBatch:
        return attend_gpu.make_batch(self.layers, self.page_tokens, self.device, decode, prefill)

    def prefix_pages(self, num_pages: int) -> SharedPages:
        return SharedPages(self, num_pages)


def backend(device: torch.device) -> type[PagedCache]:
    """The cache for a device. Tests put the other one in its place."""
    return BlockTableCache if device.type == "cuda" else StreamedCache


def make_cache(
    shapes: Shapes, num_pages: int, page_tokens: int, device: torch.device, dtype: torch.dtype
) -> PagedCache:
    """`page_tokens`: 0 = the fewest that the backend takes. Raises UserError for fp8 on a CPU."""
    kind = backend(device)
    return kind(shapes, num_pages, page_tokens or kind.least_page_tokens, device, dtype)


def bytes_per_token(shapes: Shapes, dtype: torch.dtype) -> int:
    """Of keys and values in all layers; fp8 has two fp32 scales per token and key head beside them."""
    scales = 2 * torch.float32.itemsize if dtype == FP8 else 0
    return sum(s.heads * ((s.key_dim + s.value_dim) * dtype.itemsize + scales) for s in shapes.values())

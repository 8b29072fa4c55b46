"""Activations that wait for the backward pass in host memory, instead of on the device.

Host memory is taken in slabs of 16 MiB, pinned where the machine allows it, and reused from step to step. On CUDA all
copies run on a stream of their own, and two layers' tensors are on the device at a time (Budget.activations counts with
both): in the forward pass the newest, and the one before it while it is copied out; in the backward pass the one that
is used, and the one before it while it is copied back. So the last two layers, with which the backward pass begins, are
still there and are not copied back.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SLAB = 16 << 20  # bytes of host memory taken at a time


@dataclass
class Offloaded:
    """Tensors of one layer that wait in host memory."""

    like: list[tuple[torch.Size, torch.dtype]]
    slabs: list[Tensor]
    before: "weakref.ref[Offloaded] | None"  # what the backward pass will want next
    here: Sequence[Tensor] | None = None  # on the device: not yet given up, or back again
    made: Any = None  # event: they are computed
    copied: Any = None  # event: the newest copy, in either direction, is done


class Host:
    """The slabs, and the copies out and back. limit: bytes of host memory, 0 = as many as it takes."""

    def __init__(self, device: torch.device, limit: int = 0):
        self.device, self.limit = device, limit
        self.free: list[Tensor] = []
        self.num_slabs = 0  # free or in use
        self.full = False  # the limit was reached: some tensors stayed on the device
        self.pinned = device.type == "cuda"
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.last: weakref.ref[Offloaded] | None = None

    @property
    def bytes(self) -> int:
        return self.num_slabs * SLAB

    def put(self, tensors: Sequence[Tensor]) -> Offloaded | None:
        """Copies them out; None where the limit leaves no room: they stay where they are."""
        slabs = self._take(-(-sum(map(_bytes, tensors)) // SLAB))
        if slabs is None:
            self.full = True
            return None
        stored = Offloaded([(t.shape, t.dtype) for t in tensors], slabs, self.last)
        weakref.finalize(stored, self._release, slabs)  # of a forward pass that has no backward pass
        self.last = weakref.ref(stored)
        if self.stream is None:
            _copy(tensors, slabs, out=True)
            return stored
        compute = torch.cuda.current_stream(self.device)
        stored.here, stored.made = tensors, compute.record_event()
        before = stored.before() if stored.before else None
        if before is not None and before.here is not None:  # no longer the newest
            self.stream.wait_event(before.made)
            with torch.cuda.stream(self.stream):
                _copy(before.here, before.slabs, out=True)
                before.copied = self.stream.record_event()
            earlier = before.before() if before.before else None
            if earlier is not None and earlier.here is not None:
                compute.wait_event(earlier.copied)  # its memory may be written to from here on
                earlier.here = None
        return stored

    def get(self, stored: Offloaded) -> list[Tensor]:
        """The tensors, on the device again, once; the copy of the layer before starts."""
        assert stored.slabs, "a second backward pass through an offloaded layer"
        self._fetch(stored)
        self.last = stored.before
        if stored.copied is not None:  # also on its way out: what is used next may be overwritten
            torch.cuda.current_stream(self.device).wait_event(stored.copied)
        if self.stream is not None and stored.before and (before := stored.before()):
            self._fetch(before)
        self._release(stored.slabs)  # whatever is written to them next is copied by the same stream, so later
        tensors, stored.here = list(stored.here or ()), None
        return tensors

    def settle(self) -> None:
        """Before a step: no copy of the last one is pending, even where it broke off (out of memory)."""
        if self.stream is not None:
            self.stream.synchronize()
        self.last = None

    def _fetch(self, stored: Offloaded) -> None:
        if stored.here is not None:
            return
        stored.here = [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in stored.like]
        if self.stream is None:
            _copy(stored.here, stored.slabs, out=False)
            return
        # The memory may still be in use by what was queued before: the copy waits for that, not for what comes.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            _copy(stored.here, stored.slabs, out=False)
            stored.copied = self.stream.record_event()

    def _take(self, count: int) -> list[Tensor] | None:
        missing = count - len(self.free)
        if self.limit and (self.num_slabs + max(0, missing)) * SLAB > self.limit:
            return None
        for _ in range(missing):
            self.free.append(self._new_slab())
        return [self.free.pop() for _ in range(count)]

    def _release(self, slabs: list[Tensor]) -> None:
        self.free += slabs
        slabs.clear()

    def _new_slab(self) -> Tensor:
        self.num_slabs += 1
        if self.pinned:
            try:
                return torch.empty(SLAB, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:  # the system pins no more (WSL2 allows only a share of the memory): copies get slower
                self.pinned = False
        return torch.empty(SLAB, dtype=torch.uint8)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.itemsize


def _copy(tensors: Sequence[Tensor], slabs: Sequence[Tensor], out: bool) -> None:
    """Tensors <-> slabs, as one run of bytes."""
    position = 0
    for tensor in tensors:
        rest = tensor.view(-1).view(torch.uint8)
        while len(rest):
            slab, offset = divmod(position, SLAB)
            chunk = rest[: SLAB - offset]
            stored = slabs[slab][offset : offset + len(chunk)]
            source, target = (chunk, stored) if out else (stored, chunk)
            target.copy_(source, non_blocking=True)
            position, rest = position + len(chunk), rest[len(chunk) :]

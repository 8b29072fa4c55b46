"""How fast the sampler is, beside how fast memory would let it be.

Decoding is bound by reading: every pass reads all weights once, and the keys and values of every text in it. So the
bytes that passes have to read, over the seconds they took, are a share of the memory's bandwidth (the roofline), and
that share says the same on a laptop and on an H100, where tokens per second do not. Passes over prompts or over many
rows are bound by arithmetic instead: their share is low without anything being wrong.
"""

import functools
import math
import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lengthen.models.cards import card_named

MEMORY = 30.0  # seconds; how far back the rates look


@functools.cache
def bandwidth(device: torch.device) -> float:
    """Bytes per second of the device's memory: from the table, else of the best of five copies (read and written)."""
    if device.type == "cuda":
        card = card_named(torch.cuda.get_device_name(device))
        if card and card.bandwidth:
            return 1e12 * card.bandwidth
    # Timed: a card that the table does not know, or a CPU, whose bandwidth depends on its memory modules.
    source = torch.ones(1 << 24, device=device)  # 64 MB: beyond a CPU's caches
    target, best = torch.empty_like(source), math.inf
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * source.numel() * source.itemsize / best  # read once, written once


def weight_bytes(model: PreTrainedModel) -> int:
    """What one pass reads of the weights: all but the input embedding, of which it looks up a few rows."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    own = {id(p): p.numel() * p.itemsize for p in model.parameters()}
    # A tied table is the head, too, which is read whole.
    if getattr(head, "weight", None) is not table.weight:
        own.pop(id(table.weight), None)  # looked up, not read
    return sum(own.values())


class Meter:
    """Running rates over the last half minute or so: bytes and tokens per second."""

    def __init__(self) -> None:
        self.seconds = self.bytes = self.tokens = 0.0

    def add(self, seconds: float, read: int, tokens: float) -> None:
        """A step, or several: how long it took, bytes it had to read, tokens it wrote."""
        fade = math.exp(-seconds / MEMORY)  # rates look back MEMORY seconds, however long a step is
        self.seconds = self.seconds * fade + seconds
        self.bytes = self.bytes * fade + read
        self.tokens = self.tokens * fade + tokens

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def roofline(self, device: torch.device) -> float:
        """Share of the memory's bandwidth, 0 to 1."""
        return self.bytes / self.seconds / bandwidth(device) if self.seconds else 0.0


@dataclass(frozen=True)
class Progress:
    """Where a sampler stands. `str()` of it is short enough for a progress line, which has its own time left."""

    tokens_per_second: float
    roofline: float  # share of the memory's bandwidth, 0 to 1
    rows: int
    kv: float  # share of the pages in use
    preemptions: int
    accepted: float  # accepted draft tokens, a step

    def __str__(self) -> str:
        parts = [f"{self.tokens_per_second:.0f} tokens/s ({self.roofline:.0%} of the memory's speed)"]
        parts += [f"{self.rows} texts at once", f"KV cache {self.kv:.0%} full"]
        if self.preemptions:
            parts.append(f"{self.preemptions} preempted")
        if self.accepted >= 0.05:
            parts.append(f"{self.accepted:.1f} draft tokens accepted per step")
        return ", ".join(parts)

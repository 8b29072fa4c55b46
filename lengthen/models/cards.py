"""What the machine can do: the GPUs' data sheets in one table, this computer's memory, and running out of it.

No torch here.
"""

import os
from pathlib import Path, PurePosixPath
from typing import NamedTuple


class Card(NamedTuple):
    """One kind of GPU, by its maker's data sheet; 0 = not given there."""

    tflops: float  # 1e12 FLOP/s of dense bf16 products with fp32 accumulation
    gigabytes: float  # 1e9 bytes of memory
    bandwidth: float  # 1e12 bytes/s of that memory


# By a part of the name that torch.cuda.get_device_name gives; the first match counts.
CARDS = {
    "B200": Card(2250, 180, 8.0),
    "H200": Card(989, 141, 4.8),
    "H100 PCIe": Card(756, 80, 2.0),
    "H100": Card(989, 80, 3.35),
    "A100-SXM4-80GB": Card(312, 80, 2.039),
    "A100 80GB": Card(312, 80, 1.935),
    "A100": Card(312, 40, 1.555),
    "L40S": Card(362, 48, 0.864),
    "L40": Card(181, 48, 0.864),
    "RTX 6000 Ada": Card(364, 48, 0.96),
    "A6000": Card(155, 48, 0.768),
    "RTX 5090": Card(210, 32, 1.792),
    "RTX 4090": Card(165, 24, 1.008),
    "RTX 3090": Card(71, 24, 0.936),
    "A10": Card(125, 24, 0.6),
    "L4": Card(121, 24, 0.3),
    "RTX 4080": Card(98, 16, 0.717),
    "V100": Card(0, 32, 0.9),
    "T4": Card(0, 16, 0.32),
    "RTX 3060": Card(25, 12, 0.36),
}


def card_named(name: str) -> Card | None:
    """The table's entry for a CUDA device name, None for a card it does not know."""
    return next((card for part, card in CARDS.items() if part in name), None)


def physical_memory() -> int:
    """Bytes of main memory that this process may use: the computer's, or its container's limit."""
    return min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *memory_limits(Path("/")))


def memory_limits(root: Path) -> list[int]:
    """The limits in force in bytes, of our control group and those above it, versions 1 and 2; [2^63] if none."""
    limits = [2**63]
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()  # "0::/a/b", "5:memory:/a/b"
    except OSError:
        groups = []
    for line in [*groups, "0::/", "0:memory:/"]:  # in a container its own group is usually mounted as the root
        _, names, path = line.split(":", 2)
        if names and "memory" not in names.split(","):
            continue
        base, file = ("memory", "memory.limit_in_bytes") if names else (".", "memory.max")
        folder = PurePosixPath(path)
        for group in (folder, *folder.parents):
            try:
                text = (root / "sys/fs/cgroup" / base / str(group).lstrip("/") / file).read_text().strip()
                limits += [int(text)] if text.isdigit() else []  # "max" = none
            except OSError:
                continue
    return limits

"""Always: the r with 2 r^3 >= 1, so the last 1 - (1/2)^(1/3) = 20.6 %. On average the integral of min(1, 2 r^3), 40.5
%. Texts of one length all have r = 1/2: a quarter of them goes.
"""

import hashlib
from collections import Counter


def uniform(seed: int, key: str) -> float:
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") / 2**64


def chances(words: list[int]) -> list[float]:
    rank, longer = {}, 0
    for length, equal in sorted(Counter(words).items(), reverse=True):
        rank[length] = (longer + equal / 2) / len(words)
        longer += equal
    return [min(1.0, 2 * rank[length] ** 3) for length in words]


def length_bias(words: list[int], keys: list[str], seed: int) -> set[int]:
    return {i for i, chance in enumerate(chances(words)) if uniform(seed, keys[i]) < chance}

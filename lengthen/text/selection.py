"""Selection over a whole file: pure functions of their arguments, so that a resumed run decides the same."""

import hashlib
import random
import unicodedata
from collections import Counter

from lengthen.text.words import tokens


def length_bias(words: list[int], keys: list[str], seed: int) -> set[int]:
    """Return the indices to drop so that the longer answers are learnt from (method section 2, rows 1b and 2b).

    With r the rank from the longest (near 0) to the shortest (near 1), an answer goes with probability min(1, 2 r^3):
    the shortest 20.6 % always, 40.5 % on average. r is the middle of the places that answers of equal length share,
    over their number: so equal lengths are treated alike, and few answers are thinned by the same share as many.

    Args:
        words: strict word counts, comparable between languages as characters are not.
        keys: the records' ids; the draw depends on (seed, key) only, not on order.
    """
    assert len(words) == len(keys), (len(words), len(keys))
    counts = Counter(words)
    rank, longer = {}, 0
    for length in sorted(counts, reverse=True):
        rank[length] = (longer + counts[length] / 2) / len(words)
        longer += counts[length]
    answers = enumerate(zip(words, keys, strict=True))
    return {i for i, (length, key) in answers if _uniform(seed, key) < 2 * rank[length] ** 3}


def _uniform(seed: int, key: str) -> float:
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") / 2**64


_PRIME = (1 << 61) - 1
SHINGLE, SIMILAR = 5, 0.6  # words of a shingle; Jaccard similarity from which texts are near-duplicates
NUM_BANDS, BAND_ROWS = 48, 4  # a pair of Jaccard 0.6 shares no band with probability (1 - 0.6^4)^48 = 0.13 %


class NearDuplicates:
    """Texts seen so far; `add` tells whether the next one is new.

    A near-duplicate has the same words as an earlier text, or at least SIMILAR Jaccard similarity of shingles (of
    words, in Chinese of characters). MinHash bands find the candidates in time linear in the number of texts, and an
    exact comparison decides. Refused texts are not remembered.
    """

    def __init__(self) -> None:
        self.seen: list[set[int]] = []
        self.buckets: dict[tuple, list[int]] = {}
        rng = random.Random(0)
        self.hashes = [(rng.randrange(1, _PRIME), rng.randrange(_PRIME)) for _ in range(NUM_BANDS * BAND_ROWS)]

    def add(self, text: str, language: str) -> bool:
        """Remember the text and return True, or return False when it is a near-duplicate of a remembered one."""
        words = tokens(unicodedata.normalize("NFKC", text))
        num_shingles = max(len(words) - SHINGLE + 1, 1)
        shingles = {_hash(words[i : i + SHINGLE]) for i in range(num_shingles)}
        signature = [min((a * value + b) % _PRIME for value in shingles) for a, b in self.hashes]
        bands = [(i, *signature[i : i + BAND_ROWS]) for i in range(0, len(signature), BAND_ROWS)]
        candidates = {index for band in bands for index in self.buckets.get(band, ())}
        if any(_similar(shingles, self.seen[index]) for index in candidates):
            return False
        for band in bands:
            self.buckets.setdefault(band, []).append(len(self.seen))
        self.seen.append(shingles)
        return True


def _similar(a: set[int], b: set[int]) -> bool:
    common = len(a & b)
    return common >= SIMILAR * (len(a) + len(b) - common)


def _hash(words: list[str]) -> int:
    """Stable between processes, unlike hash()."""
    return int.from_bytes(hashlib.blake2b(" ".join(words).encode(), digest_size=7).digest(), "big")

"""Exercise 1, 45 minutes: which answers are learned from?

After the drafts, and again after the extensions, the method throws some texts away: the shorter a text, the likelier it
goes. Rank all n texts from the longest (rank near 0) to the shortest (near 1). Texts of equal length share the middle
of their places: with `longer` texts above them and `equal` texts of that length,

    r = (longer + equal / 2) / n        and a text goes with probability min(1, 2 r^3)

1. On paper first: which share always goes? How many go on average? What happens to 1,000 texts of one length?
2. Write `chances`. Better to sort once than to compare every text with every other one.
3. Write `length_bias`: a text is dropped if its `uniform(seed, key)` is below its probability. This number depends on
   nothing else, so a run that was killed and is resumed decides the same, in whatever order its texts finish.

Leads to: `length_bias` in lengthen/text/selection.py, and `length_bias_drops` in lengthen/stage.py, which calls it.

    python -m pytest -q exercises/01_length_bias.py
"""

import hashlib
import random
import statistics

from lengthen.text import selection


def uniform(seed: int, key: str) -> float:
    """A number in [0, 1) that depends on seed and key alone. Given."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") / 2**64


def chances(words: list[int]) -> list[float]:
    """The probability with which each text is dropped. words: the length of each text, in any order."""
    raise NotImplementedError


def length_bias(words: list[int], keys: list[str], seed: int) -> set[int]:
    """The indices of the texts that are dropped."""
    raise NotImplementedError


# ---------------------------------------------------------------------------------------------------------


def test_equal_lengths_are_treated_alike():
    assert chances([300] * 1000) == [0.25] * 1000  # r = 1/2; the paper's release gives all of them the worst rank
    assert chances([]) == []


def test_the_shortest_fifth_always_goes_and_two_fifths_on_average():
    dropped = chances(random.Random(0).sample(range(100_000), 10_000))
    assert abs(statistics.fmean(p == 1 for p in dropped) - 0.206) < 0.001
    assert abs(statistics.fmean(dropped) - 0.405) < 0.001


def test_it_decides_as_the_project_does():
    rng = random.Random(1)
    for seed in range(20):
        words = [rng.randrange(200, 260) for _ in range(rng.randrange(1, 80))]  # many ties
        keys = [f"{rng.random()}" for _ in words]
        assert length_bias(words, keys, seed) == selection.length_bias(words, keys, seed)

"""Measures of texts and numbers, against cases worked out by hand.   python -m pytest tests/test_measures.py"""

import math
import random
import zlib

import numpy
import pytest

from lengthen.evaluation import measures
from lengthen.text.words import quantile


@pytest.mark.parametrize(
    "x, y, expected",
    [
        ([1, 2, 3, 4, 5], [5, 6, 7, 8, 7], 0.82078268166812329),  # the example of scipy.stats.spearmanr, with a tie
        ([1, 2, 3, 4, 5], [2, 4, 8, 16, 32], 1.0),  # monotone, not linear
        ([1, 2, 3, 4, 5], [9, 7, 5, 3, 1], -1.0),
        ([1, 2, 2, 3, 5], [1, 3, 2, 4, 5], 9.5 / math.sqrt(9.5 * 10)),  # ranks 1 2.5 2.5 4 5 and 1 3 2 4 5, by hand
        ([1, 2, 3, 4], [1, 2, 3, 4], None),  # too few
        ([7, 7, 7, 7, 7], [1, 2, 3, 4, 5], None),  # constant: undefined, not 0
        ([1, 2, 3, 4, 5], [7, 7, 7, 7, 7], None),
        ([], [], None),
    ],
)
def test_spearman(x, y, expected):
    pairs = list(zip(x, y, strict=True))
    assert measures.spearman(pairs) == (None if expected is None else pytest.approx(expected, abs=1e-12))


def test_spearman_without_ties_is_the_textbook_formula():
    rng = random.Random(1)
    x, y = rng.sample(range(1000), 50), rng.sample(range(1000), 50)
    rank = [{v: i for i, v in enumerate(sorted(z))} for z in (x, y)]
    gaps = sum((rank[0][a] - rank[1][b]) ** 2 for a, b in zip(x, y, strict=True))
    pairs = list(zip(x, y, strict=True))
    assert measures.spearman(pairs) == pytest.approx(1 - 6 * gaps / (50 * (50**2 - 1)), abs=1e-12)


def test_spearman_with_many_ties_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    rng = random.Random(2)
    for size in (5, 17, 200):
        pairs = [(rng.randrange(7), rng.randrange(5)) for _ in range(size)]
        want = stats.spearmanr(*zip(*pairs, strict=True)).statistic
        assert measures.spearman(pairs) == pytest.approx(want, abs=1e-12)


def test_ranks_share_ties():
    assert measures.ranks([30, 10, 20, 10, 10]) == [5, 2, 4, 2, 2]


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_quantile_is_numpys(size):
    values = [random.Random(size).randrange(1000) for _ in range(size)]
    for q in (0, 0.25, 0.5, 0.9, 1):
        assert quantile(values, q) == pytest.approx(float(numpy.quantile(values, q)))
    assert measures.median(values) == numpy.median(values)
    assert measures.median([]) is measures.p90([]) is measures.mean([]) is None


@pytest.mark.parametrize(
    "words, required, expected",
    [
        (1000, 1000, 100),
        (2000, 1000, 100 * 2 / 3),  # twice as long: a third of the way to 4 times
        (4000, 1000, 0),
        (9000, 1000, 0),
        (500, 1000, 50),  # half: the required length is twice the written one
        (800, 1000, 87.5),
        (333, 1000, 0),
        (0, 1000, 0),
    ],
)
def test_longbench_score(words, required, expected):
    """The published formula, worked out by hand: its two branches, both zeros, and an empty answer."""
    assert measures.longbench_score(words, required) == pytest.approx(expected, abs=0.2 if words == 333 else 1e-9)


# ---------------------------------------------------------------------------------------------------------
# Repetition


def fresh(start: int, count: int) -> str:
    return " ".join(f"w{i}" for i in range(start, start + count))


LOOP = "the cat sat on the mat and saw the moon"  # ten words, so one 10-gram each time it begins


def test_loops_are_found_in_the_tenths_they_cover():
    half = measures.loop_by_tenth(f"{fresh(0, 100)} {' '.join([LOOP] * 10)}", "en")
    assert half == [0.0] * 5 + [1.0] * 5
    middle = measures.loop_by_tenth(f"{fresh(0, 35)} {' '.join([LOOP] * 3)} {fresh(100, 35)}", "en")
    assert middle == [0, 0, 0, 0.5, 1, 1, 0.5, 0, 0, 0]
    # A sentence that comes twice makes no loop; one that comes three times does, wherever it stands.
    assert measures.loop_by_tenth(f"{LOOP} {fresh(0, 80)} {LOOP}", "en") == [0] * 10
    apart = f"{LOOP} {fresh(0, 30)} {LOOP} {fresh(50, 40)} {LOOP}"
    assert measures.loop_by_tenth(apart, "en") == [1, 0, 0, 0, 1, 0, 0, 0, 0, 1]


def test_loops_by_tenth_of_any_length():
    assert measures.loop_by_tenth("nine words are too few to be divided so.", "en") is None
    assert measures.loop_by_tenth(fresh(0, 10), "en") == [0] * 10
    assert measures.loop_by_tenth("", "en") is None
    line = "春江潮水连海平，海上明月共潮生。"  # 14 ideographs, of which 13 make an n-gram
    assert measures.loop_by_tenth(line * 10, "zh") == [1] * 10
    assert measures.loop_by_tenth(line * 2, "zh") == [0] * 10
    # 27 words: tenths begin at 0 2 5 8 10 13 16 18 21 24. The last 20 of them are a word said over and over.
    shares = measures.loop_by_tenth(f"{fresh(0, 7)} {'la ' * 20}", "en")
    assert shares == pytest.approx([0, 0, 1 / 3, 1, 1, 1, 1, 1, 1, 1])


def test_distinct_3_of_equal_prefixes():
    n = measures.PREFIX_WORDS
    assert measures.distinct_3(fresh(0, n)) == 1
    assert measures.distinct_3("la " * n) == 1 / (n - 2)
    # What follows the prefix does not count: neither a loop nor fresh words behind it.
    assert measures.distinct_3(fresh(0, n) + " la" * 5000) == 1
    assert measures.distinct_3("la " * n + fresh(0, n)) == 1 / (n - 2)
    assert measures.distinct_3("la " * (n - 1)) is None
    # Chinese is measured by characters; case and punctuation make no difference.
    assert measures.distinct_3("啦，" * n) == 1 / (n - 2)
    assert measures.distinct_3("La, la! " * (n // 2)) == 1 / (n - 2)


def test_compression_is_zlibs():
    n = measures.PREFIX_WORDS
    prefix = ("la " * n).strip()
    assert measures.compression("La! " * n) == len(prefix) / len(zlib.compress(prefix.encode(), 9))
    assert measures.compression("La! " * n + fresh(0, 500)) == measures.compression("La! " * n) > 20
    assert measures.compression("la " * (n - 1)) is None
    rng = random.Random(0)
    noise = " ".join("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=8)) for _ in range(n))
    # Random letters hold log2(26) of 8 bits, blanks nothing: no coder gets below 8 log2(26) bits a word of 9 bytes.
    assert 1.5 < measures.compression(noise) < 9 * 8 / (8 * math.log2(26))
    assert measures.compression(noise) < measures.compression(f"{noise[: len(noise) // 2]} " * 2)
    assert measures.compression("字" * n) > measures.compression("".join(chr(0x4E00 + i) for i in range(n)))


# ---------------------------------------------------------------------------------------------------------
# On the query's matter


@pytest.mark.parametrize(
    "query, answer, language, expected",
    [
        # boy, finds, key, beach remain of the query
        ("Write a story of around 250 words about a boy who finds a key on the beach.", "The key!", "en", 1 / 4),
        ("Write a story about a boy who finds a key on the beach.", "Boys on beaches find keys.", "en", 1 / 4),
        ("Explain photosynthesis.", "PHOTOSYNTHESIS feeds the tree", "en", 1),
        ("A gardener's garden", "He gardens.", "en", 1),  # one stem: garde
        ("Don't write about the sea's tides", "sea and tides", "en", 1),
        ("Write about this in 500 words.", "Anything.", "en", None),
        ("", "Anything.", "en", None),
        ("A heron", "", "en", 0),
        # 海边 边捡 捡到 到 is empty: 海边 边捡; 钥匙; 男孩 is separated by 的
        ("海边捡到钥匙的男孩", "男孩在海边。", "zh", 2 / 4),
        ("海边捡到钥匙的男孩", "钥匙，海 边", "zh", 1 / 4),
        ("请写一篇文章", "随便", "zh", None),
    ],
)
def test_content_words(query, answer, language, expected):
    got = measures.content_words(query, answer, language)
    assert got == (None if expected is None else pytest.approx(expected))


def test_an_answer_to_another_query_uses_fewer_of_its_content_words():
    query = "Describe how a lighthouse keeper repairs a broken lamp during a winter storm."
    on = "The keeper climbed the lighthouse while the storm broke. The lamp was broken, and winter made repair slow."
    off = "Bread needs flour, water, salt and time. Knead the dough, let it rest and bake it in a hot oven."
    assert measures.content_words(query, on, "en") > 0.8
    assert measures.content_words(query, off, "en") == 0

"""Exercise 9, 60 minutes: how far to trust a median of twelve queries.

Twelve queries, three answers each: is a median of 372 words more than one of 292? The bootstrap draws as many
queries as there are, with replacement, all answers of a query together, computes the number on what was drawn, does so
2,000 times, and looks at how widely these replicates are spread.

1. Why are queries drawn and not answers? Write `replicates`.
2. The percentile interval takes the quantiles (1 - level) / 2 and (1 + level) / 2 of the replicates. Write
   `percentile`.
3. With few queries it is too narrow. The project's interval takes other quantiles, moved and further apart:

       bias = 2 Phi^-1(share of replicates below the number; those equal to it count half)
       tail = sqrt(n / (n - 1)) * t                    t: the (1 + level) / 2 quantile of Student's t, n - 1 degrees
       ends = the quantiles Phi(bias - tail) and Phi(bias + tail) of the replicates

   Phi is the normal distribution function (`statistics.NormalDist`); a quantile of the replicates is
   `numpy.quantile`'s. The share is kept between 1 / (R + 1) and R / (R + 1) for R replicates. Write `corrected`.
4. Read the table of coverages in lengthen/evaluation/intervals.py (afterwards: below it stands the answer to step 3).
   For which number are eight queries too few?

Leads to: lengthen/evaluation/intervals.py, where `paired` draws the same queries for two runs.

    python -m pytest -q exercises/09_bootstrap.py
"""

import statistics
from collections.abc import Callable

import numpy

from lengthen.evaluation import intervals

Interval = tuple[float, float]


def replicates(
    groups: dict[str, list[float]], statistic: Callable[[list[float]], float], draws: numpy.ndarray
) -> list[float]:
    """statistic(all values) of each row of draws [R, n]: indices of queries, in the order of their sorted names."""
    raise NotImplementedError


def percentile(replicates: list[float], level: float) -> Interval:
    """The percentile interval."""
    raise NotImplementedError


def corrected(value: float, replicates: list[float], n: int, level: float) -> Interval:
    """The interval of step 3; value: the number itself, n: queries. `intervals.students_t` is Student's quantile."""
    raise NotImplementedError


# ---------------------------------------------------------------------------------------------------------


def example(queries: int, seed: int) -> dict[str, list[float]]:
    """Lengths around 300 words, log-normal; half of their variance is between queries."""
    rng = numpy.random.default_rng(seed)
    middle = rng.normal(0, 0.35, queries)
    return {f"query {i}": (300 * numpy.exp(middle[i] + rng.normal(0, 0.35, 3))).tolist() for i in range(queries)}


def draws(queries: int, resamples: int = 2000) -> numpy.ndarray:
    return numpy.random.default_rng(0).integers(queries, size=(resamples, queries))


def test_all_answers_of_a_query_are_drawn_together():
    groups = {"b": [3.0, 5.0], "a": [1.0]}
    assert replicates(groups, sum, numpy.array([[0, 0], [0, 1], [1, 1]])) == [2.0, 9.0, 16.0]


def test_the_percentile_interval_is_scipys():
    """With one answer per query, on the same replicates."""
    import scipy.stats

    groups = {name: values[:1] for name, values in example(12, 0).items()}
    ours = replicates(groups, statistics.fmean, draws(12))
    data = ([values[0] for _, values in sorted(groups.items())],)
    theirs = scipy.stats.bootstrap(data, numpy.mean, method="percentile", n_resamples=2000, rng=0)
    low, high = percentile(ours, 0.95)
    spread = statistics.stdev(ours) / 5  # their draws are others
    assert abs(low - theirs.confidence_interval.low) < spread
    assert abs(high - theirs.confidence_interval.high) < spread


def test_the_corrected_interval_is_the_projects():
    for queries in (8, 12, 30):
        groups = example(queries, queries)
        value = statistics.median([x for values in groups.values() for x in values])
        made = replicates(groups, statistics.median, draws(queries))
        want = intervals.bootstrap(groups, statistics.median)
        numpy.testing.assert_allclose(corrected(value, made, queries, 0.95), want)
        for outside in (min(made) - 1, max(made) + 1):  # a share of 0 or of 1 is no error
            assert numpy.isfinite(corrected(outside, made, queries, 0.95)).all()


def test_it_covers_the_truth_about_as_often_as_it_says():
    """The mean of 12 queries in 300 simulated runs, 95 % intervals; the seeds are fixed."""
    truth, hits = 300 * numpy.exp(0.35**2), {"percentile": 0, "corrected": 0}
    for seed in range(300):
        groups = example(12, 1000 + seed)
        value = statistics.fmean([x for values in groups.values() for x in values])
        made = replicates(groups, statistics.fmean, draws(12, 300))
        for name, (low, high) in (
            ("percentile", percentile(made, 0.95)),
            ("corrected", corrected(value, made, 12, 0.95)),
        ):
            hits[name] += low <= truth <= high
    assert hits["percentile"] < hits["corrected"] and 270 <= hits["corrected"] <= 297

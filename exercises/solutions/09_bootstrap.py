"""Answers to one query are alike: counted each for itself, twelve queries would pass for thirty-six. Eight queries
are too few for a 90th percentile: the tail of the lengths is not among them.
"""

import math
import statistics

import numpy

from lengthen.evaluation.intervals import students_t

NORMAL = statistics.NormalDist()


def replicates(groups, statistic, draws) -> list[float]:
    values = [groups[query] for query in sorted(groups)]
    return [statistic([x for i in row for x in values[i]]) for row in draws.tolist()]


def percentile(replicates, level: float) -> tuple[float, float]:
    low, high = numpy.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def corrected(value: float, replicates, n: int, level: float) -> tuple[float, float]:
    made = numpy.array(replicates)
    share = (numpy.mean(made < value) + numpy.mean(made <= value)) / 2
    edge = 1 / (len(made) + 1)
    bias = 2 * NORMAL.inv_cdf(float(min(max(share, edge), 1 - edge)))
    tail = math.sqrt(n / (n - 1)) * students_t((1 + level) / 2, n - 1)
    low, high = numpy.quantile(made, [NORMAL.cdf(bias - tail), NORMAL.cdf(bias + tail)])
    return float(low), float(high)

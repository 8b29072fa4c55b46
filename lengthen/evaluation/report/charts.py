"""What the charts of the report are drawn from: values in bins, points thinned out. The page stays small."""

import math
import random
import statistics
from collections import Counter
from collections.abc import Sequence

from lengthen.evaluation.report.rundir import amount, number

NUM_BINS = 56  # of a distribution
MAX_STEPS = 200  # points of a loss curve


def bins(rows: Sequence[dict], lowest: float = 1.0) -> dict | None:
    """Counts of each row's `solid` and `hollow` values in NUM_BINS bins of equal ratio, the same for all rows.

    Values below a sixteenth of the median are counted in the first bin: a few answers of one word would otherwise
    leave half of the axis empty. None where there is no value.
    """
    every = sorted(v for row in rows for v in (*row["solid"], *row["hollow"]))
    if not every:
        return None
    low = max(every[0], every[len(every) // 2] / 16, lowest)
    high = max(every[-1], low * 1.5)
    low, high = low / 1.06, high * 1.06
    step = math.log(high / low) / NUM_BINS

    def count(values: Sequence[float]) -> list[int]:
        counts = Counter(min(NUM_BINS - 1, max(0, int(math.log(max(v, low) / low) / step))) for v in values)
        return [counts[i] for i in range(NUM_BINS)]

    shown = [
        {**row, "solid": count(row["solid"]), "hollow": count(row["hollow"])}
        | {"num_solid": len(row["solid"]), "num_hollow": len(row["hollow"])}
        for row in rows
    ]
    return {"low": low, "high": high, "rows": shown, "pinned": sum(v < low for v in every)}


def thinned(values: list, most: int) -> list:
    """A seeded random part of the values, in their order."""
    kept = sorted(random.Random(0).sample(range(len(values)), min(most, len(values))))
    return [values[i] for i in kept]


def loss_curve(entries: list[dict]) -> dict | None:
    """At most MAX_STEPS points [step, loss] (means of neighbours) and the mean of each epoch [first, last, mean]."""
    points: list[tuple[float, float]] = []
    epochs: dict[float, list[tuple[float, float]]] = {}
    for entry in entries:
        step, loss = amount(entry.get("step")), number(entry.get("loss"))
        if step is not None and loss is not None and entry.get("skipped") is not True:
            points.append((step, loss))
            epochs.setdefault(amount(entry.get("epoch")) or 0, []).append((step, loss))
    if not points:
        return None
    size = math.ceil(len(points) / MAX_STEPS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    curve = [[statistics.fmean(s for s, _ in g), statistics.fmean(x for _, x in g)] for g in groups]
    means = [[p[0][0], p[-1][0], statistics.fmean(x for _, x in p)] for p in epochs.values()]
    return {"points": curve, "epochs": means, "steps": len(points), "per_point": size}

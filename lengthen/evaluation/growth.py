"""Growth: how much longer the answers of one model are than another's, with its interval over queries.

Growth is the median length in words of the later model's answers over that of the earlier one, counting answers that
end by EOS: the length of the others is that of a limit or of a loop. Its interval is paired where both models answered
the same queries (intervals.py). `change` compares two runs by any other measure, as a ratio or as a difference.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from lengthen.evaluation.intervals import Groups, Interval, paired, unpaired
from lengthen.evaluation.measures import median

Total = Callable[[list], float | None]  # what a measure makes of all values: their median, say
Query = tuple[str, str, str]


class Change(NamedTuple):
    value: float | None  # None: undefined, as where one side has no answers
    interval: Interval | None  # 95 %
    paired: bool  # drawn from the same queries on both sides


def query_of(row: dict) -> Query:
    """What makes an answer an answer to the same query as another: (language, length demand, text)."""
    return row["language"], row["constraint"], row["query"]


def ratio(before: float | None, after: float | None) -> float | None:
    return after / before if before and after is not None else None


def difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def change(
    before: Groups[Any], after: Groups[Any], total: Total, compare: Callable, same: bool | None = None
) -> Change:
    """compare(total of before, total of after), `compare` being `ratio` or `difference`.

    before, after: {query: values}, with an empty list for a query without a value. same: whether both answered the same
    queries; None = if their keys are equal.
    """
    pair = before.keys() == after.keys() if same is None else same

    def statistic(a: list, b: list) -> float | None:
        return compare(total(a), total(b))

    old, new = ([value for values in groups.values() for value in values] for groups in (before, after))
    return Change(statistic(old, new), (paired if pair else unpaired)(before, after, statistic), pair)


def growth(before: Groups[float], after: Groups[float]) -> Change:
    """The ratio of the median words: 1.5 = half as long again. before, after: {query: words of its answers}."""
    return change(before, after, median, ratio)

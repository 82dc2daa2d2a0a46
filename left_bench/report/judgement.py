"""Pairs of rows judged together: resolved, equal within a margin that someone gave, or not resolved.

A table of cells is dozens of comparisons, of which one in twenty would look like a difference where there is none. So
those of one table are judged as a family: of the differences said to be resolved at most one in twenty is expected to
be none (the false-discovery rate, Benjamini and Hochberg 1995, which also holds for all pairs of a set of means:
Williams, Jones and Tukey 1999). Intervals are those of each comparison alone, of 95 %: one that leaves zero out may
still be among so many that some of them do by chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from left_bench.core.errors import UserError, nearest
from left_bench.report.cells import Row
from left_bench.report.statistics import Interval, difference
from left_bench.report.uncertainty import CONFIDENCE
from left_bench.report.values import COUNTED, is_number, metric_of
from left_bench.spec.record import METRICS, find_metric

FALSE_DISCOVERIES = 1 - CONFIDENCE
"""The share of false ones that is expected, at most, among the differences said to be resolved."""
TOLD_RATE = f"{100 * FALSE_DISCOVERIES:.0f} %"
COMPARED = 100
"""Rows of which every pair is judged together; of more, the best ones set the threshold for all."""
Word = Literal["resolved", "equal", "not resolved", "not judged"]


class Margin(NamedTuple):
    """How far two values may lie apart and still count as equal."""

    amount: float
    relative: bool
    """A share of the value that is compared with, and not an amount in the metric's unit."""

    def around(self, value: float) -> float:
        return self.amount * abs(value) if self.relative else self.amount


Margins: TypeAlias = Mapping[str, Margin]
"""Metric -> margin; under the empty name that of the score a report goes by."""


class Judged(NamedTuple):
    """One comparison of a family."""

    word: Word
    value: float
    interval: Interval | None
    """Of 95 %, for this comparison alone; None where nothing tells how far the noise reaches."""
    how: str


@dataclass(frozen=True, kw_only=True)
class Family:
    """The comparisons of a report's rows in one metric, judged together."""

    metric: str
    size: int
    """Pairs that something tells the noise of."""
    threshold: float
    """The p-value up to which a difference is resolved."""
    how: Sequence[str]
    """What the intervals are over, see `statistics.Difference`."""
    margin: Margin | None = None

    def of(self, a: Row, b: Row) -> Judged | None:
        """`a` less `b`; None where either has no number."""
        apart = difference(a, b, self.metric)
        if apart is None:
            return None
        if self.metric in COUNTED:
            return Judged("resolved" if apart.value else "equal", apart.value, None, "counted")
        interval, tail = apart.interval, apart.p_value
        if interval is None or tail is None:
            return Judged("equal" if apart.value == 0 else "not judged", apart.value, None, apart.how)
        margin = 0.0 if self.margin is None else self.margin.around(b.value(self.metric) or 0.0)
        if self.margin is not None and -margin <= interval.low and interval.high <= margin:
            return Judged("equal", apart.value, interval, apart.how)
        return Judged("resolved" if tail <= self.threshold else "not resolved", apart.value, interval, apart.how)


def judge(pairs: Iterable[tuple[Row, Row]], metric: str, margin: Margin | None = None) -> Family:
    """The family of these pairs."""
    results = [apart for a, b in pairs if (apart := difference(a, b, metric)) is not None and apart.spread is not None]
    tails = sorted(apart.p_value or 0.0 for apart in results) if metric not in COUNTED else []
    most = max((i for i, p in enumerate(tails, start=1) if p <= FALSE_DISCOVERIES * i / len(tails)), default=1)
    return Family(
        metric=metric,
        size=len(tails),
        threshold=FALSE_DISCOVERIES * most / max(1, len(tails)),
        how=list(dict.fromkeys(apart.how for apart in results)),
        margin=margin,
    )


def in_order(rows: Sequence[Row], metric: str) -> list[Row]:
    """The ok rows with a number, the best value first; of equals the one that needs less memory."""
    measured = [row for row in rows if row.ok and is_number(row.value(metric))]
    sign = -1.0 if metric_of(metric).better == "higher" else 1.0

    def place(row: Row) -> tuple[float, float]:
        memory = row.value("peak_memory_bytes")
        return sign * _value(row, metric), math.inf if memory is None else memory

    return sorted(measured, key=place)


def take_margins(texts: Sequence[str], *, key: str = "--margin") -> Margins:
    """`0.02` is of the score a report goes by; `exact_match=0.02` and `peak_memory_bytes=5%` are of a metric by name.

    Raises:
        UserError: no amount, or no such metric; names `key`.
    """
    return dict(_margins(texts, key))


def _margins(texts: Sequence[str], key: str) -> Iterator[tuple[str, Margin]]:
    for text in texts:
        name, _, amount = text.rpartition("=")
        metric = name.strip().replace("-", "_")
        if metric and find_metric(metric) is None:
            raise UserError(f"{key} {text}: there is no metric '{metric}'{nearest(metric, METRICS)}")
        share = amount.strip().endswith("%")
        try:
            value = float(amount.strip().removesuffix("%"))
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{key} {text}: no margin; write 0.02, exact_match=0.02 or peak_memory_bytes=5%")
        yield metric, Margin(value / 100 if share else value, share)


def _value(row: Row, metric: str) -> float:
    return row.value(metric) or 0.0

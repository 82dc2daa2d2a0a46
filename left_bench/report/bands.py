"""Lines over training with a band over the seeds: training loss by step, validation loss and scores by what was spent.

The same lines stand in the Markdown report's plots and on the page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from left_bench.report.cells import Row
from left_bench.report.curves import LOSS, Axis, Curve, curves_of, measured_alike, metrics_at, value_at
from left_bench.report.statistics import seed_losses

AXIS_NAMES = {"seconds": "seconds of training", "tokens": "tokens of training", "step": "optimizer step"} | {
    "joules": "joules of training"
}
SMOOTHED_FROM = 20
"""Steps from which training loss is told as a running mean over a tenth of them."""
_GRID = 24
"""Places at which seeds are averaged that took their points at different steps."""


class Band(NamedTuple):
    """The seeds of a row along an axis: where, and the mean, the lowest and the highest value there."""

    at: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]

    @property
    def is_wide(self) -> bool:
        """Whether the seeds differ: else there is a line alone."""
        return self.low != self.high


def loss_band(row: Row) -> Band | None:
    """Training loss by optimizer step, each seed smoothed for itself; None below two steps."""
    steps, losses = seed_losses(row) if row.path else ([], [])
    if len(steps) < 2:
        return None
    window = len(steps) // 10 if len(steps) >= SMOOTHED_FROM else 1
    by_step = [*zip(*(_running_mean(values, window) for values in losses), strict=True)]
    means = [sum(values) / len(values) for values in by_step]
    return Band([*map(float, steps)], means, [*map(min, by_step)], [*map(max, by_step)])


def axes_told(rows: Sequence[Row]) -> list[Axis]:
    """The axes along which the rows may be drawn together: every point tells them, and one clock measured them."""
    points = [point for row in rows for curve in curves_of(row) for point in curve]
    clocks: tuple[tuple[Axis, str | None], ...] = (
        *(("seconds", "train_seconds"), ("tokens", None), ("step", None), ("joules", "train_joules")),
    )
    return [
        axis
        for axis, clock in clocks
        if all(getattr(point, axis) is not None for point in points) and (clock is None or measured_alike(rows, clock))
    ]


def metrics_told(rows: Sequence[Row]) -> list[str]:
    """What the curves tell: the validation loss, then scores along training, each only where one yardstick measures it
    in all rows."""
    names = dict.fromkeys(
        [LOSS, *(n for row in rows for curve in curves_of(row) for p in curve for n in metrics_at(p))]
    )
    return [name for name in names if measured_alike(rows, name)]


def band_of(row: Row, axis: Axis, metric: str = LOSS) -> Band | None:
    """The row's seeds along an axis; None below two points.

    Seeds that took their points at other steps are averaged on an even grid, only where all of them were at work.
    """
    known = [[point for point in curve if metric in metrics_at(point)] for curve in curves_of(row)]
    curves: list[Curve] = [curve for curve in known if len(curve) > 1]
    if not curves:
        return None
    at: list[float]
    if len({tuple(point.step for point in curve) for curve in curves}) == 1:
        at = [math.fsum(getattr(point, axis) for point in points) / len(points) for points in zip(*curves, strict=True)]
        values = [[metrics_at(point)[metric] for point in points] for points in zip(*curves, strict=True)]
    else:
        first = max(getattr(curve[0], axis) for curve in curves)
        last = min(getattr(curve[-1], axis) for curve in curves)
        places = [first + (last - first) * i / (_GRID - 1) for i in range(_GRID)]
        told = [(place, [value_at(curve, axis, place, metric) for curve in curves]) for place in places]
        whole = [(place, [v for v in found if v is not None]) for place, found in told if None not in found]
        at, values = [place for place, _ in whole], [found for _, found in whole]
    if len(at) < 2:
        return None
    means = [math.fsum(found) / len(found) for found in values]
    return Band(at, means, [*map(min, values)], [*map(max, values)])


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and those before it, `window` in all."""
    return [sum(part := values[max(0, i + 1 - window) : i + 1]) / len(part) for i in range(len(values))]

"""The plot of validation loss over the time of training: a line for each row, a band over its seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from left_bench.report.cells import Row
from left_bench.report.curves import LOSS, Axis, Curve, curves_of, measured_alike, value_at
from left_bench.report.plots import log_losses, new_figure
from left_bench.report.styles import COLOURS, DASHES, MARKERS, row_styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GRID = 24
"""Places at which seeds are averaged that took their points at different steps."""
_DRAWN = 12


def curve_figure(rows: Sequence[Row], labels: Sequence[str]) -> Figure | None:
    """Validation loss over seconds of training (over tokens, where the rows are of several machines); None where no
    row has a curve of two points, or their losses may not be compared."""
    named = [
        (row, label) for row, label in zip(rows, labels, strict=True) if any(len(curve) > 1 for curve in curves_of(row))
    ]
    if not named or not measured_alike([row for row, _ in named], LOSS):
        return None
    timed = measured_alike([row for row, _ in named], "train_seconds")
    axis: Axis = "seconds" if timed else "tokens"
    styles = row_styles([row for row, _ in named])
    lines = [
        (*_mean_and_band(curves_of(row), axis), label, style) for (row, label), style in zip(named, styles, strict=True)
    ]
    more = len(lines) - _DRAWN
    if more > 0:  # the lowest ends are named
        lines = sorted(lines, key=lambda line: line[1][-1])[:_DRAWN]
    figure, axes = new_figure(7.2, 4.2)
    for x, y, low, high, label, style in lines:
        colour = COLOURS[style.colour]
        if low != high:
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            *(x, y),
            color=colour,
            linestyle=DASHES[style.dash],
            linewidth=1.4,
            marker=MARKERS[style.marker],
            markersize=3.5,
            label=label,
        )
    axes.set_xlabel(f"{'seconds' if timed else 'tokens'} of training (optimizer steps alone)")
    axes.set_ylabel("validation loss (nats per answer token)")
    log_losses(axes, [loss for _, y, *_ in lines for loss in y])
    notes = ["mean, band: lowest to highest seed"] if any(len(curves_of(row)) > 1 for row, _ in named) else []
    notes += [f"the {_DRAWN} lowest ends of {len(named):,}"] if more > 0 else []
    axes.set_title(", ".join(["Validation loss along training", *notes]))
    axes.set_xlim(left=0)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def _mean_and_band(curves: Sequence[Curve], axis: Axis) -> tuple[list[float], list[float], list[float], list[float]]:
    """Places on the axis; mean, lowest and highest loss of the seeds there."""
    curves = [curve for curve in curves if len(curve) > 1]
    if len({tuple(point.step for point in curve) for curve in curves}) == 1:
        x = [_mean([getattr(point, axis) for point in points]) for points in zip(*curves, strict=True)]
        losses = [[point.validation_loss for point in points] for points in zip(*curves, strict=True)]
    else:  # stopped after different steps: only where all of them were at work
        first, last = (
            max(getattr(curve[0], axis) for curve in curves),
            min(getattr(curve[-1], axis) for curve in curves),
        )
        x = [first + (last - first) * i / (_GRID - 1) for i in range(_GRID)]
        results = [[value_at(curve, axis, place) for curve in curves] for place in x]
        kept = [(place, known) for place, values in zip(x, results, strict=True) if (known := _all_known(values))]
        x, losses = [place for place, _ in kept], [values for _, values in kept]
    return x, [*map(_mean, losses)], [*map(min, losses)], [*map(max, losses)]


def _all_known(values: Sequence[float | None]) -> list[float] | None:
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)

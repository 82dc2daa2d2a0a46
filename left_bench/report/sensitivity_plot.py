"""The plot of validation loss against learning rate: a line for each tuned method, its chosen rate with a dark edge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from left_bench.report.cells import Row
from left_bench.report.figure_style import INK, new_figure, scale_losses
from left_bench.report.rates import Point, Tuned, format_rate, tuned_of
from left_bench.report.styles import COLOURS, DASHES, MARKERS, row_styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DRAWN = 16


def line_of(tuned: Tuned) -> list[Point]:
    """The trials that took all their steps at the size that was chosen, along the rate."""
    size = 1.0 if tuned.size is None else tuned.size
    return [point for point in tuned.points if point.ended is None and point.loss is not None and point.size == size]


def sensitivity_figure(rows: Sequence[Row], labels: Sequence[str]) -> Figure | None:
    """Validation loss of the trials against their learning rate; None where no row was tuned with two such trials."""
    styles = row_styles(rows)
    told = [
        (i, tuned) for i, row in enumerate(rows) if (tuned := tuned_of(row)) is not None and len(line_of(tuned)) > 1
    ]
    if not told:
        return None
    more, told = len(told) - _DRAWN, told[:_DRAWN]
    figure, axes = new_figure(7.2, 4.4)
    losses: list[float] = []
    diverged = False
    for i, tuned in told:
        style, points = styles[i], line_of(tuned)
        y = [point.loss or 0.0 for point in points]
        losses += y
        [line] = axes.plot(
            [point.rate for point in points],
            y,
            color=COLOURS[style.colour],
            linestyle=DASHES[style.dash],
            linewidth=1.3,
            marker=MARKERS[style.marker],
            markersize=4,
            label=labels[i],
        )
        line.set_gid(f"row-{i}-line")
        if tuned.loss is not None:
            [best] = axes.plot(
                [tuned.rate],
                [tuned.loss],
                marker=MARKERS[style.marker],
                markersize=8,
                color=COLOURS[style.colour],
                markeredgecolor=INK,
                markeredgewidth=1.2,
                zorder=4,
            )
            best.set_gid(f"row-{i}-best")
        for point in tuned.points:
            if point.ended == "diverged":
                diverged = True
                axes.plot(
                    [point.rate],
                    [0.985],
                    transform=axes.get_xaxis_transform(),
                    marker="x",
                    markersize=6,
                    color=COLOURS[style.colour],
                    clip_on=False,
                )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: format_rate(value))  # mathematics is switched off
    axes.xaxis.set_minor_formatter(lambda *_: "")
    scale_losses(axes, losses, beyond=3)
    axes.set_xlabel("learning rate (log scale)")
    axes.set_ylabel("validation loss (nats per answer token), lower is better")
    notes = ["dark edge: the rate chosen"]
    notes += ["crosses above: diverged"] if diverged else []
    notes += [f"the first {_DRAWN} of {_DRAWN + more:,}"] if more > 0 else []
    axes.set_title(f"Sensitivity to the learning rate ({', '.join(notes)})")
    figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    return figure

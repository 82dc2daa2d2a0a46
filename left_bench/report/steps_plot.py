"""Seconds per optimizer step: a box for each row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from left_bench.report.cells import Row
from left_bench.report.figure_style import INK, MOST_BARS, new_figure
from left_bench.report.statistics import measured_steps
from left_bench.report.styles import COLOURS, row_styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def steps_figure(rows: Sequence[Row], labels: Sequence[str]) -> Figure | None:
    """Seconds per optimizer step, every step a stroke over its box, warm-up left out; None where no steps were kept."""
    named = []
    styles = row_styles(rows)
    for row, label, style in zip(rows, labels, styles, strict=True):
        seconds = [s for run in row.runs if run.ok for _, s in measured_steps(run)]
        if len(seconds) > 2:
            named.append((seconds, label, COLOURS[style.colour]))
        if len(named) > MOST_BARS:
            break
    if not named:
        return None
    more, named = len(named) > MOST_BARS, named[:MOST_BARS]
    figure, axes = new_figure(7.2, 1.3 + 0.3 * len(named))
    drawn = axes.boxplot(
        [seconds for seconds, *_ in named],
        orientation="horizontal",
        positions=range(len(named)),
        widths=0.62,
        whis=(5, 95),
        showfliers=False,
        patch_artist=True,
        whiskerprops={"color": INK, "linewidth": 0.9},
        capprops={"color": INK, "linewidth": 0.9},
        medianprops={"color": INK, "linewidth": 1.8},
    )
    for i, (seconds, _, colour) in enumerate(named):
        drawn["boxes"][i].set(facecolor=f"{colour}40", edgecolor=colour, linewidth=0.9)
        # one broken line of short strokes: a marker for each step would be most of the file
        across = [x for second in seconds for x in (second, second, math.nan)]
        along = [i - 0.12, i + 0.12, math.nan] * len(seconds)
        axes.plot(across, along, color=INK, linewidth=0.7, alpha=0.6, zorder=3)
    axes.set_yticks(range(len(named)), [label for _, label, _ in named])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds per optimizer step, left is better")
    axes.set_title(
        f"Step time: box 25 to 75 %, line median, whiskers 5 to 95 %{f' (first {MOST_BARS})' if more else ''}"
    )
    return figure

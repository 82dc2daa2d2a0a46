"""Quality over the time of training: validation loss, a line for each row, a band over its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from left_bench.report.bands import AXIS_NAMES, axes_told, band_of
from left_bench.report.cells import Row
from left_bench.report.curves import LOSS, curves_of, measured_alike
from left_bench.report.figure_style import scale_losses
from left_bench.report.line_panels import draw_panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def curve_figure(rows: Sequence[Row], labels: Sequence[str]) -> Figure | None:
    """Validation loss over seconds of training (over tokens, where the rows are of several machines); None where no
    row has a curve of two points, or their losses may not be compared."""
    drawn = [row for row in rows if any(len(curve) > 1 for curve in curves_of(row))]
    if not drawn or not measured_alike(drawn, LOSS):
        return None
    axis = axes_told(drawn)[0]
    told = ((i, band_of(row, axis)) for i, row in enumerate(rows))
    bands = {i: band for i, band in told if band is not None}
    if not bands:
        return None
    figure, panels, notes = draw_panels(rows, labels, bands)
    losses = [loss for band in bands.values() for loss in (*band.low, *band.high)]
    for axes in panels:
        scale_losses(axes, losses)
    for axes in panels:
        axes.set_xlim(left=0)
    figure.suptitle(", ".join(["Validation loss along training", *notes]), x=0.01, ha="left", fontsize=10)
    figure.supxlabel(f"{AXIS_NAMES[axis]} (optimizer steps alone)", fontsize=9)
    figure.supylabel("validation loss (nats per answer token)", fontsize=9)
    return figure

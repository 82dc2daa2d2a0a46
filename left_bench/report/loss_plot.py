"""Training loss by step: a smoothed line for each row, a band over its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from left_bench.report.bands import SMOOTHED_FROM, loss_band
from left_bench.report.cells import Row
from left_bench.report.line_panels import draw_panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def loss_figure(rows: Sequence[Row], labels: Sequence[str]) -> Figure | None:
    """Training loss by step of every cell, smoothed, a band over the seeds; None where no cell has one."""
    bands = {i: band for i, row in enumerate(rows) if (band := loss_band(row)) is not None}
    if not bands:
        return None
    figure, panels, notes = draw_panels(rows, labels, bands)
    for axes in panels:
        ticks: Any = axes.xaxis.get_major_locator()
        ticks.set_params(integer=True)  # there is no half a step
    smoothed = max(len(band.at) for band in bands.values()) >= SMOOTHED_FROM
    told = ["Training loss", *(["running mean over a tenth of the steps"] if smoothed else []), *notes]
    figure.suptitle(", ".join(told), x=0.01, ha="left", fontsize=10)
    figure.supxlabel("optimizer step", fontsize=9)
    figure.supylabel("training loss (nats)", fontsize=9)
    return figure

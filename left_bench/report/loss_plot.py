"""Training loss by step: a smoothed line for each row, a band over its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from left_bench.report.cells import Row, option
from left_bench.report.figure_style import cut_label, new_grid
from left_bench.report.statistics import seed_losses
from left_bench.report.styles import COLOURS, DASHES, MARKERS, Style, row_styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_IN_A_PANEL = 14
"""Curves up to which one panel holds them all; of more, each quantization has its own."""
_PANELS = 12
_SMOOTHED_FROM = 40
"""Steps from which a loss curve is drawn as a running mean."""


def loss_figure(rows: Sequence[Row], labels: Sequence[str]) -> Figure | None:
    """Training loss by step of every cell, smoothed, a band over the seeds; None where no cell has one.

    Of many cells each quantization has a panel of its own; a method has its colour in all of them.
    """
    styles = row_styles(rows)
    curves = [(i, curve) for i, row in enumerate(rows) if row.path and len((curve := seed_losses(row))[0]) > 1]
    if not curves:
        return None
    panels: dict[str, list[tuple[int, tuple[list[int], list[list[float]]]]]] = {}
    apart = len(curves) > _IN_A_PANEL
    for i, curve in curves:
        panels.setdefault(str(option(rows[i], "quantization")) if apart else "", []).append((i, curve))
    more = len(panels) - _PANELS
    shown = sorted(panels.items(), key=lambda panel: (panel[0] != "none", panel[0]))[:_PANELS]
    columns = 1 if len(shown) == 1 else 2
    lines = -(-len(shown) // columns)
    figure, grid = new_grid(7.2 if columns == 1 else 9.6, 4.0 if columns == 1 else 2.5 * lines + 0.6, lines, columns)
    handles: dict[str, Any] = {}
    for axes, (name, inside) in zip(grid, shown, strict=False):
        seen: dict[str, int] = {}
        for i, (steps, losses) in inside:
            method = str(option(rows[i], "peft"))
            again = seen[method] = seen.get(method, -1) + 1
            style = styles[i]._replace(dash=again % len(DASHES)) if apart else styles[i]
            label = method if apart and not again else labels[i]
            handles.setdefault(label, _draw_curve(axes, steps, losses, style, gid=f"row-{i}"))
        if name:
            axes.set_title(cut_label(name), fontsize=9)
        axes.margins(x=0.02)
        ticks: Any = axes.xaxis.get_major_locator()
        ticks.set_params(integer=True)  # there is no half a step
    for axes in grid[len(shown) :]:
        axes.set_visible(False)
    longest = max(len(steps) for _, (steps, _) in curves)
    notes = ["running mean over a tenth of the steps"] if longest >= _SMOOTHED_FROM else []
    notes += ["band: lowest to highest of the seeds"] if any(len(losses) > 1 for _, (_, losses) in curves) else []
    notes += [f"{more} more quantizations"] if more > 0 else []
    figure.suptitle(", ".join(["Training loss", *notes]), x=0.01, ha="left", fontsize=10)
    figure.supxlabel("optimizer step", fontsize=9)
    figure.supylabel("training loss (nats)", fontsize=9)
    columns_of_names = 1 + len(handles) // 26
    figure.legend([*handles.values()], [*handles], loc="outside right center", fontsize=8, ncols=columns_of_names)
    return figure


def _draw_curve(axes: Axes, steps: Sequence[int], losses: Sequence[Sequence[float]], style: Style, *, gid: str) -> Any:
    """The mean of the seeds' smoothed curves, and the band between the lowest and the highest of them."""
    window = len(steps) // 10 if len(steps) >= _SMOOTHED_FROM else 1
    smooth = [_running_mean(values, max(1, window)) for values in losses]
    colour = COLOURS[style.colour]
    if len(smooth) > 1:
        axes.fill_between(
            steps,
            [min(values) for values in zip(*smooth, strict=True)],
            [max(values) for values in zip(*smooth, strict=True)],
            color=colour,
            alpha=0.13,
            linewidth=0,
        )
    mean = [sum(values) / len(values) for values in zip(*smooth, strict=True)]
    [line] = axes.plot(
        steps,
        mean,
        color=colour,
        linestyle=DASHES[style.dash],
        linewidth=1.4,
        marker=MARKERS[style.marker],
        markersize=4,
        markevery=(style.marker % max(1, len(steps) // 5), max(1, len(steps) // 5)),
    )
    line.set_gid(gid)
    return line


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and those before it, `window` in all."""
    return [sum(part := values[max(0, i + 1 - window) : i + 1]) / len(part) for i in range(len(values))]

"""Rows as lines with bands over their seeds: in one panel, or of many rows one for each quantization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from left_bench.report.bands import Band
from left_bench.report.cells import Row, option
from left_bench.report.figure_style import cut_label, new_grid
from left_bench.report.styles import COLOURS, DASHES, MARKERS, Style, row_styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_IN_A_PANEL = 14
"""Lines up to which one panel holds them all; of more, each quantization has its own."""
_PANELS = 12
_MARKS = 5
"""Markers along a line of many points; of few, every point has one."""


class Panels(NamedTuple):
    """A figure and its panels."""

    figure: Figure
    axes: Sequence[Axes]
    notes: Sequence[str]
    """What the title has to say of all panels."""


def draw_panels(rows: Sequence[Row], labels: Sequence[str], bands: Mapping[int, Band]) -> Panels:
    """The bands, by the row's place, as lines: a method has one colour in all panels; the legend names a line once."""
    styles = row_styles(rows)
    apart = len(bands) > _IN_A_PANEL
    panels: dict[str, list[int]] = {}
    for i in bands:
        panels.setdefault(str(option(rows[i], "quantization")) if apart else "", []).append(i)
    shown = sorted(panels.items(), key=lambda panel: (panel[0] != "none", panel[0]))[:_PANELS]
    columns = 1 if len(shown) == 1 else 2
    lines = -(-len(shown) // columns)
    figure, grid = new_grid(7.2 if columns == 1 else 9.6, 4.0 if columns == 1 else 2.5 * lines + 0.6, lines, columns)
    handles: dict[str, Any] = {}
    for axes, (name, inside) in zip(grid, shown, strict=False):
        seen: dict[str, int] = {}
        for i in inside:
            method = str(option(rows[i], "peft"))
            again = seen[method] = seen.get(method, -1) + 1
            style = styles[i]._replace(dash=again % len(DASHES)) if apart else styles[i]
            label = method if apart and not again else labels[i]
            handles.setdefault(label, _draw_line(axes, bands[i], style, gid=f"row-{i}"))
        if name:
            axes.set_title(cut_label(name), fontsize=9)
        axes.margins(x=0.02)
    for axes in grid[len(shown) :]:
        axes.set_visible(False)
    names = 1 + len(handles) // 26
    figure.legend([*handles.values()], [*handles], loc="outside right center", fontsize=8, ncols=names)
    notes = ["band: lowest to highest of the seeds"] if any(band.is_wide for band in bands.values()) else []
    notes += [f"{len(panels) - _PANELS} more quantizations"] if len(panels) > _PANELS else []
    return Panels(figure, grid[: len(shown)], notes)


def _draw_line(axes: Axes, band: Band, style: Style, *, gid: str) -> Any:
    colour = COLOURS[style.colour]
    if band.is_wide:
        axes.fill_between(band.at, band.low, band.high, color=colour, alpha=0.13, linewidth=0)
    every = max(1, len(band.at) // _MARKS) if len(band.at) > 2 * _MARKS else 1
    [line] = axes.plot(
        band.at,
        band.mean,
        color=colour,
        linestyle=DASHES[style.dash],
        linewidth=1.4,
        marker=MARKERS[style.marker],
        markersize=4,
        markevery=(style.marker % every, every),
    )
    line.set_gid(gid)
    return line

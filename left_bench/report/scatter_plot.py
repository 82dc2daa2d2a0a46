"""Quality against a cost, a point for each row: peak memory, trained parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from left_bench.report.cells import Row, option
from left_bench.report.figure_style import INK, byte_scale, cut_label, new_figure
from left_bench.report.headings import heading
from left_bench.report.placement import place_labels
from left_bench.report.ranking import headline_quality, pareto_front, rankable
from left_bench.report.recommend import pareto_set
from left_bench.report.statistics import reach_of
from left_bench.report.styles import COLOURS, FILLS, MARKERS, Style, quantizations, row_styles
from left_bench.report.values import format_value, is_number, metric_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NAMED = 24
"""Points with a name that one picture still holds; what has no name tells it when pointed at."""


def pareto_figure(rows: Sequence[Row], labels: Sequence[str]) -> Figure | None:
    """Quality against peak memory of every ok cell, the Pareto set marked; None below two such cells."""
    return _scatter(rows, labels, "peak_memory_bytes")


def parameters_figure(rows: Sequence[Row], labels: Sequence[str]) -> Figure | None:
    """Quality against trainable parameters on a logarithmic axis; None below two cells that differ in them."""
    if len({row.value("trainable_params") for row in rows if row.ok and row.value("trainable_params")}) < 2:
        return None
    return _scatter(rows, labels, "trainable_params")


def _scatter(rows: Sequence[Row], labels: Sequence[str], cost: str) -> Figure | None:
    """Quality against a cost: the method by colour and marker, the quantization by the marker's fill, 95 % intervals,
    the Pareto set with a dark edge; every cell named as long as there is room for names, else those of the set.
    """
    quality = headline_quality(rows)
    if quality is None:
        return None
    shown = [
        (i, row)
        for i, row in enumerate(rows)
        if row.ok and is_number(row.value(quality)) and (is_number(row.value(cost)) and (row.value(cost) or 0) > 0)
    ]
    if len(shown) < 2:
        return None
    drawn = [row for _, row in shown]
    few = len(drawn) <= _NAMED
    figure, axes = new_figure(7.2, 4.8 + 0.06 * max(0, min(_NAMED, len(shown)) - 12))
    in_bytes = metric_of(cost).unit == "bytes"
    scale, unit = byte_scale([row.value(cost) or 0 for row in drawn]) if in_bytes else (1, "log scale")
    x = {id(row): (row.value(cost) or 0) / scale for row in drawn}
    y = {id(row): row.value(quality) or 0.0 for row in drawn}
    ranked = rankable(drawn, quality) and rankable(drawn, cost)
    front = pareto_front(drawn, quality, cost) if ranked else []
    members = pareto_set(drawn, [quality, cost]) if ranked else {}
    if len(front) > 1:
        axes.plot(
            [x[id(row)] for row in front],
            [y[id(row)] for row in front],
            drawstyle="steps-post",
            color=INK,
            linewidth=1.0,
            alpha=0.5,
            zorder=1,
        )
    fills = {name: FILLS[i % len(FILLS)] for i, name in enumerate(quantizations(drawn))}
    styles = dict(zip(map(id, rows), row_styles(rows), strict=True))
    lines: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for i, row in shown:
        at, reach = (x[id(row)], y[id(row)]), reach_of(row, quality)
        across = reach_of(row, cost) / scale
        if reach or across:
            lines += [
                ((at[0], at[1] - reach), (at[0], at[1] + reach)),
                ((at[0] - across, at[1]), (at[0] + across, at[1])),
            ]
        _draw_point(
            axes,
            at,
            (across, reach),
            styles[id(row)],
            fill=fills[str(option(row, "quantization"))],
            marked=id(row) in members,
            faint=not few,
            gid=f"row-{i}",
        )
    higher = metric_of(quality).better == "higher"
    if not higher:
        axes.invert_yaxis()  # better is up, whatever the metric
    if not in_bytes:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: format_value(cost, value))  # mathematics is switched off
        axes.xaxis.set_minor_formatter(lambda *_: "")
    axes.set_xlabel(f"{'peak memory in training' if in_bytes else heading(cost)} ({unit}), left is better")
    axes.set_ylabel(f"{heading(quality)}{'' if higher else ' (axis inverted)'}, up is better")
    axes.margins(x=0.12, y=0.08)
    marks = ["dark edge: the Pareto set"] if members else []
    marks += ["bars: 95 % intervals"] if lines else []
    against = "memory" if in_bytes else "trained parameters"
    axes.set_title(f"Quality against {against}{' (' + ', '.join(marks) + ')' if marks else ''}")
    named = [(row, labels[i]) for i, row in shown]
    if not few:  # a name for each would cover the points
        on_front = {id(row) for row in front}
        named = [(row, label) for row, label in named if id(row) in on_front][:_NAMED]
        _legend(figure, drawn, fills)
    for start, end in pairwise((x[id(row)], y[id(row)]) for row in front):
        corner = (end[0], start[1])
        lines += [(start, corner), (corner, end)]
    with_name = {id(row) for row, _ in named}
    place_labels(
        axes,
        [(x[id(row)], y[id(row)]) for row, _ in named],
        [label for _, label in named],
        avoid=lines if few else (),
        crowd=[(x[id(row)], y[id(row)]) for row in drawn if id(row) not in with_name],
    )
    return figure


def _draw_point(
    axes: Axes,
    at: tuple[float, float],
    reach: tuple[float, float],
    style: Style,
    *,
    fill: Any,
    marked: bool,
    faint: bool,
    gid: str,
) -> None:
    colour = COLOURS[style.colour]
    bars: dict[str, Any] = {"color": colour, "linewidth": 0.7, "alpha": 0.3 if faint else 0.75, "zorder": 2}
    if any(reach):
        gap = [math.nan]
        axes.plot(
            [at[0], at[0], *gap, at[0] - reach[0], at[0] + reach[0]],
            [at[1] - reach[1], at[1] + reach[1], *gap, at[1], at[1]],
            **bars,
        )
    [point] = axes.plot(
        [at[0]],
        [at[1]],
        marker=MARKERS[style.marker],
        markersize=6 if faint else 7,
        color=colour,
        **_filled(fill, colour),
        markeredgecolor=INK if marked else colour,
        markeredgewidth=1.1 if marked else 0.7,
        zorder=4 if marked else 3,
    )
    point.set_gid(gid)


def _filled(fill: Any, colour: str) -> dict[str, Any]:
    """A marker's filling as matplotlib's options."""
    if fill == "pale":
        return {"markerfacecolor": f"{colour}55"}
    return {"fillstyle": fill, "markerfacecoloralt": "white"}


def _legend(figure: Figure, rows: Sequence[Row], fills: Mapping[str, Any]) -> None:
    """The methods by colour and marker, the quantizations by fill."""
    from matplotlib.lines import Line2D

    def mark(marker: str, colour: str, label: str, fill: Any = "full") -> Any:
        options: dict[str, Any] = {"markersize": 5.5, **_filled(fill, colour)}
        return Line2D([], [], linestyle="", marker=marker, color=colour, label=cut_label(label), **options)

    styles = {str(option(row, "peft")): style for row, style in zip(rows, row_styles(rows), strict=True)}
    handles = []
    if len(styles) > 1:
        handles = [mark(MARKERS[style.marker], COLOURS[style.colour], name) for name, style in sorted(styles.items())]
    if len(fills) > 1:
        handles += [mark("", INK, " ")] * bool(handles)
        handles += [mark("o", INK, name, fill) for name, fill in fills.items()]
    if handles:
        figure.legend(handles=handles, loc="outside right center", fontsize=8, ncols=1 + len(handles) // 32)

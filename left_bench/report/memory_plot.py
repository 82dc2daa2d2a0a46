"""What the memory peak is made of: a bar for each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from left_bench.report.cells import Row
from left_bench.report.figure_style import INK, MOST_BARS, byte_scale, new_figure
from left_bench.report.statistics import reach_of
from left_bench.report.values import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_PARTS = {
    "weights": "#0072B2",
    "adapter": "#D55E00",
    "adapter_frozen": "#CC79A7",
    "gradients": "#009E73",
    "optimizer": "#E69F00",
    "activations": "#56B4E9",
    "workspace": "#B5B5B5",
    "activations_and_workspace": "#B5B5B5",
}


def memory_figure(rows: Sequence[Row], labels: Sequence[str]) -> Figure | None:
    """What the training peak is made of, one bar per cell with the interval of the whole; None where no cell tells."""
    told = [
        (i, row, parts, labels[i])
        for i, row in enumerate(rows)
        if row.ok and sum((parts := row.memory_parts()).values()) > 0
    ]
    if not told:
        return None
    more = len(told) - MOST_BARS
    told = sorted(told, key=lambda bar: sum(bar[2].values()))[:MOST_BARS] if more > 0 else told
    figure, axes = new_figure(7.2, 1.5 + 0.32 * len(told))
    scale, unit = byte_scale([sum(parts.values()) for _, _, parts, _ in told])
    order = [*_PARTS, *sorted({part for _, _, parts, _ in told for part in parts} - set(_PARTS))]
    ends = [0.0] * len(told)
    others = iter(("#CC79A7", "#56B4E9", "#666666") * len(order))
    for part in order:
        sizes = [parts.get(part, 0) / scale for _, _, parts, _ in told]
        colour = _PARTS.get(part) or next(others)
        if any(sizes):
            name = one_line(part.replace("_", " "))
            bars = axes.barh(range(len(told)), sizes, left=ends, height=0.68, color=colour, label=name)
            for bar, (i, *_) in zip(bars, told, strict=True):
                bar.set_gid(f"row-{i}-{part}")
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    for place, (end, (_, row, _, _)) in enumerate(zip(ends, told, strict=True)):
        reach = reach_of(row, "peak_memory_bytes") / scale
        if reach:
            axes.errorbar([end], [place], xerr=[reach], color=INK, elinewidth=0.9, capsize=2.5, zorder=3)
        axes.annotate(
            f"{end:,.2f}" if end < 10 else f"{end:,.0f}",
            (end + reach, place),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(told)), [label for *_, label in told])
    axes.margins(x=0.1)
    axes.set_ylim(len(told) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"peak memory in training ({unit})")
    notes = ["bars: 95 % intervals"] if any(reach_of(row, "peak_memory_bytes") for _, row, _, _ in told) else []
    notes += [f"the {MOST_BARS} smallest, {more:,} more"] if more > 0 else []
    axes.set_title("What the memory peak is made of" + (f" ({'; '.join(notes)})" if notes else ""))
    figure.legend(loc="outside lower center", ncols=5, handlelength=1.0, columnspacing=1.2)
    return figure

"""The plots of a report: figures drawn from rows, written as SVG, the same bytes for the same records."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from left_bench.core.files import write_atomically
from left_bench.report.cells import Row, option
from left_bench.report.placement import place_labels
from left_bench.report.ranking import headline_quality, pareto_front, rankable
from left_bench.report.recommend import pareto_set
from left_bench.report.statistics import mean_interval, measured_steps, seed_losses
from left_bench.report.styles import COLOURS, DASHES, FILLS, MARKERS, Style, quantizations, row_styles
from left_bench.report.tables import heading
from left_bench.report.values import format_error, format_value, is_number, metric_of, one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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
INK, _FAINT = "#333333", "#D9D9D9"
_LABEL_LIMIT = 40
_NAMED, _BARS = 24, 60
"""Points with a name, and bars, that one picture still holds; what has no name tells it when pointed at."""
_IN_A_PANEL = 14
"""Curves up to which one panel holds them all; of more, each quantization has its own."""
_PANELS = 12
_SMOOTHED_FROM = 40
"""Steps from which a loss curve is drawn as a running mean."""
_TOLD = ("peak_memory_bytes", "train_tokens_per_second")
# A white card is read alike on a light page and on a dark one.
_STYLE: dict[str, Any] = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],  # the first is matplotlib's own; a viewer takes what it has
    "font.size": 9,
    "legend.frameon": False,
    "savefig.dpi": 144,
    "svg.hashsalt": "left_bench",
    "svg.fonttype": "none",  # text as text: a drawn outline for every letter made the files ten times as large
    "text.parse_math": False,  # a label is text: a dollar sign in it starts no formula
}


def write_plots(rows: Sequence[Row], labels: Sequence[str], *, out: Path, name: str) -> list[tuple[str, str]]:
    """Draw what the rows allow into `<out>/<name>_<plot>.svg`; what is drawn of a row tells its name when pointed at.

    Returns:
        (file name, what it shows), plot by plot.
    """
    written = []
    tips = [_tip(row, label, headline_quality(rows)) for row, label in zip(rows, labels, strict=True)]
    with plot_style():
        for plot, figure, shown in figures(rows, [_label(label) for label in labels]):
            drawn = io.StringIO()
            _settle(figure)
            figure.savefig(drawn, format="svg", metadata={"Date": None})
            write_atomically(out / f"{name}_{plot}.svg", _with_tips(drawn.getvalue(), tips))
            written.append((f"{name}_{plot}.svg", shown))
    return written


def write_images(rows: Sequence[Row], labels: Sequence[str], *, out: Path, name: str) -> list[Path]:
    """The same as PNG, for what cannot show SVG (trackers)."""
    written = []
    with plot_style():
        for plot, figure, _ in figures(rows, [_label(label) for label in labels]):
            path = out / f"{name}_{plot}.png"
            _settle(figure)
            figure.savefig(path, metadata={"Software": None})
            written.append(path)
    return written


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
    scale, unit = _byte_scale([row.value(cost) or 0 for row in drawn]) if in_bytes else (1, "log scale")
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
        at, reach = (x[id(row)], y[id(row)]), _reach(row, quality)
        across = _reach(row, cost) / scale
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


def _reach(row: Row, metric: str) -> float:
    """Half the width of a mean's 95 % interval; of one run two standard errors, 0 where there are none."""
    interval = mean_interval(row, metric)
    if interval is not None:
        return (interval.high - interval.low) / 2
    return 2 * (row.stderr(metric) or 0.0)


def _legend(figure: Figure, rows: Sequence[Row], fills: Mapping[str, Any]) -> None:
    """The methods by colour and marker, the quantizations by fill."""
    from matplotlib.lines import Line2D

    def mark(marker: str, colour: str, label: str, fill: Any = "full") -> Any:
        options: dict[str, Any] = {"markersize": 5.5, **_filled(fill, colour)}
        return Line2D([], [], linestyle="", marker=marker, color=colour, label=_label(label), **options)

    styles = {str(option(row, "peft")): style for row, style in zip(rows, row_styles(rows), strict=True)}
    handles = []
    if len(styles) > 1:
        handles = [mark(MARKERS[style.marker], COLOURS[style.colour], name) for name, style in sorted(styles.items())]
    if len(fills) > 1:
        handles += [mark("", INK, " ")] * bool(handles)
        handles += [mark("o", INK, name, fill) for name, fill in fills.items()]
    if handles:
        figure.legend(handles=handles, loc="outside right center", fontsize=8, ncols=1 + len(handles) // 32)


def memory_figure(rows: Sequence[Row], labels: Sequence[str]) -> Figure | None:
    """What the training peak is made of, one bar per cell with the interval of the whole; None where no cell tells."""
    told = [
        (i, row, parts, labels[i])
        for i, row in enumerate(rows)
        if row.ok and sum((parts := row.memory_parts()).values()) > 0
    ]
    if not told:
        return None
    more = len(told) - _BARS
    told = sorted(told, key=lambda bar: sum(bar[2].values()))[:_BARS] if more > 0 else told
    figure, axes = new_figure(7.2, 1.5 + 0.32 * len(told))
    scale, unit = _byte_scale([sum(parts.values()) for _, _, parts, _ in told])
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
        reach = _reach(row, "peak_memory_bytes") / scale
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
    notes = ["bars: 95 % intervals"] if any(_reach(row, "peak_memory_bytes") for _, row, _, _ in told) else []
    notes += [f"the {_BARS} smallest, {more:,} more"] if more > 0 else []
    axes.set_title("What the memory peak is made of" + (f" ({'; '.join(notes)})" if notes else ""))
    figure.legend(loc="outside lower center", ncols=5, handlelength=1.0, columnspacing=1.2)
    return figure


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
    figure, grid = _new_grid(7.2 if columns == 1 else 9.6, 4.0 if columns == 1 else 2.5 * lines + 0.6, lines, columns)
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
            axes.set_title(_label(name), fontsize=9)
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


def steps_figure(rows: Sequence[Row], labels: Sequence[str]) -> Figure | None:
    """Seconds per optimizer step, every step a stroke over its box, warm-up left out; None where no steps were kept."""
    named = []
    styles = row_styles(rows)
    for row, label, style in zip(rows, labels, styles, strict=True):
        seconds = [s for run in row.runs if run.ok for _, s in measured_steps(run)]
        if len(seconds) > 2:
            named.append((seconds, label, COLOURS[style.colour]))
        if len(named) > _BARS:
            break
    if not named:
        return None
    more, named = len(named) > _BARS, named[:_BARS]
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
    axes.set_title(f"Step time: box 25 to 75 %, line median, whiskers 5 to 95 %{f' (first {_BARS})' if more else ''}")
    return figure


def figures(rows: Sequence[Row], labels: Sequence[str]) -> Iterator[tuple[str, Figure, str]]:
    """(name, figure, what it shows) of each that the rows allow; the first is the answer where there is one."""
    quality = headline_quality(rows)
    if (figure := pareto_figure(rows, labels)) is not None:
        yield (
            "pareto",
            figure,
            f"{heading(quality or '')} against peak memory of every cell, with 95 % intervals and the Pareto set",
        )
    if (figure := memory_figure(rows, labels)) is not None:
        yield "memory", figure, "What the memory peak of every cell is made of"
    if (figure := loss_figure(rows, labels)) is not None:
        yield "loss", figure, "Training loss of every cell, smoothed, with a band over the seeds"
    from left_bench.report.curve_plot import curve_figure

    if (figure := curve_figure(rows, labels)) is not None:
        yield "curve", figure, "Validation loss of every cell over the time of training"
    from left_bench.report.sensitivity_plot import sensitivity_figure

    if (figure := sensitivity_figure(rows, labels)) is not None:
        yield "rates", figure, "Validation loss against learning rate of every tuned method"
    if (figure := parameters_figure(rows, labels)) is not None:
        yield "parameters", figure, f"{heading(quality or '')} against trainable parameters of every cell"
    if (figure := steps_figure(rows, labels)) is not None:
        yield "steps", figure, "Seconds per optimizer step of every cell"


@contextmanager
def plot_style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own matplotlibrc says, a report looks the same
        matplotlib.rcParams.update(_STYLE)  # type: ignore[arg-type]
        yield


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of its own, in no global state; inches."""
    figure, [axes] = _new_grid(width, height, 1, 1)
    return figure, axes


def log_losses(axes: Axes, losses: Sequence[float], *, beyond: float = 8) -> None:
    """A logarithmic axis with plain numbers on it, for losses of which the highest is `beyond` times the lowest."""
    from matplotlib.ticker import LogLocator

    if min(losses) > 0 and max(losses) > beyond * min(losses):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # mathematics is switched off
        axes.yaxis.set_minor_formatter(lambda *_: "")


def _new_grid(width: float, height: float, lines: int, columns: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)


def _tip(row: Row, label: str, quality: str | None) -> str:
    """What a row's mark tells when it is pointed at."""
    numbers = []
    for metric in filter(None, (quality, *_TOLD)):
        value, error = row.value(metric), row.stderr(metric)
        if value is not None:
            beside = f" ± {format_error(metric, value, error)}" if error else ""
            numbers.append(f"{heading(metric)} {format_value(metric, value)}{beside}")
    return one_line(f"{label}: {', '.join(numbers)}")


def _with_tips(svg: str, tips: Sequence[str]) -> str:
    """The picture with a title in each group that belongs to a row."""
    return re.sub(
        r'<g id="row-(\d+)[^"]*">', lambda result: f"{result[0]}<title>{html.escape(tips[int(result[1])])}</title>", svg
    )


def _settle(figure: Figure) -> None:
    """Lay out once: with its layout engine on, saving a figure does so three times, which is most of what it costs."""
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


def _byte_scale(sizes: Sequence[float]) -> tuple[int, str]:
    return (2**30, "GiB") if max(sizes) >= 2**30 else (2**20, "MiB")


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and those before it, `window` in all."""
    return [sum(part := values[max(0, i + 1 - window) : i + 1]) / len(part) for i in range(len(values))]


def _label(label: str) -> str:
    return one_line(label, limit=_LABEL_LIMIT)

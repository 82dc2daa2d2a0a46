"""The plots of a report: figures drawn from rows, written as SVG and PNG, the same bytes for the same records."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from left_bench.report.cells import Row, option
from left_bench.report.load import read_losses
from left_bench.report.placement import place_labels
from left_bench.report.ranking import headline_quality, pareto_front, rankable
from left_bench.report.statistics import measured_steps
from left_bench.report.tables import heading
from left_bench.report.values import format_value, is_number, metric_of, one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which stay apart for colour-blind readers; their yellow is too pale for a white card.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
_LINES = ("-", "--", ":", "-.")
_PARTS = {
    "weights": "#0072B2",
    "adapter": "#D55E00",
    "adapter_frozen": "#CC79A7",
    "gradients": "#009E73",
    "optimizer": "#E69F00",
    "activations_and_workspace": "#B5B5B5",
}
_INK, _FAINT = "#333333", "#D9D9D9"
_LABEL_LIMIT = 40
_NAMED, _BARS, _CURVES = 24, 60, 12
"""Points with a name, bars and curves with a colour that one picture still holds."""
_MARKERS = "osD^vP*X<>"
_SMOOTHED_FROM = 40
"""Steps from which a loss curve is drawn as a running mean."""
# A white card is read alike on a light page and on a dark one.
_STYLE: dict[str, Any] = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
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
    """Draw what the rows allow into `<out>/<name>_<plot>.svg` and `.png`.

    Returns:
        (SVG file name, what it shows), plot by plot.
    """
    written = []
    with plot_style():
        for plot, figure, shown in _figures(rows, [_label(label) for label in labels]):
            for ending in ("svg", "png"):
                metadata = {"Date": None} if ending == "svg" else {"Software": None}
                figure.savefig(out / f"{name}_{plot}.{ending}", metadata=metadata)
                figure.set_layout_engine("none")  # laid out once: the second file has the first one's places
            written.append((f"{name}_{plot}.svg", shown))
    return written


def pareto_figure(rows: Sequence[Row], labels: Sequence[str]) -> Figure | None:
    """Quality against peak memory, every ok cell named, the Pareto front drawn; None below two such cells."""
    return _scatter(rows, labels, "peak_memory_bytes")


def parameters_figure(rows: Sequence[Row], labels: Sequence[str]) -> Figure | None:
    """Quality against trainable parameters on a logarithmic axis; None below two cells that differ in them."""
    if len({row.value("trainable_params") for row in rows if row.ok and row.value("trainable_params")}) < 2:
        return None
    return _scatter(rows, labels, "trainable_params")


def _scatter(rows: Sequence[Row], labels: Sequence[str], cost: str) -> Figure | None:
    """Quality against a cost, the front drawn, every cell named as long as there is room for names."""
    quality = headline_quality(rows)
    if quality is None:
        return None
    named = [
        (row, label)
        for row, label in zip(rows, labels, strict=True)
        if row.ok and is_number(row.value(quality)) and (is_number(row.value(cost)) and (row.value(cost) or 0) > 0)
    ]
    if len(named) < 2:
        return None
    drawn = [row for row, _ in named]
    few = len(drawn) <= _NAMED
    figure, axes = _new_figure(7.2, 4.8 + 0.06 * max(0, min(_NAMED, len(named)) - 12))
    in_bytes = metric_of(cost).unit == "bytes"
    scale, unit = _byte_scale([row.value(cost) or 0 for row in drawn]) if in_bytes else (1, "log scale")
    x = {id(row): (row.value(cost) or 0) / scale for row in drawn}
    y = {id(row): row.value(quality) or 0.0 for row in drawn}
    front = pareto_front(drawn, quality, cost) if rankable(drawn, quality) and rankable(drawn, cost) else []
    on_front = {id(row) for row in front}
    if len(front) > 1:
        axes.plot(
            [x[id(row)] for row in front],
            [y[id(row)] for row in front],
            drawstyle="steps-post",
            color=COLOURS[0],
            linewidth=1.2,
            alpha=0.6,
            zorder=1,
        )
    styled = {} if few else _by_options(drawn)
    for colour, group in (
        ("#8C8C8C", [row for row in drawn if id(row) not in on_front]),
        (COLOURS[0], [row for row in drawn if id(row) in on_front]),
    ):
        if not group or styled:
            continue
        axes.errorbar(
            [x[id(row)] for row in group],
            [y[id(row)] for row in group],
            yerr=[row.stderr(quality) or 0.0 for row in group] if few else None,
            fmt="o",
            markersize=6 if few else 3,
            color=colour,
            ecolor=colour,
            elinewidth=0.7,
            capsize=2,
            zorder=2,
        )
    for (colour, marker), group in styled.items():
        axes.scatter(
            [x[id(row)] for row in group],
            [y[id(row)] for row in group],
            s=34,
            c=colour,
            marker=marker,
            linewidths=0,
            zorder=2,
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
    axes.margins(x=0.12, y=0.12)
    marks = ["blue: unbeaten in both" if not styled else "line: unbeaten in both, named"] if front else []
    marks += ["bars: ± standard error"] if few and any(row.stderr(quality) for row in drawn) else []
    against = "memory" if in_bytes else "trained parameters"
    axes.set_title(f"Quality against {against}{' (' + ', '.join(marks) + ')' if marks else ''}")
    if not few:  # a name for each would cover the points: only the front is named
        named = [(row, label) for row, label in named if id(row) in on_front][:_NAMED]
        _options_legend(figure, drawn)
    points = [(x[id(row)], y[id(row)]) for row, _ in named]
    bars = [(row, row.stderr(quality) or 0.0) for row, _ in named if few]
    lines = [((x[id(row)], y[id(row)] - error), (x[id(row)], y[id(row)] + error)) for row, error in bars]
    for start, end in pairwise((x[id(row)], y[id(row)]) for row in front):
        corner = (end[0], start[1])
        lines += [(start, corner), (corner, end)]
    others = [] if few else [(x[id(row)], y[id(row)]) for row in drawn if id(row) not in on_front]
    place_labels(axes, points, [label for _, label in named], avoid=lines, crowd=others)
    return figure


def _options(rows: Sequence[Row]) -> tuple[list[str], list[str]] | None:
    """The methods and quantizations, where colours and shapes are enough to tell them apart."""
    found = [list(dict.fromkeys(str(option(row, group)) for row in rows)) for group in ("peft", "quantization")]
    return (found[0], found[1]) if len(found[0]) <= len(_MARKERS) and len(found[1]) <= len(COLOURS) else None


def _by_options(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """(colour of the quantization, shape of the method) -> rows."""
    known = _options(rows)
    groups: dict[tuple[str, str], list[Row]] = {}
    if known is None:
        return groups
    for row in rows:
        method, quantization = str(option(row, "peft")), str(option(row, "quantization"))
        style = (COLOURS[known[1].index(quantization)], _MARKERS[known[0].index(method)])
        groups.setdefault(style, []).append(row)
    return groups


def _options_legend(figure: Figure, rows: Sequence[Row]) -> None:
    from matplotlib.lines import Line2D

    known = _options(rows)
    if known is None:
        return

    def mark(shape: str, colour: str, label: str) -> Any:
        return Line2D([], [], linestyle="", marker=shape, color=colour, markersize=5.5, label=_label(label))

    handles = [mark("o", colour, name) for colour, name in zip(COLOURS, known[1], strict=False)] * (len(known[1]) > 1)
    handles += [mark("", _INK, " ")] * (len(known[0]) > 1 and len(known[1]) > 1)
    handles += [mark(shape, _INK, name) for shape, name in zip(_MARKERS, known[0], strict=False)] * (len(known[0]) > 1)
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)


def memory_figure(rows: Sequence[Row], labels: Sequence[str]) -> Figure | None:
    """What the training peak is made of, one bar per cell; None where no cell tells."""
    named = [
        (parts, label)
        for row, label in zip(rows, labels, strict=True)
        if row.ok and sum((parts := row.memory_parts()).values()) > 0
    ]
    if not named:
        return None
    more = len(named) - _BARS
    named = sorted(named, key=lambda bar: sum(bar[0].values()))[:_BARS] if more > 0 else named
    figure, axes = _new_figure(7.2, 1.5 + 0.32 * len(named))
    scale, unit = _byte_scale([sum(parts.values()) for parts, _ in named])
    order = [*_PARTS, *sorted({part for parts, _ in named for part in parts} - set(_PARTS))]
    ends = [0.0] * len(named)
    others = iter(("#CC79A7", "#56B4E9", "#666666") * len(order))
    for part in order:
        sizes = [parts.get(part, 0) / scale for parts, _ in named]
        colour = _PARTS.get(part) or next(others)
        if any(sizes):
            shown = one_line(part.replace("_", " "))
            axes.barh(range(len(named)), sizes, left=ends, height=0.68, color=colour, label=shown)
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    for i, end in enumerate(ends):
        axes.annotate(
            f"{end:,.2f}" if end < 10 else f"{end:,.0f}",
            (end, i),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(named)), [label for _, label in named])
    axes.margins(x=0.1)
    axes.set_ylim(len(named) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"peak memory in training ({unit})")
    axes.set_title("What the memory peak is made of" + (f" (the {_BARS} smallest, {more:,} more)" if more > 0 else ""))
    figure.legend(loc="outside lower center", ncols=5, handlelength=1.0, columnspacing=1.2)
    return figure


def loss_figure(rows: Sequence[Row], labels: Sequence[str]) -> Figure | None:
    """Training loss by step, from `events.jsonl` beside the records; None where no cell has one."""
    found = ((_mean_losses(row), label) for row, label in zip(rows, labels, strict=True) if row.ok or row.path)
    curves = [((steps, losses), label) for (steps, losses), label in found if len(steps) > 1]
    if not curves:
        return None
    more = len(curves) - _CURVES
    figure, axes = _new_figure(7.2, 4.0)
    if more > 0:  # a hundred colours show none of them: the lowest ends are named, the others are their background
        curves = sorted(curves, key=lambda curve: sum(curve[0][1][-5:]) / len(curve[0][1][-5:]))
        for (steps, losses), _ in curves[_CURVES : _CURVES + _BARS]:
            window = len(losses) // 10 if len(losses) >= _SMOOTHED_FROM else 1
            axes.plot(steps, _running_mean(losses, max(1, window)), color="#C8C8C8", linewidth=0.7, zorder=1)
        curves = curves[:_CURVES]
    for i, ((steps, losses), label) in enumerate(curves):
        colour, line = COLOURS[i % len(COLOURS)], _LINES[i // len(COLOURS) % len(_LINES)]
        window = len(losses) // 10 if len(losses) >= _SMOOTHED_FROM else 1
        if window > 1:
            axes.plot(steps, losses, color=colour, linewidth=0.5, alpha=0.25)
        axes.plot(steps, _running_mean(losses, window), color=colour, linestyle=line, linewidth=1.4, label=label)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss (nats)")
    longest = max(len(losses) for (_, losses), _ in curves)
    notes = ["running mean over a tenth of the steps"] if longest >= _SMOOTHED_FROM else []
    notes += ["mean over the seeds"] if any(row.members for row in rows) else []
    notes += [f"named: the {_CURVES} lowest ends of {more + _CURVES:,}"] if more > 0 else []
    axes.set_title(", ".join(["Training loss", *notes]))
    axes.margins(x=0.02)
    ticks: Any = axes.xaxis.get_major_locator()
    ticks.set_params(integer=True)  # there is no half a step
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def steps_figure(rows: Sequence[Row], labels: Sequence[str]) -> Figure | None:
    """Seconds per optimizer step, every step a stroke over its box, warm-up left out; None where no steps were kept."""
    named = []
    for row, label in zip(rows, labels, strict=True):
        seconds = [s for run in row.runs if run.ok for _, s in measured_steps(run)]
        if len(seconds) > 2:
            named.append((seconds, label))
        if len(named) > _BARS:
            break
    if not named:
        return None
    more, named = len(named) > _BARS, named[:_BARS]
    figure, axes = _new_figure(7.2, 1.3 + 0.3 * len(named))
    axes.boxplot(
        [seconds for seconds, _ in named],
        orientation="horizontal",
        positions=range(len(named)),
        widths=0.62,
        whis=(5, 95),
        showfliers=False,
        patch_artist=True,
        boxprops={"facecolor": "#CFE3F1", "edgecolor": COLOURS[0], "linewidth": 0.9},
        whiskerprops={"color": COLOURS[0], "linewidth": 0.9},
        capprops={"color": COLOURS[0], "linewidth": 0.9},
        medianprops={"color": COLOURS[3], "linewidth": 1.6},
    )
    for i, (seconds, _) in enumerate(named):
        # one broken line of short strokes: a marker for each step would be most of the file
        across = [x for second in seconds for x in (second, second, math.nan)]
        along = [i - 0.12, i + 0.12, math.nan] * len(seconds)
        axes.plot(across, along, color=_INK, linewidth=0.7, alpha=0.6, zorder=3)
    axes.set_yticks(range(len(named)), [label for _, label in named])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds per optimizer step, left is better")
    axes.set_title(f"Step time: box 25 to 75 %, line median, whiskers 5 to 95 %{f' (first {_BARS})' if more else ''}")
    return figure


def _mean_losses(row: Row) -> tuple[list[int], list[float]]:
    """Training loss by step, the mean over the seeds at the steps that all of them have."""
    found = [read_losses(run.path) for run in row.runs if run.path and (run.ok or not row.ok)]
    curves = [dict(zip(*curve, strict=True)) for curve in found if len(curve[0]) > 1]
    if not curves:
        return [], []
    steps = [step for step in curves[0] if all(step in curve for curve in curves)]
    return steps, [sum(curve[step] for curve in curves) / len(curves) for step in steps]


def _figures(rows: Sequence[Row], labels: Sequence[str]) -> Iterator[tuple[str, Figure, str]]:
    quality = headline_quality(rows)
    if (figure := pareto_figure(rows, labels)) is not None:
        yield "pareto", figure, f"{heading(quality or '')} against peak memory of every cell, with the Pareto front"
    if (figure := memory_figure(rows, labels)) is not None:
        yield "memory", figure, "What the memory peak of every cell is made of"
    if (figure := loss_figure(rows, labels)) is not None:
        yield "loss", figure, "Training loss of every cell, step by step"
    from left_bench.report.curve_plot import curve_figure

    if (figure := curve_figure(rows, labels)) is not None:
        yield "curve", figure, "Validation loss of every cell over the time of training"
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


def _new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of its own, in no global state; inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _byte_scale(sizes: Sequence[float]) -> tuple[int, str]:
    return (2**30, "GiB") if max(sizes) >= 2**30 else (2**20, "MiB")


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and those before it, `window` in all."""
    return [sum(part := values[max(0, i + 1 - window) : i + 1]) / len(part) for i in range(len(values))]


def _label(label: str) -> str:
    return one_line(label, limit=_LABEL_LIMIT)

"""The plots of a report: figures drawn from rows, written as SVG and PNG, the same bytes for the same records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from left_bench.report.cells import Row
from left_bench.report.load import read_losses
from left_bench.report.placement import place_labels
from left_bench.report.ranking import headline_quality, pareto_front, rankable
from left_bench.report.tables import heading
from left_bench.report.values import is_number, metric_of, one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which stay apart for colour-blind readers; their yellow is too pale for a white card.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
_LINES = ("-", "--", ":", "-.")
_PARTS = {
    "weights": "#0072B2",
    "adapter": "#D55E00",
    "gradients": "#009E73",
    "optimizer": "#E69F00",
    "activations_and_workspace": "#B5B5B5",
}
_INK, _FAINT = "#333333", "#D9D9D9"
_LABEL_LIMIT = 40
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
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "legend.frameon": False,
    "savefig.dpi": 144,
    "svg.hashsalt": "left_bench",
    "svg.fonttype": "path",
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
            written.append((f"{name}_{plot}.svg", shown))
    return written


def pareto_figure(rows: Sequence[Row], labels: Sequence[str]) -> Figure | None:
    """Quality against peak memory, every ok cell named, the Pareto front drawn; None below two such cells."""
    quality = headline_quality(rows)
    if quality is None:
        return None
    cost = "peak_memory_bytes"
    named = [
        (row, label)
        for row, label in zip(rows, labels, strict=True)
        if row.ok and is_number(row.value(quality)) and is_number(row.value(cost))
    ]
    if len(named) < 2:
        return None
    drawn = [row for row, _ in named]
    figure, axes = _new_figure(7.2, 4.8 + 0.06 * max(0, len(named) - 12))
    scale, unit = _byte_scale([row.value(cost) or 0 for row in drawn])
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
    for row in drawn:
        colour = COLOURS[0] if id(row) in on_front else "#8C8C8C"
        axes.errorbar(
            x[id(row)],
            y[id(row)],
            yerr=row.stderr(quality),
            fmt="o",
            markersize=6,
            color=colour,
            ecolor=colour,
            elinewidth=0.7,
            capsize=2,
            zorder=2,
        )
    higher = metric_of(quality).better == "higher"
    if not higher:
        axes.invert_yaxis()  # better is up, whatever the metric
    axes.set_xlabel(f"peak memory in training ({unit}), left is better")
    axes.set_ylabel(f"{heading(quality)}{'' if higher else ' (axis inverted)'}, up is better")
    axes.margins(x=0.12, y=0.12)
    marks = ["blue: no cell beats it in both"] if front else []
    marks += ["bars: ± standard error"] if any(row.stderr(quality) for row in drawn) else []
    axes.set_title(f"Quality against memory{' (' + ', '.join(marks) + ')' if marks else ''}")
    points = [(x[id(row)], y[id(row)]) for row in drawn]
    bars = [(row, row.stderr(quality) or 0.0) for row in drawn]
    lines = [((x[id(row)], y[id(row)] - error), (x[id(row)], y[id(row)] + error)) for row, error in bars]
    for start, end in pairwise((x[id(row)], y[id(row)]) for row in front):
        corner = (end[0], start[1])
        lines += [(start, corner), (corner, end)]
    place_labels(axes, points, [label for _, label in named], avoid=lines)
    return figure


def memory_figure(rows: Sequence[Row], labels: Sequence[str]) -> Figure | None:
    """What the training peak is made of, one bar per cell; None where no cell tells."""
    named = [
        (row.record.memory_breakdown, label)
        for row, label in zip(rows, labels, strict=True)
        if row.record and row.ok and sum(row.record.memory_breakdown.values()) > 0
    ]
    if not named:
        return None
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
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"peak memory in training ({unit})")
    axes.set_title("What the memory peak is made of")
    figure.legend(loc="outside lower center", ncols=5, handlelength=1.0, columnspacing=1.2)
    return figure


def loss_figure(rows: Sequence[Row], labels: Sequence[str]) -> Figure | None:
    """Training loss by step, from `events.jsonl` beside the records; None where no cell has one."""
    curves = [(read_losses(row.path), label) for row, label in zip(rows, labels, strict=True) if row.path]
    curves = [((steps, losses), label) for (steps, losses), label in curves if len(steps) > 1]
    if not curves:
        return None
    figure, axes = _new_figure(7.2, max(4.0, 0.9 + 0.19 * len(curves)))
    for i, ((steps, losses), label) in enumerate(curves):
        colour, line = COLOURS[i % len(COLOURS)], _LINES[i // len(COLOURS) % len(_LINES)]
        window = len(losses) // 10 if len(losses) >= _SMOOTHED_FROM else 1
        if window > 1:
            axes.plot(steps, losses, color=colour, linewidth=0.5, alpha=0.25)
        axes.plot(steps, _running_mean(losses, window), color=colour, linestyle=line, linewidth=1.4, label=label)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss (nats)")
    longest = max(len(losses) for (_, losses), _ in curves)
    axes.set_title("Training loss" + (", running mean over a tenth of the steps" if longest >= _SMOOTHED_FROM else ""))
    axes.margins(x=0.02)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def _figures(rows: Sequence[Row], labels: Sequence[str]) -> Iterator[tuple[str, Figure, str]]:
    quality = headline_quality(rows)
    if (figure := pareto_figure(rows, labels)) is not None:
        yield "pareto", figure, f"{heading(quality or '')} against peak memory of every cell, with the Pareto front"
    if (figure := memory_figure(rows, labels)) is not None:
        yield "memory", figure, "What the memory peak of every cell is made of"
    if (figure := loss_figure(rows, labels)) is not None:
        yield "loss", figure, "Training loss of every cell, step by step"


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

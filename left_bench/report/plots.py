"""The plots of a report: figures drawn from rows, written as SVG, the same bytes for the same records."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from left_bench.core.files import write_atomically
from left_bench.report.cells import Row
from left_bench.report.curve_plot import curve_figure
from left_bench.report.figure_style import cut_label, plot_style
from left_bench.report.headings import heading
from left_bench.report.loss_plot import loss_figure
from left_bench.report.memory_plot import memory_figure
from left_bench.report.ranking import headline_quality
from left_bench.report.scatter_plot import parameters_figure, pareto_figure
from left_bench.report.sensitivity_plot import sensitivity_figure
from left_bench.report.steps_plot import steps_figure
from left_bench.report.values import format_error, format_value, one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TOLD = ("peak_memory_bytes", "train_tokens_per_second")


def write_plots(rows: Sequence[Row], labels: Sequence[str], *, out: Path, name: str) -> list[tuple[str, str]]:
    """Draw what the rows allow into `<out>/<name>_<plot>.svg`; what is drawn of a row tells its name when pointed at.

    Returns:
        (file name, what it shows), plot by plot.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    written = []
    tips = [_tip(row, label, headline_quality(rows)) for row, label in zip(rows, labels, strict=True)]
    with plot_style():
        for plot, figure, shown in figures(rows, [cut_label(label) for label in labels]):
            drawn = io.StringIO()
            _settle(figure)
            # not `savefig`, which draws everything once more beforehand
            canvas: Any = FigureCanvasSVG(figure)
            canvas.print_svg(drawn, metadata={"Date": None})
            write_atomically(out / f"{name}_{plot}.svg", _with_tips(drawn.getvalue(), tips))
            written.append((f"{name}_{plot}.svg", shown))
    return written


def write_images(rows: Sequence[Row], labels: Sequence[str], *, out: Path, name: str) -> list[Path]:
    """The same as PNG, for what cannot show SVG (trackers)."""
    written = []
    with plot_style():
        for plot, figure, _ in figures(rows, [cut_label(label) for label in labels]):
            path = out / f"{name}_{plot}.png"
            _settle(figure)
            figure.savefig(path, metadata={"Software": None})
            written.append(path)
    return written


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
    if (figure := curve_figure(rows, labels)) is not None:
        yield "curve", figure, "Validation loss of every cell over the time of training"
    if (figure := sensitivity_figure(rows, labels)) is not None:
        yield "rates", figure, "Validation loss against learning rate of every tuned method"
    if (figure := parameters_figure(rows, labels)) is not None:
        yield "parameters", figure, f"{heading(quality or '')} against trainable parameters of every cell"
    if (figure := steps_figure(rows, labels)) is not None:
        yield "steps", figure, "Seconds per optimizer step of every cell"


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

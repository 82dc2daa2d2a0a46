"""How every plot of a report looks: sizes, colours of text and lines, how a size is counted, how names are cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from left_bench.report.values import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#333333", "#D9D9D9"
MOST_BARS = 60
"""Bars that one picture still holds."""
_LABEL_LIMIT = 40
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
    "grid.color": FAINT,
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


@contextmanager
def plot_style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own matplotlibrc says, a report looks the same
        matplotlib.rcParams.update(_STYLE)  # type: ignore[arg-type]
        yield


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of its own, in no global state; inches."""
    figure, [axes] = new_grid(width, height, 1, 1)
    return figure, axes


def new_grid(width: float, height: float, lines: int, columns: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)


def scale_losses(axes: Axes, losses: Sequence[float], *, beyond: float = 8) -> None:
    """Make the axis of losses logarithmic, with plain numbers, if the highest exceeds `beyond` times the lowest."""
    from matplotlib.ticker import LogLocator

    if min(losses) > 0 and max(losses) > beyond * min(losses):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # mathematics is switched off
        axes.yaxis.set_minor_formatter(lambda *_: "")


def byte_scale(sizes: Sequence[float]) -> tuple[int, str]:
    return (2**30, "GiB") if max(sizes) >= 2**30 else (2**20, "MiB")


def cut_label(label: str) -> str:
    return one_line(label, limit=_LABEL_LIMIT)

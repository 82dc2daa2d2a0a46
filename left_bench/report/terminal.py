"""The end of a run on the terminal: one line per cell."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from left_bench.report.axes import find_axes, labels
from left_bench.report.cells import Row, row_of
from left_bench.report.headings import heading
from left_bench.report.ranking import headline_quality
from left_bench.report.tables import ROWS_SHOWN
from left_bench.report.values import ABSENT, format_error, format_share, format_value, one_line
from left_bench.spec.record import Record

if TYPE_CHECKING:
    from rich.console import Console

_COLUMNS = ("peak_memory_bytes", "train_tokens_per_second", "trainable_params", "wall_seconds")
_HEADINGS = {
    "peak_memory_bytes": "memory",
    "train_tokens_per_second": "tokens/s",
    "trainable_params": "trainable",
    "wall_seconds": "wall",
}
_PLAIN_WIDTH, _NO_EDGE = 100, 10_000
_REASON_LIMIT = 300


def print_summary(records: Sequence[Record], *, console: Console | None = None) -> None:
    """Print the records, one line each, and beneath why some did not run; of very many the first ones.

    Args:
        console: where to; None: standard output. Where that is no terminal, the text is plain and as wide as it needs.
    """
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    rows = [row_of(record) for record in records]
    if not rows:
        return
    names = [one_line(name) for name in labels(rows, find_axes(rows))]
    quality = headline_quality(rows)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("cell", overflow="fold")
    table.add_column("status", no_wrap=True)
    metrics = [*([quality] if quality else []), *_COLUMNS]
    for metric in metrics:
        table.add_column(_HEADINGS.get(metric, heading(metric)), justify="right", no_wrap=True)
    for row, name in list(zip(rows, names, strict=True))[:ROWS_SHOWN]:
        style = "green" if row.ok else "yellow" if row.status == "unsupported" else "red"
        table.add_row(Text(name), Text(row.status, style=style), *(Text(_number(row, metric)) for metric in metrics))
    if console is None:
        console = Console(file=sys.stdout)
        if not console.is_terminal:  # a file has no edge to wrap at
            natural = Measurement.get(console, console.options.update(width=_NO_EDGE), table).maximum
            console.width = max(_PLAIN_WIDTH, natural)
    console.print(table)
    if len(rows) > ROWS_SHOWN:
        console.print(Text(f"and {len(rows) - ROWS_SHOWN:,} more cells"))
    failed = [(row, name) for row, name in zip(rows, names, strict=True) if not row.ok]
    for row, name in failed[:ROWS_SHOWN]:
        reason = one_line(row.reason or "no reason was recorded", limit=_REASON_LIMIT)
        console.print(Text(f"{name}: {row.status}: {reason}"), soft_wrap=True)
    if len(failed) > ROWS_SHOWN:
        console.print(Text(f"and {len(failed) - ROWS_SHOWN:,} more that are not ok"))
    if not any(row.scored for row in rows):
        console.print(Text("random weights: no quality is scored"))


def _number(row: Row, metric: str) -> str:
    value = row.value(metric)
    text = format_value(metric, value)
    if metric == "trainable_params" and value is not None:
        share = format_share(value, row.value("total_params"))
        return f"{text} ({share})" if share else text
    if text == ABSENT:
        return text
    stderr = row.stderr(metric)
    return text if stderr is None or value is None else f"{text} ± {format_error(metric, value, stderr)}"

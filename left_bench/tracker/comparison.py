"""A finished sweep as trackers are told it: the table of its records, beside the report that was written of them."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from left_bench.spec.record import METRICS, RECORD_NAME, Record
from left_bench.tracker.base import Attempt, Comparison, launch_id
from left_bench.tracker.choose import open_tracker

if TYPE_CHECKING:
    from left_bench.report.load import Run


def compare(
    records: Sequence[Record],
    *,
    sweep: str,
    started_at: str | None,
    command: str,
    markdown: Path,
    plots: Sequence[Path] = (),
) -> Comparison:
    """One row per record: what it is, how it ended, its options and every metric that any of them has.

    Args:
        started_at: the start of the sweep's last launch, ISO 8601.
        markdown: the report.
        plots: its plots as PNG files, which every tracker can show.
    """
    groups = list(dict.fromkeys(group for record in records for group in record.choices))
    known = [*METRICS, *(f"base_{name}" for name in METRICS)]
    measured = {name for record in records for name in record.metrics}
    metrics = [name for name in known if name in measured] + sorted(measured - set(known))
    fixed = ["cell", "run", "status", "reason", "seed"]
    rows: list[list[str | float | None]] = []
    for record in records:
        attempt = Attempt.of(record, run_dir=markdown.parent)
        facts = [attempt.name, attempt.id, record.status, record.reason, record.config.get("seed")]
        options = [record.choices.get(group) for group in groups]
        rows.append([*facts, *options, *(record.metrics.get(name) for name in metrics)])
    return Comparison(
        sweep=sweep,
        launch=launch_id(started_at) if started_at else None,
        command=command,
        columns=[*fixed, *(f"axis.{group}" for group in groups), *metrics],
        rows=rows,
        markdown=markdown,
        plots=list(plots),
    )


def images_of(runs: Sequence[Run], *, name: str, out: Path) -> list[Path]:
    """The plots of a report over these runs, as PNG files."""
    from left_bench.report.axes import find_axes, labels
    from left_bench.report.cells import row_of
    from left_bench.report.plots import write_images
    from left_bench.report.seeds import pool

    rows = pool([row_of(run) for run in runs])
    return write_images(rows, labels(rows, find_axes(rows)), out=out, name=name)


def track_sweep(
    section: Mapping[str, Any],
    *,
    runs_dir: Path,
    cells: Iterable[str],
    sweep: str,
    started_at: str | None,
    command: str,
    markdown: Path,
) -> None:
    """Tell the trackers of `section` how a sweep's cells compare; nothing that goes wrong here goes further."""
    if not section:
        return
    from left_bench.report import read_runs

    try:
        paths = [runs_dir / cell / RECORD_NAME for cell in cells]
        runs, _ = read_runs([path for path in paths if path.is_file()])
        by_id = {run.record.cell_id: run.record for run in runs}
        records = [by_id[cell] for cell in cells if cell in by_id]
        with tempfile.TemporaryDirectory() as folder:
            compared = compare(
                records,
                sweep=sweep,
                started_at=started_at,
                command=command,
                markdown=markdown,
                plots=images_of(runs, name=markdown.stem, out=Path(folder)),
            )
            open_tracker(section, store=runs_dir).report(compared)
    except Exception as error:
        print(f"warning: the sweep's comparison was not tracked ({type(error).__name__}: {error})", file=sys.stderr)

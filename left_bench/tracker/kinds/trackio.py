"""trackio: a dashboard on this machine (`trackio show --project left_bench`), no account.

Runs go straight into trackio's own sqlite store: `trackio.init` makes up run ids, knows no time but now, and asks the
hub for the user's name where a token lies about.
"""

from __future__ import annotations

import datetime
import shutil
import time as clock
from pathlib import Path
from typing import Any

from left_bench.compat.trackio import as_logged
from left_bench.spec.record import Record
from left_bench.tracker.base import (
    SAMPLE_COLUMNS,
    Attempt,
    Comparison,
    TrackerKind,
    file_name,
    flat_environment,
    sample_rows,
    summary_of,
)

_WRITE_EVERY_SECONDS = 2.0


class TrackioTracker:
    """Runs of the project `project` in trackio's folder (`TRACKIO_DIR`)."""

    def __init__(self, *, store: Path | None = None, project: str) -> None:  # it has a folder of its own
        self._project = project
        self._id = self._name = ""
        self._config: dict[str, Any] = {}
        self._rows: list[tuple[int, str, dict[str, Any]]] = []
        self._step, self._written = 0, 0.0

    def start(self, attempt: Attempt) -> None:
        self._open(
            attempt.id, f"{file_name(attempt.name)}-{attempt.id}", group=attempt.group, config=attempt.configuration()
        )

    def log(self, step: int, *, time: float, **metrics: float) -> None:
        self._take(step, time, {f"train/{name}": value for name, value in metrics.items()})

    def log_validation(self, step: int, *, time: float, **metrics: float) -> None:
        self._take(step, time, {f"eval/{name}": value for name, value in metrics.items()})

    def _take(self, step: int, time: float, metrics: dict[str, Any]) -> None:
        self._step = step
        self._rows.append((step, _iso(time), metrics))
        if clock.monotonic() - self._written >= _WRITE_EVERY_SECONDS:
            self._write()

    def finish(self, record: Record) -> None:
        import trackio

        self._config |= flat_environment(record) | {"status": record.status, "reason": record.reason}
        last: dict[str, Any] = summary_of(record)
        if record.samples:
            table = trackio.Table(columns=list(SAMPLE_COLUMNS), data=sample_rows(record))
            last["samples"] = as_logged(table, project=self._project, run=self._name, step=self._step)
        self._rows.append((self._step, record.finished_at, last))
        self._write()

    def report(self, comparison: Comparison) -> None:
        import trackio

        config = {"sweep_name": comparison.sweep, "launch": comparison.launch, "command": comparison.command}
        name = " ".join([comparison.name, *([comparison.launch] if comparison.launch else [])])
        self._open(comparison.id, name, group=comparison.group, config=config)
        table = trackio.Table(columns=list(comparison.columns), data=comparison.rows)
        parts = {
            "comparison": table,
            "report": trackio.Markdown(comparison.markdown.read_text(encoding="utf-8")),
            **{f"plot/{path.stem}": trackio.Image(str(path), caption=path.stem) for path in comparison.plots},
        }
        shown = {name: as_logged(part, project=self._project, run=self._name) for name, part in parts.items()}
        self._rows.append((0, _iso(clock.time()), shown))
        self._write()

    def _open(self, run_id: str, name: str, *, group: str | None, config: dict[str, Any]) -> None:
        from trackio.media import get_project_media_path
        from trackio.sqlite_storage import SQLiteStorage

        SQLiteStorage.delete_run(self._project, name, run_id=run_id)
        shutil.rmtree(get_project_media_path(project=self._project, run=name), ignore_errors=True)
        self._id, self._name, self._rows, self._step = run_id, name, [], 0
        self._config = config | {"_Username": None, "_Created": _iso(clock.time()), "_Group": group}
        self._written = 0.0

    def _write(self) -> None:
        from trackio.sqlite_storage import SQLiteStorage

        rows, self._rows = self._rows, []
        SQLiteStorage.bulk_log(
            project=self._project,
            run=self._name,
            run_id=self._id,
            steps=[step for step, _, _ in rows],
            timestamps=[time for _, time, _ in rows],
            metrics_list=[metrics for _, _, metrics in rows],
            config=self._config,
        )
        self._written = clock.monotonic()


TRACKER = TrackerKind(make=TrackioTracker, settings={"project": "left_bench"}, packages=("trackio",), extra="trackio")


def _iso(time: float) -> str:
    return datetime.datetime.fromtimestamp(time, datetime.timezone.utc).isoformat()

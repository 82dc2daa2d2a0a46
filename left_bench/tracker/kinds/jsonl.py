"""JSON lines: `<store>/jsonl/<run id>.jsonl`, a file a run, written anew when the run is told again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from left_bench.spec.record import Record
from left_bench.tracker.base import Attempt, Comparison, TrackerKind, flat_environment, summary_of


class JsonlTracker:
    """Lines are `{"kind": "start" | "step" | "validation" | "finish" | "report", ...}`."""

    def __init__(self, *, store: Path, folder: str | None) -> None:
        self._folder = Path(folder) if folder else store / "jsonl"
        self._file: TextIO | None = None

    def start(self, attempt: Attempt) -> None:
        self._open(attempt.id)
        self._write(
            "start",
            id=attempt.id,
            name=attempt.name,
            group=attempt.group,
            tags=attempt.tags,
            config=attempt.configuration(),
        )

    def log(self, step: int, *, time: float, **metrics: float) -> None:
        self._write("step", step=step, time=time, **metrics)

    def log_validation(self, step: int, *, time: float, **metrics: float) -> None:
        self._write("validation", step=step, time=time, **metrics)

    def finish(self, record: Record) -> None:
        self._write(
            "finish",
            summary=summary_of(record),
            environment=flat_environment(record),
            samples=[sample.model_dump() for sample in record.samples],
        )
        self._close()

    def report(self, comparison: Comparison) -> None:
        self._open(comparison.id)
        rows = [dict(zip(comparison.columns, row, strict=True)) for row in comparison.rows]
        text = comparison.markdown.read_text(encoding="utf-8")
        self._write("report", id=comparison.id, group=comparison.group, cells=rows, markdown=text)
        self._close()

    def _open(self, run_id: str) -> None:
        self._close()  # a run that failed half-way is left as it is
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = (self._folder / f"{run_id}.jsonl").open("w", encoding="utf-8", buffering=1)

    def _write(self, kind: str, **fields: Any) -> None:
        assert self._file is not None
        self._file.write(json.dumps({"kind": kind, **fields}) + "\n")

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


TRACKER = TrackerKind(make=JsonlTracker, settings={"folder": None})

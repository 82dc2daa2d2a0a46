"""Events of a running cell: one JSON line each, written by the worker and read by its parent.

Trackers and progress bars run in the parent and read this file, so that they cannot break or slow the measured
process, and a run can be sent to a tracker again from disk.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

EVENTS_NAME = "events.jsonl"
Tell = Callable[[str, int, int], None]
"""Called with the current work of a phase, how much is done, and the total: rows evaluated, attempts at a peak."""
ROW_COUNTS = (
    *("train_rows", "test_rows", "dropped_rows", "repeated_rows"),
    *("truncated_rows", "truncated_test_rows", "train_epochs"),
)
"""Metrics in the event `data`, which is written before anything is loaded."""
VALIDATION_COUNTS = ("validation_rows", "repeated_validation_rows")
"""More of them, absent from older records and events."""
_PROGRESS_EVERY_SECONDS = 0.5


class EventWriter:
    """Appends events to a file, one complete line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("w", encoding="utf-8", buffering=1)

    def write(self, event: str, **fields: Any) -> None:
        self._file.write(json.dumps({"event": event, "time": round(time.time(), 3), **fields}) + "\n")

    def close(self) -> None:
        self._file.close()


class NullEventWriter(EventWriter):
    """Writes nothing: used by ranks other than the first, whose events would be duplicates."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: str, **fields: Any) -> None:
        return None

    def close(self) -> None:
        return None


def progress_of(events: EventWriter) -> Tell:
    """Returns a function that writes `progress` events: one when a piece of work begins, then at most two a second."""
    written_at, written_work = -math.inf, ""

    def tell(work: str, done: int, total: int) -> None:
        nonlocal written_at, written_work
        now = time.monotonic()
        if work != written_work or now - written_at >= _PROGRESS_EVERY_SECONDS:
            written_at, written_work = now, work
            events.write("progress", work=work, done=done, total=total)

    return tell


class EventReader:
    """Reads the events appended since the last call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> Iterator[dict[str, Any]]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):  # still being written
                    break
                self._offset += len(line)
                try:
                    event = json.loads(line)
                except ValueError:  # torn by a killed writer
                    continue
                if isinstance(event, dict):
                    yield event


def rows_in_words(event: Mapping[str, Any], *, max_length: int | None) -> str:
    """The numbers of rows: `train 6, validation 3, test 4, dropped 10 (no prompt or answer), 2.7 epochs`."""
    result = f"{event['shape']}: " if event.get("shape") else ""
    validation = f"validation {event['validation_rows']:,}, " if "validation_rows" in event else ""
    parts = [f"{result}train {event['train_rows']:,}, {validation}test {event['test_rows']:,}"]
    if event["dropped_rows"]:
        parts.append(f"dropped {event['dropped_rows']:,} (no prompt or answer)")
    if event["repeated_rows"]:
        parts.append(f"left out {event['repeated_rows']:,} (a test row's question)")
    if repeated := event.get("repeated_validation_rows"):
        parts.append(f"left out {repeated:,} for validation (a question of a training or test row, or a repeated one)")
    if cut := event["truncated_rows"] + event["truncated_test_rows"]:
        parts.append(f"cut {cut:,} (longer than training.max_length={max_length})")
    return ", ".join([*parts, f"{event['train_epochs']:.2g} epochs"])

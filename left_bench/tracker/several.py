"""Several trackers as one, and a tracker's failures kept to itself."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from left_bench.spec.record import Record
from left_bench.tracker.base import Attempt, Comparison, Tracker


class Together:
    """Tells every tracker the same."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers

    def start(self, attempt: Attempt) -> None:
        for tracker in self._trackers:
            tracker.start(attempt)

    def log(self, step: int, *, time: float, **metrics: float) -> None:
        for tracker in self._trackers:
            tracker.log(step, time=time, **metrics)

    def log_validation(self, step: int, *, time: float, **metrics: float) -> None:
        for tracker in self._trackers:
            tracker.log_validation(step, time=time, **metrics)

    def finish(self, record: Record) -> None:
        for tracker in self._trackers:
            tracker.finish(record)

    def report(self, comparison: Comparison) -> None:
        for tracker in self._trackers:
            tracker.report(comparison)


class Shielded:
    """A tracker whose first failure in a run is said once and ends its part; the cell goes on."""

    def __init__(self, inner: Tracker, name: str) -> None:
        self._inner, self._name = inner, name
        self._broken = False
        self.failures = 0

    def start(self, attempt: Attempt) -> None:
        self._broken = False
        self._call("start", attempt)

    def log(self, step: int, *, time: float, **metrics: float) -> None:
        self._call("log", step, time=time, **metrics)

    def log_validation(self, step: int, *, time: float, **metrics: float) -> None:
        self._call("log_validation", step, time=time, **metrics)

    def finish(self, record: Record) -> None:
        self._call("finish", record)

    def report(self, comparison: Comparison) -> None:
        self._broken = False
        self._call("report", comparison)

    def _call(self, method: str, *arguments: Any, **named: Any) -> None:
        if self._broken:
            return
        try:
            getattr(self._inner, method)(*arguments, **named)
        except Exception as error:
            self._broken = True
            self.failures += 1
            text = " ".join(str(error).split())[:300]
            print(
                f"warning: tracker={self._name} failed in {method} ({type(error).__name__}: {text}); the records on "
                f"disk are complete, and `left-bench track RUNS --tracker {self._name}` tells it again",
                file=sys.stderr,
            )

"""What else ran on the machine: CPU time that other processes took while a cell was measured."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence


class Neighbours:
    """Counts from its making on; a core lost to somebody else can cost a threaded step far more than its share.

    `beside`: processes that belong to the run too.
    """

    def __init__(self, *, beside: Sequence[int] = ()) -> None:
        self._beside = beside
        self._start = time.monotonic(), _busy_seconds(), _own_seconds(beside)

    def share(self) -> float | None:
        """Others' part of the CPU time that the machine has, 0 to 1; None where the system does not tell."""
        start, busy, own = self._start
        seconds = (time.monotonic() - start) * (os.cpu_count() or 1)
        now = _busy_seconds()
        if now is None or busy is None or seconds <= 0:
            return None
        return min(1.0, max(0.0, ((now - busy) - (_own_seconds(self._beside) - own)) / seconds))


def _busy_seconds() -> float | None:
    import psutil

    times = psutil.cpu_times()
    names = ("user", "nice", "system", "irq", "softirq", "steal")
    found = [getattr(times, name) for name in names if hasattr(times, name)]
    return float(sum(found)) if found else None


def _own_seconds(beside: Sequence[int]) -> float:
    import psutil

    spent = os.times()
    found = spent.user + spent.system + spent.children_user + spent.children_system
    for pid in beside:
        with contextlib.suppress(psutil.Error):  # it has ended
            times = psutil.Process(pid).cpu_times()
            found += times.user + times.system
    return found

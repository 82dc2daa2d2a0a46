"""What else ran on the machine: CPU time that other processes took while a cell was measured."""

from __future__ import annotations

import os
import time


class Neighbours:
    """Counts from its making on; a core lost to somebody else can cost a threaded step far more than its share."""

    def __init__(self) -> None:
        self._start = time.monotonic(), _busy_seconds(), _own_seconds()

    def share(self) -> float | None:
        """Others' part of the CPU time that the machine has, 0 to 1; None where the system does not tell."""
        start, busy, own = self._start
        seconds = (time.monotonic() - start) * (os.cpu_count() or 1)
        now = _busy_seconds()
        if now is None or busy is None or seconds <= 0:
            return None
        return min(1.0, max(0.0, ((now - busy) - (_own_seconds() - own)) / seconds))


def _busy_seconds() -> float | None:
    import psutil

    times = psutil.cpu_times()
    names = ("user", "nice", "system", "irq", "softirq", "steal")
    found = [getattr(times, name) for name in names if hasattr(times, name)]
    return float(sum(found)) if found else None


def _own_seconds() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system

"""Other load on the machine: CPU time used by other processes while a cell was measured."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

DISTURBED = 0.05
"""Share of the machine's CPU time used by others above which a measurement does not show the machine's own speed."""


class Neighbours:
    """Measures other processes' CPU time since its creation.

    A core lost to another process can slow a multithreaded step by far more than its share. `own_pids`: other
    processes of the same run.
    """

    def __init__(self, *, own_pids: Sequence[int] = ()) -> None:
        self._own_pids = own_pids
        self._start = time.monotonic(), _busy_seconds(), _own_seconds(own_pids)

    def share(self) -> float | None:
        """Other processes' share of the machine's CPU time, 0 to 1; None if the system does not report it."""
        start, busy, own = self._start
        seconds = (time.monotonic() - start) * (os.cpu_count() or 1)
        now = _busy_seconds()
        if now is None or busy is None or seconds <= 0:
            return None
        return min(1.0, max(0.0, ((now - busy) - (_own_seconds(self._own_pids) - own)) / seconds))


class Quiet(NamedTuple):
    """A measurement, and how much other processes disturbed it."""

    value: float
    disturbed_by: float | None
    """Share of the machine's CPU time that others took from the measured cores; None: negligible."""


def measured_quietly(measure: Callable[[], float], *, cores: int, attempts: int) -> Quiet:
    """The highest of a few measurements, stopping at the first undisturbed one.

    Args:
        cores: how many cores the measured code uses; load on the machine's other cores does not count.
    """
    free = max(0.0, 1 - cores / (os.cpu_count() or 1))
    best, quietest = 0.0, float("inf")
    for _ in range(attempts):
        neighbours = Neighbours()
        best = max(best, measure())
        quietest = min(quietest, (neighbours.share() or 0.0) - free)
        if quietest <= DISTURBED:
            return Quiet(best, None)
    return Quiet(best, quietest)


def _busy_seconds() -> float | None:
    import psutil

    times = psutil.cpu_times()
    names = ("user", "nice", "system", "irq", "softirq", "steal")
    results = [getattr(times, name) for name in names if hasattr(times, name)]
    return float(sum(results)) if results else None


def _own_seconds(pids: Sequence[int]) -> float:
    import psutil

    spent = os.times()
    result = spent.user + spent.system + spent.children_user + spent.children_system
    for pid in pids:
        with contextlib.suppress(psutil.Error):  # it has ended
            times = psutil.Process(pid).cpu_times()
            result += times.user + times.system
    return result

"""The cost of torch.compile: how often it compiled and for how long, so that steps are not charged for it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any


@dataclass
class Compiling:
    """Counts compilations after `watch` is called; otherwise everything stays zero."""

    graphs: int = 0
    """Number of compilations, including recompilations."""
    seconds: float = 0.0
    _taken: float = 0.0
    _start: float = 0.0

    def watch(self) -> None:
        """Register for torch's compilation events in this process (importing its compiler takes a second)."""
        from left_bench.compat.torch import watch_compiling

        watch_compiling(self._begin, self._end)

    def take(self) -> float:
        """Seconds of compilation since the last call."""
        new, self._taken = self.seconds - self._taken, self.seconds
        return new

    def _begin(self, _args: Any) -> None:
        self._start = time.perf_counter()

    def _end(self, _args: Any) -> None:
        self.graphs += 1
        self.seconds += time.perf_counter() - self._start

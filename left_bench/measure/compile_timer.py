"""What torch.compile costs: how often it compiled, and for how long, so that no step is charged with it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any


@dataclass
class Compiling:
    """Counts compilations from `watch` on; without it, none are to be expected and all is zero."""

    graphs: int = 0
    """Times that a piece of code was compiled, for the first time or again."""
    seconds: float = 0.0
    _taken: float = 0.0
    _start: float = 0.0

    def watch(self) -> None:
        """Be told by torch (importing its compiler takes a second) of every compilation in this process."""
        from left_bench.compat.torch import watch_compiling

        watch_compiling(self._begin, self._end)

    def take(self) -> float:
        """Seconds of compiling since this was last asked."""
        new, self._taken = self.seconds - self._taken, self.seconds
        return new

    def _begin(self, _args: Any) -> None:
        self._start = time.perf_counter()

    def _end(self, _args: Any) -> None:
        self.graphs += 1
        self.seconds += time.perf_counter() - self._start

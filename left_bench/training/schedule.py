"""The learning-rate schedule: over the steps, or over the seconds if `training.max_seconds` ends training."""

from __future__ import annotations

import math
from typing import Any

from transformers import get_scheduler

from left_bench.spec.cell import Training


class Schedule:
    """transformers' schedules of warm-up and decay.

    With a time limit, the position in the schedule is the share of seconds used, so that it ends when training does, on
    a machine of any speed.
    """

    def __init__(self, optimizer: Any, training: Training) -> None:
        # transformers' plain `constant` has no warm-up
        shape = "constant_with_warmup" if training.schedule == "constant" else training.schedule
        self._inner: Any = get_scheduler(
            shape, optimizer, math.ceil(training.steps * training.warmup_ratio), training.steps
        )
        self._steps, self._max_seconds = training.steps, training.max_seconds

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return float(self._inner.optimizer.param_groups[0]["lr"])

    def step(self, *, seconds: float) -> None:
        """Advance after a step; `seconds`: of training so far."""
        inner = self._inner
        inner.step()
        if self._max_seconds is None:
            return
        place = max(inner.last_epoch, self._steps * min(1.0, seconds / self._max_seconds))
        rates = [base * shape(place) for base, shape in zip(inner.base_lrs, inner.lr_lambdas, strict=True)]
        for group, rate in zip(inner.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self._inner.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._inner.load_state_dict(state)

"""Cells planned before they run, where `hardware.plan_first` asks for it: one that cannot fit becomes a row at once.

A launch plans its cells side by side before the first one runs (`plan_ahead`). Each cell takes its plan from the cache
where it runs, because the memory of that machine decides.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from left_bench.launch.planning import Question, limit_of, outcomes
from left_bench.launch.progress import still_at_work
from left_bench.plan.peak import certain_need, measured_range
from left_bench.plan.result import Plan
from left_bench.report.values import format_value
from left_bench.spec.cell import Cell


@dataclass(frozen=True)
class Prediction:
    """What a cell is expected to hold in memory, and what there is."""

    cell: Cell
    plan: Plan
    limit_bytes: int | None
    """None: not known."""

    @property
    def refusal(self) -> str | None:
        """Why the cell cannot fit; None where it fits, may fit, or where that is not known."""
        counted = self.plan
        if not counted.largest.measured:  # rows may all be shorter than the cell allows
            parts = {name: size for name, size in counted.parts.items() if name != "activations_and_workspace"}
            counted = Plan(counted.largest, parts=parts)
        needed = certain_need(counted, self.cell)
        if self.limit_bytes is None or needed <= self.limit_bytes:
            return None
        told = ", ".join(f"{name.replace('_', ' ')} {_size(size)}" for name, size in counted.parts.items())
        key = self.cell.hardware.memory_limit
        there = "the memory there is" if key is None else "hardware.memory_limit"
        return (
            f"planned to hold {_size(needed)} ({told}), more than the {_size(self.limit_bytes)} of {there}; "
            "`left-bench plan --remedies` with the same overrides says what makes it fit"
        )

    @property
    def metrics(self) -> dict[str, float]:
        """The peak, and between what its measurement is expected, by the names of METRICS."""
        if self.plan.peak_bytes is None:
            return {}
        result = {"predicted_peak_memory_bytes": float(self.plan.peak_bytes)}
        if (between := measured_range(self.plan, self.cell)) is not None:
            least, most = between
            result |= {"predicted_least_memory_bytes": float(least), "predicted_most_memory_bytes": float(most)}
        return result

    @property
    def facts(self) -> dict[str, Any]:
        """What a record keeps of the plan."""
        plain = self.plan.plain()
        return {key: plain[key] for key in ("parts", "largest", "unknown")} | {"limit_bytes": self.limit_bytes}


def predicted(cell: Cell) -> Prediction | None:
    """The cell's plan, made now unless it is in the cache; None where no plan can be made."""
    with still_at_work() as tell:
        [prediction] = _predicted([cell], tell=lambda *_: tell(f"planning {cell.id}"))
    return prediction


def plan_ahead(cells: Sequence[Cell]) -> None:
    """Plan cells side by side, so that their plans are in the cache when they run."""
    if not cells:
        return
    with still_at_work() as tell:
        _predicted(cells, tell=lambda done, _: tell(f"planned {done} of {len(cells)} cells (hardware.plan_first)"))


def _predicted(cells: Sequence[Cell], *, tell: Any) -> list[Prediction | None]:
    try:
        answers = list(outcomes([Question(cell) for cell in cells], tell=tell))
    except RuntimeError as error:  # planning broke off: the cells will show what they need
        print(f"warning: not planned: {error}", file=sys.stderr)
        return [None] * len(cells)
    return [
        None if answer.plan is None else Prediction(cell, answer.plan, limit_of(cell))
        for cell, answer in zip(cells, answers, strict=True)
    ]


def _size(value: float) -> str:
    return format_value("peak_memory_bytes", value)

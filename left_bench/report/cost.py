"""What cells cost, by prices that a reader gives: records hold joules and seconds, and no money."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from left_bench.core.errors import UserError
from left_bench.report.load import Run
from left_bench.report.values import significant
from left_bench.spec.record import Record

_JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True, kw_only=True)
class Prices:
    """In one currency, whichever it is; None: not given."""

    per_kwh: float | None = None
    per_hour: float | None = None
    """Of one accelerator, or of the machine where a cell runs on its CPU."""

    def of(self, record: Record) -> dict[str, float]:
        """The metrics of a record's cost; a sum that lacks a part is none."""
        metrics, found = record.metrics, dict[str, float]()
        wanted = [price for price in (self.per_kwh, self.per_hour) if price is not None]
        if self.per_kwh is not None and "cell_joules" in metrics:
            joules = metrics["cell_joules"] + metrics.get("cpu_cell_joules", 0.0)
            found["cell_energy_cost"] = self.per_kwh * joules / _JOULES_PER_KWH
        if self.per_hour is not None and "wall_seconds" in metrics:
            found["cell_hours_cost"] = self.per_hour * _accelerators(record) * metrics["wall_seconds"] / 3600
        if wanted and len(found) == len(wanted):
            found["cell_cost"] = sum(found.values())
        return found if len(wanted) == 2 else {name: cost for name, cost in found.items() if name == "cell_cost"}

    def told(self) -> str:
        """The prices in words, as a report says them."""
        parts = []
        if self.per_kwh is not None:
            parts.append(f"{significant(self.per_kwh)} per kWh of the device and of the CPUs, as far as they were read")
        if self.per_hour is not None:
            parts.append(f"{significant(self.per_hour)} per hour of an accelerator, or of the machine without one")
        return f"By the prices given: {' and '.join(parts)}, in whichever currency. Loading and scoring are in it."


NO_PRICES = Prices()


def with_costs(runs: Sequence[Run], prices: Prices) -> list[Run]:
    """The runs with their costs among the metrics."""
    if prices == NO_PRICES:
        return list(runs)
    return [run._replace(record=_with(run.record, prices.of(run.record))) for run in runs]


def price(text: str | None, *, key: str) -> float | None:
    """A price as the command line gives it.

    Raises:
        UserError: no amount of money; names `key`.
    """
    if text is None:
        return None
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not (math.isfinite(found) and found >= 0):
        raise UserError(f"{key} {text}: not a price; write an amount like 0.35, without its currency")
    return found


def _with(record: Record, costs: dict[str, float]) -> Record:
    return record.model_copy(update={"metrics": record.metrics | costs})


def _accelerators(record: Record) -> int:
    hardware = record.config.get("hardware")
    hardware = hardware if isinstance(hardware, dict) else {}
    return 1 if hardware.get("device") == "cpu" else int(hardware.get("processes") or 1)

"""What cells cost, by prices that a reader gives: records hold joules and seconds, and no money."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from left_bench.core.errors import UserError
from left_bench.report.load import Run
from left_bench.report.values import metric_of, significant
from left_bench.spec.record import METRICS, Record

if TYPE_CHECKING:
    from left_bench.report.recommend import Need

_JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True, kw_only=True)
class Prices:
    """In one currency, whichever it is; None: not given."""

    per_kwh: float | None = None
    per_hour: float | None = None
    """Of one accelerator, or of the machine where a cell runs on its CPU."""

    def of(self, record: Record) -> dict[str, float]:
        """The metrics of a record's cost; a sum that lacks a part is none."""
        metrics, result = record.metrics, dict[str, float]()
        wanted = [price for price in (self.per_kwh, self.per_hour) if price is not None]
        if self.per_kwh is not None and "cell_joules" in metrics:
            joules = metrics["cell_joules"] + metrics.get("cpu_cell_joules", 0.0)
            result["cell_energy_cost"] = self.per_kwh * joules / _JOULES_PER_KWH
        if self.per_hour is not None and "wall_seconds" in metrics:
            result["cell_hours_cost"] = self.per_hour * _accelerators(record) * metrics["wall_seconds"] / 3600
        if wanted and len(result) == len(wanted):
            result["cell_cost"] = sum(result.values())
        if "cell_cost" in result and (points := _points_gained(record)) is not None:
            result["cost_per_point"] = result["cell_cost"] / points
        told = result if len(wanted) == 2 else ("cell_cost", "cost_per_point")
        return {name: cost for name, cost in result.items() if name in told}

    def told(self) -> str:
        """The prices in words, as a report says them."""
        parts = []
        if self.per_kwh is not None:
            parts.append(f"{significant(self.per_kwh)} per kWh (of the device and the CPUs, as far as they were read)")
        if self.per_hour is not None:
            parts.append(
                f"{significant(self.per_hour)} per hour (of an accelerator, or of the machine where there is none)"
            )
        return f"At the prices given, in their currency: {' and '.join(parts)}. Loading and scoring are included."


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
        result = float(text)
    except ValueError:
        result = math.nan
    if not (math.isfinite(result) and result >= 0):
        raise UserError(f"{key} {text}: not a price; write an amount like 0.35, without its currency")
    return result


def add_price_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--price-per-kwh", metavar="PRICE", help="turn joules into money: what a kWh costs")
    parser.add_argument(
        "--price-per-hour",
        metavar="PRICE",
        help="turn wall time into money: what an hour of one accelerator costs, or of the machine without one",
    )


def prices_of(options: argparse.Namespace) -> Prices:
    """The prices given on a command line.

    Raises:
        UserError: one is no amount of money.
    """
    return Prices(
        per_kwh=price(options.price_per_kwh, key="--price-per-kwh"),
        per_hour=price(options.price_per_hour, key="--price-per-hour"),
    )


def check_prices(needs: Sequence[Need], prices: Prices) -> None:
    """Refuse a bound on money without a price.

    Raises:
        UserError: naming the bound.
    """
    for need in needs:
        if metric_of(need.metric).unit == "money" and prices == NO_PRICES:
            raise UserError(
                f"a bound on {need.metric} ({need}) wants a price: give --price-per-hour or --price-per-kwh with it"
            )


def _with(record: Record, costs: dict[str, float]) -> Record:
    return record.model_copy(update={"metrics": record.metrics | costs})


def _points_gained(record: Record) -> float | None:
    """Hundredths that the record's first score between 0 and 1 gained over the base model; None without a gain."""
    scores = [name for name, metric in METRICS.items() if (metric.unit, metric.better) == ("fraction", "higher")]
    for name in scores:
        after, before = record.metrics.get(name), record.metrics.get(f"base_{name}")
        if after is not None and before is not None and METRICS[name].kind == "quality":
            return 100 * (after - before) if after > before else None
    return None


def _accelerators(record: Record) -> int:
    hardware = record.config.get("hardware")
    hardware = hardware if isinstance(hardware, dict) else {}
    return 1 if hardware.get("device") == "cpu" else int(hardware.get("processes") or 1)

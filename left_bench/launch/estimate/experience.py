"""Corrections from cells that have run here: the ratio of their measured to their computed seconds."""

from __future__ import annotations

import contextlib
import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from left_bench.core.errors import UserError
from left_bench.core.paths import versions_of
from left_bench.launch.estimate.arithmetic import Factors, of_method, of_quantization, seconds_of
from left_bench.launch.estimate.calibrate import kept
from left_bench.measure.auto_precision import emulated, what_makes_it_fast
from left_bench.spec.cell import Cell, fingerprint
from left_bench.spec.record import RECORD_NAME, Record, read_record

_LATEST = 64
"""Number of records to read; more would take seconds without changing the result."""
_DECIDING = ("torch", "transformers")


@dataclass(frozen=True)
class Experience:
    """Results of earlier cells on this machine."""

    bases: frozenset[str] = frozenset()
    """Base models, by `base_of`, whose scores an earlier cell has stored."""
    of_kinds: Mapping[str, Factors] = field(default_factory=dict)
    of_weights: Mapping[str, Factors] = field(default_factory=dict)
    """The same for cells of any method, divided by the method's own factor."""

    def factors(self, cell: Cell) -> tuple[Factors, bool]:
        """How many times longer a cell's passes take than the base model's, and whether all contributions are known."""
        if (result := self.of_kinds.get(_kind(cell))) is not None:
            return result, True
        whole, weights = True, self.of_weights.get(_weights(cell))
        if weights is None and cell.quantization.target is not None:
            native = cell.precision.compute_dtype == "bfloat16" and not emulated(cell.device_type, "bfloat16")
            weights = of_quantization(cell.quantization.name) if native else None
            whole = weights is not None
        method, weights = of_method(cell), weights or Factors()
        return Factors(method.train * weights.train, method.evaluate * weights.evaluate), whole


def base_of(cell: Cell) -> str:
    """Equal for cells that share the base model's scores."""
    return fingerprint(cell.base_identity)


def gathered(runs_dir: Path, *, at_once: int) -> Experience:
    """The experience from a runs folder's latest records that were made on this machine in its current state.

    Args:
        at_once: cells that will run at the same time.
    """
    bases = set()
    kinds: dict[str, list[Factors]] = defaultdict(list)
    weights: dict[str, list[Factors]] = defaultdict(list)
    for record in _latest(runs_dir):
        # records of another left_bench version may have other keys and values
        with contextlib.suppress(UserError, ValueError, KeyError, TypeError, ZeroDivisionError):
            cell = Cell.model_validate({"choices": record.choices, **record.config})
            if "base_scores_from" in record.provenance:
                bases.add(base_of(cell))
            result = _compared(record, cell, at_once=at_once)
            if result is not None:
                method = of_method(cell)
                kinds[_kind(cell)].append(result)
                weights[_weights(cell)].append(Factors(result.train / method.train, result.evaluate / method.evaluate))
    return Experience(frozenset(bases), _medians(kinds), _medians(weights))


def _compared(record: Record, cell: Cell, *, at_once: int) -> Factors | None:
    """Measured divided by computed seconds; None for a cell that cannot be compared."""
    known, effective = kept(cell, at_once=at_once), record.environment.get("effective", {})
    if known is None or not _made_here(record) or "resumed_after_steps" in record.provenance:
        return None
    if (effective.get("threads"), effective.get("concurrent_cells")) != (known.rates.threads, at_once):
        return None
    measured = {phase.name: phase.seconds for phase in record.phases}
    expected = seconds_of(cell, known.rates, known.rows)
    return Factors(*(measured[phase] / expected[phase] for phase in ("train", "evaluate")))


def _made_here(record: Record) -> bool:
    now, machine = what_makes_it_fast(), record.environment.get("machine", {})
    if set(now["limits"]) - {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}:  # records do not contain these limits
        return False
    versions = {name: record.environment.get("versions", {}).get(name) for name in _DECIDING}
    same = machine.get("cpu") == now["cpu"] and machine.get("instruction_sets") == list(now["sets"] or ())
    return same and machine.get("device") == "cpu" and versions == versions_of(_DECIDING)


def _latest(runs_dir: Path) -> list[Record]:
    results = []
    with contextlib.suppress(OSError):
        paths = sorted(runs_dir.glob(f"*/{RECORD_NAME}"), key=lambda path: path.stat().st_mtime)[-_LATEST:]
        for path in paths:
            with contextlib.suppress(ValueError):  # damaged: reported where it is needed
                results.append(read_record(path))
    return [record for record in results if record.status == "ok"]


def _kind(cell: Cell) -> str:
    return fingerprint([_weights(cell), cell.identity["peft"]])


def _weights(cell: Cell) -> str:
    layout = [cell.training.attention, cell.training.kernels, cell.training.compile, cell.training.batching]
    return fingerprint([*(cell.identity[group] for group in ("model", "quantization", "precision")), layout])


def _medians(factors: Mapping[str, list[Factors]]) -> dict[str, Factors]:
    return {
        kind: Factors(
            statistics.median(item.train for item in those), statistics.median(item.evaluate for item in those)
        )
        for kind, those in factors.items()
    }

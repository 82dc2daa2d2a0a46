"""Records side by side: one row per cell, and the few settings in which the rows differ."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from left_bench.report.frame import flatten
from left_bench.report.load import Problem, Run, Sweep, score_of
from left_bench.report.uncertainty import Scored, crossed_spread, scored_rows, seeds_spread
from left_bench.report.values import format_flops, format_value, one_line
from left_bench.spec.record import METRICS, Record

NOT_RUN = "not run"
UNREADABLE = "unreadable"
# Weights drawn at random quantize like any others; every other quality metric is a score of what they learned.
_SCORES = frozenset(name for name, metric in METRICS.items() if metric.kind == "quality") - {"quantization_error"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A cell in a report, whether or not there is a record of it."""

    cell_id: str
    status: str
    """A record's status, `not run` or `unreadable`."""
    reason: str | None = None
    record: Record | None = None
    path: Path | None = None
    """The record's file."""
    members: tuple[Row, ...] = ()
    """The runs under several seeds that this row stands for; empty where it is one run (see `seeds.pool`)."""

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def runs(self) -> tuple[Row, ...]:
        """The runs behind this row: one for each seed, the failed ones too."""
        return self.members or (self,)

    @cached_property
    def _means(self) -> dict[str, float | None]:
        return {}

    @cached_property
    def _errors(self) -> dict[str, float | None]:
        return {}

    @cached_property
    def differences(self) -> dict[tuple[int, str], tuple[Row, Any]]:
        """Where `statistics.difference` keeps what it found of this row and another in a metric."""
        return {}

    @property
    def seed(self) -> Any:
        return self.record.config.get("seed") if self.record else None

    @cached_property
    def scored(self) -> bool:
        """False for random weights: their scores say nothing of quality."""
        section = self.record.config.get("model") if self.record else None
        return not (isinstance(section, dict) and section.get("weights") == "random")

    def value(self, metric: str) -> float | None:
        """The metric as recorded, a mean over the seeds; None where it was not measured, or scores random weights."""
        if self.members:
            if metric not in self._means:
                self._means[metric] = _mean(run.value(metric) for run in self.members if run.ok or not self.ok)
            return self._means[metric]
        if self.record is None or (metric.removeprefix("base_") in _SCORES and not self.scored):
            return None
        return self.record.metrics.get(metric)

    def base_value(self, metric: str) -> float | None:
        """The same metric before training."""
        if self.members:
            return _mean(run.base_value(metric) for run in self.members if run.ok)
        recorded = self.value(f"base_{metric}")
        score = score_of(self.record, metric) if self.record and self.scored else None
        return score.base_value if recorded is None and score else recorded

    def stderr(self, metric: str) -> float | None:
        """One standard error of the value: over held-out rows and seeds, whichever of them there are.

        Seeds whose rows were not kept are taken as independent of the rows' own scatter, which counts it once more.
        """
        if len(self.members) > 1 and metric not in self._errors:
            self._errors[metric] = self._pooled_stderr(metric)
        if len(self.members) > 1 and sum(run.ok for run in self.members) > 1:
            return self._errors[metric]
        score = score_of(self.record, metric) if self.record and self.scored else None
        return score.stderr if score and score.stderr is not None and math.isfinite(score.stderr) else None

    def _pooled_stderr(self, metric: str) -> float | None:
        scored = self.scored_rows(metric)
        spread = crossed_spread(scored.values, scored.weights) if scored else None
        if spread is not None:
            return math.sqrt(spread.variance)
        done = [run for run in self.members if run.ok and run.value(metric) is not None]
        spread = seeds_spread([v for run in done if (v := run.value(metric)) is not None and math.isfinite(v)])
        if spread is None:
            return done[0].stderr(metric) if done else None
        of_rows = [error for run in done if (error := run.stderr(metric)) is not None]
        return math.hypot(math.sqrt(spread.variance), math.fsum(of_rows) / max(1, len(of_rows)))

    def scored_rows(self, metric: str) -> Scored | None:
        """What its ok runs kept row by row; None where one kept nothing."""
        if metric not in self._scored_rows:
            done = [run for run in self.runs if run.ok]
            paths = [run.path for run in done if run.path is not None]
            kept = bool(paths) and len(paths) == len(done) and self.scored
            self._scored_rows[metric] = scored_rows(paths, metric) if kept else None
        return self._scored_rows[metric]

    @cached_property
    def _scored_rows(self) -> dict[str, Scored | None]:
        return {}

    def by_seed(self, metric: str) -> dict[Any, float]:
        """Seed -> value of the ok runs, finite ones only."""
        if metric not in self._by_seed:
            results = {run.seed: run.value(metric) for run in self.runs if run.ok}
            self._by_seed[metric] = {
                seed: value for seed, value in results.items() if value is not None and math.isfinite(value)
            }
        return self._by_seed[metric]

    @cached_property
    def _by_seed(self) -> dict[str, dict[Any, float]]:
        return {}

    def memory_parts(self) -> dict[str, float]:
        """Part of the memory peak -> bytes, means over the seeds."""
        results = [run.record.memory_breakdown for run in self.runs if run.record and run.ok]
        parts = dict.fromkeys(part for breakdown in results for part in breakdown)
        return {part: sum(breakdown.get(part, 0) for breakdown in results) / len(results) for part in parts}

    def phase_seconds(self) -> dict[str, float]:
        """Phase -> seconds, means over the seeds."""
        result: dict[str, list[float]] = {}
        for run in self.runs:
            for phase in run.record.phases if run.record and (run.ok or not self.ok) else ():
                result.setdefault(phase.name, []).append(phase.seconds)
        return {name: sum(seconds) / len(seconds) for name, seconds in result.items()}

    def section(self, name: str) -> dict[str, Any]:
        """One section of the configuration; empty where there is none."""
        section = self.record.config.get(name) if self.record else None
        return section if isinstance(section, dict) else {}

    def noted(self, part: str) -> dict[str, Any]:
        """`machine`, `versions` or `effective` of the environment; empty where it was not noted."""
        result = self.record.environment.get(part) if self.record else None
        return result if isinstance(result, dict) else {}

    @cached_property
    def machine(self) -> str | None:
        """A short name that two records share only when they come from one machine; None: not noted."""
        machine = self.noted("machine")
        named = machine.get("id") or machine.get("device_name") or machine.get("cpu")
        return one_line(named) if named else None


def sweep_rows(sweep: Sweep, runs: Sequence[Run], problems: Sequence[Problem]) -> list[Row]:
    """The sweep's cells in its own order; a cell without a record is there too, as `not run`."""
    unreadable = {problem.path.parent.name: problem for problem in problems}
    by_cell: dict[str, list[Run]] = {}
    for run in runs:
        by_cell.setdefault(run.record.cell_id, []).append(run)
    rows: list[Row] = []
    for cell_id in sweep.cells:
        result = by_cell.get(cell_id)
        if result:
            rows += map(row_of, result)
        elif cell_id in unreadable:
            problem = unreadable[cell_id]
            rows.append(Row(cell_id=cell_id, status=UNREADABLE, reason=problem.message, path=problem.path))
        else:
            rows.append(Row(cell_id=cell_id, status=NOT_RUN, reason="the sweep lists it, and there is no record of it"))
    return rows


def so_far(runs: Sequence[Row], sweep: Sweep) -> str:
    """What is to be said of a sweep that has not come to its end."""
    done, total = sum(run.record is not None for run in runs), len(sweep.cells)
    partial = f"Partial: {done:,} of {total:,} cells so far. " if done < total else ""
    return f"{partial}The sweep had not finished when this was written."


def row_of(run: Run | Record) -> Row:
    record, path = (run, None) if isinstance(run, Record) else run
    return Row(cell_id=record.cell_id, status=record.status, reason=record.reason, record=record, path=path)


def _mean(values: Iterable[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    if not measured:
        return None
    return measured[0] if len(set(measured)) == 1 else math.fsum(measured) / len(measured)


def machines_of(rows: Sequence[Row]) -> list[str]:
    """The machines that the records name; what never started, as an unsupported cell, names none."""
    return list(dict.fromkeys(run.machine for row in rows for run in row.runs if run.machine))


def peaks_of(rows: Sequence[Row]) -> dict[str, list[tuple[float, Row]]]:
    """Compute dtype -> what matrix products in it came to at most (FLOP/s), run by run; none where it was not noted."""
    result: dict[str, list[tuple[float, Row]]] = {}
    for run in (run for row in rows for run in row.runs):
        peak = run.noted("effective").get("peak_flops_per_second")
        if isinstance(peak, (int, float)) and math.isfinite(peak) and peak > 0:
            precision = run.section("precision")
            dtype = "TF32" if precision.get("tf32") else one_line(precision.get("compute_dtype"))
            result.setdefault(dtype, []).append((float(peak), run))
    return result


def machine_line(row: Row, rows: Sequence[Row], *, several: bool) -> str:
    """The row's machine in words, with the peaks measured on it, and its short name where the rows are of `several`."""
    machine = row.noted("machine")
    memory = machine.get("memory_bytes")
    known = [
        f"{machine['cores']} cores" if machine.get("cores") else "",
        f"{format_value('peak_memory_bytes', memory)} memory" if isinstance(memory, (int, float)) else "",
        f"device {machine.get('device_name') or machine['device']}" if machine.get("device") else "",
        *_told_peaks([run for item in rows for run in item.runs if run.machine == row.machine]),
        f"here called {row.machine}" if several else "",
    ]
    return f"{machine.get('cpu') or row.machine} ({', '.join(part for part in known if part)})"


def _told_peaks(rows: Sequence[Row]) -> Iterator[str]:
    for dtype, peaks in peaks_of(rows).items():
        speeds = [peak for peak, _ in peaks]
        yield f"{dtype} products at {format_flops(min(speeds), max(speeds))}"


def settings(row: Row) -> dict[str, Any]:
    """Everything that was set for a cell, flat: `peft` is the chosen option, `peft.config.r` one key of it."""
    if row.record is None:
        return {}
    return dict(row.record.choices) | flatten(row.record.config)


def option(row: Row, group: str) -> str | None:
    """The option by the name of what it is: `lora` for `qlora`, which is LoRA and a choice in another group."""
    named = row.section(group).get("name")
    chosen = row.record.choices.get(group) if row.record else None
    return str(named) if named is not None else chosen

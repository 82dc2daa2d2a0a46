"""Records side by side: one row per cell, and the few settings in which the rows differ."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from left_bench.core.errors import UserError, nearest
from left_bench.report.load import FlatSections, Problem, Run, Sweep, flat_section, flatten, score_of
from left_bench.report.uncertainty import Scored, crossed_spread, scored_rows, seeds_spread
from left_bench.report.values import ABSENT, format_flops, format_setting, format_value, one_line
from left_bench.spec.cell import GROUPS, slugify
from left_bench.spec.record import METRICS, Record

NOT_RUN = "not run"
UNREADABLE = "unreadable"
_ID_GROUPS = ("model", "quantization", "peft", "precision", "data")  # the parts of a cell id, see Cell.id
# Weights drawn at random quantize like any others; every other quality metric is a score of what they learned.
_SCORES = frozenset(name for name, metric in METRICS.items() if metric.kind == "quality") - {"quantization_error"}
# Labels, what another key has taken over, and where a file happens to lie: none of them tells two cells apart.
_NOT_AN_AXIS = ("peft.learning_rate", "hardware.timeout", "data.path", "model.wheel.")
# A section's key that another group's option decides when it is left open, see Cell.from_config.
_DECIDED_BY = {
    "training.learning_rate": "peft",
    "eval.metrics": "data",
    "eval.max_new_tokens": "data",
    "quantization.config.bnb_4bit_compute_dtype": "precision",
    "quantization.config.compute_dtype": "precision",
    **dict.fromkeys(("peft.config.total_step", "peft.config.tinit", "peft.config.tfinal"), "training"),
}


# What a tuning chooses is a part of each method, and tells tuned rows apart in no table.
_TUNED = "training.learning_rate"
_TUNED_WITH_SIZES = tuple(
    f"peft.config.{key}"
    for key in (
        *("r", "init_r", "target_r", "lora_alpha", "alpha"),
        *("num_virtual_tokens", "adapter_len", "n_frequency"),
    )
)


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


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A setting in which the rows differ: a label column."""

    key: str
    """As on the command line: `peft`, `peft.config.r`, `seed`; or `machine`, `cell`."""
    heading: str
    values: tuple[str, ...]
    """One per row; a dash where the cell has no such setting."""


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


def find_axes(rows: Sequence[Row]) -> list[Axis]:
    """The label columns that tell the rows apart.

    They are the choices that vary, the seed, and the configuration's leaves that vary although the choices do not
    (`peft.config.r` in a sweep over ranks). A leaf that follows from an option, as `peft.config.r` does where only
    LoRA has one, is explained by that option's column.
    """
    choices = _choices(rows)
    groups = sorted({group for row in choices for group in row}, key=lambda g: (_place(g), g))
    varying = [group for group in groups if len({row[group] for row in choices if group in row}) > 1]
    columns = {group: [row.get(group) for row in choices] for group in varying}
    columns |= _varying_leaves(rows, choices, varying)
    if len(machines_of(rows)) > 1:
        columns["machine"] = [row.machine for row in rows]
    axes = [
        Axis(key=key, heading=heading, values=tuple(map(format_setting, columns[key])))
        for key, heading in _headings(columns).items()
    ]
    if not axes and len(rows) == 1 and (method := rows[0].record and rows[0].record.choices.get("peft")):
        return [Axis(key="peft", heading="peft", values=(one_line(method),))]
    if not axes or len({*_points(axes)}) < len(rows):
        axes.append(_cell_axis(rows, alone=not axes))
    return axes


def labels(rows: Sequence[Row], axes: Sequence[Axis]) -> list[str]:
    """A short name for every row, all different: `lora`, `nf4 lora`, `r=8`."""
    axes = _naming(axes)
    plain = [" ".join(_label_part(axis, axis.values[i]) for axis in axes) for i in range(len(rows))]
    # `none` says little in a name: `full` instead of `none full`, as long as the names stay apart
    short = [
        " ".join(_label_part(axis, axis.values[i]) for axis in axes if axis.values[i] not in ("none", ABSENT))
        or one_line(rows[i].cell_id)
        for i in range(len(rows))
    ]
    chosen = short if len(set(short)) == len(rows) else plain
    counts = Counter(chosen)
    return [label if counts[label] == 1 else f"{label} #{i + 1}" for i, label in enumerate(chosen)]


def find_baseline(rows: Sequence[Row], selector: str | None = None) -> Row | None:
    """The row that the others are held against; None where none is ok.

    Args:
        selector: a cell id or the beginning of one, or settings as `peft=lora` or `quantization=none,peft=full`
            (the first ok row that has them all). None: unquantized full fine-tuning, else the first ok row.

    Raises:
        UserError: the selector fits no row, several ids, or only rows that are not ok.
    """
    if selector is not None:
        return _selected(rows, selector)
    done = [row for row in rows if row.ok]
    full = [row for row in done if _choice(row, "peft") == "full" and _choice(row, "quantization") in ("none", None)]
    return next(iter(full + done), None)


def _selected(rows: Sequence[Row], selector: str) -> Row:
    wanted = dict(part.partition("=")[::2] for part in selector.split(",")) if "=" in selector else None
    if wanted is None:
        ids = list(dict.fromkeys(run.cell_id for row in rows for run in row.runs))
        fitting = [selector] if selector in ids else [cell_id for cell_id in ids if cell_id.startswith(selector)]
        if not selector or not fitting:
            known = [*ids, *sorted({option for row in rows if row.record for option in row.record.choices.values()})]
            raise UserError(f"--baseline {selector}: no cell has an id that begins so{nearest(selector, known)}")
        if len(fitting) > 1:
            raise UserError(f"--baseline {selector}: {len(fitting)} ids begin so, {fitting[0]} and {fitting[1]} too")
        results = [row for row in rows if any(run.cell_id == fitting[0] for run in row.runs)]
    else:
        results = [row for row in rows if row.record]
        for key, value in ((key.strip(), value.strip()) for key, value in wanted.items()):
            known = sorted({name for row in results for name in settings(row)})
            if key not in known:
                raise UserError(f"--baseline {selector}: the cells have no setting '{key}'{nearest(key, known)}")
            texts = {format_setting(settings(row).get(key)) for row in results}
            results = [row for row in results if value in _spellings(settings(row).get(key))]
            if not results:
                raise UserError(f"--baseline {selector}: no cell has {key}={value}{_among(value, texts)}")
    done = [row for row in results if row.ok]
    if not done:
        raise UserError(f"--baseline {selector}: {results[0].cell_id} is {results[0].status}; choose a cell that is ok")
    return done[0]


def _spellings(value: Any) -> tuple[str, ...]:
    """A setting as reports print it and as it is typed on the command line."""
    return format_setting(value), str(value), "null" if value is None else str(value).lower()


def _among(value: str, known: Iterable[str]) -> str:
    return nearest(value, known) or f"; there is {', '.join(sorted(known)[:8])}"


def _choice(row: Row, group: str) -> str | None:
    return row.record.choices.get(group) if row.record else None


def _place(group: str) -> int:
    return GROUPS.index(group) if group in GROUPS else len(GROUPS) + (group == "seed")


def _choices(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Group -> option and the seed, row by row; of a cell that left no record, as far as its id tells them."""
    options: dict[tuple[str, str], str] = {}
    for row in rows:
        for group, option in row.record.choices.items() if row.record else ():
            options[group, slugify(str(row.section(group).get("name", option)))] = option
    pooled = any(row.members for row in rows)  # then a seed tells no two rows apart, or the cell's hash has to
    results = []
    for row in rows:
        if row.record is not None:
            seed = None if pooled else row.seed
            results.append(dict(row.record.choices) | ({} if seed is None else {"seed": str(seed)}))
            continue
        *slugs, seed, _hash = parts if len(parts := row.cell_id.split("-")) == len(_ID_GROUPS) + 2 else ["", ""]
        named = {g: options.get((g, slug), slug) for g, slug in zip(_ID_GROUPS, slugs, strict=False)}
        results.append(named | ({"seed": seed[1:]} if named and not pooled else {}))
    return results


def _varying_leaves(
    rows: Sequence[Row], choices: Sequence[dict[str, str]], varying: Sequence[str]
) -> dict[str, list[Any]]:
    configs = [row.record.config if row.record else None for row in rows]
    flat: FlatSections = {}
    section_of = {
        key: name for config in configs if config for name in config for key in flat_section(name, config[name], flat)
    }
    chosen = _chosen_by_tuning(rows)
    one_only = {name for name in section_of.values() if len({id(c.get(name)) for c in configs if c is not None}) == 1}
    leaves: dict[str, list[Any]] = {}
    for key, name in section_of.items():
        if "." not in key or name in one_only or key.startswith(_NOT_AN_AXIS) or key.endswith((".name", "._target_")):
            continue
        values = [flat_section(name, c[name], flat).get(key) if c and name in c else None for c in configs]
        known = [(value, choice) for value, choice, c in zip(values, choices, configs, strict=True) if c is not None]
        if len({value for value, _ in known}) < 2:
            continue
        deciders: list[tuple[str, ...]] = [(group,) for group in varying]
        if key in _DECIDED_BY:
            deciders.append((key.partition(".")[0], _DECIDED_BY[key]))
        if not any(_follows(known, groups) for groups in deciders) and key not in chosen:
            leaves[key] = values
    return leaves


def _chosen_by_tuning(rows: Sequence[Row]) -> tuple[str, ...]:
    """Keys that a tuning chose for every row."""
    told = [row.record.provenance.get("tuned") for row in rows if row.record]
    if not told or not all(isinstance(item, dict) for item in told):
        return ()
    sized = any(isinstance(item, dict) and "size" in item for item in told)
    return (_TUNED, *_TUNED_WITH_SIZES) if sized else (_TUNED,)


def _follows(known: Sequence[tuple[Any, dict[str, str]]], groups: Sequence[str]) -> bool:
    """Whether the options of `groups` alone decide the value."""
    seen: dict[tuple[str | None, ...], Any] = {}
    return all(seen.setdefault(tuple(choice.get(g) for g in groups), value) == value for value, choice in known)


def _headings(columns: Iterable[str]) -> dict[str, str]:
    """The last part of each key, or all of it where that would be read as another column."""
    keys = list(columns)
    short = Counter(key.rpartition(".")[2] for key in keys)
    return {key: last if short[last := key.rpartition(".")[2]] == 1 and last not in GROUPS else key for key in keys}


def _cell_axis(rows: Sequence[Row], *, alone: bool) -> Axis:
    """The cell's id, or its hash beside other columns; numbered where a cell was run more than once."""
    names = [row.cell_id if alone else row.cell_id.rpartition("-")[2] for row in rows]
    if not alone and len(set(names)) < len({row.cell_id for row in rows}):
        names = [row.cell_id for row in rows]
    counts, seen = Counter(names), Counter[str]()
    for i, name in enumerate(names):
        seen[name] += 1
        names[i] = f"{name} ({seen[name]})" if counts[name] > 1 else name
    return Axis(key="cell", heading="cell", values=tuple(one_line(name) for name in names))


def _naming(axes: Sequence[Axis]) -> list[Axis]:
    """Without the keys that tell no more rows apart: where alpha is always twice the rank, the rank is enough."""
    kept = list(axes)
    for axis in reversed(axes):
        rest = [other for other in kept if other is not axis]
        if "." in axis.key and rest and len({*_points(rest)}) == len({*_points(kept)}):
            kept = rest
    return kept


def _points(axes: Sequence[Axis]) -> Iterator[tuple[str, ...]]:
    return zip(*(axis.values for axis in axes), strict=True)


def _label_part(axis: Axis, value: str) -> str:
    if axis.key == "seed":
        return f"seed {value}"
    if axis.key == "machine":
        return f"on {value}"
    return f"{axis.heading}={value}" if "." in axis.key else value

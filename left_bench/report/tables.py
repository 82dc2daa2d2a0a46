"""The tables of a report: cells side by side, each number beside the baseline's, the best in bold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from left_bench.report.cells import Axis, Row
from left_bench.report.cost import NO_PRICES, Prices
from left_bench.report.judgement import TOLD_RATE, Family, Judged, Margins
from left_bench.report.load import Problem, Sweep
from left_bench.report.markdown import details, escape, table
from left_bench.report.ranking import (
    COST,
    ENERGY,
    MEMORY_AND_SIZE,
    SPEED,
    best_and_second,
    comparable,
    confounders,
    family_of,
    headline_quality,
    present,
    qualities,
    rankable,
    standing,
    touching,
)
from left_bench.report.statistics import mean_interval, seed_values
from left_bench.report.values import (
    ABSENT,
    format_against,
    format_against_both,
    format_difference,
    format_error,
    format_interval,
    format_ratio,
    format_setting,
    format_share,
    format_value,
    metric_of,
)
from left_bench.spec.record import SCORER_PREFIX, TASK_PREFIX

if TYPE_CHECKING:
    from left_bench.report.curves import Target
    from left_bench.report.recommend import Need

ROWS_SHOWN = 200
"""Rows of a table that a person may still read."""
CELLS_NAMED = 12
_HOW = {
    "paired rows": "paired by held-out row",
    "paired rows and seeds": "paired by held-out row and by seed, crossed",
    "seeds": "over the seeds",
    "steps": "over the steps",
    "standard errors": "standard errors, taken as independent",
}

PHASES = ("load", "load_cached", "attach", "evaluate_base", "train", "validate", "evaluate", "save", "merge")
_HEADINGS = {
    "exact_match": "exact match",
    "eval_loss": "eval loss (nats)",
    "eval_perplexity": "perplexity",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU",
    "f1": "F1",
    "number_match": "number match",
    "verifier_score": "verifier's score",
    "judge_win_rate": "judge prefers it to the base",
    "preference_accuracy": "prefers the right answer",
    "preference_margin_nats": "preference margin (nats)",
    "validation_loss": "validation loss",
    "forgetting_nats": "forgetting (nats)",
    "quantization_error": "quantization error",
    "peak_memory_bytes": "peak memory",
    "weights_bytes": "base weights",
    "stored_bits_per_param": "bits/param",
    "quantized_bits_per_param": "bits/quantized param",
    "trainable_params": "trainable params",
    "adapter_file_bytes": "adapter file",
    "train_tokens_per_second": "train tokens/s",
    "generate_tokens_per_second": "generate tokens/s",
    "merged_generate_tokens_per_second": "merged generate tokens/s",
    "model_flops_utilization": "FLOPs utilization",
    "wall_seconds": "wall time",
    "train_joules": "training energy",
    "joules_per_1000_tokens": "energy/1,000 tokens",
    "train_watts": "training power",
    "cell_joules": "cell's energy",
    "cpu_train_joules": "CPUs' training energy",
    "cpu_joules_per_1000_tokens": "CPUs' energy/1,000 tokens",
    "cpu_train_watts": "CPUs' training power",
    "cpu_cell_joules": "CPUs' energy",
    "cell_cost": "cost",
    "cost_per_point": "cost of a point",
    "cell_energy_cost": "cost of energy",
    "cell_hours_cost": "cost of hours",
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that a report is made from; `rows`, `labels` and every axis' values run parallel."""

    name: str
    rows: Sequence[Row]
    axes: Sequence[Axis]
    labels: Sequence[str]
    baseline: Row | None
    sweep: Sweep | None = None
    problems: Sequence[Problem] = ()
    plots: Sequence[tuple[str, str]] = field(default=())
    """(file name, what it shows)."""
    needs: Sequence[Need] = ()
    """What a recommended cell has to fulfil."""
    group_by: str | None = None
    """The setting whose every value gets a leaderboard of its own."""
    claims: bool = False
    """Whether the field's usual sentences are put beside the rows."""
    where: str | None = None
    """The condition that chose the rows."""
    prices: Prices = NO_PRICES
    """What energy and hours cost."""
    target: Target | None = None
    """A quality, and when each row reached it along training."""
    margins: Margins = field(default_factory=dict)
    """Metric -> how far apart two values still count as equal."""

    @cached_property
    def records(self) -> list[Row]:
        """The rows that have a record."""
        return [row for row in self.rows if row.record]

    @cached_property
    def runs(self) -> list[tuple[Row, str]]:
        """Every single run with its name, the seeds of one row after another."""
        return [
            (run, label if not row.members else f"{label} seed {_seed(run)}")
            for row, label in zip(self.rows, self.labels, strict=True)
            for run in row.runs
        ]

    @cached_property
    def names(self) -> Mapping[int, str]:
        """`id(row)` -> label."""
        return {id(row): label for row, label in zip(self.rows, self.labels, strict=True)}

    @cached_property
    def places(self) -> Mapping[int, int]:
        """`id(row)` -> its place in `rows` and in every axis."""
        return {id(row): i for i, row in enumerate(self.rows)}

    def family(self, metric: str) -> Family:
        """What judges the differences between the rows in a metric: the same in every table."""
        if metric not in self._families:
            self._families[metric] = family_of(self.rows, metric, self.margins)
        return self._families[metric]

    @cached_property
    def _families(self) -> dict[str, Family]:
        return {}

    @cached_property
    def confounders(self) -> list[tuple[str, str]]:
        return confounders(self.rows, self.names)


def _seed(run: Row) -> str:
    """The run's seed; of a run without a record, what its id says."""
    return format_setting(run.seed) if run.record else run.cell_id.split("-")[-2].removeprefix("s")


def heading(metric: str) -> str:
    """A metric's column heading."""
    if metric.startswith(SCORER_PREFIX):
        return f"{metric.removeprefix(SCORER_PREFIX).replace('_', ' ')} (own scorer)"
    if metric.startswith(TASK_PREFIX):
        return f"{metric.removeprefix(TASK_PREFIX).replace('_', ' ')} (lm-eval)"
    return _HEADINGS.get(metric, metric)


def cells_tables(report: Report) -> Iterator[str]:
    """Quality, memory and size, speed, energy, cost: tables that share the label columns, and how to read them."""
    yield "## Quality"
    yield from _quality(report)
    yield from confounders_of(report, "quality")
    yield "## Memory and size"
    yield from _metrics_table(report, MEMORY_AND_SIZE)
    yield from confounders_of(report, "memory")
    yield "## Speed"
    yield from _metrics_table(report, SPEED)
    if not all(rankable(report.rows, metric) for metric in present(report.rows, SPEED)):
        yield (
            "The cells come from different machines: speed is neither ranked nor set against a baseline on another one."
        )
    yield from confounders_of(report, "speed")
    if present(report.rows, ENERGY):
        yield "## Energy"
        yield from _energy(report)
    if present(report.rows, COST):
        yield "## Cost"
        yield report.prices.told()
        yield from _metrics_table(report, COST)
        yield from confounders_of(report, "cost")


def _energy(report: Report) -> Iterator[str]:
    sources = [str(source) for run, _ in report.runs if (source := run.noted("effective").get("energy"))]
    told = f" ({escape('; '.join(dict.fromkeys(sources)))})" if sources else ""
    yield (
        f"Joules as the hardware's own counters tell them{told}: of the device that trains, over the steps that count "
        "for speed and over the whole cell. The CPUs' beside a GPU stand apart and are in none of the others."
    )
    yield from _metrics_table(report, ENERGY)
    yield from confounders_of(report, "energy")


def confounders_of(report: Report, kind: str) -> Iterator[str]:
    """What else differs between the cells and may explain a difference in this kind of metric."""
    result = touching(report.confounders, kind)
    if result:
        listed = ", ".join(dict.fromkeys(what for what, _ in result))
        told = "\n".join(f"- **{escape(what)}**: {escape(how)}" for what, how in result)
        yield details(f"Confounders: the cells also differ in {listed}; a difference in {kind} may come from it", told)


def how_to_read(report: Report) -> Iterator[str]:
    """Brackets, bold and the plus-minus sign, explained once, above the first table that has them."""
    if len(report.rows) < 2:
        return
    parts = []
    if report.baseline is not None:
        name = escape(report.names[id(report.baseline)])
        parts.append(
            f"In brackets: against the baseline **{name}**; `not resolved`, with the 95 % interval of the difference "
            "or the ratio, where it may be none; `same` where the values print alike."
        )
        parts.append(
            f"All pairs of cells are judged together, metric by metric (false-discovery rate {TOLD_RATE}, "
            "Benjamini and Hochberg): an interval that leaves none out alone may be unresolved among so many."
        )
    if report.margins:
        told = ", ".join(
            f"{heading(name)} {f'{margin.amount:.3g}×' if margin.relative else format_value(name, margin.amount)}"
            for name, margin in report.margins.items()
        )
        parts.append(f"`equal`: the interval lies within the margin given ({escape(told)}).")
    parts.append("**Bold**: the best value of a column, <u>underlined</u>: the second, resolved or not.")
    repeated = sorted({len(seeds) for row in report.rows if len(seeds := {run.seed for run in row.runs if run.ok}) > 1})
    if repeated:
        of = " or ".join(map(str, repeated))
        parts.append(f"± is one standard error: of scores over held-out rows and {of} seeds, of the rest over seeds.")
    elif any(
        row.stderr(metric) is not None for row in report.rows for metric in present(report.rows, qualities(report.rows))
    ):
        parts.append("± is one standard error of the score over the held-out rows.")
    if not repeated and any(row.value("peak_memory_bytes") is not None for row in report.rows):
        parts.append("Each cell was run once: nothing tells how far another run's memory would lie from these.")
    yield " ".join(parts)


def seeds_table(report: Report) -> Iterator[str]:
    """Mean, interval and every seed's own value of what decides, for the rows that were repeated."""
    rows = [row for row in report.rows if sum(run.ok for run in row.runs) > 1]
    quality = headline_quality(report.rows)
    metrics = present(rows, [*([quality] if quality else []), "peak_memory_bytes", "train_tokens_per_second"])
    if not rows or not metrics:
        return
    yield "## Seeds"
    lines = []
    for row in rows[:ROWS_SHOWN]:
        seeds = [format_setting(run.seed) for run in row.runs if run.ok]
        cells = []
        for metric in metrics:
            values = seed_values(row, metric)
            interval = mean_interval(row, metric)
            text = format_value(metric, row.value(metric))
            if interval is not None and len({format_value(metric, value) for value in values.values()}) > 1:
                text += f" [{format_value(metric, interval.low)}, {format_value(metric, interval.high)}]"
                text += ": " + ", ".join(format_value(metric, value) for value in values.values())
            cells.append(text)
        lines.append([escape(report.names[id(row)]), escape(", ".join(seeds)), *cells])
    what = (
        "Mean over the seeds, its 95 % interval by Student's t in brackets (of scores over held-out rows and seeds "
        "crossed, of the rest over the seeds), and the seeds one by one."
    )
    listed = table(["cell", "seeds", *map(heading, metrics)], lines, labels=2)
    yield details("Every seed's own values", f"{what}\n\n{listed}")
    yield from cut_line(len(rows))


def phases_table(report: Report) -> Iterator[str]:
    """Seconds per phase and cell."""
    rows = [row for row in report.rows if row.phase_seconds()]
    seconds = {id(row): row.phase_seconds() for row in rows[:ROWS_SHOWN]}
    names = dict.fromkeys(name for phases in seconds.values() for name in phases)
    order = sorted(names, key=lambda name: PHASES.index(name) if name in PHASES else len(PHASES))
    if not order:
        return
    lines = [
        [
            *label_cells(report, row),
            *(format_value("load_seconds", seconds[id(row)].get(name)) for name in order),
            format_value("overhead_seconds", row.value("overhead_seconds")),
        ]
        for row in rows[:ROWS_SHOWN]
    ]
    header = [*label_headings(report), *map(escape, order), "outside phases"]
    yield "## Phases"
    yield details("Seconds of every phase", table(header, lines, labels=len(report.axes)))
    yield from cut_line(len(rows))


def cut_line(rows: int) -> Iterator[str]:
    """What was left out of a table of so many rows."""
    if rows > ROWS_SHOWN:
        yield f"{rows - ROWS_SHOWN:,} more rows are left out here; `--format csv` or `parquet` has them all."


def _quality(report: Report) -> Iterator[str]:
    records = report.records
    if any(not row.scored for row in records):
        those = (
            ""
            if not any(row.scored for row in records)
            else " in " + ", ".join(escape(report.names[id(row)]) for row in records if not row.scored)
        )
        yield f"**Random weights: no quality is scored**{those}."
    metrics = present(report.rows, qualities(report.rows))
    if not metrics and records and not any(row.scored for row in records):
        return
    yield from _metrics_table(report, metrics)
    scored = [metric for metric in metrics if any(row.base_value(metric) is not None for row in report.rows)]
    if scored:
        yield "`before → after` training."
    yield from _unresolved(report, metrics)


def _unresolved(report: Report, metrics: Sequence[str]) -> Iterator[str]:
    names, lines, how = report.names, [], dict[str, None]()
    for metric in metrics:
        result = standing(report.rows, metric, family=report.family(metric))
        if result is None or len(result.places) < 2 or not result.family.size:
            continue
        shown = [_told_from_best(metric, row, against, names) for row, against in result.unresolved[:CELLS_NAMED]]
        more = len(result.unresolved) - len(shown)
        others = ", ".join(shown) + (f" and {more:,} more" if more else "")
        lines.append(
            f"- {heading(metric)}: best is **{escape(names[id(result.best)])}**; "
            + (f"not resolved from it: {others}" if shown else "every other cell is resolved from it")
            + "."
        )
        how |= dict.fromkeys(result.family.how)
    if lines:
        told = "; ".join(_HOW[one] for one in how if one in _HOW)
        lines.append(f"\nThe intervals are {told}.")
        yield "\n".join(lines)
    seeds = {run.seed for row in report.records for run in row.runs if run.record}
    if (
        len(report.rows) > 1
        and len(seeds) == 1
        and any(row.stderr(metric) is not None for row in report.records for metric in metrics)
    ):
        yield (
            "**One seed only**: the intervals tell of the held-out rows, not of other seeds, under which order and "
            "initialization differ. Repeat with `seed=0,1,2` before a small difference is taken for one."
        )


def _metrics_table(report: Report, metrics: Sequence[str]) -> Iterator[str]:
    rows, shown = report.rows, present(report.rows, metrics)
    status = any(not row.ok for row in rows)
    alike = {metric: text for metric in shown if (text := constant(rows, metric)) is not None}
    yield from lifted(alike)
    shown = [metric for metric in shown if metric not in alike]
    marks = {metric: best_and_second(rows, metric) for metric in shown}
    lines = []
    for row in rows[:ROWS_SHOWN]:
        numbers = [_number(report, row, metric, marks[metric]) for metric in shown]
        lines.append([*label_cells(report, row), *([_status(row)] if status else []), *numbers])
    header = [*label_headings(report), *(["status"] if status else []), *map(heading, shown)]
    told = ", ".join(map(heading, shown)) or "status"
    cells = "cell" if len(rows) == 1 else "cells"
    yield details(f"{len(rows):,} {cells}: {told}", table(header, lines, labels=len(report.axes) + status))
    yield from cut_line(len(rows))


def constant(rows: Sequence[Row], metric: str) -> str | None:
    """A metric's text where it is the same in all of several rows that are ok; None where it is not."""
    done = [row for row in rows if row.ok]
    if len(done) < 2 or any(row.base_value(metric) is not None for row in done):
        return None
    texts = {format_value(metric, row.value(metric)) for row in done}
    return texts.pop() if len(texts) == 1 else None


def lifted(alike: Mapping[str, str]) -> Iterator[str]:
    """The columns that would hold one value only, as a line above the table."""
    if alike:
        yield "The same in every row: " + ", ".join(f"{heading(metric)} {text}" for metric, text in alike.items()) + "."


def marked(row: Row, metric: str, marks: tuple[Sequence[Row], Sequence[Row]]) -> str:
    """The value with its standard error; bold where it is the best of its table, underlined where it is the second."""
    value = row.value(metric)
    text = format_value(metric, value)
    if any(row is other for other in marks[0]):
        text = f"**{text}**"
    elif any(row is other for other in marks[1]):
        text = f"<u>{text}</u>"
    stderr = row.stderr(metric)
    quality = metric_of(metric).kind == "quality"
    return (
        text
        if value is None or stderr is None or not (quality or stderr)
        else (f"{text} ± {format_error(metric, value, stderr)}")
    )


def _number(report: Report, row: Row, metric: str, marks: tuple[Sequence[Row], Sequence[Row]]) -> str:
    value = row.value(metric)
    if value is None:
        return ABSENT
    text = marked(row, metric, marks)
    if metric == "trainable_params":
        share = format_share(value, row.value("total_params"))
        text += f", {share}" if share else ""
    base = row.base_value(metric)
    if base is not None:
        text = f"{format_value(metric, base)} → {text}"
    against = told_against(row, report.baseline, metric, report.family(metric))
    return f"{text} ({against})" if against else text


def told_against(row: Row, reference: Row | None, metric: str, family: Family, *, both: bool = False) -> str:
    """How a row stands to a reference: `not resolved` with the interval, `equal`, `same`, or the difference or ratio,
    `both` or the one that fits best. Empty where there is nothing to compare.
    """
    if reference is None or row is reference or not row.ok or not comparable(row, reference, metric):
        return ""
    result = family.of(row, reference)
    if result is None:
        return ""
    value, other = row.value(metric), reference.value(metric)
    if result.word == "not resolved" and result.interval is not None and result.interval.low < result.interval.high:
        return f"not resolved, {_told_interval(metric, result, other)}"
    if result.word == "equal" and result.interval is not None:
        return "equal"
    if format_value(metric, value) == format_value(metric, other):
        return "same"
    return (format_against_both if both else format_against)(metric, value, other)


def _told_interval(metric: str, judged: Judged, other: float | None) -> str:
    """The interval of a difference of scores, else of a ratio."""
    assert judged.interval is not None
    if metric_of(metric).kind == "quality" or not other or other <= 0:
        return " to ".join(map(format_difference, judged.interval))
    return " to ".join(format_ratio(max(0.0, 1 + end / other)) for end in judged.interval)


def _told_from_best(metric: str, row: Row, against: Judged, names: Mapping[int, str]) -> str:
    name = escape(names[id(row)])
    return name if against.interval is None else f"{name} ({format_interval(against.interval)})"


def status_word(row: Row) -> str:
    """The status as a word of a table: `OOM`, `unsupported`."""
    return "OOM" if row.status == "oom" else row.status


def _status(row: Row) -> str:
    done = sum(run.ok for run in row.runs)
    if row.ok and done < len(row.runs):
        return f"{done} of {len(row.runs)} ok"
    return "ok" if row.ok else f"**{escape(status_word(row))}**"


def label_headings(report: Report) -> list[str]:
    return [escape(axis.heading) for axis in report.axes]


def label_cells(report: Report, row: Row) -> list[str]:
    cells = [escape(axis.values[report.places[id(row)]]) for axis in report.axes]
    if row is report.baseline and len(report.rows) > 1:
        cells[-1] += " *(baseline)*"
    return cells

"""The tables of a report: cells side by side, each number beside the baseline's, the best in bold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from left_bench.report.cells import Axis, Row
from left_bench.report.load import Problem, Sweep
from left_bench.report.markdown import escape, table
from left_bench.report.ranking import (
    MEMORY_AND_SIZE,
    QUALITY,
    SPEED,
    best_rows,
    comparable,
    present,
    rankable,
    ties_with_best,
)
from left_bench.report.values import ABSENT, format_against, format_share, format_value

PHASES = ("load", "attach", "evaluate_base", "train", "evaluate", "save", "merge")
_HEADINGS = {
    "exact_match": "exact match",
    "eval_loss": "eval loss (nats)",
    "eval_perplexity": "perplexity",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU",
    "f1": "F1",
    "forgetting_nats": "forgetting (nats)",
    "quantization_error": "quantization error",
    "peak_memory_bytes": "peak memory",
    "weights_bytes": "base weights",
    "stored_bits_per_param": "bits/param",
    "trainable_params": "trainable params",
    "adapter_file_bytes": "adapter file",
    "train_tokens_per_second": "train tokens/s",
    "generate_tokens_per_second": "generate tokens/s",
    "merged_generate_tokens_per_second": "merged generate tokens/s",
    "model_flops_utilization": "FLOPs utilization",
    "wall_seconds": "wall time",
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

    @property
    def records(self) -> list[Row]:
        """The rows that have a record."""
        return [row for row in self.rows if row.record]

    @property
    def names(self) -> Mapping[int, str]:
        """`id(row)` -> label."""
        return {id(row): label for row, label in zip(self.rows, self.labels, strict=True)}


def heading(metric: str) -> str:
    """A metric's column heading."""
    return _HEADINGS.get(metric, metric)


def cells_tables(report: Report) -> Iterator[str]:
    """Quality, memory and size, speed: three tables that share the label columns, and how to read them."""
    if report.baseline is not None and len(report.rows) > 1:
        name = escape(report.names[id(report.baseline)])
        yield (
            f"In brackets: against the baseline **{name}**, a difference of scores, else a ratio. "
            "**Bold**: the best of a column."
        )
    yield "## Quality"
    yield from _quality(report)
    yield "## Memory and size"
    yield _metrics_table(report, MEMORY_AND_SIZE)
    yield "## Speed"
    yield _metrics_table(report, SPEED)
    if not all(rankable(report.rows, metric) for metric in present(report.rows, SPEED)):
        yield (
            "The cells come from different machines: speed is neither ranked nor set against a baseline on another one."
        )


def phases_table(report: Report) -> Iterator[str]:
    """Seconds per phase and cell."""
    rows = [row for row in report.rows if row.record and row.record.phases]
    seconds = {id(row): {phase.name: phase.seconds for phase in row.record.phases} for row in rows if row.record}
    names = dict.fromkeys(name for phases in seconds.values() for name in phases)
    order = sorted(names, key=lambda name: PHASES.index(name) if name in PHASES else len(PHASES))
    if not order:
        return
    lines = [
        [
            *_label_cells(report, row),
            *(format_value("load_seconds", seconds[id(row)].get(name)) for name in order),
            format_value("overhead_seconds", row.value("overhead_seconds")),
        ]
        for row in rows
    ]
    header = [*_label_headings(report), *map(escape, order), "outside phases"]
    yield "## Phases"
    yield table(header, lines, labels=len(report.axes))


def _quality(report: Report) -> Iterator[str]:
    records = report.records
    if any(not row.scored for row in records):
        those = (
            ""
            if not any(row.scored for row in records)
            else " in " + ", ".join(escape(report.names[id(row)]) for row in records if not row.scored)
        )
        yield f"**Random weights: no quality is scored**{those}."
    metrics = present(report.rows, QUALITY)
    if not metrics and records and not any(row.scored for row in records):
        return
    yield _metrics_table(report, QUALITY)
    scored = [metric for metric in metrics if any(row.base_value(metric) is not None for row in report.rows)]
    if scored:
        yield "`before → after` training, ± one standard error over the held-out rows."
    yield from _ties(report, metrics)


def _ties(report: Report, metrics: Sequence[str]) -> Iterator[str]:
    names, lines = report.names, []
    for metric in metrics:
        found = ties_with_best(report.rows, metric)
        if found is None:
            continue
        best, tied = found
        others = ", ".join(escape(names[id(row)]) for row in tied)
        lines.append(
            f"- {heading(metric)}: best is **{escape(names[id(best)])}**; "
            + (f"inside the noise, so tied with it: {others}." if tied else "no other cell ties with it.")
        )
    if lines:
        lines.append("\nA tie is a difference below two standard errors of that difference.")
        yield "\n".join(lines)
    seeds = {row.record.config.get("seed") for row in report.records if row.record}
    if (
        len(report.rows) > 1
        and len(seeds) == 1
        and any(row.stderr(metric) is not None for row in report.records for metric in metrics)
    ):
        yield (
            "One seed only: the standard errors tell of the held-out rows, not of other seeds. "
            "Differences within ±2 standard errors are no evidence."
        )


def _metrics_table(report: Report, metrics: Sequence[str]) -> str:
    rows, shown = report.rows, present(report.rows, metrics)
    status = any(not row.ok for row in rows)
    best = {metric: {id(row) for row in best_rows(rows, metric)} for metric in shown}
    lines = []
    for row in rows:
        numbers = [_number(report, row, metric, bold=id(row) in best[metric]) for metric in shown]
        lines.append([*_label_cells(report, row), *([_status(row)] if status else []), *numbers])
    header = [*_label_headings(report), *(["status"] if status else []), *map(heading, shown)]
    return table(header, lines, labels=len(report.axes) + status)


def _number(report: Report, row: Row, metric: str, *, bold: bool) -> str:
    value = row.value(metric)
    if value is None:
        return ABSENT
    text = f"**{format_value(metric, value)}**" if bold else format_value(metric, value)
    if metric == "trainable_params":
        share = format_share(value, row.value("total_params"))
        text += f", {share}" if share else ""
    stderr, base = row.stderr(metric), row.base_value(metric)
    if stderr is not None:
        text += f" ± {format_value(metric, stderr)}"
    if base is not None:
        text = f"{format_value(metric, base)} → {text}"
    if row is not report.baseline and row.ok and comparable(row, report.baseline, metric) and report.baseline:
        against = format_against(metric, value, report.baseline.value(metric))
        text += f" ({against})" if against else ""
    return text


def _status(row: Row) -> str:
    return "ok" if row.ok else f"**{escape(row.status)}**"


def _label_headings(report: Report) -> list[str]:
    return [escape(axis.heading) for axis in report.axes]


def _label_cells(report: Report, row: Row) -> list[str]:
    i = next(i for i, other in enumerate(report.rows) if other is row)
    cells = [escape(axis.values[i]) for axis in report.axes]
    if row is report.baseline and len(report.rows) > 1:
        cells[-1] += " *(baseline)*"
    return cells

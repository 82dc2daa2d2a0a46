"""Quality along training: what each row had reached at equal steps, time, energy and memory, and when it met a target.

Everything here is of the validation rows; the test rows are scored once, at the end, and stand in the other tables.
Seconds, tokens and joules are those of the optimizer steps alone, as `spec.record.CurvePoint` has them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

from left_bench.core.errors import UserError, nearest
from left_bench.report.cells import Row
from left_bench.report.headings import heading
from left_bench.report.markdown import details, escape, table
from left_bench.report.ranking import yardstick
from left_bench.report.report import Report
from left_bench.report.tables import ROWS_SHOWN, cut_line
from left_bench.report.uncertainty import seeds_spread
from left_bench.report.values import ABSENT, format_error, format_value, metric_of, significant
from left_bench.spec.record import METRICS, CurvePoint, find_metric

LOSS = "validation_loss"
_STILL_FALLING = 0.05
"""Share of the whole fall, from the first point to the last, that falls in the last quarter of the steps."""
_LEAST_FALL = 0.01  # nats
_CLOCK = (
    "Seconds, tokens and joules are those of the optimizer steps alone, warm-up steps included: no loading, compiling,"
    " checkpoint or evaluation is in them. Values between two points are interpolated."
)
Curve = Sequence[CurvePoint]
Axis = Literal["step", "seconds", "tokens", "joules"]
"""What may be spent: a field of a point."""


class Target(NamedTuple):
    """A quality to be reached: `exact_match=0.4`."""

    metric: str
    bound: float

    def met(self, value: float) -> bool:
        return value <= self.bound if metric_of(self.metric).better == "lower" else value >= self.bound

    def __str__(self) -> str:
        sign = "≤" if metric_of(self.metric).better == "lower" else "≥"
        return f"{heading(self.metric).replace('_', ' ')} {sign} {format_value(self.metric, self.bound)}"


class Told(NamedTuple):
    """A table in plain text, and what is to be said with it."""

    title: str
    header: list[str]
    lines: list[list[str]]
    remarks: list[str]


def parse_target(text: str) -> Target:
    """`--target METRIC=VALUE`.

    Raises:
        UserError: there is no such metric, or the value is no number.
    """
    name, equals, value = text.partition("=")
    metric = find_metric(name)
    if metric is None or metric.kind != "quality" or name.startswith("base_"):
        known = [item for item, meaning in METRICS.items() if meaning.kind == "quality"]
        raise UserError(f"--target {text}: no such score{nearest(name, known)}; give one as validation_loss=1.2")
    try:
        bound = float(value)
    except ValueError:
        bound = math.nan
    if not equals or not math.isfinite(bound):
        raise UserError(f"--target {text}: {value!r} is no number; write {name}=0.5")
    return Target(name, bound)


def check_target(rows: Sequence[Row], target: Target) -> None:
    """Refuse a target that no curve can meet.

    Raises:
        UserError: no record has the metric along training.
    """
    results = {name for row in rows for curve in curves_of(row) for point in curve for name in metrics_at(point)}
    if target.metric not in results:
        has = (
            f"they have {', '.join(sorted(results))}" if results else "they have no curve, which takes validation rows"
        )
        more = (
            "; run the cells with eval.curve_scores=true" if target.metric in METRICS and target.metric != LOSS else ""
        )
        raise UserError(f"--target {target.metric}: no record has it along training ({has}){more}")


def curves_of(row: Row) -> list[Curve]:
    """The curves of the row's ok runs."""
    if not row.scored:
        return []
    return [run.record.curve for run in row.runs if run.ok and run.record and run.record.curve]


def measured_alike(rows: Sequence[Row], metric: str) -> bool:
    """Whether one yardstick measures the metric in all of the rows."""
    return len({yardstick(row, metric) for row in rows}) <= 1


def value_at(curve: Curve, axis: Axis, budget: float, metric: str = LOSS) -> float | None:
    """The metric when so much of `axis` was spent, on a straight line between points; None outside of them."""
    result: list[tuple[float | None, float | None]] = [
        (getattr(point, axis), metrics_at(point).get(metric)) for point in curve
    ]
    known = [(x, y) for x, y in result if x is not None and y is not None]
    for x, y in known:
        if math.isclose(x, budget, rel_tol=1e-9):
            return y
    for (before, low), (after, high) in pairwise(known):
        if before < budget < after:
            return low + (high - low) * (budget - before) / (after - before)
    return None


def spent_until(curve: Curve, target: Target, axis: Axis) -> float | None:
    """How much of `axis` was spent when the target was met first; None where it was not, or is not known.

    A target that the first point meets is met there: what was before it is not known.
    """
    last: tuple[float, float] | None = None
    for point in curve:
        x: float | None = getattr(point, axis)
        y = metrics_at(point).get(target.metric)
        if x is None or y is None:
            continue
        if target.met(y):
            if last is None:
                return float(x)
            return last[0] + (float(x) - last[0]) * (target.bound - last[1]) / (y - last[1])
        last = x, y
    return None


def still_falling(row: Row) -> bool:
    """Whether the loss fell so much in the last quarter of training that more of it would lower the loss further."""
    falls, totals = [], []
    for curve in curves_of(row):
        quarter = value_at(curve, "step", 0.75 * curve[-1].step)
        if quarter is not None:
            falls.append(quarter - curve[-1].validation_loss)
            totals.append(curve[0].validation_loss - curve[-1].validation_loss)
    if not falls:
        return False
    fall, total = (math.fsum(numbers) / len(numbers) for numbers in (falls, totals))
    return fall > _LEAST_FALL and fall > _STILL_FALLING * total


def equal_cost(rows: Sequence[Row], labels: Sequence[str]) -> Told | None:
    """Validation loss of every row at the steps, the time and the energy that all of them have spent, and the lowest
    among those that need no more memory; None below two rows with curves that may be compared."""
    named = [(row, label) for row, label in zip(rows, labels, strict=True) if curves_of(row)]
    drawn = [row for row, _ in named]
    if len(drawn) < 2 or not measured_alike(drawn, LOSS):
        return None
    columns: list[tuple[str, Axis, float]] = []
    remarks = []
    budgets: tuple[tuple[Axis, str | None], ...] = (
        *(("step", None), ("seconds", "train_seconds"), ("joules", "train_joules")),
    )
    for axis, clock in budgets:
        ends = [getattr(curve[-1], axis) for row in drawn for curve in curves_of(row)]
        known = [end for end in ends if end is not None]
        if len(known) < len(ends):
            continue
        if clock is not None and not measured_alike(drawn, clock):
            remarks.append(
                f"No column at equal {'time' if axis == 'seconds' else 'energy'}: the cells come from several machines."
            )
            continue
        columns.append((f"at {_spent(axis, min(known))}", axis, min(known)))
    memory = measured_alike(drawn, "peak_memory_bytes") and all(row.value("peak_memory_bytes") for row in drawn)
    header = ["cell", "at its end", *(name for name, _, _ in columns)]
    header += ["lowest within its memory"] if memory else []
    lines = []
    for row, label in named:
        falling = " ↘" if still_falling(row) else ""
        line = [label, _mean([curve[-1].validation_loss for curve in curves_of(row)]) + falling]
        for _, axis, budget in columns:
            line.append(_mean([value_at(curve, axis, budget) for curve in curves_of(row)]))
        if memory:
            line.append(_lowest_within(row, named))
        lines.append(line)
    marks = ["the largest that all cells spent", "± is one standard error over the seeds"]
    first = f"Validation loss, in nats per answer token; each budget is {marks[0]}"
    first += f", and {marks[1]}." if any(len(curves_of(row)) > 1 for row in drawn) else "."
    remarks = [first, _CLOCK, *remarks]
    if memory:
        remarks.append(
            "Within its memory: of the cells whose training peak is no higher, the one with the lowest loss."
        )
    if any(still_falling(row) for row in drawn):
        remarks.append(
            "↘: still falling at its end, by more than a twentieth of the whole fall in the last quarter of its steps."
            " More steps would lower it, so its place here says less."
        )
    return Told("Validation loss at equal steps, time, energy and memory", header, lines, remarks)


def to_target(rows: Sequence[Row], labels: Sequence[str], target: Target) -> Told:
    """What each row had spent when it met the target: means over the seeds that did."""
    lines = []
    for row, label in zip(rows, labels, strict=True):
        if not (curves := curves_of(row)):
            continue
        met = [curve for curve in curves if spent_until(curve, target, "step") is not None]
        best = [
            value for curve in curves for point in curve if (value := metrics_at(point).get(target.metric)) is not None
        ]
        pick = min if metric_of(target.metric).better == "lower" else max
        reached = f"{len(met)} of {len(curves)} seeds" if len(curves) > 1 else "yes" if met else "no"
        axes: tuple[Axis, ...] = ("step", "seconds", "tokens", "joules")
        results = [_until(met, target, axis) for axis in axes]
        lines.append([label, reached, *results, format_value(target.metric, pick(best)) if best else ABSENT])
    header = ["cell", "met", "steps", "time", "tokens", "energy", "best on the way"]
    remarks = [f"On the validation rows. {_CLOCK}"]
    if any(len(curves_of(row)) > 1 for row in rows):
        remarks.append("Means over the seeds that met it.")
    if not measured_alike([row for row in rows if curves_of(row)], "train_seconds"):
        remarks.append("The cells come from several machines: their seconds are not comparable.")
    return Told(f"Time and tokens to {target}", header, lines, remarks)


def curves_section(report: Report) -> Iterator[str]:
    """Both tables as Markdown: the first folded, the second where a target was asked for."""
    equal = equal_cost(report.rows, report.labels)
    if equal is None and report.target is None:
        return
    yield "## Along training"
    if report.target is not None:
        asked = to_target(report.rows, report.labels, report.target)
        yield f"{escape(asked.title)}:"
        yield as_markdown(asked)
        yield escape(" ".join(asked.remarks))
        yield from cut_line(len(asked.lines))
    if equal is not None:
        yield details(equal.title, f"{as_markdown(equal)}\n\n{escape(' '.join(equal.remarks))}")
        yield from cut_line(len(equal.lines))


def as_markdown(told: Told) -> str:
    """The table alone, cut where it is too long."""
    return table([*map(escape, told.header)], [[*map(escape, line)] for line in told.lines[:ROWS_SHOWN]])


def metrics_at(point: CurvePoint) -> dict[str, float]:
    """The validation loss and the scores of a point."""
    return {LOSS: point.validation_loss} | (point.scores or {})


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return ABSENT
    mean = math.fsum(known) / len(known)
    spread = seeds_spread(known)
    error = "" if spread is None else f" ± {format_error(LOSS, mean, math.sqrt(spread.variance))}"
    return format_value(LOSS, mean) + error


def _lowest_within(row: Row, named: Sequence[tuple[Row, str]]) -> str:
    """The lowest loss among the rows that need no more memory than this one, and whose it is."""
    size = row.value("peak_memory_bytes") or 0.0
    fitting = [(_end(other), label) for other, label in named if (other.value("peak_memory_bytes") or 0.0) <= size]
    loss, label = min(fitting)
    return f"{format_value(LOSS, loss)} {label}"


def _end(row: Row) -> float:
    ends = [curve[-1].validation_loss for curve in curves_of(row)]
    return math.fsum(ends) / len(ends)


def _until(met: Sequence[Curve], target: Target, axis: Axis) -> str:
    results = [spent for curve in met if (spent := spent_until(curve, target, axis)) is not None]
    return _spent(axis, math.fsum(results) / len(results)) if results and len(results) == len(met) else ABSENT


def _spent(axis: Axis, value: float) -> str:
    if axis == "joules":
        return format_value("train_joules", value)
    return f"{significant(value)} s" if axis == "seconds" else f"{value:,.0f} {'steps' if axis == 'step' else axis}"

"""The tables of a report: cells side by side, each number beside the baseline's, the best in bold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from left_bench.report.cells import Row
from left_bench.report.confounders import touching
from left_bench.report.headings import heading
from left_bench.report.judgement import TOLD_RATE, Family, Judged
from left_bench.report.markdown import details, escape, table
from left_bench.report.ranking import (
    COST,
    ENERGY,
    MEMORY_AND_SIZE,
    SPEED,
    best_and_second,
    comparable,
    headline_quality,
    present,
    qualities,
    rankable,
    standing,
)
from left_bench.report.report import Report
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
_PREDICTED = (
    "predicted_peak_memory_bytes",
    "predicted_least_memory_bytes",
    "predicted_most_memory_bytes",
    "peak_memory_bytes",
)


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
            "The cells come from different machines: speed is not ranked, nor compared with a baseline on another one."
        )
    yield from confounders_of(report, "speed")
    if present(report.rows, ENERGY):
        yield "## Energy"
        yield from _energy(report)
    if present(report.rows, COST):
        yield "## Cost"
        yield report.prices.told()
        if "cell_cost" not in present(report.rows, COST):
            yield "No total: no cell has all that is priced. Joules were not measured; leave the price of a kWh out."
        yield from _metrics_table(report, COST)
        yield from confounders_of(report, "cost")


def _energy(report: Report) -> Iterator[str]:
    sources = [str(source) for run, _ in report.runs if (source := run.noted("effective").get("energy"))]
    told = f" ({escape('; '.join(dict.fromkeys(sources)))})" if sources else ""
    yield (
        f"Joules from the hardware's own counters{told}: of the device that trains, over the steps that count for "
        "speed and over the whole cell. The energy of the CPUs beside a GPU is listed separately, in no other column."
    )
    yield from _metrics_table(report, ENERGY)
    yield from confounders_of(report, "energy")


def confounders_of(report: Report, kind: str) -> Iterator[str]:
    """What else differs between the cells and may explain a difference in this kind of metric."""
    result = touching(report.confounders, kind)
    if result:
        listed = ", ".join(dict.fromkeys(what for what, _ in result))
        told = "\n".join(f"- **{escape(what)}**: {escape(how)}" for what, how in result)
        yield details(
            f"Confounders: the cells also differ in {listed}; a difference in {kind} may come from that", told
        )


def how_to_read(report: Report) -> Iterator[str]:
    """Brackets, bold and the plus-minus sign, explained once, above the first table that has them."""
    if len(report.rows) < 2:
        return
    parts = []
    if report.baseline is not None:
        name = escape(report.names[id(report.baseline)])
        parts.append(
            f"In brackets: the difference from the baseline **{name}**, or the ratio to it; `not resolved`, with the "
            "95 % interval, where there may be no difference; `same` where both values print alike."
        )
        parts.append(
            f"All pairs of cells are judged together, metric by metric (false-discovery rate {TOLD_RATE}, "
            "Benjamini and Hochberg), so a difference may be unresolved although its own interval excludes zero."
        )
    if report.margins:
        told = ", ".join(
            f"{heading(name)} {f'{margin.amount:.3g}×' if margin.relative else format_value(name, margin.amount)}"
            for name, margin in report.margins.items()
        )
        parts.append(f"`equal`: the interval lies within the margin given ({escape(told)}).")
    parts.append(
        "**Bold**: the best value of a column; <u>underlined</u>: the second best; whether or not it is resolved."
    )
    repeated = sorted({len(seeds) for row in report.rows if len(seeds := {run.seed for run in row.runs if run.ok}) > 1})
    if repeated:
        of = " or ".join(map(str, repeated))
        parts.append(
            f"± is one standard error: over held-out rows and {of} seeds for scores, over seeds for everything else."
        )
    elif any(
        row.stderr(metric) is not None for row in report.rows for metric in present(report.rows, qualities(report.rows))
    ):
        parts.append("± is one standard error of the score over the held-out rows.")
    if not repeated and any(row.value("peak_memory_bytes") is not None for row in report.rows):
        parts.append("Each cell was run once, so how much memory varies from run to run is not known.")
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
        "The mean, its 95 % interval by Student's t in brackets (over held-out rows and seeds, crossed, for scores; "
        "over seeds for everything else), and the value of each seed."
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


def predictions_table(report: Report) -> Iterator[str]:
    """What was planned of each cell's memory before it ran, beside what was measured; nothing where nothing was."""
    rows = [row for row in report.rows if row.value("predicted_peak_memory_bytes") is not None]
    if not rows:
        return
    lines = []
    for row in rows[:ROWS_SHOWN]:
        planned, least, most, measured = (row.value(metric) for metric in _PREDICTED)
        between = None if least is None or most is None else (least, most)
        judged = ABSENT
        if between is not None and measured is not None:
            judged = "within" if between[0] <= measured <= between[1] else "**outside**"
        expected = ABSENT if between is None else " to ".join(format_value("peak_memory_bytes", end) for end in between)
        sizes = (format_value("peak_memory_bytes", size) for size in (planned, measured))
        lines.append([*label_cells(report, row), next(sizes), expected, next(sizes), judged])
    yield "## Memory, predicted and measured"
    yield (
        "Planned before each cell ran (`hardware.plan_first`): the most that the tensors of a step hold at once, and "
        "between what the measured peak was expected. Means over the seeds."
    )
    header = [*label_headings(report), "tensors of a step", "expected peak", "measured peak", ""]
    yield table(header, lines, labels=len(report.axes))
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
        lines.append(f"\nWhat the intervals are based on: {told}.")
        yield "\n".join(lines)
    seeds = {run.seed for row in report.records for run in row.runs if run.record}
    if (
        len(report.rows) > 1
        and len(seeds) == 1
        and any(row.stderr(metric) is not None for row in report.records for metric in metrics)
    ):
        yield (
            "**One seed only**: the intervals cover the held-out rows, not other seeds, whose row order and "
            "initialization differ. Repeat with `seed=0,1,2` before trusting a small difference."
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

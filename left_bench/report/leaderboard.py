"""The tables a reader decides by: the leaderboard, one table per axis with the others held equal, two axes crossed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from left_bench.core.errors import UserError, nearest
from left_bench.report.axes import Axis
from left_bench.report.cells import Row, option, settings
from left_bench.report.confounders import confounders
from left_bench.report.headings import heading
from left_bench.report.judgement import TOLD_RATE
from left_bench.report.markdown import code, escape, table
from left_bench.report.master_weights import whom_rounding_hurts
from left_bench.report.ranking import Standing, best_and_second, headline_quality, present, standing
from left_bench.report.rates import about_rates, rates_column
from left_bench.report.recommend import Recommendation, how_sure, recommend, sentence
from left_bench.report.report import Report
from left_bench.report.tables import (
    CELLS_NAMED,
    ROWS_SHOWN,
    constant,
    cut_line,
    how_to_read,
    label_cells,
    label_headings,
    lifted,
    marked,
    status_word,
    told_against,
)
from left_bench.report.values import ABSENT, format_setting, format_value, metric_of
from left_bench.spec.cell import GROUPS

AXES = ("quantization", "peft", "precision", "training", "optimizer")
CROSSED = ("quantization", "peft")
_CONTEXTS_SHOWN = 4
_NO_CONTEXT = ("seed", "cell")
_DECIDING = ("peak_memory_bytes", "train_tokens_per_second", "trainable_params")
_AXIS_METRICS = (
    "peak_memory_bytes",
    "weights_bytes",
    "train_tokens_per_second",
    "generate_tokens_per_second",
    "trainable_params",
)


def leaderboard(report: Report) -> Iterator[str]:
    """Every cell, best quality first; what did not run is at the end, in words. One table per value of `group_by`."""
    if len(report.rows) < 2:
        return
    yield "## Leaderboard"
    yield from how_to_read(report)
    quality = headline_quality(report.rows)
    wanted = _DECIDING if _only_group(report) is None else (*_DECIDING, *_AXIS_METRICS)
    metrics = present(report.rows, list(dict.fromkeys([*([quality] if quality else []), *wanted])))
    if not metrics:
        yield "No cell has a result yet."
        return
    if report.group_by is None:
        yield from _ranked(report, report.rows, metrics)
        return
    for value, rows in _by_setting(report.rows, report.group_by).items():
        yield f"### {code(report.group_by)}: {escape(value)}"
        yield from _ranked(report, rows, metrics)


def recommendation(report: Report) -> Iterator[str]:
    """Which cell to take, how sure that is, and the Pareto set it is taken from."""
    result = recommend(report.rows, report.needs, margins=report.margins)
    if result is None or (len(report.rows) < 2 and not report.needs):
        return
    yield "## Recommendation"
    yield f"**{escape(sentence(result, report.needs, report.names, report.rows))}**"
    if len(result.fitting) > 1 and (sure := [*how_sure(result, report.names)]):
        yield "\n".join(f"- {escape(line)}" for line in sure)
    yield from _pareto_table(report, result)


def _pareto_table(report: Report, found: Recommendation) -> Iterator[str]:
    if not found.front:
        return
    drawn = any(share is not None for share in found.front.values())
    over = ", ".join(heading(metric) for metric in found.metrics)
    fit = " among those that fit" if report.needs else ""
    yield (
        f"The Pareto set: no other cell{fit} beats these in {over} at once, in at least 5 % of resamples of held-out "
        "rows and seeds."
        if drawn
        else f"The Pareto set, by the values as measured: no other cell{fit} beats these in {over} at once."
    )
    by_id = {id(row): row for row in found.fitting}
    lines = []
    for key, share in [*found.front.items()][:ROWS_SHOWN]:
        row, name = by_id[key], escape(report.names[key])
        numbers = [format_value(metric, row.value(metric)) for metric in found.metrics]
        lines.append([f"**{name}**" if row is found.chosen else name, *numbers, *_share(share, drawn)])
    head = ["cell", *map(heading, found.metrics), *(["unbeaten in"] if drawn else [])]
    yield table(head, lines)
    yield from cut_line(len(found.front))


def _share(share: float | None, drawn: bool) -> list[str]:
    return ([ABSENT] if share is None else [f"{share:.0%}"]) if drawn else []


def axis_tables(report: Report) -> Iterator[str]:
    """For each axis that varies, the rows that differ in it alone, beside each other."""
    if (group := _only_group(report)) and len(report.rows) > 1 and report.group_by is None:
        yield f"## By {group}"
        yield f"The cells differ in {code(group)} alone: the leaderboard is this table."
        return
    for group, own, others, blocks in axis_blocks(report):
        yield f"## By {group}"
        yield from _axis_table(report, group, own, others, blocks)


def axis_blocks(report: Report) -> Iterator[tuple[str, list[Axis], list[Axis], list[list[Row]]]]:
    """For each axis that varies: its own label columns, the others, and the blocks of rows that differ in it alone."""
    for group in AXES:
        own, others = _split(report, group)
        blocks = [  # with one that is ok there is nothing to compare, and the leaderboard has it
            rows
            for rows in _contexts(report, others).values()
            if len({_texts(report, own, row) for row in rows if row.ok}) > 1
        ]
        if own and blocks:
            yield group, own, others, blocks


def crossed_tables(report: Report) -> Iterator[str]:
    """Quantization against method: one table each for quality, memory and speed."""
    own = [axis for axis in report.axes if axis.key.partition(".")[0] in CROSSED]
    others = [axis for axis in report.axes if axis not in own and axis.key not in _NO_CONTEXT]
    quality = headline_quality(report.rows)
    metrics = [metric for metric in (quality, "peak_memory_bytes", "train_tokens_per_second") if metric]
    shown = 0
    for context, rows in _contexts(report, others).items():
        grid = _Grid.of(report, rows)
        # a star (one method over every quantization, one quantization under every method) crosses nothing
        if len(rows) < len(grid.across) + len(grid.down) or min(len(grid.across), len(grid.down)) < 2:
            continue
        shown += 1
        if shown == 1:
            yield f"## {CROSSED[0].capitalize()} × {CROSSED[1]}"
        if shown > _CONTEXTS_SHOWN:
            continue
        if context:
            yield _context_line(others, context)
        for metric in present(rows, metrics):
            yield f"**{heading(metric).capitalize()}** ({_better(metric)}):"
            yield grid.table(report, metric)
            yield from cut_line(len(grid.down))
        yield from _other_differences(report, rows, CROSSED)
    if shown > _CONTEXTS_SHOWN:
        yield f"{shown - _CONTEXTS_SHOWN} more such tables are left out here; narrow the report with `--where`."


def check_group_by(rows: Sequence[Row], key: str) -> None:
    """Refuse a key that no row has a setting for.

    Raises:
        UserError: naming the key and the nearest.
    """
    known = {name for row in rows for name in settings(row)}
    if key not in known:
        raise UserError(f"--group-by {key}: the cells have no setting '{key}'{nearest(key, known)}")


class _Grid(NamedTuple):
    """Rows by their two coordinates."""

    down: list[str]
    across: list[str]
    cells: dict[tuple[str, str], Row]

    @classmethod
    def of(cls, report: Report, rows: Sequence[Row]) -> _Grid:
        sides = [[axis for axis in report.axes if axis.key.partition(".")[0] == group] for group in CROSSED]
        cells: dict[tuple[str, str], Row] = {}
        for row in rows:
            at = [_label(report, axes, row) or option(row, group) for axes, group in zip(sides, CROSSED, strict=True)]
            cells.setdefault((str(at[1]), str(at[0])), row)
        return cls(list(dict.fromkeys(d for d, _ in cells)), list(dict.fromkeys(a for _, a in cells)), cells)

    def table(self, report: Report, metric: str) -> str:
        rows = list(self.cells.values())
        marks = best_and_second(rows, metric)
        lines = []
        for down in self.down[:ROWS_SHOWN]:
            results = [self.cells.get((down, across)) for across in self.across]
            texts = [ABSENT if row is None else _in_place(row, metric, marks) for row in results]
            lines.append([escape(down), *texts])
        return table(["", *map(escape, self.across)], lines)


def _ranked(report: Report, rows: Sequence[Row], metrics: Sequence[str]) -> Iterator[str]:
    alike = {metric: text for metric in metrics if (text := constant(rows, metric)) is not None}
    yield from lifted(alike)
    metrics = [metric for metric in metrics if metric not in alike] or list(metrics[:1])
    marks = {metric: best_and_second(rows, metric) for metric in metrics}
    ordered = sorted(rows, key=lambda row: _standing(row, metrics[0]))[:ROWS_SHOWN]
    result = standing(ordered, metrics[0], family=report.family(metrics[0]))
    rates = rates_column(report, ordered)
    if rates is not None and len(set(rates)) == 1:
        yield f"Learning rate of every row: {rates[0]}."
        rates = None
    lines = []
    for i, row in enumerate(ordered):
        told = [told_against(row, report.baseline, metric, report.family(metric), both=True) for metric in metrics]
        cells = [_in_place(row, metrics[0], marks[metrics[0]], told[0])]
        cells += [_beside(row, metric, marks[metric], text) for metric, text in zip(metrics[1:], told[1:], strict=True)]
        place = [] if result is None else [str(result.places.get(id(row), ABSENT))]
        lines.append([*place, *label_cells(report, row), *cells, *([rates[i]] if rates else [])])
    numbered = [] if result is None else ["#"]
    header = [*numbered, *label_headings(report), *map(heading, metrics), *(["learning rate"] if rates else [])]
    yield table(header, lines, labels=len(numbered) + len(report.axes))
    yield from cut_line(len(rows))
    if result and len(result.places) > 1:
        yield _about_places(report, result, metrics[0])
    if (hurt := whom_rounding_hurts(rows, report.names)) is not None:
        yield f"**Master weights**: {escape(hurt)}."
    yield from about_rates(report)
    yield from _other_differences(report, rows, ())


def _axis_table(
    report: Report, group: str, own: Sequence[Axis], others: Sequence[Axis], blocks: Sequence[Sequence[Row]]
) -> Iterator[str]:
    rows = [row for block in blocks for row in block]
    varying = [axis for axis in others if len({_text(report, axis, row) for row in rows}) > 1]
    if held := [axis for axis in others if axis not in varying]:
        yield _context_line(held, _texts(report, held, rows[0]))
    quality = headline_quality(rows)
    metrics = present(rows, [*([quality] if quality else []), *_AXIS_METRICS])
    alike = {metric: text for metric in metrics if (text := constant(rows, metric)) is not None}
    yield from lifted(alike)
    metrics = [metric for metric in metrics if metric not in alike] or metrics[:1]
    if not metrics:
        return
    references = {id(row): reference_of(report, own, block) for block in blocks for row in block}
    lines: list[list[str]] = []
    for block in blocks:
        if len(lines) >= ROWS_SHOWN:
            break
        reference = references[id(block[0])]
        marks = {metric: best_and_second(block, metric) for metric in metrics}
        for row in block:
            labels = [escape(_text(report, axis, row)) for axis in (*varying, *own)]
            if row is reference:
                labels[-1] += " *(reference)*"
            told = [told_against(row, reference, metric, report.family(metric)) for metric in metrics]
            cells = [_in_place(row, metrics[0], marks[metrics[0]], told[0])]
            cells += [_beside(row, m, marks[m], text) for m, text in zip(metrics[1:], told[1:], strict=True)]
            lines.append([*labels, *cells])
    header = [*(escape(axis.heading) for axis in (*varying, *own)), *map(heading, metrics)]
    of = "its block, whose rows differ in nothing else" if varying else "these rows, which differ in nothing else"
    yield f"In brackets: compared with the reference of {of}."
    yield table(header, lines[:ROWS_SHOWN], labels=len(varying) + len(own))
    yield from cut_line(len(rows))
    yield from _other_differences(report, rows, (group,))


def _other_differences(report: Report, rows: Sequence[Row], compared: Sequence[str]) -> Iterator[str]:
    """The names of what else differs between the rows of one table; how is told under the tables of all metrics."""
    results = [what for what, _ in confounders(rows, report.names) if what.partition(".")[0] not in compared]
    if results:
        names = ", ".join(code(what) for what in dict.fromkeys(results))
        yield f"Confounders: the rows also differ in {names}; see *Quality*, *Memory and size* and *Speed*."


def _about_places(report: Report, found: Standing, metric: str) -> str:
    """What a place means, and which cells are not resolved from the best."""
    names = report.names
    others = [escape(names[id(row)]) for row, _ in found.unresolved]
    first = escape(names[id(found.best)])
    told = (
        f"{len(others):,} {'cell is' if len(others) == 1 else 'cells are'} not resolved from the best, {first}: "
        f"{_shortened(others)}"
        if others
        else f"every other cell is resolved from the best, {first}"
    )
    return (
        f"`#`: the place. A cell shares the place above it unless its paired difference in {heading(metric)} from the "
        f"first cell of that place is resolved ({found.family.size:,} pairs judged together, false-discovery rate "
        f"{TOLD_RATE}); {told}."
    )


def _shortened(names: Sequence[str]) -> str:
    more = len(names) - CELLS_NAMED
    return ", ".join(names[:CELLS_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def _only_group(report: Report) -> str | None:
    """The axis in which alone the rows differ: its table is the leaderboard."""
    groups = {axis.key.partition(".")[0] for axis in report.axes if axis.key not in _NO_CONTEXT}
    return next(iter(groups)) if len(groups) == 1 and groups <= set(AXES) else None


def _in_place(row: Row, metric: str, marks: tuple[Sequence[Row], Sequence[Row]], against: str = "") -> str:
    """The value, or the word for why there is none."""
    if not row.ok:
        return f"**{escape(status_word(row))}**"
    return _beside(row, metric, marks, against)


def _beside(row: Row, metric: str, marks: tuple[Sequence[Row], Sequence[Row]], against: str) -> str:
    if row.value(metric) is None:
        return ABSENT
    text = marked(row, metric, marks)
    return f"{text} ({against})" if against else text


def _standing(row: Row, metric: str) -> tuple[bool, float, float]:
    """Of equals the one that needs less memory stands first."""
    value, memory = row.value(metric), row.value("peak_memory_bytes")
    if not row.ok or value is None or not math.isfinite(value):
        return True, float(not row.ok), 0.0
    return False, -value if metric_of(metric).better == "higher" else value, math.inf if memory is None else memory


def _by_setting(rows: Sequence[Row], key: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(format_setting(settings(row).get(key)) if row.record else ABSENT, []).append(row)
    return groups


def _split(report: Report, group: str) -> tuple[list[Axis], list[Axis]]:
    """The label columns of an axis (the option, and keys of its section), and those that have to be equal."""
    own = [axis for axis in report.axes if axis.key.partition(".")[0] == group]
    return own, [axis for axis in report.axes if axis not in own and axis.key not in _NO_CONTEXT]


def _contexts(report: Report, others: Sequence[Axis]) -> dict[tuple[str, ...], list[Row]]:
    result: dict[tuple[str, ...], list[Row]] = {}
    for row in report.rows:
        result.setdefault(_texts(report, others, row), []).append(row)
    return result


def _texts(report: Report, axes: Sequence[Axis], row: Row) -> tuple[str, ...]:
    return tuple(_text(report, axis, row) for axis in axes)


def _text(report: Report, axis: Axis, row: Row) -> str:
    """The row's value on an axis; an option that only chooses in another group is what it chooses (`qlora`: `lora`)."""
    if axis.key in GROUPS and row.record:
        return format_setting(option(row, axis.key))
    return axis.values[report.places[id(row)]]


def _label(report: Report, axes: Sequence[Axis], row: Row) -> str:
    texts = [(axis, _text(report, axis, row)) for axis in axes]
    return " ".join(f"{axis.heading}={text}" if "." in axis.key else text for axis, text in texts if text != ABSENT)


def _context_line(axes: Sequence[Axis], texts: Sequence[str]) -> str:
    told = ", ".join(f"{escape(axis.heading)} {escape(text)}" for axis, text in zip(axes, texts, strict=True))
    return f"Held equal: {told}."


def reference_of(report: Report, own: Sequence[Axis], block: Sequence[Row]) -> Row | None:
    """The row with the report's baseline's own option, else the first that is ok."""
    wanted = _texts(report, own, report.baseline) if report.baseline else None
    done = [row for row in block if row.ok]
    return next((row for row in done if _texts(report, own, row) == wanted), next(iter(done), None))


def _better(metric: str) -> str:
    return {"higher": "higher is better", "lower": "lower is better"}.get(metric_of(metric).better, "")

"""`left-bench compare A B`: what changed between two sets of records, cell by cell; a regression gate."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from left_bench.cell import not_identity
from left_bench.errors import UserError, nearest
from left_bench.record import METRICS
from left_bench.report.cells import Row, find_axes, labels, row_of
from left_bench.report.gate import MISSING, Gate, parse_gate
from left_bench.report.load import Problem, choose, flatten, read_runs
from left_bench.report.markdown import escape, table
from left_bench.report.seeds import pool
from left_bench.report.statistics import Interval, difference, speed_ratio
from left_bench.report.tables import heading
from left_bench.report.values import format_difference, format_value, is_number, metric_of, one_line, significant

FROM_STEPS = "train_tokens_per_second"
# What is counted and not measured: any difference is one.
_EXACT = frozenset(
    name for name, metric in METRICS.items() if metric.kind == "size" or metric.unit in ("params", "bits", "count")
) | {"weights_bytes", "reload_ok"}
# Beside a metric that says the same, or of no interest in a comparison.
_LEFT_OUT = frozenset({"eval_perplexity", "baseline_memory_bytes", "first_train_loss", "train_loss"})
_ROWS_PRINTED = 200
Judgement = Literal["better", "worse", "changed", "tie", "not judged"]


class Change(NamedTuple):
    """One metric of one cell, before and after."""

    cell: str
    metric: str
    before: float
    after: float
    interval: Interval | None
    """Of the difference, in the metric's unit; None: one measurement on either side."""
    how: str
    judgement: Judgement

    @property
    def relative(self) -> float | None:
        return (self.after - self.before) / abs(self.before) if self.before else None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two sets of records beside each other."""

    matched: Sequence[tuple[str, Row, Row]]
    """(name, A's row, B's row)."""
    changes: Sequence[Change]
    only_a: Sequence[str]
    only_b: Sequence[str]
    ended: Sequence[tuple[str, str, str]]
    """(name, status in A, status in B) of the cells that are not ok on both sides."""
    differing: Sequence[tuple[str, str, str]]
    """(what, in A, in B): versions, machine, commit, and settings that one side alone has."""
    problems: Sequence[Problem] = ()


def main(argv: list[str]) -> int:
    """`left-bench compare A B`: 0; 1 where a `--fail-on` is hit; 2 when the input cannot be used."""
    options = _parser().parse_args(argv)
    try:
        gates = [parse_gate(text) for text in options.fail_on if text.strip() != MISSING]
        found = compare(options.a, options.b, ignore=options.ignore, where=options.where)
        if not found.matched and options.fail_on:
            raise UserError(
                f"no cell of A={options.a} is also in B={options.b}: nothing was compared, so nothing passes"
            )
    except UserError as error:
        print(f"left-bench compare: {error}", file=sys.stderr)
        return 2
    hits = failures(found, gates, missing=any(text.strip() == MISSING for text in options.fail_on))
    print_comparison(found, hits, every=options.all, gated=bool(options.fail_on))
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        with Path(summary).open("a", encoding="utf-8") as file:
            file.write(write_summary(found, hits, every=options.all, gated=bool(options.fail_on)) + "\n")
    return 1 if hits else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="left-bench compare",
        allow_abbrev=False,
        description="Match the cells of two sets of records and print what changed beyond the noise from A to B. Cells "
        "match by everything that was set; versions, machine and commit may differ.",
        epilog="A change is judged by the 95%% interval of the difference: quality over held-out rows and seeds, "
        "training speed over the steps, other measurements over seeds. Where there is one measurement on either "
        "side the change is shown and not judged; --fail-on takes it as it is.",
    )
    parser.add_argument("a", metavar="A", help="runs folder, cell folder or record file: before")
    parser.add_argument("b", metavar="B", help="the same: after")
    parser.add_argument(
        "--fail-on",
        action="append",
        default=[],
        metavar="CHANGE",
        help="leave with 1 where a cell changes by more, and not within the noise: 'train_tokens_per_second<-5%%', "
        "'exact_match<-0.02', 'missing' for cells that B has no more; may be repeated",
    )
    parser.add_argument(
        "--ignore",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY",
        help="settings that may differ, as model.name_or_path or a whole section, as hardware",
    )
    parser.add_argument(
        "--where", metavar="CONDITION", help="only the records that fulfil it, as in `left-bench report`"
    )
    parser.add_argument("--all", action="store_true", help="print what did not change too")
    return parser


def compare(
    a: str | os.PathLike[str], b: str | os.PathLike[str], *, ignore: Sequence[str] = (), where: str | None = None
) -> Comparison:
    """Match the cells of two sets of records and judge every metric that both have.

    Raises:
        UserError: a path does not exist or holds no record, or `ignore` or `where` names what no record has.
    """
    sides, problems = [], []
    for name, path in (("A", a), ("B", b)):
        runs, unread = read_runs(path)
        problems += unread
        if not runs:
            hint = f"; {len(unread)} could not be read, first {unread[0]}" if unread else ""
            raise UserError(f"{name}={path}: there is no record (<cell id>/record.json){hint}")
        sides.append(runs if where is None else choose(runs, where))
    rows = [pool(_newest([row_of(run) for run in runs])) for runs in sides]
    flat = [[_identity(row) for row in side] for side in rows]
    keys = [{key for one in side for key in one} for side in flat]
    unknown = [key for key in ignore if not any(_under(known, key) for known in keys[0] | keys[1])]
    if unknown:
        raise UserError(
            f"--ignore {unknown[0]}: the cells have no such setting{nearest(unknown[0], keys[0] | keys[1])}"
        )
    shared = {key for key in keys[0] & keys[1] if not any(_under(key, ignored) for ignored in ignore)}
    by_identity = [_by_identity(side, one, shared) for side, one in zip(rows, flat, strict=True)]
    pairs = [
        pair for key, group in by_identity[0].items() for pair in zip(group, by_identity[1].get(key, ()), strict=False)
    ]
    in_both = {id(row) for pair in pairs for row in pair}
    names = _names([*rows[0], *(row for row in rows[1] if id(row) not in in_both)])
    matched = [(names[id(before)], before, after) for before, after in pairs]
    changes = [
        change for name, before, after in matched if before.ok and after.ok for change in _changes(name, before, after)
    ]
    only = [[names[id(row)] for row in side if id(row) not in in_both] for side in rows]
    ended = []
    for name, before, after in matched:
        old, new = ({run.seed: run for run in row.runs} for row in (before, after))
        for seed in dict.fromkeys([*old, *new]):
            seeded = name if len(old) == len(new) == 1 else f"{name} seed {seed}"
            if seed not in new:
                only[0].append(seeded)
            elif seed not in old:
                only[1].append(seeded)
            elif not (old[seed].ok and new[seed].ok):
                ended.append((seeded, old[seed].status, new[seed].status))
    one_sided = [(f"setting {key}", *_one_sided(key, flat)) for key in sorted(keys[0] ^ keys[1]) if _always(key, flat)]
    return Comparison(
        matched=matched,
        changes=changes,
        only_a=only[0],
        only_b=only[1],
        ended=ended,
        differing=[*_surroundings(*rows), *one_sided],
        problems=problems,
    )


def failures(found: Comparison, gates: Sequence[Gate], *, missing: bool = False) -> list[str]:
    """What the gates object to, in sentences; with a gate, a cell that was ok and is so no more is a failure too."""
    hits = []
    for gate in gates:
        measured = [change for change in found.changes if change.metric == gate.metric]
        if not measured:
            hits.append(f"{gate.text}: {gate.metric} was measured in no cell of both, so nothing was compared")
        hits += [
            f"{gate.text}: {change.cell} went from {_value(change, 'before')} to {_value(change, 'after')}"
            for change in measured
            if change.judgement != "tie" and gate.hit(change.before, change.after)
        ]
    if gates or missing:
        hits += [f"{name} was ok and is {after} now" for name, before, after in found.ended if before == "ok"]
    if missing:
        hits += [f"{MISSING}: B has no {name}" for name in found.only_a]
    return hits


def print_comparison(found: Comparison, hits: Sequence[str], *, every: bool, gated: bool) -> None:
    """The comparison as plain text on standard output."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console.width = 160
    for line in _head(found):
        console.print(Text(line), soft_wrap=True)
    shown = _shown(found, every=every)
    if shown:
        grid = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("cell", "metric", "A", "B", "change", "95 % interval", "judged", "over"):
            grid.add_column(name, justify="right" if name in ("A", "B", "change") else "left", overflow="fold")
        for change in shown[:_ROWS_PRINTED]:
            style = {"better": "green", "worse": "red"}.get(change.judgement, "")
            cells = [one_line(cell) for cell in _cells(change)]
            grid.add_row(*(Text(cell, style=style if i == 6 else "") for i, cell in enumerate(cells)))
        console.print(grid)
        if len(shown) > _ROWS_PRINTED:
            console.print(Text(f"{len(shown) - _ROWS_PRINTED} more lines are left out; narrow with --where"))
    for line in _tail(found, hits, every=every, gated=gated):
        console.print(Text(line), soft_wrap=True)


def write_summary(found: Comparison, hits: Sequence[str], *, every: bool, gated: bool) -> str:
    """The comparison as Markdown, for a job's summary."""
    parts = ["## left-bench compare", *(escape(line) for line in _head(found))]
    shown = _shown(found, every=every)
    if shown:
        lines = [[escape(cell) for cell in _cells(change)] for change in shown[:_ROWS_PRINTED]]
        header = ["cell", "metric", "A", "B", "change", "95 % interval", "judged", "over"]
        parts.append(table(header, lines, labels=2))
    parts += [escape(line) for line in _tail(found, hits, every=every, gated=gated)]
    return "\n\n".join(parts)


def _head(found: Comparison) -> Iterator[str]:
    counts = f"{len(found.matched)} cells in both, {len(found.only_a)} only in A, {len(found.only_b)} only in B"
    yield f"{counts}."
    for what, before, after in found.differing:
        yield f"{what}: {before} in A, {after} in B"


def _tail(found: Comparison, hits: Sequence[str], *, every: bool, gated: bool) -> Iterator[str]:
    tied = sum(change.judgement == "tie" for change in found.changes)
    open_ = [change for change in found.changes if change.judgement == "not judged" and change.before != change.after]
    if found.changes and not every:
        yield f"{tied} of {len(found.changes)} comparisons are ties; --all prints them."
    if open_:
        yield f"{len(open_)} have one measurement on either side and are not judged; repeat under other seeds."
    for name, before, after in found.ended:
        yield f"{name}: {before} in A, {after} in B"
    for side, names in (("A", found.only_a), ("B", found.only_b)):
        if names:
            more = f" and {len(names) - 20} more" if len(names) > 20 else ""
            yield f"only in {side}: {', '.join(names[:20])}{more}"
    if found.problems:
        yield f"{len(found.problems)} files could not be read, first {found.problems[0]}"
    for hit in hits:
        yield f"FAILED {hit}"
    if gated and not hits:
        yield "passed: no change is beyond the bounds"


def _shown(found: Comparison, *, every: bool) -> list[Change]:
    if every:
        return list(found.changes)
    return [change for change in found.changes if change.judgement != "tie" and change.before != change.after]


def _cells(change: Change) -> list[str]:
    low, high = ("", "") if change.interval is None else map(_of(change), change.interval)
    relative = change.relative
    shift = _of(change)(change.after - change.before) if metric_of(change.metric).kind == "quality" else ""
    if not shift:
        shift = "from zero" if relative is None else f"{relative:+.1%}"
    return [
        change.cell,
        heading(change.metric),
        _value(change, "before"),
        _value(change, "after"),
        shift,
        f"{low} to {high}" if low else "",
        change.judgement,
        change.how if change.how != "none" else "one measurement each",
    ]


def _of(change: Change) -> Any:
    """How a difference of this metric is written: a share of A's value, or the difference itself for a score."""
    if metric_of(change.metric).kind == "quality" or not change.before:
        return format_difference
    return lambda value: f"{value / abs(change.before):+.1%}"


def _value(change: Change, side: Literal["before", "after"]) -> str:
    text = format_value(change.metric, getattr(change, side))
    same = format_value(change.metric, change.before) == format_value(change.metric, change.after)
    return significant(getattr(change, side), digits=6) if same and change.before != change.after else text


def _changes(name: str, before: Row, after: Row) -> Iterator[Change]:
    for metric in METRICS:
        x, y = before.value(metric), after.value(metric)
        if metric in _LEFT_OUT or x is None or y is None or not (is_number(x) and is_number(y)):
            continue
        if metric in _EXACT:
            yield Change(name, metric, x, y, None, "counted, not measured", "tie" if x == y else _judged(metric, y - x))
            continue
        interval, how = _noise(before, after, metric)
        if interval is not None:
            judgement: Judgement = "tie" if 0 in interval else _judged(metric, y - x)
        else:
            judgement = "tie" if x == y else "not judged"
        yield Change(name, metric, x, y, interval, how, judgement)


def _noise(before: Row, after: Row, metric: str) -> tuple[Interval | None, str]:
    """The interval of B less A, and what it is over: for training speed the steps, and seeds where they reach wider."""
    found = difference(after, before, metric)
    interval, how = (found.interval, found.how) if found else (None, "none")
    if metric != FROM_STEPS or (steps := speed_ratio(after, before)) is None:
        return interval, how
    base = before.value(metric) or 0.0
    over_steps = Interval(*(base * (end - 1) for end in steps[1]))
    if interval is None:
        return over_steps, "steps"
    return Interval(min(interval.low, over_steps.low), max(interval.high, over_steps.high)), "steps and seeds"


def _judged(metric: str, change: float) -> Judgement:
    better = metric_of(metric).better
    if better == "none":
        return "changed"
    return "better" if (change > 0) == (better == "higher") else "worse"


def _newest(rows: Sequence[Row]) -> list[Row]:
    """One run of every cell id on a machine: the newest that is ok, else the newest."""
    kept: dict[tuple[str, str | None], Row] = {}
    for row in rows:  # oldest first
        key = (row.cell_id, row.machine)
        if key not in kept or row.ok or not kept[key].ok:
            kept[key] = row
    return list(kept.values())


def _identity(row: Row) -> dict[str, Any]:
    """Everything that was set and changes the result, flat; the seed aside, which the rows were pooled over."""
    flat = flatten(row.record.config) if row.record else {}
    return {key: value for key, value in flat.items() if key != "seed" and not not_identity(key)}


def _by_identity(rows: Sequence[Row], flat: Sequence[Mapping[str, Any]], keys: set[str]) -> dict[Hashable, list[Row]]:
    found: dict[Hashable, list[Row]] = {}
    for row, settings in zip(rows, flat, strict=True):
        found.setdefault(frozenset((key, value) for key, value in settings.items() if key in keys), []).append(row)
    return found


def _under(key: str, ignored: str) -> bool:
    return key == ignored or key.startswith(f"{ignored}.")


def _always(key: str, flat: Sequence[Sequence[Mapping[str, Any]]]) -> bool:
    """Whether every cell of one side has the key: a setting that came or went with a version."""
    return any(side and all(key in one for one in side) for side in flat)


def _one_sided(key: str, flat: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[str, str]:
    told = [", ".join(dict.fromkeys(str(one[key]) for one in side if key in one)) or "not there" for side in flat]
    return one_line(told[0], limit=80), one_line(told[1], limit=80)


def _names(rows: Sequence[Row]) -> dict[int, str]:
    """Names by what was set: A's cell and B's bear the same one."""
    axes = [axis for axis in find_axes(rows) if axis.key not in ("machine", "cell")]
    found = labels(rows, axes) if axes else [row.cell_id for row in rows]
    return {id(row): name.rpartition(" #")[0] or name for row, name in zip(rows, found, strict=True)}


def _surroundings(a: Sequence[Row], b: Sequence[Row]) -> Iterator[tuple[str, str, str]]:
    """Versions, machine and commit, where the two sides differ in them."""
    sides = [_noted(side) for side in (a, b)]
    for what in dict.fromkeys([*sides[0], *sides[1]]):
        before, after = (", ".join(side.get(what, {})) or "not noted" for side in sides)
        if before != after:
            yield what, before, after


def _noted(rows: Sequence[Row]) -> dict[str, dict[str, None]]:
    found: dict[str, dict[str, None]] = {}
    runs = [run for row in rows for run in row.runs if run.record]
    for row in runs:
        machine = row.noted("machine")
        noted = {f"version of {name}": version for name, version in row.noted("versions").items()}
        noted |= {"machine": f"{machine.get('cpu')} ({row.machine})" if row.machine else None}
        noted |= {key: row.record.provenance.get(key) for key in ("commit", "git_commit")} if row.record else {}
        for what, value in noted.items():
            if value is not None:
                found.setdefault(one_line(what), {})[one_line(value, limit=80)] = None
    return found

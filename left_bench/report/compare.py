"""`left-bench compare A B`: what changed between two sets of records, cell by cell; a regression gate."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from left_bench.core.errors import UserError
from left_bench.report.changes import UNCHANGED, Change, Comparison, compare
from left_bench.report.gate import MISSING, Gate, parse_gate
from left_bench.report.headings import heading
from left_bench.report.markdown import escape, table
from left_bench.report.values import format_difference, format_value, metric_of, one_line, significant

_ROWS_PRINTED = 200


def main(argv: list[str]) -> int:
    """`left-bench compare A B`: 0; 1 where a `--fail-on` is hit; 2 when the input cannot be used."""
    options = _parser().parse_args(argv)
    try:
        gates = [parse_gate(text) for text in options.fail_on if text.strip() != MISSING]
        result = compare(options.a, options.b, ignore=options.ignore, where=options.where)
        if not result.matched and options.fail_on:
            raise UserError(
                f"no cell of A={options.a} is also in B={options.b}: nothing was compared, so nothing passes"
            )
    except UserError as error:
        print(f"left-bench compare: {error}", file=sys.stderr)
        return 2
    hits = failures(result, gates, missing=any(text.strip() == MISSING for text in options.fail_on))
    if options.json:
        print(json.dumps(as_data(result, hits), indent=1))
    else:
        print_comparison(result, hits, every=options.all, gated=bool(options.fail_on))
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        with Path(summary).open("a", encoding="utf-8") as file:
            file.write(write_summary(result, hits, every=options.all, gated=bool(options.fail_on)) + "\n")
    return 1 if hits else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="left-bench compare",
        allow_abbrev=False,
        description="Match the cells of two sets of records and print what changed beyond the noise from A to B. Cells "
        "match by everything that was set; versions, machine and commit may differ.",
        epilog="A change is judged by the 95 % interval of the difference: quality over held-out rows and seeds, "
        "training speed over the steps, other measurements over seeds. Where there is one measurement on either "
        "side the change is shown and not judged; --fail-on takes it as it is.",
    )
    parser.add_argument("a", metavar="A", help="runs folder, cell folder, record file or file of records: before")
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
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


def failures(comparison: Comparison, gates: Sequence[Gate], *, missing: bool = False) -> list[str]:
    """What the gates object to, in sentences; with a gate, a cell that was ok and is so no more is a failure too."""
    hits = []
    for gate in gates:
        measured = [change for change in comparison.changes if change.metric == gate.metric]
        if not measured:
            hits.append(f"{gate.text}: {gate.metric} was measured in no cell of both, so nothing was compared")
        hits += [
            f"{gate.text}: {change.cell} went from {_value(change, 'before')} to {_value(change, 'after')}"
            for change in measured
            if change.judgement not in UNCHANGED and gate.hit(change.before, change.after)
        ]
        hits += [
            f"{gate.text}: {name} has no {gate.metric} in B"
            for name, before, after in comparison.matched
            if before.ok and after.ok and before.value(gate.metric) is not None and after.value(gate.metric) is None
        ]
    if gates or missing:
        hits += [f"B has a file that cannot be read: {problem}" for problem in comparison.problems_b]
        hits += [f"{name} was ok and is {after} now" for name, before, after in comparison.ended if before == "ok"]
    if missing:
        hits += [f"{MISSING}: B has no {name}" for name in comparison.only_a]
    return hits


def as_data(comparison: Comparison, hits: Sequence[str]) -> dict[str, Any]:
    """The whole comparison for a program; a number that is none of JSON's is null."""
    changes = [
        {
            **{name: getattr(change, name) for name in ("cell", "metric", "before", "after")},
            "unit": metric_of(change.metric).unit,
            "interval": None if change.interval is None else [*map(_finite, change.interval)],
            "relative": _finite(change.relative),
            "judged": change.judgement,
            "over": change.how,
        }
        for change in comparison.changes
    ]
    return {
        "matched": [name for name, _, _ in comparison.matched],
        "only_in_a": list(comparison.only_a),
        "only_in_b": list(comparison.only_b),
        "differing": [{"what": what, "a": a, "b": b} for what, a, b in comparison.differing],
        "ended_otherwise": [{"cell": cell, "a": a, "b": b} for cell, a, b in comparison.ended],
        "changes": changes,
        "unreadable": [str(problem) for problem in comparison.problems],
        "failed": list(hits),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def print_comparison(comparison: Comparison, hits: Sequence[str], *, every: bool, gated: bool) -> None:
    """The comparison as plain text on standard output."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console.width = 160
    for line in _head(comparison):
        console.print(Text(line), soft_wrap=True)
    shown = _shown(comparison, every=every)
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
    for line in _tail(comparison, hits, every=every, gated=gated):
        console.print(Text(line), soft_wrap=True)


def write_summary(comparison: Comparison, hits: Sequence[str], *, every: bool, gated: bool) -> str:
    """The comparison as Markdown, for a job's summary."""
    parts = ["## left-bench compare", *(escape(line) for line in _head(comparison))]
    shown = _shown(comparison, every=every)
    if shown:
        lines = [[escape(cell) for cell in _cells(change)] for change in shown[:_ROWS_PRINTED]]
        header = ["cell", "metric", "A", "B", "change", "95 % interval", "judged", "over"]
        parts.append(table(header, lines, labels=2))
    parts += [escape(line) for line in _tail(comparison, hits, every=every, gated=gated)]
    return "\n\n".join(parts)


def _head(comparison: Comparison) -> Iterator[str]:
    only_a, only_b = len(comparison.only_a), len(comparison.only_b)
    yield f"{len(comparison.matched)} cells in both, {only_a} only in A, {only_b} only in B."
    for what, before, after in comparison.differing:
        yield f"{what}: {before} in A, {after} in B"


def _tail(comparison: Comparison, hits: Sequence[str], *, every: bool, gated: bool) -> Iterator[str]:
    tied = sum(change.judgement in UNCHANGED for change in comparison.changes)
    open_ = [
        change for change in comparison.changes if change.judgement == "not judged" and change.before != change.after
    ]
    if comparison.changes and not every:
        yield f"{tied} of {len(comparison.changes)} comparisons show no change that is resolved; --all prints them."
    if open_:
        yield f"{len(open_)} have one measurement on either side and are not judged; repeat under other seeds."
    for name, before, after in comparison.ended:
        yield f"{name}: {before} in A, {after} in B"
    for side, names in (("A", comparison.only_a), ("B", comparison.only_b)):
        if names:
            more = f" and {len(names) - 20} more" if len(names) > 20 else ""
            yield f"only in {side}: {', '.join(names[:20])}{more}"
    if comparison.problems:
        yield f"{len(comparison.problems)} files could not be read, first {comparison.problems[0]}"
    for hit in hits:
        yield f"FAILED {hit}"
    if gated and not hits:
        yield "passed: no change is beyond the bounds"


def _shown(comparison: Comparison, *, every: bool) -> list[Change]:
    if every:
        return list(comparison.changes)
    return [
        change for change in comparison.changes if change.judgement not in UNCHANGED and change.before != change.after
    ]


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

"""`left-bench report`: from runs folders to files."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from left_bench.core.errors import UserError, nearest
from left_bench.core.files import write_atomically
from left_bench.report.archive import is_archive
from left_bench.report.axes import find_axes, labels
from left_bench.report.baseline import find_baseline
from left_bench.report.cells import Row, row_of, sweep_rows
from left_bench.report.cost import NO_PRICES, Prices, add_price_options, check_prices, prices_of, with_costs
from left_bench.report.curves import Target, check_target, parse_target
from left_bench.report.document import write_document
from left_bench.report.export import csv_text, write_parquet
from left_bench.report.frame import choose, frame_of
from left_bench.report.judgement import Margins, take_margins
from left_bench.report.leaderboard import check_group_by
from left_bench.report.load import PathLike, Problem, Run, Sweep, is_trial, read_runs, read_sweeps, write_records
from left_bench.report.ranking import headline_quality
from left_bench.report.recommend import BOUNDS_HELP, Need, how_sure, named_margins, recommend, sentence, take_needs
from left_bench.report.report import Report
from left_bench.report.seeds import pool
from left_bench.spec.cell import slugify

LOOSE_NAME = "cells"
CLAIMS_SWEEP = "claims"
_WORTH_A_PROCESS = 100
"""Cells from which a second process costs less than it saves."""
FORMATS = ("md", "html", "csv", "parquet", "jsonl")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a report is asked for beside its records."""

    formats: Sequence[str] = ("md",)
    baseline: str | None = None
    group_by: str | None = None
    where: str | None = None
    needs: Sequence[Need] = ()
    margins: Margins = field(default_factory=dict)
    claims: bool = False
    prices: Prices = NO_PRICES
    target: Target | None = None
    plots: bool = True
    """Of the Markdown; the page draws its own."""


@dataclass(kw_only=True)
class Plan:
    """One report to write."""

    name: str
    rows: list[Row]
    sweep: Sweep | None
    problems: Sequence[Problem] = ()
    file_name: str = ""


def main(argv: list[str]) -> int:
    """`left-bench report RUNS...`: write one report per sweep, print the paths; 2 when the input cannot be used."""
    try:
        needs, argv = take_needs(argv)
        options = _parser().parse_args(argv)
        wanted = Wanted(
            formats=_formats(options.format),
            baseline=options.baseline,
            group_by=options.group_by,
            where=options.where,
            needs=needs,
            margins=take_margins(options.margin),
            claims=options.claims,
            prices=prices_of(options),
            target=None if options.target is None else parse_target(options.target),
        )
        check_prices(needs, wanted.prices)
        for path in write_reports(options.runs, out=options.out, name=options.name, wanted=wanted, say=print):
            print(path)
    except UserError as error:
        print(f"left-bench report: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="left-bench report",
        allow_abbrev=False,
        description="Make reports from records: one per sweep, and one of the cells that belong to none.",
        epilog=BOUNDS_HELP,
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUNS", help="runs folder, cell folder, record file, or file of records (jsonl)"
    )
    parser.add_argument("--out", default="reports", metavar="DIR", help="where the reports go (default: %(default)s)")
    parser.add_argument(
        "--baseline",
        metavar="SELECTOR",
        help="the cell to compare with: a cell id or its beginning, or settings as peft=lora,quantization=none "
        "(default: unquantized full fine-tuning, else the first cell that is ok)",
    )
    parser.add_argument(
        "--target",
        metavar="METRIC=VALUE",
        help="time, tokens and energy until each cell reached a quality along training: validation_loss=1.2",
    )
    parser.add_argument("--group-by", metavar="KEY", help="a leaderboard for each value of a setting, as peft")
    parser.add_argument(
        "--format", default="md", metavar="LIST", help=f"of {', '.join(FORMATS)}, with commas (default: %(default)s)"
    )
    parser.add_argument(
        "--where",
        metavar="CONDITION",
        help="only the records that fulfil it: 'choices.quantization == \"nf4\" and exact_match > 0.5'",
    )
    parser.add_argument(
        "--claims",
        action="store_true",
        help=f"put the field's usual sentences to the test in every report; the sweep '{CLAIMS_SWEEP}' always does",
    )
    add_price_options(parser)
    add_margin_option(parser)
    parser.add_argument("--name", help="only the sweep of this name; where there is no sweep, the report's name")
    return parser


def add_margin_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--margin",
        action="append",
        default=[],
        metavar="[METRIC=]AMOUNT",
        help="how far apart two values still count as equal: 0.02 of the score, exact_match=0.02, "
        "peak_memory_bytes=5%%; the cell to take is then the cheapest shown to be within it of the best; may be "
        "repeated",
    )


def write_report(
    runs_dir: PathLike, *, name: str, out: PathLike, baseline: str | None = None, prices: Prices = NO_PRICES
) -> Path:
    """Write the report of the sweep `name` in `runs_dir` to `<out>/<name>.md`, its plots and its `.html` beside it.

    Where `runs_dir` notes no sweep, `name` is the report's name and every record is in it.

    Raises:
        UserError: there is no such sweep, no record, or no such baseline.
    """
    wanted = Wanted(formats=("md", "html"), baseline=baseline, prices=prices)
    return write_reports([runs_dir], out=out, name=name, wanted=wanted)[0]


def write_reports(
    paths: Sequence[PathLike],
    *,
    out: PathLike,
    name: str | None = None,
    wanted: Wanted = Wanted(),
    say: Callable[[str], object] = lambda _: None,
) -> list[Path]:
    """Write a report per sweep under `paths` and one, `cells`, of the records that belong to no sweep.

    Args:
        say: takes the recommendation of each report, where bounds were given for one.

    Raises:
        UserError: a path does not exist, there is nothing to report, or something that was asked for fits nothing.
    """
    plans = plans_of(paths, name=name, where=wanted.where, prices=wanted.prices)
    chosen = _baselines([plan.rows for plan in plans], wanted.baseline)
    if wanted.group_by is not None:
        check_group_by([row for plan in plans for row in plan.rows], wanted.group_by)
    if wanted.target is not None:
        check_target([row for plan in plans for row in plan.rows], wanted.target)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for plan in plans if wanted.needs else ():
        say(f"{plan.name}: {next(_advices(plan, wanted))}")
    return [path for written in _write_all(plans, chosen, wanted, out) for path in written]


def _write_all(plans: Sequence[Plan], chosen: Sequence[Row | None], wanted: Wanted, out: Path) -> list[list[Path]]:
    """Write each plan; of many cells the largest report here, and the others in a process beside it."""
    sizes = [sum(len(row.runs) for row in plan.rows) for plan in plans]
    if len(plans) < 2 or (os.cpu_count() or 1) < 2 or sum(sizes) < _WORTH_A_PROCESS:
        return [_write(plan, baseline, wanted, out) for plan, baseline in zip(plans, chosen, strict=True)]
    largest = sizes.index(max(sizes))
    # a new interpreter, not a fork: whoever calls this may have threads
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as beside:
        others = {i: beside.submit(_write, plans[i], chosen[i], wanted, out) for i in range(len(plans)) if i != largest}
        here = _write(plans[largest], chosen[largest], wanted, out)
        return [here if i == largest else others[i].result() for i in range(len(plans))]


def plans_of(paths: Sequence[PathLike], *, name: str | None, where: str | None, prices: Prices) -> list[Plan]:
    """The records under `paths` by the reports that they belong in: one for each sweep, one for those of none.

    Raises:
        UserError: as `write_reports`.
    """
    runs, problems = read_runs(paths)
    runs = with_costs(runs, prices)
    sweeps, unread = read_sweeps([path for path in paths if Path(path).is_dir() or is_archive(Path(path))])
    problems = [*problems, *unread]
    listed = ", ".join(map(str, paths))
    if not runs:
        hint = f"; {len(problems)} could not be read, first {problems[0]}" if problems else ""
        raise UserError(f"RUNS={listed}: there is no record (<cell id>/record.json){hint}")
    swept = {cell_id for sweep in sweeps for cell_id in sweep.cells}
    kept = runs if where is None else choose(runs, where)
    if not kept:
        raise UserError(f"--where {where}: none of the {len(runs)} records fulfils it")
    plans = [
        Plan(name=sweep.name, rows=_sweep_rows(sweep, kept, problems, chosen=where is not None), sweep=sweep)
        for sweep in sweeps
    ]
    # an unreadable file of no sweep's is told where the other such cells are, else in the last report
    homeless = [problem for problem in problems if where is not None or problem.path.parent.name not in swept]
    if loose := [row_of(run) for run in kept if run.record.cell_id not in swept and not is_trial(run.record)]:
        plans.append(Plan(name=LOOSE_NAME, rows=loose, sweep=None))
    plans = [plan for plan in plans if plan.rows]
    if not plans:
        raise UserError(f"RUNS={listed}: there are {len(kept)} trials of a tuning and no cell that is compared yet")
    plans = _wanted(plans, name) if name is not None else plans
    plans[-1].problems = homeless
    taken: set[str] = set()
    for plan in plans:
        plan.file_name = _free_name(plan.name, taken)
        taken.add(plan.file_name)
        plan.rows = pool(plan.rows)
    return plans


def _sweep_rows(sweep: Sweep, runs: Sequence[Run], problems: Sequence[Problem], *, chosen: bool) -> list[Row]:
    """The sweep's rows; a condition chose among records, and a cell without one cannot be known to fulfil it."""
    rows = sweep_rows(sweep, runs, problems)
    return [row for row in rows if row.record] if chosen else rows


def _write(plan: Plan, baseline: Row | None, wanted: Wanted, out: Path) -> list[Path]:
    written = []
    stem = out / plan.file_name
    if "md" in wanted.formats:
        written.append(write_atomically(stem.with_name(f"{plan.file_name}.md"), _markdown(plan, baseline, wanted, out)))
    if "html" in wanted.formats:
        from left_bench.report.page import write_page

        path = stem.with_name(f"{plan.file_name}.html")
        advice = [*_advices(plan, wanted)] if len(plan.rows) > 1 else []
        write_page(
            plan.rows,
            title=plan.name,
            path=path,
            baseline=baseline,
            sweep=plan.sweep,
            problems=plan.problems,
            notes=advice,
            target=wanted.target,
        )
        written.append(path)
    runs = [Run(run.record, run.path) for row in plan.rows for run in row.runs if run.record and run.path]
    if "csv" in wanted.formats:
        path = stem.with_name(f"{plan.file_name}.csv")
        write_atomically(path, csv_text(frame_of(runs)))
        written.append(path)
    if "parquet" in wanted.formats:
        written.append(write_parquet(frame_of(runs), stem.with_name(f"{plan.file_name}.parquet")))
    if "jsonl" in wanted.formats:
        written.append(write_records(stem.with_name(f"{plan.file_name}.jsonl"), runs, plan.sweep))
    return written


def _markdown(plan: Plan, baseline: Row | None, wanted: Wanted, out: Path) -> str:
    if wanted.plots:  # matplotlib
        from left_bench.report.plots import write_plots

    axes = find_axes(plan.rows)
    names = labels(plan.rows, axes)
    report = Report(
        name=plan.name,
        rows=plan.rows,
        axes=axes,
        labels=names,
        baseline=baseline,
        sweep=plan.sweep,
        problems=plan.problems,
        plots=write_plots(plan.rows, names, out=out, name=plan.file_name) if wanted.plots else [],
        needs=wanted.needs,
        group_by=wanted.group_by,
        claims=wanted.claims or plan.name == CLAIMS_SWEEP,
        where=wanted.where,
        prices=wanted.prices,
        target=wanted.target,
        margins=named_margins(wanted.margins, headline_quality(plan.rows)),
    )
    return write_document(report)


def _advices(plan: Plan, wanted: Wanted) -> Iterator[str]:
    """The cell to take, then how sure that is."""
    result = recommend(plan.rows, wanted.needs, margins=wanted.margins)
    if result is None:
        yield "no recommendation; no cell is ok with a score, or their scores may not be ranked"
        return
    names = labels(plan.rows, find_axes(plan.rows))
    by_id = {id(row): label for row, label in zip(plan.rows, names, strict=True)}
    yield sentence(result, wanted.needs, by_id, plan.rows)
    if len(result.fitting) > 1:
        yield from how_sure(result, by_id)


def _formats(text: str) -> list[str]:
    named = [part.strip() for part in text.split(",") if part.strip()]
    for name in named or [text]:
        if name not in FORMATS:
            raise UserError(f"--format {name}: no such format{nearest(name, FORMATS)} ({', '.join(FORMATS)})")
    return named


def _wanted(plans: list[Plan], name: str) -> list[Plan]:
    results = [plan for plan in plans if plan.name == name]
    results = [plan for plan in results if plan.sweep] or results  # a sweep may be named as the cells of none are
    if not results and all(plan.sweep is None for plan in plans):
        for plan in plans:
            plan.name = name
        return plans
    if not results:
        known = [plan.name for plan in plans]
        hint = nearest(name, known) or f"; there is {', '.join(known)}"
        raise UserError(f"--name {name}: there is no such sweep in RUNS{hint}")
    return results


def _baselines(reports: Sequence[list[Row]], selector: str | None) -> list[Row | None]:
    """The baseline of each report; a selector that fits one of them need not fit the others."""
    refusals = [_refusal(rows, selector) for rows in reports]
    if all(refusals):
        raise next(refusal for refusal in refusals if refusal)
    return [find_baseline(rows, None if refused else selector) for rows, refused in zip(reports, refusals, strict=True)]


def _refusal(rows: Sequence[Row], selector: str | None) -> UserError | None:
    try:
        find_baseline(rows, selector)
    except UserError as error:
        return error
    return None


def _free_name(title: str, taken: set[str]) -> str:
    """The title as a file name that no other report has."""
    stem = name = slugify(title)
    number = 2
    while name in taken:
        name, number = f"{stem}_{number}", number + 1
    return name

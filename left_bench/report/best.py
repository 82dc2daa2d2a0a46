"""`left-bench best`: the cell to take, where it lies, and what to type next."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence

from left_bench.core.errors import UserError, nearest
from left_bench.report.axes import find_axes, labels
from left_bench.report.cells import Row
from left_bench.report.command import add_margin_option, plans_of
from left_bench.report.cost import add_price_options, check_prices, prices_of
from left_bench.report.headings import heading
from left_bench.report.judgement import take_margins
from left_bench.report.ranking import QUALITY
from left_bench.report.recommend import (
    BOUNDS_HELP,
    MEMORY,
    Need,
    Recommendation,
    how_sure,
    recommend,
    sentence,
    take_needs,
)
from left_bench.report.values import format_error, format_value
from left_bench.spec.record import METRICS


def main(argv: list[str]) -> int:
    """Print the cell to take of each sweep; 1 where no cell fits or none is scored, 2 when the input cannot be used."""
    try:
        needs, argv = take_needs(argv)
        options = _parser().parse_args(argv)
        quality = options.metric and _quality(options.metric)
        margins, prices = take_margins(options.margin), prices_of(options)
        check_prices(needs, prices)
        plans = plans_of(options.runs, name=options.name, where=options.where, prices=prices)
    except UserError as error:
        print(f"left-bench best: {error}", file=sys.stderr)
        return 2
    taken = False
    for number, plan in enumerate(plans):
        if number:
            print()
        if len(plans) > 1:
            print(f"# {plan.name}")
        result = recommend(plan.rows, needs, quality=quality, margins=margins)
        if result is None:
            print("No recommendation: no cell is ok with a score, or their scores may not be ranked.")
            continue
        taken = taken or result.chosen is not None
        print("\n".join(_told(result, needs, plan.rows)))
    return 0 if taken else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="left-bench best",
        allow_abbrev=False,
        description="The cell to take, by the rule of the report's recommendation: the one with the best score, or "
        "with --margin the one that needs the least memory of those shown to be within it of the best.",
        epilog=BOUNDS_HELP,
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUNS", help="runs folder, cell folder, record file, or file of records"
    )
    parser.add_argument("--metric", metavar="NAME", help="the score to go by (default: the report's own)")
    parser.add_argument("--where", metavar="CONDITION", help="only the records that fulfil it")
    parser.add_argument("--name", help="only the sweep of this name")
    add_price_options(parser)
    add_margin_option(parser)
    return parser


def _quality(name: str) -> str:
    metric = name.replace("-", "_")
    if metric not in QUALITY:
        hint = nearest(metric, QUALITY) or f"; there are {', '.join(QUALITY)}"
        raise UserError(f"--metric {name}: {'not a score' if metric in METRICS else 'no such metric'}{hint}")
    return metric


def _told(recommendation: Recommendation, needs: Sequence[Need], rows: Sequence[Row]) -> Iterator[str]:
    names = {id(row): label for row, label in zip(rows, labels(rows, find_axes(rows)), strict=True)}
    why = sentence(recommendation, needs, names, rows)
    if recommendation.chosen is None:
        yield why
        return
    quality = recommendation.metrics[0]
    # the seeds differ by chance: the one that did best on the held-out rows would only look better than it is
    run = next(run for run in recommendation.chosen.runs if run.ok)
    value, error, before = (
        of(quality)
        for of in (recommendation.chosen.value, recommendation.chosen.stderr, recommendation.chosen.base_value)
    )
    score = f"{heading(quality)} {format_value(quality, value)}"
    if value is not None and error is not None:
        score += f" ± {format_error(quality, value, error)}"
    seeds = sum(run.ok for run in recommendation.chosen.runs)
    beside = [f"{format_value(quality, before)} before training"] if before is not None else []
    beside += [f"the mean of {seeds} seeds; the cell is seed {run.seed}"] if seeds > 1 else []
    yield f"cell:   {run.cell_id}"
    told = f" ({', '.join(beside)})" if beside else ""
    yield f"score:  {score}{told}"
    if (memory := recommendation.chosen.value(MEMORY)) is not None:
        yield f"memory: {format_value(MEMORY, memory)} at the peak of training"
    yield f"why:    {why}"
    for told in how_sure(recommendation, names) if len(recommendation.fitting) > 1 else ():
        yield f"sure:   {told}"
    if run.path is not None and run.path.is_file():  # a file of records has no model beside it
        folder = shlex.quote(str(run.path.parent))
        yield f"folder: {run.path.parent} (what it trained: {run.path.parent / 'adapter'})"
        yield "next:"
        yield f"  left-bench chat {folder}"
        yield f"  left-bench export {folder} --to merged my_model"
        yield f"  left-bench train {folder} --all-rows"

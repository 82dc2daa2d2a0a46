"""`left-bench report`: from runs folders to files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from left_bench.cell import slugify
from left_bench.errors import UserError, nearest
from left_bench.record import write_atomically
from left_bench.report.cells import Row, find_axes, find_baseline, labels, row_of, sweep_rows
from left_bench.report.document import write_document
from left_bench.report.load import PathLike, Problem, Sweep, read_runs, read_sweeps
from left_bench.report.tables import Report

LOOSE_NAME = "cells"


def main(argv: list[str]) -> int:
    """`left-bench report RUNS...`: write one report per sweep, print the paths; 2 when the input cannot be used."""
    parser = argparse.ArgumentParser(
        prog="left-bench report",
        description="Make reports from records: one per sweep, and one of the cells that belong to none.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="runs folder, cell folder or record file")
    parser.add_argument("--out", default="reports", metavar="DIR", help="where the reports go (default: %(default)s)")
    parser.add_argument(
        "--baseline",
        metavar="SELECTOR",
        help="the cell to compare with: a cell id or its beginning, or settings as peft=lora,quantization=none "
        "(default: unquantized full fine-tuning, else the first cell that is ok)",
    )
    parser.add_argument("--name", help="only the sweep of this name; where there is no sweep, the report's name")
    options = parser.parse_args(argv)
    try:
        for path in write_reports(options.runs, out=options.out, name=options.name, baseline=options.baseline):
            print(path)
    except UserError as error:
        print(f"left-bench report: {error}", file=sys.stderr)
        return 2
    return 0


def write_report(runs_dir: PathLike, *, name: str, out: PathLike, baseline: str | None = None) -> Path:
    """Write the report of the sweep `name` in `runs_dir` to `<out>/<name>.md`, its plots beside it.

    Where `runs_dir` notes no sweep, `name` is the report's name and every record is in it.

    Raises:
        UserError: there is no such sweep, no record, or no such baseline.
    """
    return write_reports([runs_dir], out=out, name=name, baseline=baseline)[0]


def write_reports(
    paths: Sequence[PathLike], *, out: PathLike, name: str | None = None, baseline: str | None = None
) -> list[Path]:
    """Write a report per sweep under `paths` and one, `cells.md`, of the records that belong to no sweep.

    Raises:
        UserError: a path does not exist, there is nothing to report, or `name` or `baseline` fits nothing.
    """
    runs, problems = read_runs(paths)
    sweeps, unread = read_sweeps([path for path in paths if Path(path).is_dir()])
    problems = [*problems, *unread]
    if not runs:
        listed = ", ".join(map(str, paths))
        hint = f"; {len(problems)} could not be read, first {problems[0]}" if problems else ""
        raise UserError(f"RUNS={listed}: there is no record (<cell id>/record.json){hint}")
    planned: list[tuple[str, list[Row], Sweep | None]] = [
        (sweep.name, sweep_rows(sweep, runs, problems), sweep) for sweep in sweeps
    ]
    swept = {cell_id for sweep in sweeps for cell_id in sweep.cells}
    loose = [row_of(run) for run in runs if run.record.cell_id not in swept]
    # an unreadable file of no sweep's is told where the other such cells are, else in the last report
    homeless = [problem for problem in problems if problem.path.parent.name not in swept]
    if loose:
        planned.append((LOOSE_NAME, loose, None))
    planned = _wanted(planned, name) if name is not None else planned
    chosen = _baselines([rows for _, rows, _ in planned], baseline)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for (title, rows, sweep), base in zip(planned, chosen, strict=True):
        file_name = _free_name(title, {path.stem for path in written})
        told = homeless if len(written) + 1 == len(planned) else []
        written.append(_write(title, rows, base, sweep, told, out=out, file_name=file_name))
    return written


def _write(
    title: str,
    rows: list[Row],
    baseline: Row | None,
    sweep: Sweep | None,
    problems: Sequence[Problem],
    *,
    out: Path,
    file_name: str,
) -> Path:
    from left_bench.report.plots import write_plots

    axes = find_axes(rows)
    names = labels(rows, axes)
    plots = write_plots(rows, names, out=out, name=file_name)
    report = Report(
        name=title,
        rows=rows,
        axes=axes,
        labels=names,
        baseline=baseline,
        sweep=sweep,
        problems=problems,
        plots=plots,
    )
    return write_atomically(out / f"{file_name}.md", write_document(report))


def _wanted(planned: list[tuple[str, list[Row], Sweep | None]], name: str) -> list[tuple[str, list[Row], Sweep | None]]:
    found = [plan for plan in planned if plan[0] == name]
    if not found and all(sweep is None for _, _, sweep in planned):
        return [(name, rows, None) for _, rows, _ in planned]
    if not found:
        known = [title for title, _, _ in planned]
        hint = nearest(name, known) or f"; there is {', '.join(known)}"
        raise UserError(f"--name {name}: there is no such sweep in RUNS{hint}")
    return found


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

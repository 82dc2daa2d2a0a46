"""`left-bench track`: tell finished records to a tracker, from disk; telling twice leaves what telling once does."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from left_bench.core.errors import UserError, nearest
from left_bench.report.archive import is_archive, lines_beside
from left_bench.report.load import PathLike, Run, Sweep, read_runs, read_sweeps
from left_bench.spec.events import EVENTS_NAME
from left_bench.spec.record import Record
from left_bench.tracker.base import Attempt, Feed, Tracker
from left_bench.tracker.choose import TRACKERS, check_trackers, defaults_of, make_tracker
from left_bench.tracker.comparison import compare, images_of
from left_bench.tracker.several import Shielded


def main(argv: list[str]) -> int:
    """`left-bench track RUNS... --tracker NAME`: 1 when something could not be told or read, 2 for a wrong request."""
    parser = argparse.ArgumentParser(
        prog="left-bench track",
        description="Tell finished records (and their steps, from events.jsonl) to trackers. A run that is there "
        "already is replaced, so that it can be done again at any time.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="runs folder, cell folder or record file")
    parser.add_argument("--tracker", required=True, metavar="NAME", help=f"one or more of {','.join(TRACKERS)}")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a tracker's setting, as project=mine"
    )
    parser.add_argument("--sweep", metavar="NAME", help="only the cells of this sweep (default: all records)")
    parser.add_argument("--store", metavar="DIR", help="where local stores lie (default: the first RUNS folder)")
    options = parser.parse_args(argv)
    section = section_of(options.tracker, options.set)
    check_trackers(section)
    store = Path(options.store) if options.store else store_of(Path(options.runs[0]))
    return replay(options.runs, section=section, store=store, sweep=options.sweep)


def section_of(names: str, settings: Sequence[str]) -> dict[str, dict[str, str | bool]]:
    """The `tracker` section of `--tracker a,b --set key=value`; a setting goes to the trackers that have it.

    Raises:
        UserError: an unknown tracker, or a setting that none of them has.
    """
    chosen = [name.strip() for name in names.strip("[] ").split(",")]
    for name in chosen:
        if name not in TRACKERS:
            raise UserError(
                f"--tracker {name}: no such tracker{nearest(name, TRACKERS)} (there are {', '.join(TRACKERS)})"
            )
    section: dict[str, dict[str, str | bool]] = {name: {} for name in chosen}
    for setting in settings:
        key, equals, value = setting.partition("=")
        takers = [name for name in chosen if key in defaults_of(name)]
        if not equals or not takers:
            raise UserError(f"--set {setting}: no such setting of {names}; settings are written KEY=VALUE")
        plain: str | bool = value.lower() == "true" if value.lower() in ("true", "false") else value
        for name in takers:
            section[name][key] = plain
    return section


def store_of(path: Path) -> Path:
    """The runs folder that `path` is, or lies in."""
    if is_archive(path):
        return path.parent
    if path.is_file():
        return path.parent.parent
    return path.parent if (path / "record.json").is_file() else path


def replay(paths: Sequence[PathLike], *, section: dict[str, Any], store: Path, sweep: str | None = None) -> int:
    """Tell every record under `paths`, and every sweep's comparison; 1 when something could not be told or read.

    Args:
        sweep: tell only this one's cells.

    Raises:
        UserError: a path does not exist, or there is no record, or no such sweep.
    """
    runs, problems = read_runs(paths)
    sweeps, _ = read_sweeps([path for path in paths if Path(path).is_dir() or is_archive(Path(path))])
    if not runs:
        raise UserError(f"RUNS={', '.join(map(str, paths))}: there is no record (<cell id>/record.json)")
    if sweep is not None:
        names = [item.name for item in sweeps]
        sweeps = [item for item in sweeps if item.name == sweep]
        if not sweeps:
            hint = nearest(sweep, names) or (f"; there is {', '.join(names)}" if names else "")
            raise UserError(f"--sweep {sweep}: there is no such sweep in {', '.join(map(str, paths))}{hint}")
        runs = [run for run in runs if run.record.cell_id in sweeps[0].cells]
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    failures = 0
    for name, settings in section.items():
        tracker = Shielded(make_tracker(name, settings, store=store), name)
        for number, run in enumerate(runs, start=1):
            tell(tracker, run, sweeps)
            print(f"[{number}/{len(runs)}] {name} {run.record.cell_id}")
        for item in sweeps:
            _tell_sweep(tracker, item, runs, paths)
        failures += tracker.failures
    return 1 if failures or problems else 0


def tell(tracker: Tracker, run: Run, sweeps: Sequence[Sweep]) -> None:
    """One record and its events, as they were told while the cell ran."""
    attempt = attempt_of(run.record, run.path.parent, sweeps)
    tracker.start(attempt)
    feed = Feed(tracker)
    for event in lines_beside(run.path.with_name(EVENTS_NAME)):
        feed.event(event)
    tracker.finish(run.record)


def attempt_of(record: Record, run_dir: Path, sweeps: Sequence[Sweep]) -> Attempt:
    """The record's attempt; the sweep is looked up where the record does not name it."""
    attempt = Attempt.of(record, run_dir=run_dir)
    if attempt.sweep is not None:
        return attempt
    return replace(attempt, sweep=next((sweep.name for sweep in sweeps if record.cell_id in sweep.cells), None))


def _tell_sweep(tracker: Tracker, sweep: Sweep, runs: Sequence[Run], paths: Sequence[PathLike]) -> None:
    from left_bench.report.command import write_reports

    by_id = {run.record.cell_id: run.record for run in runs}
    records = [by_id[cell] for cell in sweep.cells if cell in by_id]
    if not records:
        return
    with tempfile.TemporaryDirectory() as folder:
        [markdown] = write_reports(paths, out=folder, name=sweep.name)
        mine = [run for run in runs if run.record.cell_id in sweep.cells]
        compared = compare(
            records,
            sweep=sweep.name,
            started_at=sweep.started_at,
            command=sweep.command,
            markdown=markdown,
            plots=images_of(mine, name=markdown.stem, out=Path(folder)),
        )
        tracker.report(compared)

"""Runs folders and files of records -> records and sweeps; nothing here needs torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from left_bench.core.errors import UserError, nearest
from left_bench.report.archive import ENDING, is_archive, member, open_archive, paths_in, write_archive
from left_bench.spec.events import EVENTS_NAME
from left_bench.spec.record import RECORD_NAME, KnownParts, Record, Score, parse_record, read_record
from left_bench.spec.run_files import ROWS_NAME

SWEEPS_FOLDER = "sweeps"
PathLike: TypeAlias = "str | os.PathLike[str]"


class Run(NamedTuple):
    """A record and the file it was read from."""

    record: Record
    path: Path


class Problem(NamedTuple):
    """A file that could not be read, and why, in one line."""

    path: Path
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What the launcher noted of a sweep: its cells in order, and how it was started."""

    name: str
    cells: tuple[str, ...]
    command: str = ""
    overrides: tuple[str, ...] = ()
    started_at: str | None = None
    finished_at: str | None = None
    """None: it was still running, or was interrupted."""


def read_runs(paths: PathLike | Iterable[PathLike]) -> tuple[list[Run], list[Problem]]:
    """Every record under `paths`: runs folders, cell folders, record files or files of records (`archive`), each once,
    oldest first.

    A file that is no record of this schema is returned as a problem and is never left out in silence.

    Raises:
        UserError: a path does not exist.
    """
    known: KnownParts = {}
    listed = _paths(paths)
    results = [_read(path, known) for path in _record_files(listed)]
    runs = _once([run for run in results if isinstance(run, Run)])
    problems = [problem for problem in results if isinstance(problem, Problem)]
    problems += [Problem(path, told) for path in _archives(listed) for told in open_archive(path).broken]
    return sorted(runs, key=lambda run: (run.record.started_at, run.record.cell_id)), problems


def is_trial(record: Record) -> bool:
    """Whether it is of a trial of a tuning, which chose a learning rate and is compared with nothing."""
    section = record.config.get("eval")
    return isinstance(section, dict) and section.get("trial") is True


def find_runs(cell: str, runs_dir: str) -> tuple[list[Run], list[Problem]]:
    """The records of a path, or of the cell in `runs_dir` whose id is `cell` or begins so.

    Raises:
        UserError: there is none.
    """
    path = Path(cell)
    if path.exists():
        runs, problems = read_runs(path)
        if not runs:
            why = str(problems[0]) if problems else f"there is no record ({RECORD_NAME})"
            raise UserError(f"{cell}: {why}")
        return runs, problems
    if not Path(runs_dir).is_dir():
        raise UserError(
            f"{cell}: there is no such file, and no folder {runs_dir} to look the cell up in; name it with --runs"
        )
    runs, _ = read_runs(runs_dir)
    results = [run for run in runs if run.record.cell_id == cell or run.record.cell_id.startswith(cell)]
    exact = [run for run in results if run.record.cell_id == cell]
    if not results:
        raise UserError(
            f"{cell}: no cell of {runs_dir} has an id that begins so{nearest(cell, [r.record.cell_id for r in runs])}"
        )
    return exact or results, []  # what cannot be read has no id to be asked for by


def read_sweeps(paths: PathLike | Iterable[PathLike]) -> tuple[list[Sweep], list[Problem]]:
    """The sweeps noted in `<runs folder>/sweeps/*.json` and in files of records; one of the same name in several is
    joined."""
    sweeps: dict[str, Sweep] = {}
    problems: list[Problem] = []
    for path, raw in _noted_sweeps(_paths(paths)):
        try:
            sweep = _sweep(json.loads(path.read_text(encoding="utf-8")) if raw is None else raw, path.stem)
        except (OSError, ValueError) as error:
            problems.append(Problem(path, f"no sweep ({error})"))
            continue
        sweeps[sweep.name] = _joined(sweeps[sweep.name], sweep) if sweep.name in sweeps else sweep
    return list(sweeps.values()), problems


def write_records(path: Path, runs: Sequence[Run], sweep: Sweep | None) -> Path:
    """The records with what lies beside them as one file, from which the same report is made (`archive`)."""
    raw = [_raw(run) for run in runs]
    noted = None if sweep is None else {name: value for name, value in vars(sweep).items() if value is not None}
    return write_archive(path, [(item, run.path) for item, run in zip(raw, runs, strict=True)], noted)


def score_of(record: Record, metric: str) -> Score | None:
    """The score behind `record.metrics[metric]`: of several tasks', the one that has this very value."""
    scores = [score for score in record.scores if score.metric == metric]
    if len(scores) <= 1:
        return scores[0] if scores else None
    value = record.metrics.get(metric, math.nan)
    return next((score for score in scores if math.isclose(score.value, value, rel_tol=1e-9)), None)


def _paths(paths: PathLike | Iterable[PathLike]) -> list[Path]:
    listed = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    results = [Path(path) for path in listed]
    for path in results:
        if not path.exists():
            raise UserError(f"RUNS={path}: there is no such folder or record; name the runs folder of a sweep")
    return results


def _record_files(paths: list[Path]) -> Iterator[Path]:
    seen: set[Path] = set()
    for path in paths:
        if is_archive(path):
            files = paths_in(path)
        elif path.is_file():
            files = [path]
        elif (path / RECORD_NAME).is_file():
            files = [path / RECORD_NAME]
        else:
            files = sorted(path.glob(f"*/{RECORD_NAME}"))
            files += [file for archive in _archives([path]) for file in paths_in(archive)]
        for file in files:
            if file.resolve() not in seen:
                seen.add(file.resolve())
                yield file


def _archives(paths: list[Path]) -> list[Path]:
    """The files of records among paths, and in the folders among them; not what lies beside a record."""
    results = []
    for path in paths:
        if is_archive(path):
            results.append(path)
        elif path.is_dir() and not (path / RECORD_NAME).is_file():
            files = sorted(file for file in path.glob(f"*{ENDING}") if file.name not in (EVENTS_NAME, ROWS_NAME))
            results += [file for file in files if open_archive(file).cells or open_archive(file).sweep]
    return results


def _noted_sweeps(paths: list[Path]) -> Iterator[tuple[Path, Any]]:
    """(file, sweep) of files of records; (file, None) where the file is a sweep's own."""
    for folder in paths:
        for path in sorted((folder / SWEEPS_FOLDER).glob("*.json")):
            yield path, None
    for path in _archives(paths):
        if (sweep := open_archive(path).sweep) is not None:
            yield path, sweep


def _once(runs: list[Run]) -> list[Run]:
    """One of each: two reports that share a cell have its record in both of their files."""
    kept: dict[tuple[str, str, str], Run] = {}
    others = []
    for run in runs:
        if member(run.path) is None:
            others.append(run)
        else:
            kept.setdefault((run.record.cell_id, run.record.started_at, run.record.finished_at), run)
    return [*others, *kept.values()]


def _read(path: Path, known: KnownParts) -> Run | Problem:
    try:
        line = member(path)
        record = read_record(path, known=known) if line is None else parse_record(line["record"], path, known=known)
    except (ValueError, RecursionError) as error:
        return Problem(path, str(error).removeprefix(f"{path}: "))
    return Run(record, path)


def _raw(run: Run) -> dict[str, Any]:
    """The record as its file has it: also what a reading leaves out."""
    line = member(run.path)
    result = json.loads(run.path.read_text(encoding="utf-8")) if line is None else line["record"]
    return dict(result)


def _sweep(raw: Any, stem: str) -> Sweep:
    if not isinstance(raw, dict) or not isinstance(raw.get("cells"), list):
        raise ValueError("`cells`, a list of cell ids, is missing")
    overrides = raw.get("overrides")
    return Sweep(
        name=str(raw.get("name") or stem),
        cells=tuple(dict.fromkeys(str(cell) for cell in raw["cells"])),
        command=str(raw.get("command") or ""),
        overrides=tuple(map(str, overrides)) if isinstance(overrides, list) else (),
        started_at=raw.get("started_at"),
        finished_at=raw.get("finished_at"),
    )


def _joined(first: Sweep, second: Sweep) -> Sweep:
    commands = dict.fromkeys(command for command in (first.command, second.command) if command)
    return Sweep(
        name=first.name,
        cells=tuple(dict.fromkeys(first.cells + second.cells)),
        command="\n".join(commands),
        overrides=tuple(dict.fromkeys(first.overrides + second.overrides)),
        started_at=first.started_at,
        finished_at=second.finished_at if first.finished_at else None,
    )

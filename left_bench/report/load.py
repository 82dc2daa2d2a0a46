"""Runs folders -> records, sweeps and a table; nothing here needs torch."""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeGuard

from left_bench.core.errors import UserError, nearest
from left_bench.report.archive import ENDING, is_archive, lines_beside, member, open_archive, paths_in, write_archive
from left_bench.report.where import parse_where
from left_bench.spec.events import EVENTS_NAME
from left_bench.spec.record import METRICS, RECORD_NAME, KnownParts, Record, Score, parse_record, read_record
from left_bench.spec.run_files import ROWS_NAME

if TYPE_CHECKING:
    import pandas

SWEEPS_FOLDER = "sweeps"
_PROBLEMS_LISTED = 20
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


class RowResult(NamedTuple):
    """One held-out row as a cell answered it (`rows.jsonl`)."""

    reference: str
    answer_tokens: int
    nll: float
    """Summed over the answer's tokens, nats."""
    prediction: str | None
    """None: nothing was generated."""
    rejected_nll: float | None = None
    """The worse answer's, summed likewise; None: the row has none."""
    scores: tuple[tuple[str, float], ...] = ()
    """(metric, score) of what cannot be told from answer and reference alone."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Optimizer steps as `events.jsonl` has them; the lists run parallel."""

    steps: list[int]
    losses: list[float]
    """Finite ones only: a step whose loss is none is left out."""
    seconds: list[float]
    tokens: list[float]


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


def load_records(path: PathLike | Iterable[PathLike], *, where: str | None = None) -> pandas.DataFrame:
    """Records as a table, one row each, oldest first.

    Columns: `cell_id, status, reason, attempt, seed, started_at, finished_at` (UTC times), `choices.<group>`, every
    metric by its own name with `<metric>_stderr` where it has one, `config.<section>.<key>`, `machine.<key>`, `path`.
    What differed in fact (batch layout, threads, dtypes as they were found) is in `effective.<key>`, the notes on what
    confounds a comparison in `notes`. What was not measured is NaN. Records that cannot be read, or are of another
    schema, are named in `frame.attrs["unreadable"]` and in a warning.

    Args:
        path: a runs folder, a cell folder, a record file, or several of them.
        where: only the records that fulfil this condition, as `left-bench report --where` takes it.

    Raises:
        UserError: a path does not exist, or the condition cannot be used.
    """
    runs, problems = read_runs(path)
    if where is not None:
        runs = choose(runs, where)
    return frame_of(runs, problems)


def frame_of(runs: Sequence[Run], problems: Sequence[Problem] = ()) -> pandas.DataFrame:
    """The table of `load_records`, of runs already read."""
    import pandas

    frame = pandas.DataFrame.from_records([flat_row(run) for run in runs])
    for column in ("started_at", "finished_at"):
        if column in frame:
            frame[column] = pandas.to_datetime(frame[column], utc=True, errors="coerce", format="ISO8601")
    frame.attrs["unreadable"] = [str(problem) for problem in problems]
    if problems:
        listed = "; ".join(map(str, problems[:_PROBLEMS_LISTED]))
        listed += f"; and {len(problems) - _PROBLEMS_LISTED} more" if len(problems) > _PROBLEMS_LISTED else ""
        warnings.warn(f"{len(problems)} records could not be read and are not in the table: {listed}", stacklevel=3)
    return frame


def choose(runs: Sequence[Run], where: str) -> list[Run]:
    """The runs that fulfil a condition.

    Raises:
        UserError: the condition cannot be read, or names a field that no record has.
    """
    condition = parse_where(where)
    flat = [flat_row(run) for run in runs]
    if flat:
        condition.check(METRICS.keys() | {key for row in flat for key in row})
    return [run for run, row in zip(runs, flat, strict=True) if condition.matches(row)]


def read_steps(record_path: Path) -> Steps:
    """The training steps in `events.jsonl` beside a record; broken lines are passed over.

    Where the steps start anew (another attempt appended to the file), the last attempt counts.
    """
    result = Steps(steps=[], losses=[], seconds=[], tokens=[])
    for event in lines_beside(record_path.with_name(EVENTS_NAME)):
        if event.get("event") != "step":
            continue
        step, loss = event.get("step"), event.get("loss")
        if type(step) is not int or not _finite(loss):
            continue
        if result.steps and step <= result.steps[-1]:
            result = Steps(steps=[], losses=[], seconds=[], tokens=[])
        result.steps.append(step)
        result.losses.append(float(loss))
        seconds, tokens = event.get("seconds"), event.get("tokens")
        if _finite(seconds) and _finite(tokens) and seconds > 0:
            result.seconds.append(float(seconds))
            result.tokens.append(float(tokens))
    return result


def read_losses(record_path: Path) -> tuple[list[int], list[float]]:
    """Steps and training losses from `events.jsonl` beside a record."""
    steps = read_steps(record_path)
    return steps.steps, steps.losses


def read_row_results(record_path: Path) -> tuple[RowResult, ...] | None:
    """The held-out rows in `rows.jsonl` beside a record, in their order; None where there is no whole file of them."""
    path = record_path.with_name(ROWS_NAME)
    file = path if member(path) is None else path.parent.parent
    try:
        changed = file.stat().st_mtime_ns
    except OSError:
        return None
    return _row_results(path, changed)


@lru_cache(maxsize=512)
def _row_results(path: Path, _changed: int) -> tuple[RowResult, ...] | None:
    results = []
    for line in lines_beside(path):
        reference, tokens, nll, prediction = (line.get(k) for k in ("reference", "answer_tokens", "nll", "prediction"))
        if not (isinstance(reference, str) and type(tokens) is int and _finite(nll)):
            return None
        rejected = line.get("rejected_nll")
        if not isinstance(prediction, (str, type(None))) or not (rejected is None or _finite(rejected)):
            return None
        scores = line.get("scores") or {}
        if not isinstance(scores, dict) or not all(map(_finite, scores.values())):
            return None
        results.append(RowResult(reference, tokens, float(nll), prediction, rejected, tuple(scores.items())))
    return tuple(results) or None


def _finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists become tuples, so that every value can be compared and counted."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[sys.intern(f"{prefix}{key}")] = _hashable(value)  # ten thousand records share a hundred keys
    return flat


FlatSections: TypeAlias = dict[tuple[str, int], dict[str, Any]]


def flat_section(name: str, section: Any, known: FlatSections) -> dict[str, Any]:
    """One section of a configuration, flat and not to be changed; records that were read together share theirs.

    Args:
        known: what was flattened before, by the section's identity; good as long as those records are alive.
    """
    key = name, id(section)
    if key not in known:
        known[key] = flatten({name: section})
    return known[key]


def deciding(flat: Mapping[str, Any]) -> Mapping[str, Any]:
    """Flat settings without the path of what has its content among them: rows, weights and scorers are the same
    elsewhere."""
    moved = {
        path
        for content, path in (("data.content", "data.path"), ("model.content", "model.name_or_path"))
        if flat.get(content) is not None
    }
    kept = {key: value for key, value in flat.items() if key not in moved} if moved else flat
    if flat.get("eval.scorer_content") is None:
        return kept
    return {**kept, "eval.scorer": str(flat.get("eval.scorer")).rpartition(":")[2]}


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


def flat_row(run: Run) -> dict[str, Any]:
    """One record as the columns of `load_records`."""
    record = run.record
    row: dict[str, Any] = {
        "cell_id": record.cell_id,
        "status": record.status,
        "reason": record.reason,
        "attempt": record.attempt,
        "seed": record.config.get("seed"),
        "started_at": record.started_at,
        "finished_at": record.finished_at,
    }
    row |= {f"choices.{group}": option for group, option in record.choices.items()}
    for name, value in record.metrics.items():
        row.setdefault(name, value)  # a metric never takes the place of a field
        score = score_of(record, name)
        if score is not None and score.stderr is not None:
            row[f"{name}_stderr"] = score.stderr
    row |= flatten(record.config, "config.")
    for part, prefix in (("machine", "machine."), ("effective", "effective."), ("versions", "versions.")):
        noted = record.environment.get(part)
        if isinstance(noted, dict):
            row |= flatten(noted, prefix)
    notes = record.provenance.get("notes")
    if isinstance(notes, list) and notes:
        row["notes"] = tuple(map(str, notes))
    row |= {f"memory.{part}": size for part, size in record.memory_breakdown.items()}
    return row | {"sweep": record.provenance.get("sweep"), "path": str(run.path)}


def _hashable(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_hashable(part) for part in value)
    return json.dumps(value, sort_keys=True) if isinstance(value, dict) else value

"""Records as a table, one row each: what `load_records` gives, and what `--where` chooses by."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from left_bench.report.load import PathLike, Problem, Run, read_runs, score_of
from left_bench.report.where import parse_where
from left_bench.spec.record import METRICS

if TYPE_CHECKING:
    import pandas

_PROBLEMS_LISTED = 20


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

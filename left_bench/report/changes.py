"""Two sets of records matched cell by cell: what changed between them, and whether it is beyond the noise."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from left_bench.core.errors import UserError, nearest
from left_bench.report.axes import find_axes, labels
from left_bench.report.cells import Row, row_of
from left_bench.report.frame import choose, deciding, flatten
from left_bench.report.load import Problem, Run, is_trial, read_runs
from left_bench.report.ranking import own_metrics
from left_bench.report.seeds import pool
from left_bench.report.statistics import Interval, difference, speed_ratio
from left_bench.report.values import COUNTED, is_number, metric_of, one_line
from left_bench.spec.cell import not_identity
from left_bench.spec.record import METRICS

_FROM_STEPS = "train_tokens_per_second"
# Beside a metric that says the same, or of no interest in a comparison.
_LEFT_OUT = frozenset({"eval_perplexity", "baseline_memory_bytes", "first_train_loss", "train_loss"})
Judgement = Literal["better", "worse", "changed", "same", "not resolved", "not judged"]

UNCHANGED = ("same", "not resolved")


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
    """Files of both that could not be read."""
    problems_b: Sequence[Problem] = ()


def compare(
    a: str | os.PathLike[str], b: str | os.PathLike[str], *, ignore: Sequence[str] = (), where: str | None = None
) -> Comparison:
    """Match the cells of two sets of records and judge every metric that both have.

    Raises:
        UserError: a path does not exist or holds no record, or `ignore` or `where` names what no record has.
    """
    sides: list[list[Run]] = []
    problems: list[list[Problem]] = []
    for name, path in (("A", a), ("B", b)):
        runs, unread = read_runs(path)
        runs = [run for run in runs if not is_trial(run.record)]
        problems.append(unread)
        if not runs:
            hint = f"; {len(unread)} could not be read, first {unread[0]}" if unread else ""
            raise UserError(f"{name}={path}: there is no record (<cell id>/record.json){hint}")
        sides.append(runs if where is None else choose(runs, where))
    rows = [pool(_newest([row_of(run) for run in runs])) for runs in sides]
    flat = [[_identity(row) for row in side] for side in rows]
    keys = [{key for item in side for key in item} for side in flat]
    unknown = [key for key in ignore if not any(_under(known, key) for known in keys[0] | keys[1])]
    if unknown:
        raise UserError(
            f"--ignore {unknown[0]}: the cells have no such setting{nearest(unknown[0], keys[0] | keys[1])}"
        )
    # a field that one side alone has came or went with a version; an argument of an upstream class was set, or was not
    came = {key for key in keys[0] ^ keys[1] if not _free(key)}
    shared = {key for key in (keys[0] | keys[1]) - came if not any(_under(key, ignored) for ignored in ignore)}
    by_identity = [_by_identity(side, item, shared) for side, item in zip(rows, flat, strict=True)]
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
        problems=[*problems[0], *problems[1]],
        problems_b=problems[1],
    )


def _changes(name: str, before: Row, after: Row) -> Iterator[Change]:
    for metric in (*METRICS, *own_metrics((before, after))):
        x, y = before.value(metric), after.value(metric)
        if metric in _LEFT_OUT or x is None or y is None or not (is_number(x) and is_number(y)):
            continue
        if metric in COUNTED:
            yield Change(
                name, metric, x, y, None, "counted, not measured", "same" if x == y else _judged(metric, y - x)
            )
            continue
        interval, how = _noise(before, after, metric)
        if interval is not None:
            judgement: Judgement = "not resolved" if 0 in interval else _judged(metric, y - x)
        else:
            judgement = "same" if x == y else "not judged"
        yield Change(name, metric, x, y, interval, how, judgement)


def _noise(before: Row, after: Row, metric: str) -> tuple[Interval | None, str]:
    """The interval of B less A, and what it is over: for training speed the steps, and seeds where they reach wider."""
    result = difference(after, before, metric)
    interval, how = (result.interval, result.how) if result else (None, "none")
    if metric != _FROM_STEPS or (steps := speed_ratio(after, before)) is None:
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
    return {key: value for key, value in deciding(flat).items() if key != "seed" and not not_identity(key)}


def _by_identity(rows: Sequence[Row], flat: Sequence[Mapping[str, Any]], keys: set[str]) -> dict[Hashable, list[Row]]:
    result: dict[Hashable, list[Row]] = {}
    for row, settings in zip(rows, flat, strict=True):
        result.setdefault(frozenset((key, value) for key, value in settings.items() if key in keys), []).append(row)
    return result


def _free(key: str) -> bool:
    """Whether it is an argument under a section's `config`: DoRA is LoRA with one more of them."""
    return key.split(".")[1:2] == ["config"]


def _under(key: str, ignored: str) -> bool:
    return key == ignored or key.startswith(f"{ignored}.")


def _always(key: str, flat: Sequence[Sequence[Mapping[str, Any]]]) -> bool:
    """Whether every cell of one side has the key: a setting that came or went with a version."""
    return any(side and all(key in item for item in side) for side in flat)


def _one_sided(key: str, flat: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[str, str]:
    told = [", ".join(dict.fromkeys(str(item[key]) for item in side if key in item)) or "not there" for side in flat]
    return one_line(told[0], limit=80), one_line(told[1], limit=80)


def _names(rows: Sequence[Row]) -> dict[int, str]:
    """Names by what was set: A's cell and B's bear the same one."""
    axes = [axis for axis in find_axes(rows) if axis.key not in ("machine", "cell")]
    result = labels(rows, axes) if axes else [row.cell_id for row in rows]
    return {id(row): name.rpartition(" #")[0] or name for row, name in zip(rows, result, strict=True)}


def _surroundings(a: Sequence[Row], b: Sequence[Row]) -> Iterator[tuple[str, str, str]]:
    """Versions, machine and commit, where the two sides differ in them."""
    sides = [_noted(side) for side in (a, b)]
    for what in dict.fromkeys([*sides[0], *sides[1]]):
        before, after = (", ".join(side.get(what, {})) or "not noted" for side in sides)
        if before != after:
            yield what, before, after


def _noted(rows: Sequence[Row]) -> dict[str, dict[str, None]]:
    result: dict[str, dict[str, None]] = {}
    runs = [run for row in rows for run in row.runs if run.record]
    for row in runs:
        machine = row.noted("machine")
        noted = {f"version of {name}": version for name, version in row.noted("versions").items()}
        noted |= {"machine": f"{machine.get('cpu')} ({row.machine})" if row.machine else None}
        noted |= {key: row.record.provenance.get(key) for key in ("commit", "git_commit")} if row.record else {}
        for what, value in noted.items():
            if value is not None:
                result.setdefault(one_line(what), {})[one_line(value, limit=80)] = None
    return result

"""What lies beside a record: its training steps and its held-out rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from left_bench.report.archive import lines_beside, member
from left_bench.spec.events import EVENTS_NAME
from left_bench.spec.run_files import ROWS_NAME


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

"""Produces one cell's record: the cell is claimed, refused or run in a separate process, tracked, and written.

A launch calls `run_cell` for every cell, wherever its launcher runs it.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

from left_bench.core import interrupt
from left_bench.core.errors import UserError
from left_bench.grid.compose import Settings
from left_bench.grid.rules import why_unsupported
from left_bench.launch.cell_lock import claim, next_attempt
from left_bench.launch.plan_first import Prediction, predicted
from left_bench.launch.progress import say_end, watch
from left_bench.launch.supervise import LOG_NAME, run_isolated
from left_bench.pretrained import source
from left_bench.spec.cell import Cell
from left_bench.spec.record import RECORD_NAME, KnownParts, NewerSchema, Record, not_started, read_record
from left_bench.spec.redact import redact_file, redacted_record
from left_bench.tracker import Attempt, Feed, open_tracker
from left_bench.training.checkpoint import forget_checkpoints

_UNWRITABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG),
)


class Pace:
    """The remaining time of a launch, estimated from the cells that it has run."""

    def __init__(self, cells: int = 0) -> None:
        self._to_run, self._seconds, self._run = cells, 0.0, 0

    def ended(self, record: Record) -> None:
        """Note that a cell of this process has ended."""
        again = sum(phase.seconds for phase in record.phases if phase.name not in _ONCE)
        if self._run:  # the first cell's time outside phases is mostly imports, which happen only once
            again += max(0.0, record.metrics.get("overhead_seconds", 0.0))
        self._seconds, self._run = self._seconds + again, self._run + 1

    @property
    def seconds_left(self) -> float | None:
        """None before the first cell, after the last, and if cells run in other processes, which do not report here."""
        left = self._to_run - self._run
        return self._seconds / self._run * left if self._run and left > 0 else None


# phases that only the first cell of its kind has, for all that follow
_ONCE = ("peak", "evaluate_base", "keep_quantized", "quantization_error")


def note_records(cells: Sequence[str], runs_dir: Path, *, keep: Collection[str]) -> tuple[dict[str, int], set[str]]:
    """Read the existing records before a launch's first cell runs.

    Returns:
        Each cell's recorded attempt, 0 for none; and the finished cells among `keep`, which are reported.

    Raises:
        UserError: a record was written by a newer left_bench.
    """
    attempts, done = {}, set()
    for number, cell in enumerate(cells, start=1):
        record = previous_record(runs_dir / cell / RECORD_NAME)
        attempts[cell] = record.attempt if record is not None else 0
        if record is not None and record.status == "ok" and cell in keep:
            done.add(cell)
            say_end(record, number=number, total=len(cells), skipped=True)
    return attempts, done


def run_cell(
    cell: Cell,
    settings: Settings,
    *,
    overrides: list[str],
    command: str,
    recorded_before: int | None = None,
    number: int = 1,
    total: int = 1,
    sweep: str | None = None,
    launch: str | None = None,
    take_seat: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    bars: bool = True,
    pace: Pace | None = None,
    provenance: Mapping[str, Any] = MappingProxyType({}),
) -> Record | None:
    """Produce one cell's record; None if another launch is running the cell now.

    An existing `ok` record is kept, and so is any record that another launch has written since this one began.

    Args:
        recorded_before: the recorded attempt when the launch began, 0 for none; None: unknown.
        take_seat: waits for cores and accelerators, given the device kind.
        bars: show bars on a terminal; those of parallel cells would overwrite each other.
        pace: the launch's, if it runs its cells in this process; it is updated, and estimates the remaining time.
        provenance: further provenance for the record.

    Raises:
        UserError: the cell's folder cannot be written, or has a record of a newer left_bench.
    """
    run_dir = settings.runs_dir / cell.id
    try:
        with claim(run_dir) as mine:
            if not mine:
                return None
            for unfinished in run_dir.glob(".*.*"):  # temporary files of a killed process
                unfinished.unlink()
            previous = previous_record(run_dir / RECORD_NAME)
            recorded = previous.attempt if previous is not None else 0
            made_elsewhere = recorded_before is not None and recorded > recorded_before
            if previous is not None and (made_elsewhere or (previous.status == "ok" and not settings.force)):
                say_end(previous, number=number, total=total, skipped=True)
                return previous
            attempt = next_attempt(run_dir, recorded=recorded)
            if previous is not None:  # from now on the cell counts as not done
                Path(run_dir / RECORD_NAME).replace(run_dir / f"record.{recorded}.json")
            if settings.force:
                forget_checkpoints(run_dir)
            this_attempt = Attempt(
                cell_id=cell.id,
                number=attempt,
                choices=cell.choices,
                config=cell.sections(),
                sweep=sweep,
                launch=launch,
                run_dir=run_dir,
            )
            record = _run_claimed(
                cell,
                settings,
                attempt=this_attempt,
                overrides=overrides,
                command=command,
                number=number,
                total=total,
                take_seat=take_seat,
                bars=bars,
                more=provenance,
            )
    except OSError as error:
        if error.errno not in _UNWRITABLE:  # a closed pipe or no process available: not the folder's fault
            raise
        raise UserError(
            f"runs_dir={settings.runs_dir}: {error.filename or run_dir} cannot be written ({error.strerror or error}); "
            "fix that and give the same command again, finished cells are kept"
        ) from error
    seconds_left = None
    if pace is not None:
        pace.ended(record)
        seconds_left = pace.seconds_left
    say_end(record, number=number, total=total, seconds_left=seconds_left)
    return record


def _run_claimed(
    cell: Cell,
    settings: Settings,
    *,
    attempt: Attempt,
    overrides: list[str],
    command: str,
    number: int,
    total: int,
    take_seat: Callable[[str], AbstractContextManager[Any]],
    bars: bool,
    more: Mapping[str, Any],
) -> Record:
    run_dir = attempt.run_dir
    tracker = open_tracker(settings.tracker, store=settings.runs_dir)
    tracker.start(attempt)
    feed = Feed(tracker)
    forced = settings.force_unsupported
    refusal = None if forced else why_unsupported(cell)
    prediction = None
    wanting = _fetch_model(cell) if refusal is None and source(cell.model) != "hub" else None
    if cell.hardware.plan_first and refusal is None and wanting is None:  # before a large model is downloaded
        prediction = predicted(cell)
        refusal = None if forced or prediction is None else prediction.refusal
    if refusal is None and wanting is None and source(cell.model) == "hub":
        wanting = _fetch_model(cell)
    if refusal is not None:
        record = not_started(cell, "unsupported", refusal)
    elif wanting is not None:
        record = not_started(cell, "failed", wanting)
    else:
        try:
            with take_seat(cell.hardware.device), watch(cell, number=number, total=total, bars=bars) as view:

                def on_event(event: dict[str, Any]) -> None:
                    view.event(event)
                    feed.event(event)

                record = run_isolated(cell, run_dir, on_event=on_event)
        except UserError as error:  # this machine does not have the required devices
            record = not_started(cell, "failed", str(error))
    if record.status != "ok":  # a terminal's Ctrl-C also reaches the children, whose failure is then not a result
        interrupt.check()
    facts = {"sweep": attempt.sweep, "launch": attempt.launch, "overrides": overrides, "command": command}
    provenance = record.provenance | facts | dict(more)
    record = record.model_copy(update={"attempt": attempt.number, "provenance": provenance})
    record = redacted_record(record if prediction is None else _beside(record, prediction))
    redact_file(run_dir / LOG_NAME)
    record.write(run_dir)
    tracker.finish(record)
    return record


def _beside(record: Record, prediction: Prediction) -> Record:
    """The record with what was predicted before the cell ran."""
    facts = {"prediction": prediction.facts}
    changes = {"metrics": record.metrics | prediction.metrics, "provenance": record.provenance | facts}
    return record.model_copy(update=changes)


def _fetch_model(cell: Cell) -> str | None:
    """Get the base model's files before the cell's clock starts; returns the error if that fails."""
    from left_bench.pretrained import fetch

    try:
        fetch(cell.model, dtype=cell.precision.weights_dtype)
    except (UserError, MemoryError, RuntimeError, OSError) as error:
        return str(error).splitlines()[0]
    return None


def add_provenance(run_dir: Path, told: Mapping[str, Any]) -> None:
    """Note in a kept record what a launch has learned of where it comes from; the cell's result stays as it is."""
    with claim(run_dir) as mine:
        record = previous_record(run_dir / RECORD_NAME) if mine else None
        if record is not None and any(record.provenance.get(key) != value for key, value in told.items()):
            record.model_copy(update={"provenance": record.provenance | dict(told)}).write(run_dir)


def store_received(text: str, runs_dir: Path) -> None:
    """Write a record that a job returned because storage is not shared, unless there is a newer one."""
    record = Record.model_validate_json(text)
    path = runs_dir / record.cell_id / RECORD_NAME
    try:
        existing = read_record(path) if path.exists() else None
    except ValueError:
        existing = None
    if existing is None or existing.finished_at < record.finished_at:
        record.write(path.parent)


def previous_record(path: Path, *, known: KnownParts | None = None) -> Record | None:
    """The existing record; a damaged one is reported, moved aside, and counts as none.

    Raises:
        UserError: it was written by a newer left_bench, and running the cell again would lose it.
    """
    if not path.exists():
        return None
    try:
        return read_record(path, known=known)
    except NewerSchema as error:
        raise UserError(f"{error}; upgrade left_bench or give another runs_dir=") from error
    except ValueError as error:
        if isinstance(error.__cause__, FileNotFoundError):  # just moved by another launch
            return None
        if isinstance(error.__cause__, OSError):
            raise UserError(f"{error}; make it readable or give another runs_dir=") from error
        aside = path.with_name("record.damaged.json")
        path.replace(aside)
        print(f"warning: {error}; kept as {aside.name}, the cell is run again", file=sys.stderr)
        return None

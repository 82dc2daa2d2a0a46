"""One cell to its record: claimed, refused or run in a process of its own, tracked, and written.

`run_cell` is what a launch does for every cell, wherever its launcher has taken it.
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
from left_bench.launch.progress import say_end, watch
from left_bench.launch.supervise import LOG_NAME, run_isolated
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
    """What is left of a launch, by the cells that it has run: of those that are to come nothing else is known yet."""

    def __init__(self, cells: int = 0) -> None:
        self._to_run, self._seconds, self._run = cells, 0.0, 0

    def ended(self, record: Record) -> None:
        """A cell came to its record in this process."""
        again = sum(phase.seconds for phase in record.phases if phase.name not in _ONCE)
        if self._run:  # what the first spent outside its phases is imports, which are made once
            again += max(0.0, record.metrics.get("overhead_seconds", 0.0))
        self._seconds, self._run = self._seconds + again, self._run + 1

    @property
    def seconds_left(self) -> float | None:
        """None before the first cell, after the last, and where cells run in other processes, which tell nobody."""
        left = self._to_run - self._run
        return self._seconds / self._run * left if self._run and left > 0 else None


# what the first cell of its kind does for all that follow
_ONCE = ("peak", "evaluate_base", "keep_quantized", "quantization_error")


def note_records(cells: Sequence[str], runs_dir: Path, *, keep: Collection[str]) -> tuple[dict[str, int], set[str]]:
    """Look at the records before a launch's first cell runs.

    Returns:
        Each cell's attempt on record, 0 for none; and those of `keep` that are done, it is said of each.

    Raises:
        UserError: a record of a newer left_bench.
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
    """Take one cell to its record; None when another launch is running it just now.

    An `ok` record that is there already is kept, and so is any record that another launch has made since this one
    began.

    Args:
        recorded_before: the attempt that was on record as the launch began, 0 for none; None: it is not known.
        take_seat: waits for cores and accelerators, given the device kind.
        bars: bars on a terminal; cells that run beside each other would draw over each other's.
        pace: of a launch that runs its cells in this process: it is told of this one, and tells what is left.
        provenance: what the record says besides of where it comes from.

    Raises:
        UserError: the cell's folder cannot be written, or holds a record of a newer left_bench.
    """
    run_dir = settings.runs_dir / cell.id
    try:
        with claim(run_dir) as mine:
            if not mine:
                return None
            for unfinished in run_dir.glob(".*.*"):  # what a killed process was still writing
                unfinished.unlink()
            previous = previous_record(run_dir / RECORD_NAME)
            recorded = previous.attempt if previous is not None else 0
            made_elsewhere = recorded_before is not None and recorded > recorded_before
            if previous is not None and (made_elsewhere or (previous.status == "ok" and not settings.force)):
                say_end(previous, number=number, total=total, skipped=True)
                return previous
            attempt = next_attempt(run_dir, recorded=recorded)
            if previous is not None:  # from here on the cell counts as not done
                Path(run_dir / RECORD_NAME).replace(run_dir / f"record.{recorded}.json")
            if settings.force:
                forget_checkpoints(run_dir)
            told_of = Attempt(
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
                attempt=told_of,
                overrides=overrides,
                command=command,
                number=number,
                total=total,
                take_seat=take_seat,
                bars=bars,
                more=provenance,
            )
    except OSError as error:
        if error.errno not in _UNWRITABLE:  # a closed pipe, no process to be had: not the folder's fault
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
    refusal = None if settings.force_unsupported else why_unsupported(cell)
    if refusal is not None:
        record = not_started(cell, "unsupported", refusal)
    elif (wanting := _fetch_model(cell)) is not None:
        record = not_started(cell, "failed", wanting)
    else:
        try:
            with take_seat(cell.hardware.device), watch(cell, number=number, total=total, bars=bars) as view:

                def on_event(event: dict[str, Any]) -> None:
                    view.event(event)
                    feed.event(event)

                record = run_isolated(cell, run_dir, on_event=on_event)
        except UserError as error:  # this machine has no such seat
            record = not_started(cell, "failed", str(error))
    if record.status != "ok":  # a terminal's Ctrl-C goes to the children as well, and what they say of it is no result
        interrupt.check()
    told = {"sweep": attempt.sweep, "launch": attempt.launch, "overrides": overrides, "command": command}
    provenance = record.provenance | told | dict(more)
    record = redacted_record(record.model_copy(update={"attempt": attempt.number, "provenance": provenance}))
    redact_file(run_dir / LOG_NAME)
    record.write(run_dir)
    tracker.finish(record)
    return record


def _fetch_model(cell: Cell) -> str | None:
    """Make the base model's files before the cell's clock starts; what is wrong when they cannot be had."""
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
    """Write a record that a job sent back, for want of shared storage; a newer one that is there is kept."""
    record = Record.model_validate_json(text)
    path = runs_dir / record.cell_id / RECORD_NAME
    try:
        kept = read_record(path) if path.exists() else None
    except ValueError:
        kept = None
    if kept is None or kept.finished_at < record.finished_at:
        record.write(path.parent)


def previous_record(path: Path, *, known: KnownParts | None = None) -> Record | None:
    """The record that is there; a damaged one is said, put aside, and counts as none.

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
        if isinstance(error.__cause__, FileNotFoundError):  # put aside by another launch just now
            return None
        if isinstance(error.__cause__, OSError):
            raise UserError(f"{error}; make it readable or give another runs_dir=") from error
        aside = path.with_name("record.damaged.json")
        path.replace(aside)
        print(f"warning: {error}; kept as {aside.name}, the cell is run again", file=sys.stderr)
        return None

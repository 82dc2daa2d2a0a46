"""From a composed configuration to records: one cell, or the cells of a sweep.

Hydra composes and carries the jobs; this module is what it calls. `Launch` looks at all cells of a sweep before the
first one runs and sums up after the last; `run_job` takes one of them through compatibility, isolation and tracking.
A launcher may run `run_job` in another process or on another machine: all it knows is its configuration and files.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from left_bench import interrupt
from left_bench.carried import Ended, forget_jobs, note_job, noted_jobs, store_received
from left_bench.cell import Cell, fingerprint
from left_bench.checkpoint import forget_checkpoints
from left_bench.claim import claim, next_attempt, until_done
from left_bench.compose import Settings, check_cell, check_folder, compose
from left_bench.errors import UserError, user_errors
from left_bench.isolate import LOG_NAME, run_isolated
from left_bench.loader import use_sweep_loader
from left_bench.progress import say_end, watch
from left_bench.record import RECORD_NAME, KnownParts, NewerSchema, Record, Status, read_record
from left_bench.redact import redact_file, redacted_record
from left_bench.rules import why_unsupported
from left_bench.seats import SCHEDULERS, available_cores, cells_at_once, seated
from left_bench.sweep import (
    SWEEPS_FOLDER,
    Manifest,
    best_trial,
    check_launcher,
    check_objective,
    command_of,
    jobs_of,
    launcher_of,
    quiet_optuna,
    scope_of,
    searches,
    sweep_name,
)
from left_bench.tracker import Attempt, Feed, check_trackers, launch_id, open_tracker
from left_bench.worker import utc_now

_UNWRITABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG),
)

# Cells that another launch had in hand, taken up again at the end; None: no end to come back at (a launcher's process).
_later: list[Callable[[], Record | None]] | None = None
# Cell id -> the attempt that was on record when this launch began (0: none); a later one was made by another launch.
_found_at_start: dict[str, int] = {}


def run_job(config: DictConfig) -> Ended:
    """Hydra's task, in whatever process its launcher chose: run the composed cell and leave its record.

    Returns:
        How it ended; with the status `elsewhere` where another launch has the cell in hand.
    """
    from left_bench.cli import register_resolvers

    register_resolvers()  # a launcher's process has those of Hydra alone
    hydra: Any = HydraConfig.get()
    _go_to(hydra.runtime.cwd)
    cell, settings = compose(config, hydra)
    launcher = launcher_of(hydra)
    number, total, sweep, folder, started_at = 1, 1, None, None, utc_now()
    if hydra.mode is not None and hydra.mode.name == "MULTIRUN":
        sweep, folder, number = sweep_name(hydra), settings.runs_dir / SWEEPS_FOLDER, int(hydra.job.num) + 1
        total, started_at = scope_of(folder / f"{sweep}.json", hydra, cell)
    at_once = settings.at_once or cells_at_once(hydra.launcher, launcher, cores=len(available_cores()))

    def attempt() -> Record | None:
        return run_cell(
            cell,
            settings,
            overrides=list(hydra.overrides.task),
            number=number,
            total=total,
            sweep=sweep,
            launch=launch_id(started_at),
            take_seat=functools.partial(
                seated,
                at_once=min(at_once, total),
                devices=cell.hardware.processes,
                share=settings.share_devices,
                scheduled=launcher in SCHEDULERS,
            ),
            bars=launcher == "basic",
        )

    try:
        interrupt.check()
        record = attempt()
        if record is None and _later is not None and not searches(hydra):
            _later.append(attempt)
            return Ended(cell_id=cell.id, status="elsewhere", objective=None, record=None)
        record = record or until_done([attempt])[0]
    except KeyboardInterrupt:
        print(f"\n{_left_off(cell, settings.runs_dir, sweep)}", file=sys.stderr)
        raise
    shared = folder is None or sweep is None or (folder / f"{sweep}.json").exists()
    if shared and folder and sweep and searches(hydra):
        note_job(folder, sweep, number=number, cell_id=cell.id)
    return Ended.of(record, objective=settings.objective, sent_back=not shared)


def run_cell(
    cell: Cell,
    settings: Settings,
    *,
    overrides: list[str],
    number: int = 1,
    total: int = 1,
    sweep: str | None = None,
    launch: str | None = None,
    take_seat: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    bars: bool = True,
) -> Record | None:
    """Take one cell to its record; None when another launch is running it just now.

    An `ok` record that is there already is kept, and so is any record that another launch has made since this one
    began.

    Args:
        take_seat: waits for cores and accelerators, given the device kind.
        bars: bars on a terminal; cells that run beside each other would draw over each other's.

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
            previous = _previous(run_dir / RECORD_NAME)
            recorded = previous.attempt if previous is not None else 0
            made_elsewhere = recorded > _found_at_start.get(cell.id, recorded)
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
                number=number,
                total=total,
                take_seat=take_seat,
                bars=bars,
            )
    except OSError as error:
        if error.errno not in _UNWRITABLE:  # a closed pipe, no process to be had: not the folder's fault
            raise
        raise UserError(
            f"runs_dir={settings.runs_dir}: {error.filename or run_dir} cannot be written ({error.strerror or error}); "
            "mend that and give the same command again, finished cells are kept"
        ) from error
    say_end(record, number=number, total=total)
    return record


def _run_claimed(
    cell: Cell,
    settings: Settings,
    *,
    attempt: Attempt,
    overrides: list[str],
    number: int,
    total: int,
    take_seat: Callable[[str], AbstractContextManager[Any]],
    bars: bool,
) -> Record:
    run_dir = attempt.run_dir
    tracker = open_tracker(settings.tracker, store=settings.runs_dir)
    tracker.start(attempt)
    feed = Feed(tracker)
    refusal = None if settings.force_unsupported else why_unsupported(cell)
    if refusal is not None:
        record = _ended(cell, "unsupported", refusal)
    elif (wanting := _fetch_model(cell)) is not None:
        record = _ended(cell, "failed", wanting)
    else:
        try:
            with take_seat(cell.hardware.device), watch(cell, number=number, total=total, bars=bars) as view:

                def on_event(event: dict[str, Any]) -> None:
                    view.event(event)
                    feed.event(event)

                record = run_isolated(cell, run_dir, on_event=on_event)
        except UserError as error:  # this machine has no such seat
            record = _ended(cell, "failed", str(error))
    if record.status != "ok":  # a terminal's Ctrl-C goes to the children as well, and what they say of it is no result
        interrupt.check()
    told = {"sweep": attempt.sweep, "launch": attempt.launch, "overrides": overrides, "command": command_of(overrides)}
    provenance = record.provenance | told
    record = redacted_record(record.model_copy(update={"attempt": attempt.number, "provenance": provenance}))
    redact_file(run_dir / LOG_NAME)
    record.write(run_dir)
    tracker.finish(record)
    return record


def _left_off(cell: Cell, runs_dir: Path, sweep: str | None) -> str:
    """What an interrupted launch leaves, and what goes on from there."""
    told = f"{cell.id} has no record of this attempt and is run again"
    if sweep is None:
        return told
    cells = json.loads((runs_dir / SWEEPS_FOLDER / f"{sweep}.json").read_text(encoding="utf-8"))["cells"]
    done = sum((runs_dir / name / RECORD_NAME).exists() for name in cells)
    return f"{done} of {len(cells)} cells have their record; {told}"


def _fetch_model(cell: Cell) -> str | None:
    """Make the base model's files before the cell's clock starts; what is wrong when they cannot be had."""
    from left_bench.pretrained import fetch

    try:
        fetch(cell.model, dtype=cell.precision.weights_dtype)
    except (UserError, MemoryError, RuntimeError, OSError) as error:
        return str(error).splitlines()[0]
    return None


def _ended(cell: Cell, status: Status, reason: str) -> Record:
    """The record of a cell whose worker was never started."""
    now = utc_now()
    return Record(
        cell_id=cell.id,
        status=status,
        reason=reason,
        started_at=now,
        finished_at=now,
        choices=cell.choices,
        config=cell.sections(),
    )


class Launch(Callback):
    """Hydra's hooks around a run: all cells are checked before the first starts; the end is summed up."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        with user_errors(callback=True):
            cell, settings = compose(config, config.hydra)
            check_cell(cell)
            begin([cell.id], settings, later=None)
            check_trackers(settings.tracker)

    def on_run_end(self, config: DictConfig, **_: Any) -> None:
        cell, settings = compose(config, config.hydra)
        _finish([cell.id], settings.runs_dir, manifest=None)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        with user_errors(callback=True):
            use_sweep_loader()
            check_launcher(config)
            ids: dict[str, None] = {}
            unlike: dict[str, Cell] = {}
            for job in jobs_of(config):  # one at a time: thousands of configurations would fill the memory
                cell, settings = compose(job, job.hydra)
                ids[cell.id] = None
                interrupt.check()
                unlike.setdefault(fingerprint([cell.identity["model"], cell.identity["data"]]), cell)
            if not ids:
                raise UserError("the sweep has no cells: one of its keys has no values, such as seed=range(0,0)")
            for cell in unlike.values():
                interrupt.check()
                check_cell(cell)
                if searches(config.hydra):
                    check_objective(cell, settings.objective)
            begin(list(ids), settings, later=[])
            check_trackers(settings.tracker)
            overrides = list(config.hydra.overrides.task)
            name = sweep_name(config.hydra)
            manifest = Manifest(
                name=name,
                command=command_of(overrides, multirun="sweep" not in config.hydra.runtime.choices),
                overrides=overrides,
                started_at=utc_now(),
                cells=[] if searches(config.hydra) else list(ids),
            )
            manifest.write(settings.runs_dir)
            if searches(config.hydra):
                quiet_optuna()
                forget_jobs(settings.runs_dir / SWEEPS_FOLDER, name)
            self._manifest = manifest

    def __getstate__(self) -> dict[str, Any]:
        return {}  # launchers send the callback with every job, which needs no list of all the others

    def on_job_end(self, config: DictConfig, job_return: Any, **_: Any) -> None:
        # Hydra's launchers keep every job's return to the end, two whole configurations in each
        job_return.cfg = job_return.hydra_cfg = None

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        runs_dir = Path(config.runs_dir)
        interrupt.check()
        with user_errors(callback=True):
            if _later:
                print(f"waiting for {len(_later)} cells that another launch is running")
                until_done(_later)
            received = store_received(runs_dir)
            # this launch's own: another of the same name may have written the file meanwhile
            cells = self._manifest.cells or noted_jobs(runs_dir / SWEEPS_FOLDER, self._manifest.name) or received
            manifest = self._manifest.model_copy(update={"finished_at": utc_now(), "cells": cells})
            manifest.write(runs_dir)
        tracker: Any = OmegaConf.to_container(config.tracker, resolve=True)
        _finish(
            manifest.cells,
            runs_dir,
            manifest=manifest,
            reports_dir=Path(config.reports_dir),
            tracker=tracker,
            objective=str(config.objective) if searches(config.hydra) else None,
        )


def _go_to(folder: str) -> None:
    """Relative paths mean what they meant where the sweep was started; some launchers start elsewhere."""
    if Path(folder).is_dir() and Path(folder) != Path.cwd():
        os.chdir(folder)


def begin(cells: list[str], settings: Settings, *, later: list[Callable[[], Record | None]] | None) -> None:
    """Look at the folders before the first cell runs, and note which attempts are on record.

    Raises:
        UserError: a folder that cannot be made or written, or a record of a newer left_bench.
    """
    global _later
    for key in ("runs_dir", "reports_dir"):
        check_folder(key, getattr(settings, key))
    _later = later
    _found_at_start.clear()
    for cell in cells:
        previous = _previous(settings.runs_dir / cell / RECORD_NAME)
        _found_at_start[cell] = previous.attempt if previous is not None else 0


def _finish(
    cells: list[str],
    runs_dir: Path,
    *,
    manifest: Manifest | None,
    reports_dir: Path = Path(),
    tracker: dict[str, Any] | None = None,
    objective: str | None = None,
) -> None:
    """Print the summary, write the report, and leave with 1 when a cell ended other than ok or unsupported.

    Args:
        objective: what a search was after; its best trial is said.
    """
    from left_bench.report import print_summary, write_report
    from left_bench.tracker.comparison import track_sweep

    known: KnownParts = {}
    paths = [runs_dir / cell / RECORD_NAME for cell in cells]
    records = [record for path in paths if (record := _previous(path, known=known)) is not None]
    print_summary(records)
    if objective is not None:
        print(best_trial(records, objective=objective))
    all_well = len(records) == len(cells) and all(record.status in ("ok", "unsupported") for record in records)
    del records, known  # the report reads them again
    if manifest is not None:
        markdown = write_report(runs_dir, name=manifest.name, out=reports_dir)
        print(f"report: {markdown}\npage: {markdown.with_suffix('.html')}")
        track_sweep(
            tracker or {},
            runs_dir=runs_dir,
            cells=cells,
            sweep=manifest.name,
            started_at=manifest.started_at,
            command=manifest.command,
            markdown=markdown,
        )
    print(f"records: {runs_dir}/<cell>/{RECORD_NAME}")
    if not all_well:
        raise SystemExit(1)


def _previous(path: Path, *, known: KnownParts | None = None) -> Record | None:
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

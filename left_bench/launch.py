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
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from left_bench.carried import Ended, forget_jobs, note_job, noted_jobs, store_received
from left_bench.cell import GROUPS, Cell, fingerprint, slugify
from left_bench.checkpoint import forget_checkpoints
from left_bench.claim import claim, next_attempt, until_done
from left_bench.device import find_device
from left_bench.errors import UserError
from left_bench.isolate import LOG_NAME, run_isolated
from left_bench.loader import use_sweep_loader
from left_bench.progress import say_end, watch
from left_bench.record import RECORD_NAME, NewerSchema, Record, Status, read_record, write_atomically
from left_bench.redact import redact_file, redacted_record, refuse_secrets
from left_bench.rules import why_unsupported
from left_bench.seats import SCHEDULERS, available_cores, cells_at_once, seated
from left_bench.sweep import (
    SWEEPS_FOLDER,
    check_launcher,
    check_objective,
    jobs_of,
    launcher_of,
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


class Settings(BaseModel):
    """What steers a launch and changes no result."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runs_dir: Path
    reports_dir: Path
    force: bool
    force_unsupported: bool
    objective: str = "eval_loss"
    """The metric that a search (Optuna) is after."""
    at_once: int | None = Field(default=None, ge=1)
    """Cells that run at the same time on one machine; None: what the launcher's settings say."""
    share_devices: bool = False
    """Let parallel cells use the same accelerator."""
    tracker: dict[str, Any]


class Manifest(BaseModel):
    """`runs/sweeps/<name>.json`: which cells a sweep is made of, in its order."""

    name: str
    command: str
    overrides: list[str]
    started_at: str
    finished_at: str | None = None
    cells: list[str]

    def path(self, runs_dir: Path) -> Path:
        return runs_dir / SWEEPS_FOLDER / f"{self.name}.json"

    def write(self, runs_dir: Path) -> None:
        write_atomically(self.path(runs_dir), self.model_dump_json(indent=1) + "\n")


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
    from left_bench.pretrained import model_folder

    try:
        model_folder(cell.model, dtype=cell.precision.weights_dtype)
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


def compose(config: DictConfig, hydra: DictConfig) -> tuple[Cell, Settings]:
    """The cell and the settings of a composed configuration; nothing below this sees OmegaConf.

    Raises:
        UserError: a value is missing or not allowed.
    """
    try:
        plain: dict[str, Any] = {key: _plain(config, key) for key in map(str, config) if key not in ("hydra", "sweep")}
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key}: no value; give {error.full_key}=VALUE") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    choices = {group: str(hydra.runtime.choices[group]) for group in GROUPS}
    if _overridden(hydra, "model.name_or_path"):
        plain["model"], choices["model"] = _named_model(plain["model"])
    plain["hardware"] = plain["hardware"] | {"device": find_device(plain["hardware"]["device"])}
    if plain["model"].get("trust_remote_code") and not _on_command_line(hydra, "model.trust_remote_code"):
        raise UserError(
            "model.trust_remote_code=true stands in a file; code of a model's author runs only where the command line "
            "says so: give model.trust_remote_code=true there"
        )
    settings = {name: plain.pop(name) for name in Settings.model_fields}
    unknown = sorted(set(plain) - {*GROUPS, "seed"})
    if unknown:
        raise UserError(f"{unknown[0]}: no such key; groups are {', '.join(GROUPS)}")
    try:
        cell, found = Cell.from_config(plain, choices=choices), Settings.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{'.'.join(map(str, first['loc']))}={first['input']!r}: {first['msg'].lower()}") from error
    refuse_secrets(overrides=hydra.overrides.task, config=cell.model_dump_json())
    return cell, found


def _plain(config: DictConfig, key: str) -> Any:
    value = config[key]
    return OmegaConf.to_container(value, resolve=True, throw_on_missing=True) if OmegaConf.is_config(value) else value


def check_cell(cell: Cell) -> None:
    """Refuse, before anything runs, what can be seen to be wrong without loading a model.

    Raises:
        UserError: naming the key, the value and the mend.
    """
    from left_bench.data import load_rows
    from left_bench.pretrained import check_model

    check_model(cell.model)
    if cell.data.path is not None or cell.data.source == "jsonl":
        load_rows(cell.data)


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
                unlike.setdefault(fingerprint([cell.identity["model"], cell.identity["data"]]), cell)
            for cell in unlike.values():
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
                forget_jobs(settings.runs_dir / SWEEPS_FOLDER, name)
            self._manifest = manifest

    def __getstate__(self) -> dict[str, Any]:
        return {}  # launchers send the callback with every job, which needs no list of all the others

    def on_job_end(self, config: DictConfig, job_return: Any, **_: Any) -> None:
        # Hydra's launchers keep every job's return to the end, two whole configurations in each
        job_return.cfg = job_return.hydra_cfg = None

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        runs_dir = Path(config.runs_dir)
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
        _finish(manifest.cells, runs_dir, manifest=manifest, reports_dir=Path(config.reports_dir), tracker=tracker)


def _go_to(folder: str) -> None:
    """Relative paths mean what they meant where the sweep was started; some launchers start elsewhere."""
    if Path(folder).is_dir() and Path(folder) != Path.cwd():
        os.chdir(folder)


def command_of(overrides: Iterable[str], *, multirun: bool = False) -> str:
    """The command line that repeats a run or, where there is no sweep among the overrides, a multirun."""
    plain = [override.removeprefix("++") for override in overrides]
    return shlex.join(["left-bench", *(["-m"] if multirun else []), *plain])


class user_errors:
    """Turns a UserError into one line and exit code 2.

    Hydra swallows what its callbacks raise, with a warning, and would run what could not be checked: `callback` makes
    an end of any other exception as well.
    """

    def __init__(self, *, callback: bool = False) -> None:
        self._callback = callback

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UserError):
            print(f"left-bench: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        if isinstance(error, Exception) and self._callback:
            traceback.print_exception(error)
            raise SystemExit(1) from None


def begin(cells: list[str], settings: Settings, *, later: list[Callable[[], Record | None]] | None) -> None:
    """Look at the folders before the first cell runs, and note which attempts are on record.

    Raises:
        UserError: a folder that cannot be made or written, or a record of a newer left_bench.
    """
    global _later
    for key in ("runs_dir", "reports_dir"):
        _check_folder(key, getattr(settings, key))
    _later = later
    _found_at_start.clear()
    for cell in cells:
        previous = _previous(settings.runs_dir / cell / RECORD_NAME)
        _found_at_start[cell] = previous.attempt if previous is not None else 0


def _check_folder(key: str, folder: Path) -> None:
    """Refuse a folder that cannot be made or written.

    Raises:
        UserError: naming the key, the part of the path in the way, and the mend.
    """
    where = f"{key}={str(folder)!r}" if len(str(folder)) < 200 else f"{key}={str(folder)[:200]!r}…"
    try:
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    except (OSError, ValueError) as error:  # too long a name, a null character
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{where}: cannot be a folder's name ({reason}); give another") from error
    if not there.is_dir():
        raise UserError(f"{where}: {there} is a file, not a folder; give another folder with {key}=")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{where}: no permission to write to {there}; give a folder of yours with {key}=")


def _finish(
    cells: list[str],
    runs_dir: Path,
    *,
    manifest: Manifest | None,
    reports_dir: Path = Path(),
    tracker: dict[str, Any] | None = None,
) -> None:
    """Print the summary, write the report, and leave with 1 when a cell ended other than ok or unsupported."""
    from left_bench.report import print_summary, write_report
    from left_bench.tracker.comparison import track_sweep

    records = [record for cell in cells if (record := _previous(runs_dir / cell / RECORD_NAME)) is not None]
    print_summary(records)
    if manifest is not None:
        markdown = write_report(runs_dir, name=manifest.name, out=reports_dir)
        print(f"report: {markdown}")
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
    if len(records) < len(cells) or any(record.status not in ("ok", "unsupported") for record in records):
        raise SystemExit(1)


def _previous(path: Path) -> Record | None:
    """The record that is there; a damaged one is said, put aside, and counts as none.

    Raises:
        UserError: it was written by a newer left_bench, and running the cell again would lose it.
    """
    if not path.exists():
        return None
    try:
        return read_record(path)
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


def _overridden(hydra: DictConfig, key: str) -> bool:
    return any(override.lstrip("+").startswith(f"{key}=") for override in hydra.overrides.task)


def _on_command_line(hydra: DictConfig, key: str) -> bool:
    """Whether a person gave the key, and not a file of options or a sweep's parameters."""
    parameters = OmegaConf.select(hydra, "sweeper.params") or {}
    return _overridden(hydra, key) and not any(str(one).lstrip("+") == key for one in parameters)


def _named_model(section: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A model given by hub id or folder: the chosen option's wheel and architecture are not its."""
    name_or_path = str(section["name_or_path"])
    name = slugify(Path(name_or_path).name or name_or_path)
    return section | {"name": name, "wheel": None, "config": None, "weights": "pretrained"}, name_or_path

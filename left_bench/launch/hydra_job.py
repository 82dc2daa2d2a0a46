"""From a composed configuration to records: one cell, or the cells of a sweep.

Hydra composes and carries the jobs; this module is what it calls. `Launch` looks at all cells of a sweep before the
first one runs and sums up after the last; `run_job` takes one of them to its record.
A launcher may run `run_job` in another process or on another machine: all it knows is its configuration and files.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from left_bench.core import interrupt
from left_bench.core.clock import utc_now
from left_bench.core.errors import UserError, user_errors
from left_bench.core.files import write_atomically
from left_bench.evaluation.judge import what_leaves
from left_bench.grid.compose import Settings, check_cell, check_folder, compose, ignored_choices
from left_bench.grid.loader import use_sweep_loader
from left_bench.grid.rules import why_unsupported
from left_bench.grid.sweep import (
    LAUNCH_VARIABLE,
    SWEEPS_FOLDER,
    Manifest,
    OwnFiles,
    best_trial,
    check_launcher,
    check_objective,
    command_of,
    config_dir_of,
    jobs_of,
    launch_of,
    launcher_of,
    quiet_optuna,
    runs_elsewhere,
    scope_of,
    searches,
    sweep_name,
)
from left_bench.grid.sweeper import use_grid_sweeper
from left_bench.launch.cell_lock import until_done
from left_bench.launch.estimate import Planned, say_estimate
from left_bench.launch.partial_report import begin_partial, write_partial
from left_bench.launch.preflight import Trial, has_user_values, rehearse, trial_key
from left_bench.launch.remote_results import Ended, note_job, noted_jobs, store_received
from left_bench.launch.run_cell import note_records, previous_record, run_cell
from left_bench.measure.auto_precision import AUTO, CARRIED_VARIABLE, emulated, emulation_note, fast_precision
from left_bench.processes.resources import SCHEDULERS, available_cores, cells_at_once, seated
from left_bench.spec.cell import Cell, fingerprint
from left_bench.spec.record import RECORD_NAME, KnownParts, Record
from left_bench.tracker import check_trackers, launch_id

# Cells that another launch had in hand, taken up again at the end; None: no end to come back at (a launcher's process).
_later: list[Callable[[], Record | None]] | None = None


def run_job(config: DictConfig) -> Ended:
    """Hydra's task, in whatever process its launcher chose: run the composed cell and leave its record.

    Returns:
        How it ended; with the status `elsewhere` where another launch has the cell in hand.
    """
    from left_bench.grid.command_line import register_resolvers

    register_resolvers()  # a launcher's process has those of Hydra alone
    hydra: Any = HydraConfig.get()
    _go_to(hydra.runtime.cwd)
    cell, settings = compose(config, hydra)
    launcher = launcher_of(hydra)
    number, total, sweep, own, started_at = 1, 1, None, None, utc_now()
    if hydra.mode is not None and hydra.mode.name == "MULTIRUN":
        sweep = sweep_name(hydra)
        own = OwnFiles.of(settings.runs_dir / SWEEPS_FOLDER, sweep, launch_of(hydra))
        number, total, started_at = scope_of(own.scope, hydra, cell)
    command = command_of(hydra.overrides.task, config_dir=config_dir_of(hydra))
    at_once = _at_once(hydra, settings)

    def attempt() -> Record | None:
        return run_cell(
            cell,
            settings,
            overrides=list(hydra.overrides.task),
            command=command,
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
        print(f"\n{_interruption_note(cell, settings.runs_dir, own)}", file=sys.stderr)
        _report_so_far(settings, own, sweep=sweep, always=True)
        raise
    _report_so_far(settings, own, sweep=sweep)
    shared = own is None or own.scope.exists()
    if shared and own and searches(hydra):
        note_job(own.jobs, number=number, cell_id=cell.id)
    return Ended.of(record, objective=settings.objective, sent_back=not shared)


def _report_so_far(settings: Settings, own: OwnFiles | None, *, sweep: str | None, always: bool = False) -> None:
    """Let the report grow with the sweep; a search's has no list of cells before its end, and a cell has no report."""
    if own is None or sweep is None or not own.report.exists():
        return
    write_partial(
        own.report,
        runs_dir=settings.runs_dir,
        name=sweep,
        out=settings.reports_dir,
        per_kwh=settings.price_per_kwh,
        per_hour=settings.price_per_hour,
        always=always,
    )


def _interruption_note(cell: Cell, runs_dir: Path, own: OwnFiles | None) -> str:
    """What an interrupted launch leaves, and what goes on from there."""
    told = f"{cell.id} has no record of this attempt and is run again"
    if own is None or not own.scope.exists():
        return told
    cells = json.loads(own.scope.read_text(encoding="utf-8"))["cells"]
    if not cells:  # a search, whose cells are not known before
        return told
    done = sum((runs_dir / name / RECORD_NAME).exists() for name in cells)
    return f"{done} of {len(cells)} cells have their record; {told}"


class Launch(Callback):
    """Hydra's hooks around a run: all cells are checked before the first starts; the end is summed up."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        with user_errors(callback=True):
            cell, settings = compose(config, config.hydra)
            check_cell(cell)
            check_trackers(settings.tracker)
            begin([cell.id], settings, later=None)
            record = previous_record(settings.runs_dir / cell.id / RECORD_NAME)
            kept = record is not None and record.status == "ok" and not settings.force
            if has_user_values(config.hydra) and not kept:
                rehearse(_without_refused([Trial.of(cell, config.hydra)], settings), cells_follow=True)
            if not kept:
                _print_emulation_notes([Asked.by(cell)])
                if (leaving := what_leaves(cell)) is not None:
                    print(leaving, file=sys.stderr)
                planned = [Planned(cell, 1)] if not _is_refused(cell, settings) else []
                say_estimate(planned, settings.runs_dir)

    def on_run_end(self, config: DictConfig, **_: Any) -> None:
        with user_errors(callback=True):
            cell, settings = compose(config, config.hydra)
            _finish([cell.id], settings.runs_dir, manifest=None)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        with user_errors(callback=True):
            launch = f"{launch_id(utc_now())}-{os.getpid()}"
            environment = use_sweep_loader().environment
            environment[LAUNCH_VARIABLE] = launch
            check_launcher(config)
            for told in ignored_choices(config):
                print(told, file=sys.stderr)
            ids: dict[str, None] = {}
            unlike: dict[str, Cell] = {}
            skippable: dict[tuple[str, ...], str] = {}
            own: dict[str, Trial] = {}
            slow: dict[str, Asked] = {}
            alike: dict[str, tuple[Cell, set[str]]] = {}
            automatic: dict[str, str] = {}
            leaving: dict[str, str] = {}
            for overrides, job in jobs_of(config):  # one at a time: thousands of configurations would fill the memory
                cell, settings = compose(job, job.hydra)
                ids[cell.id] = None
                asked = Asked.by(cell)
                if emulated(asked.device, asked.dtype):
                    slow[cell.id] = asked
                if job.hydra.runtime.choices.precision == AUTO:
                    automatic[asked.device] = fast_precision(asked.device).option
                if (sent := what_leaves(cell)) is not None:
                    leaving[cell.id] = sent
                if not settings.force:
                    skippable[tuple(overrides)] = cell.id
                if has_user_values(job.hydra):
                    own.setdefault(trial_key(cell), Trial.of(cell, job.hydra))
                alike.setdefault(_what_it_costs(cell), (cell, set()))[1].add(cell.id)
                interrupt.check()
                unlike.setdefault(fingerprint([cell.identity["model"], cell.identity["data"]]), cell)
            if not ids:
                raise UserError("the sweep has no cells: one of its keys has no values, such as seed=range(0,0)")
            for cell in unlike.values():
                interrupt.check()
                check_cell(cell)
                if searches(config.hydra):
                    check_objective(cell, settings.objective)
            check_trackers(settings.tracker)
            done = begin(list(ids), settings, later=[], keep={} if searches(config.hydra) else skippable.values())
            trials = _without_refused((trial for trial in own.values() if trial.cell.id not in done), settings)
            rehearse(trials, cells_follow=launcher_of(config.hydra) == "basic")
            for sent in dict.fromkeys(sent for cell_id, sent in leaving.items() if cell_id not in done):
                print(sent, file=sys.stderr)
            if not runs_elsewhere(config.hydra):
                _print_emulation_notes(asked for cell_id, asked in slow.items() if cell_id not in done)
            elif automatic:
                print(_carried_precision_note(automatic), file=sys.stderr)
            if automatic:  # one sweep, one precision, whichever machines its cells get to
                environment[CARRIED_VARIABLE] = ",".join(f"{device}={name}" for device, name in automatic.items())
            _say_what_it_takes(alike.values(), config.hydra, settings, done=done)
            use_grid_sweeper(done=[job for job, cell_id in skippable.items() if cell_id in done])
            given = list(config.hydra.overrides.task)
            name = sweep_name(config.hydra)
            manifest = Manifest(
                name=name,
                command=command_of(
                    given,
                    multirun="sweep" not in config.hydra.runtime.choices,
                    config_dir=config_dir_of(config.hydra),
                ),
                overrides=given,
                started_at=utc_now(),
                cells=[] if searches(config.hydra) else list(ids),
            )
            manifest.write(settings.runs_dir)
            self._own = OwnFiles.of(settings.runs_dir / SWEEPS_FOLDER, name, launch)
            write_atomically(self._own.scope, manifest.model_dump_json() + "\n")
            atexit.register(self._own.remove)  # an interrupted launch does not come to its end
            if searches(config.hydra):
                quiet_optuna()
            else:
                begin_partial(self._own.report)
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
            cells = self._manifest.cells or noted_jobs(self._own.jobs) or received
            self._own.remove()
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
                prices=[None if one is None else float(one) for one in (config.price_per_kwh, config.price_per_hour)],
            )


class Asked(NamedTuple):
    """What a cell wants of the machine's matrix products."""

    device: str
    dtype: str
    option: str

    @classmethod
    def by(cls, cell: Cell) -> Asked:
        return cls(cell.device_type, cell.precision.compute_dtype, cell.precision.name)


def _print_emulation_notes(cells: Iterable[Asked]) -> None:
    """One line for each dtype for which this machine has no instructions: what was asked for is done, and its price."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for device, dtype, option in cells:
        if emulated(device, dtype):
            found.setdefault((device, dtype), {})[option] = None
    for (device, dtype), options in found.items():
        note = emulation_note(device, dtype, list(options))
        if note is not None:
            print(note, file=sys.stderr)


def _at_once(hydra: Any, settings: Settings) -> int:
    """Cells that run at the same time on one machine."""
    return settings.at_once or cells_at_once(hydra.launcher, launcher_of(hydra), cores=len(available_cores()))


def _say_what_it_takes(
    alike: Iterable[tuple[Cell, set[str]]], hydra: Any, settings: Settings, *, done: Collection[str]
) -> None:
    """Say what the cells that are left to run will take.

    Args:
        alike: one of the cells that cost the same, and the ids of all of them; in a search it stands for every trial.
    """
    times = int(hydra.sweeper.n_trials) if searches(hydra) else 1
    left = [(cell, len(ids.difference(done))) for cell, ids in alike if not _is_refused(cell, settings)]
    say_estimate(
        [Planned(cell, cells * times) for cell, cells in left if cells],
        settings.runs_dir,
        at_once=_at_once(hydra, settings),
        elsewhere=runs_elsewhere(hydra),
        cells_follow=launcher_of(hydra) == "basic",
    )


def _carried_precision_note(automatic: Mapping[str, str]) -> str:
    chosen = ", ".join(f"{option} on {device} ({fast_precision(device).why})" for device, option in automatic.items())
    return (
        f"note: precision=auto is {chosen}, by what this machine is; the launcher takes it along to other machines, "
        "precision=NAME chooses another"
    )


def _without_refused(trials: Iterable[Trial], settings: Settings) -> list[Trial]:
    """Those that no rule refuses: the others are no error, but rows that say so."""
    return [trial for trial in trials if not _is_refused(trial.cell, settings)]


def _is_refused(cell: Cell, settings: Settings) -> bool:
    return not settings.force_unsupported and why_unsupported(cell) is not None


def _what_it_costs(cell: Cell) -> str:
    """The same for cells that take the same time: what differs in a seed or a learning rate does as much work."""
    identity = cell.identity
    identity.pop("seed", None)
    for key in ("learning_rate", "sft_learning_rate", "schedule", "warmup_ratio"):
        identity["training"].pop(key, None)
    return fingerprint(identity)


def _go_to(folder: str) -> None:
    """Relative paths mean what they meant where the sweep was started; some launchers start elsewhere."""
    if Path(folder).is_dir() and Path(folder) != Path.cwd():
        os.chdir(folder)


def begin(
    cells: Sequence[str],
    settings: Settings,
    *,
    later: list[Callable[[], Record | None]] | None,
    keep: Collection[str] = (),
) -> set[str]:
    """Look at the folders before the first cell runs, and note which attempts are on record.

    Returns:
        Those of `keep` that are done; it is said of each.

    Raises:
        UserError: a folder that cannot be made or written, or a record of a newer left_bench.
    """
    global _later
    for key in ("runs_dir", "reports_dir"):
        check_folder(key, getattr(settings, key))
    _later = later
    return note_records(cells, settings.runs_dir, keep=frozenset(keep))


def _finish(
    cells: list[str],
    runs_dir: Path,
    *,
    manifest: Manifest | None,
    reports_dir: Path = Path(),
    tracker: dict[str, Any] | None = None,
    objective: str | None = None,
    prices: Sequence[float | None] = (None, None),
) -> None:
    """Print the summary, write the report, and leave with 1 when a cell ended other than ok or unsupported.

    Args:
        objective: what a search was after; its best trial is said.
        prices: of a kWh and of an hour, for the report.
    """
    from left_bench.report import print_summary, write_report
    from left_bench.report.cost import Prices
    from left_bench.tracker.comparison import track_sweep

    known: KnownParts = {}
    paths = [runs_dir / cell / RECORD_NAME for cell in cells]
    records = [record for path in paths if (record := previous_record(path, known=known)) is not None]
    print_summary(records)
    if objective is not None:
        print(best_trial(records, objective=objective))
    all_well = len(records) == len(cells) and all(record.status in ("ok", "unsupported") for record in records)
    del records, known  # the report reads them again
    if manifest is not None:
        try:
            markdown = write_report(
                runs_dir,
                name=manifest.name,
                out=reports_dir,
                prices=Prices(per_kwh=prices[0], per_hour=prices[1]),
            )
        except OSError as error:
            raise UserError(
                f"reports_dir={reports_dir}: {error.filename or reports_dir} cannot be written "
                f"({error.strerror or error}); the records are kept, mend that and give the same command again"
            ) from error
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

"""A launch, from the command line to its closing summary: `Launch`, which Hydra calls.

Hydra reads the command line and has two ways to run something: the task of a single run, and the sweeper of a sweep
(`hydra_plugins.left_bench_sweeper`). Both lead to `Launch`, and a single cell is handled like one of a sweep: composed
once, checked, skipped if it is done, run as a `Job`, and included in the summary.
"""

from __future__ import annotations

import atexit
import copy
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from left_bench.core import interrupt
from left_bench.core.clock import utc_now
from left_bench.core.errors import UserError, user_errors
from left_bench.core.files import write_atomically
from left_bench.grid.compose import Settings, check_cell, check_folder, compose, ignored_choices
from left_bench.grid.job_composer import JobComposer
from left_bench.grid.sweep import (
    SWEEPS_FOLDER,
    Manifest,
    best_trial,
    check_launcher,
    check_objective,
    command_of,
    config_dir_of,
    jobs_of,
    launcher_of,
    quiet_optuna,
    runs_elsewhere,
    searches,
    sweep_name,
)
from left_bench.grid.tuning import Tuning, check_tuning, is_tuning, tuning_of
from left_bench.launch.cell_lock import until_done
from left_bench.launch.composed import Composed
from left_bench.launch.estimate import Planned, say_estimate
from left_bench.launch.job import ELSEWHERE, Ended, Job, OwnFiles, for_launchers, run_job, take
from left_bench.launch.notes import say_automatic_precision, say_what_is_emulated, say_what_leaves
from left_bench.launch.partial_report import begin_partial
from left_bench.launch.plan_first import plan_ahead
from left_bench.launch.preflight import Trial, has_user_values, rehearse
from left_bench.launch.run_cell import Pace, add_provenance, note_records, previous_record, store_received
from left_bench.launch.tuner import Tuner, is_finished
from left_bench.measure.auto_precision import AUTO
from left_bench.processes.resources import available_cores, cells_at_once
from left_bench.spec.cell import SECTIONS, Cell, fingerprint
from left_bench.spec.record import RECORD_NAME, KnownParts, Record
from left_bench.tracker import check_trackers, launch_id

_BATCH_LAUNCHER = "hydra_plugins.left_bench_sweeper.BatchLauncher"


class Launch:
    """The cells of one command. Hydra calls it as the task of a run; its sweeper calls `sweep`."""

    def __init__(self, typed: Sequence[str] = ()) -> None:
        """`typed`: the command line's overrides as the user typed them."""
        self._typed = tuple(typed)
        self._started_at = utc_now()
        self._launcher = "basic"
        self._elsewhere = False
        self._searches = False
        self._at_once = 1
        self._total = 1
        self._sweep: str | None = None
        self._own: OwnFiles | None = None
        self._manifest: Manifest | None = None
        self._cells: dict[str, None] = {}
        """Ids in the sweep's order; for a search, added as they are chosen."""
        self._recorded: dict[str, int] = {}
        self._pace = Pace()
        self._hydras_launcher: Launcher | None = None
        self._later: list[Job] = []
        self._shared_sections: dict[tuple[str, str], Any] = {}

    def __call__(self, config: DictConfig) -> None:
        """Run one cell, from this process."""
        with user_errors():
            hydra: Any = HydraConfig.get()
            if (tuning := tuning_of(config)) is not None:
                raise UserError(
                    f"+tune={tuning.name}: one cell is no comparison to tune for; add -m, or +sweep=NAME for a sweep"
                )
            job = self._composed(config, hydra)
            self._prepare([job], hydra)

            def run(jobs: Sequence[Composed]) -> None:
                for item in jobs:
                    take(self._job(item, 1, hydra), pace=self._pace)

            self._conduct([job], run)

    def sweep(self, config: DictConfig, context: HydraContext) -> None:
        """Run a sweep or a search (`hydra/sweeper=`), with the launcher chosen by `hydra/launcher=`."""
        hydra = config.hydra
        check_launcher(config)
        tuning = tuning_of(config)
        for note in ignored_choices(config):
            print(note, file=sys.stderr)
        # one at a time, because thousands of configurations would fill the memory
        jobs = [self._composed(job, job.hydra) for _, job in jobs_of(config, context.config_loader)]
        if not jobs:
            raise UserError("the sweep has no cells: one of its keys has no values, such as seed=range(0,0)")
        self._launcher, self._elsewhere, self._searches = launcher_of(hydra), runs_elsewhere(hydra), searches(hydra)
        self._sweep = sweep_name(hydra)
        if tuning is not None:
            check_tuning(tuning, [job.cell for job in jobs], config)
        self._prepare(jobs, hydra)
        launch = functools.partial(self._run_with_launcher, config=config, context=context)
        if tuning is not None:
            jobs = self._tuned(tuning, jobs, config, context, launch)
        if self._searches:
            self._conduct(jobs, lambda _: self._search(config, context, launch), config=config)
        else:
            self._conduct(jobs, lambda left: self._run_grid(left, hydra, launch), config=config)

    # --- before the first cell ---

    def _composed(self, config: DictConfig, hydra: Any) -> Composed:
        """The only place where a job's configuration becomes a cell."""
        interrupt.check()
        cell, settings = compose(config, hydra, typed=self._typed)
        cell = cell.model_copy(update={name: self._shared(name, getattr(cell, name)) for name in SECTIONS})
        trial = Trial.of(cell, hydra) if has_user_values(hydra) else None
        overrides = [str(item) for item in hydra.overrides.task if not is_tuning(str(item))]
        return Composed(overrides, cell, settings, trial, hydra.runtime.choices.precision == AUTO)

    def _shared(self, name: str, section: Any) -> Any:
        """An equal section of an earlier cell, if there is one: ten thousand cells have only a few dozen different
        ones."""
        return self._shared_sections.setdefault((name, section.model_dump_json()), section)

    def _prepare(self, jobs: Sequence[Composed], hydra: Any) -> None:
        """Check all cells, without writing anything."""
        self._settings = jobs[-1].settings
        self._at_once = self._settings.at_once or cells_at_once(
            hydra.launcher, self._launcher, cores=len(available_cores())
        )
        self._trials = int(hydra.sweeper.n_trials) if self._searches else 1
        self._cells = {} if self._searches else dict.fromkeys(job.cell.id for job in jobs)
        self._total = self._trials if self._searches else len(self._cells)
        distinct: dict[str, Cell] = {}
        for job in jobs:
            identity = job.cell.identity
            distinct.setdefault(fingerprint([identity["model"], identity["data"]]), job.cell)
        for cell in distinct.values():
            interrupt.check()
            check_cell(cell)
            if self._searches:
                check_objective(cell, self._settings.objective)
        check_trackers(self._settings.tracker)
        for key in ("runs_dir", "reports_dir"):
            check_folder(key, getattr(self._settings, key))

    def _conduct(
        self, jobs: Sequence[Composed], run: Callable[[Sequence[Composed]], None], *, config: DictConfig | None = None
    ) -> None:
        """Skip finished cells, check the others and print notes about them, run them, and sum up.

        Args:
            config: the sweep's; None for a single cell, which has no manifest and no report.
        """
        left = self._without_finished(jobs)
        if self._own is None:  # otherwise a tuning came before
            self._rehearse_and_note(left)
        if config is not None:
            self._open_manifest(config)
        run(left)
        interrupt.check()
        if self._later:
            print(f"waiting for {len(self._later)} cells that another launch is running")
            until_done([functools.partial(job.attempt, self._pace) for job in self._later])
        if config is not None:
            self._close_manifest()
        self._sum_up()

    def _without_finished(self, jobs: Sequence[Composed]) -> list[Composed]:
        """The jobs left to run; finished ones are reported. Notes the recorded attempts of all cells."""
        keep = {job.cell.id for job in jobs if not job.settings.force}
        self._recorded, done = note_records(list(self._cells), self._settings.runs_dir, keep=keep)
        self._pace = Pace(len(self._cells) - len(done))
        for job in jobs:
            if job.provenance and job.cell.id in done and not job.settings.force:
                add_provenance(job.settings.runs_dir / job.cell.id, job.provenance)
        return [job for job in jobs if job.settings.force or job.cell.id not in done]

    def _rehearse_and_note(self, left: Sequence[Composed], trials: Sequence[tuple[Cell, int]] = ()) -> None:
        """`trials`: cells of a tuning that come before, and how many there are of each."""
        here = self._launcher == "basic"
        allowed = [job for job in left if not job.refused]
        rehearse((job.trial for job in allowed if job.trial is not None), cells_follow=here)
        say_what_leaves(job.cell for job in left)
        if self._elsewhere:
            say_automatic_precision(job.cell for job in left if job.automatic)
        else:
            say_what_is_emulated(job.cell for job in left)
        by_cost: dict[str, tuple[Cell, set[str]]] = {}
        for job in allowed:
            by_cost.setdefault(_cost_key(job.cell), (job.cell, set()))[1].add(job.cell.id)
        if left or trials:
            say_estimate(
                [
                    *(Planned(cell, number) for cell, number in trials),
                    *(Planned(cell, len(ids) * self._trials) for cell, ids in by_cost.values()),
                ],
                self._settings.runs_dir,
                at_once=self._at_once,
                elsewhere=self._elsewhere,
                cells_follow=here,
            )
        if not self._elsewhere and not self._searches:  # after the estimate, which has fetched what is local
            plan_ahead([job.cell for job in allowed if job.cell.hardware.plan_first])

    def _open_manifest(self, config: DictConfig) -> None:
        hydra, runs_dir = config.hydra, self._settings.runs_dir
        overrides, several = list(hydra.overrides.task), "sweep" not in hydra.runtime.choices
        self._manifest = Manifest(
            name=str(self._sweep),
            command=command_of(overrides, multirun=several, config_dir=config_dir_of(hydra)),
            overrides=overrides,
            started_at=self._started_at,
            cells=list(self._cells),
        )
        self._manifest.write(runs_dir)
        OmegaConf.save(config, runs_dir / SWEEPS_FOLDER / "multirun.yaml")  # as Hydra's own sweeper does
        own = self._own or self._open_own_files(self._manifest.name)
        write_atomically(own.scope, self._manifest.model_dump_json() + "\n")
        if self._searches:
            quiet_optuna()
        else:
            begin_partial(own.report)

    def _open_own_files(self, sweep: str) -> OwnFiles:
        folder = self._settings.runs_dir / SWEEPS_FOLDER
        self._own = OwnFiles.of(folder, sweep, f"{launch_id(self._started_at)}-{os.getpid()}")
        atexit.register(self._own.remove)  # an interrupted launch does not come to its end
        return self._own

    # --- the cells ---

    def _tuned(
        self,
        tuning: Tuning,
        jobs: Sequence[Composed],
        config: DictConfig,
        context: HydraContext,
        launch: Callable[..., list[JobReturn]],
    ) -> list[Composed]:
        """The jobs with the learning rate that is found for each method, by trials that are run here.

        A trial that has a record is not run again. The sweep's manifest is written after the trials, which are no
        cells of the comparison.
        """
        composer = JobComposer(context.config_loader, config)

        def composed(overrides: list[str]) -> Composed:
            job = composer.compose(overrides)
            return self._composed(job, job.hydra)

        def finished(cell: Cell) -> Record | None:
            record = None if self._settings.force else self._record_of(cell)
            return record if record is not None and is_finished(record) else None

        tuner = Tuner(tuning, [job for job in jobs if not job.refused], composed)
        kept = tuner.take_up(finished)
        if tuner.methods:
            self._rehearse_and_note(jobs, tuner.planned())
            print(
                f"tuning: {tuning.trials} trials for each of {tuner.methods} methods before the comparison"
                f"{f', {kept} runs of them are kept' if kept else ''}"
            )
        own = self._open_own_files(str(self._sweep))
        write_atomically(own.scope, json.dumps({"cells": []}) + "\n")
        self._pace, done = Pace(tuner.left), 0
        while runs := tuner.ask():
            interrupt.check()
            self._total = done + max(tuner.left, len(runs))
            size = 1 if self._launcher == "basic" else config.hydra.sweeper.get("max_batch_size") or len(runs)
            for first in range(0, len(runs), size):
                batch = runs[first : first + size]
                launch([(run.job, done + place) for place, run in enumerate(batch, start=1)], first=done)
                done += len(batch)
                for run in batch:
                    tuner.tell(run, self._record_of(run.job.cell))
            tuner.take_up(finished)  # behind a trial that had to be run again, others may be done
        self._hydras_launcher = None  # it knows the pace of the trials
        result = [tuner.settled(job) for job in jobs]
        self._cells = dict.fromkeys(job.cell.id for job in result)
        self._total = len(self._cells)
        return result

    def _record_of(self, cell: Cell) -> Record | None:
        return previous_record(self._settings.runs_dir / cell.id / RECORD_NAME)

    def _run_grid(self, left: Sequence[Composed], hydra: Any, launch: Callable[..., list[JobReturn]]) -> None:
        """Run the jobs in batches: one at a time in this process, otherwise as many as the launcher takes."""
        places = {cell_id: place for place, cell_id in enumerate(self._cells, start=1)}
        jobs = [(item, places[item.cell.id]) for item in left]
        size = 1 if self._launcher == "basic" else hydra.sweeper.get("max_batch_size") or max(1, len(jobs))
        for first in range(0, len(jobs), size):
            launch(jobs[first : first + size], first=first)

    def _search(self, config: DictConfig, context: HydraContext, launch: Callable[..., list[JobReturn]]) -> None:
        """Run a search with the chosen sweeper, which requests batches of trials and receives their results."""
        composer = JobComposer(context.config_loader, config)
        begun = 0

        def run_batch(trials: Sequence[Sequence[str]]) -> list[JobReturn]:
            nonlocal begun
            jobs = []
            for number, overrides in enumerate(trials, start=begun + 1):
                job = composer.compose(overrides)
                jobs.append((self._composed(job, job.hydra), number))
            first, begun = begun, begun + len(jobs)
            self._cells |= dict.fromkeys(job.cell.id for job, _ in jobs)
            return launch(jobs, first=first)

        inner = copy.deepcopy(config)
        chosen = context.config_loader.load_configuration(
            None, [f"hydra/sweeper={config.hydra.runtime.choices['hydra/sweeper']}"], run_mode=RunMode.MULTIRUN
        )
        with open_dict(inner):
            inner.hydra.sweeper._target_ = chosen.hydra.sweeper._target_
            inner.hydra.launcher = {"_target_": _BATCH_LAUNCHER}
        sweeper = Plugins.instance().instantiate_sweeper(config=inner, hydra_context=context, task_function=run_batch)
        sweeper.sweep(list(config.hydra.overrides.task))

    def _run_with_launcher(
        self, jobs: Sequence[tuple[Composed, int]], *, first: int, config: DictConfig, context: HydraContext
    ) -> list[JobReturn]:
        """Let the launcher run these jobs, each with its position in the sweep, and process the results.

        Args:
            first: how many jobs were passed to the launcher before.
        """
        if self._hydras_launcher is None:
            task = functools.partial(run_job, pace=self._pace) if self._launcher == "basic" else run_job
            self._hydras_launcher = Plugins.instance().instantiate_launcher(for_launchers(context), task, config)
        made = [self._job(item, number, config.hydra) for item, number in jobs]
        returns = list(self._hydras_launcher.launch([job.carried() for job in made], initial_job_idx=first))
        for job, returned in zip(made, returns, strict=True):
            ended: Ended = returned.return_value  # raises what the job raised
            if ended.status == ELSEWHERE:
                self._later.append(job)
            if ended.record is not None:
                store_received(ended.record, self._settings.runs_dir)
        return returns

    def _job(self, composed: Composed, number: int, hydra: Any) -> Job:
        is_trial = "tuning" in composed.provenance
        return Job(
            cell=composed.cell,
            settings=composed.settings,
            overrides=composed.overrides,
            command=command_of(composed.overrides, config_dir=config_dir_of(hydra)),
            number=number,
            total=self._total,
            recorded=self._recorded.get(composed.cell.id),
            sweep=f"{self._sweep}_tuning" if is_trial else self._sweep,
            launch=launch_id(self._started_at),
            launcher=self._launcher,
            at_once=self._at_once,
            elsewhere=self._elsewhere,
            comes_back=not (self._sweep is None or is_trial or self._searches) and self._launcher == "basic",
            folder=str(hydra.runtime.cwd),
            own=self._own,
            provenance=dict(composed.provenance),
        )

    # --- the end ---

    def _close_manifest(self) -> None:
        assert self._own is not None and self._manifest is not None
        self._own.remove()
        # write this launch's own: another of the same name may have overwritten the file
        changes = {"finished_at": utc_now(), "cells": list(self._cells)}
        self._manifest = self._manifest.model_copy(update=changes)
        self._manifest.write(self._settings.runs_dir)

    def _sum_up(self) -> None:
        """Print the summary, write a sweep's report, and exit with 1 if a cell ended neither ok nor unsupported."""
        from left_bench.report import print_summary

        runs_dir = self._settings.runs_dir
        known: KnownParts = {}
        paths = [runs_dir / cell / RECORD_NAME for cell in self._cells]
        records = [record for path in paths if (record := previous_record(path, known=known)) is not None]
        print_summary(records)
        if self._searches:
            print(best_trial(records, objective=self._settings.objective))
        all_well = len(records) == len(paths) and all(record.status in ("ok", "unsupported") for record in records)
        del records, known  # the report reads them again
        if self._manifest is not None:
            _report(self._manifest, self._settings)
        print(f"records: {runs_dir}/<cell>/{RECORD_NAME}")
        if not all_well:
            raise SystemExit(1)


def _cost_key(cell: Cell) -> str:
    """Equal for cells that take the same time: a seed or a learning rate does not change the amount of work."""
    identity = cell.identity
    identity.pop("seed", None)
    for key in ("learning_rate", "sft_learning_rate", "schedule", "warmup_ratio"):
        identity["training"].pop(key, None)
    return fingerprint(identity)


def _report(manifest: Manifest, settings: Settings) -> None:
    """Write a sweep's report and send it to its trackers."""
    from left_bench.report import write_report
    from left_bench.report.cost import Prices
    from left_bench.tracker.comparison import track_sweep

    prices = Prices(per_kwh=settings.price_per_kwh, per_hour=settings.price_per_hour)
    out = settings.reports_dir
    try:
        markdown: Path = write_report(settings.runs_dir, name=manifest.name, out=out, prices=prices)
    except OSError as error:
        raise UserError(
            f"reports_dir={out}: {error.filename or out} cannot be written "
            f"({error.strerror or error}); the records are kept; fix that and give the same command again"
        ) from error
    print(f"report: {markdown}\npage: {markdown.with_suffix('.html')}")
    track_sweep(
        settings.tracker,
        runs_dir=settings.runs_dir,
        cells=manifest.cells,
        sweep=manifest.name,
        started_at=manifest.started_at,
        command=manifest.command,
        markdown=markdown,
    )

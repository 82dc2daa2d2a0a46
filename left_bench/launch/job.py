"""One job of a launch: a composed cell and everything needed to run it in the process its launcher chooses.

Launchers carry a job as one line among its overrides. They may call `run_job` in another process, on another machine,
or again after a preemption: it only depends on the job and on files.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from hydra.conf import HydraConf
from hydra.core.utils import JobReturn
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict
from pydantic import BaseModel, ConfigDict

from left_bench.core import interrupt
from left_bench.core.errors import user_errors
from left_bench.grid.compose import Settings, check_same_files
from left_bench.launch.cell_lock import until_done
from left_bench.launch.partial_report import write_partial
from left_bench.launch.run_cell import Pace, run_cell
from left_bench.processes.resources import SCHEDULERS, seated
from left_bench.spec.cell import Cell
from left_bench.spec.record import RECORD_NAME, Record

_CARRIED = "hydra.left_bench_job="
"""Launchers leave overrides that begin with `hydra.` out of their logs."""
_HYDRAS_PART = ("mode", "sweep", "job", "runtime", "verbose", "output_subdir", "job_logging", "hydra_logging")
"""The keys that launchers and Hydra's own job runner read."""
_NOT_A_JOBS = ("help", "hydra_help", "run", "callbacks", "sweeper", "launcher", "searchpath")
ELSEWHERE = "elsewhere"


class OwnFiles(NamedTuple):
    """Files that a launch shares with its jobs, wherever they run; no other launch of the sweep writes them."""

    scope: Path
    """The manifest at the launch's start; another launch of the same name may have overwritten the shared one."""
    report: Path
    """When the sweep's report was last written, and how long it took."""

    @classmethod
    def of(cls, folder: Path, sweep: str, launch: str) -> OwnFiles:
        return cls(*(folder / f"{sweep}.{launch}.{what}" for what in ("scope", "report")))

    def remove(self) -> None:
        for path in self:
            path.unlink(missing_ok=True)


class Job(BaseModel):
    """A cell to run, and what its launch knows about it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cell: Cell
    settings: Settings
    overrides: list[str]
    command: str
    """The command that runs only this cell again."""
    number: int
    """Position in the launch, from 1."""
    total: int
    recorded: int | None
    """The recorded attempt when the launch began, 0 for none: a later one was made by another launch. None: unknown."""
    sweep: str | None
    launch: str
    """The id by which trackers group its cells."""
    launcher: str
    at_once: int
    """Cells that run at the same time on one machine."""
    elsewhere: bool
    """Whether the launcher may run it on another machine."""
    comes_back: bool
    """Whether the launch returns to the cell at its end if another launch is running it now; otherwise the job
    waits."""
    folder: str
    """The command's working directory, which relative paths refer to."""
    own: OwnFiles | None
    provenance: dict[str, Any] = {}
    """What the record says besides of where it comes from."""

    def carried(self) -> list[str]:
        """The overrides to pass to a launcher."""
        # a dollar sign would be an interpolation to OmegaConf; in JSON it only occurs within strings
        text = self.model_dump_json(by_alias=True).replace("$", "\\u0024")
        return [*self.overrides, f"{_CARRIED}{text}"]

    def attempt(self, pace: Pace | None = None) -> Record | None:
        """The cell's record, run now if necessary; None if another launch is running the cell."""
        return run_cell(
            self.cell,
            self.settings,
            overrides=self.overrides,
            command=self.command,
            recorded_before=self.recorded,
            number=self.number,
            total=self.total,
            sweep=self.sweep,
            launch=self.launch,
            take_seat=functools.partial(
                seated,
                at_once=min(self.at_once, self.total),
                devices=self.cell.hardware.processes,
                share=self.settings.share_devices,
                scheduled=self.launcher in SCHEDULERS,
            ),
            bars=self.launcher == "basic",
            pace=pace,
            provenance=self.provenance,
        )


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What a job returns to its launcher.

    A search uses it as a number, the objective; a cell without one (diverged, out of memory, ...) is a failed trial.
    """

    cell_id: str
    status: str
    """`elsewhere` if another launch is running the cell."""
    objective: float | None
    record: str | None = None
    """The record as JSON, if the runs folder is not shared."""

    @classmethod
    def of(cls, record: Record, *, objective: str, sent_back: bool) -> Ended:
        value = record.metrics.get(objective) if record.status == "ok" else None
        text = record.model_dump_json() if sent_back else None
        return cls(cell_id=record.cell_id, status=record.status, objective=value, record=text)

    def __float__(self) -> float:
        if self.objective is None:
            raise ValueError(f"{self.cell_id} is {self.status} and has no value")
        return self.objective

    def __repr__(self) -> str:  # printed by Optuna's sweeper for a failed trial
        return f"{self.cell_id}: {self.status}"


def run_job(config: DictConfig, *, pace: Pace | None = None) -> Ended:
    """The task that a launcher runs: produce the record of the job's cell.

    Args:
        config: from `JobLoader`.
        pace: the launch's, if the job runs in its process.
    """
    with user_errors():
        return take(Job.model_validate_json(config.job), pace=pace)


def take(job: Job, *, pace: Pace | None = None) -> Ended:
    """Run a job's cell in a separate process started by this one."""
    if Path(job.folder).is_dir() and Path(job.folder) != Path.cwd():
        os.chdir(job.folder)  # some launchers start elsewhere
    if job.elsewhere:
        check_same_files(job.cell)
    try:
        interrupt.check()
        record = job.attempt(pace)
        if record is None and job.comes_back:
            return Ended(cell_id=job.cell.id, status=ELSEWHERE, objective=None)
        record = record or until_done([job.attempt])[0]
    except KeyboardInterrupt:
        print(f"\n{_interruption_note(job)}", file=sys.stderr)
        _report_so_far(job, always=True)
        raise
    _report_so_far(job)
    shared = job.own is None or job.own.scope.exists()
    return Ended.of(record, objective=job.settings.objective, sent_back=not shared)


def _report_so_far(job: Job, *, always: bool = False) -> None:
    """Update the report of a running sweep. A search has no list of cells before its end, and a single cell no
    report."""
    if job.own is None or job.sweep is None or not job.own.report.exists():
        return
    write_partial(
        job.own.report,
        runs_dir=job.settings.runs_dir,
        name=job.sweep,
        out=job.settings.reports_dir,
        per_kwh=job.settings.price_per_kwh,
        per_hour=job.settings.price_per_hour,
        always=always,
    )


def _interruption_note(job: Job) -> str:
    """What an interrupted launch has completed, and how it continues."""
    unfinished = f"{job.cell.id} has no record of this attempt and is run again"
    if job.own is None or not job.own.scope.exists():
        return unfinished
    cells = json.loads(job.own.scope.read_text(encoding="utf-8"))["cells"]
    if not cells:  # a search, whose cells are not known in advance
        return unfinished
    done = sum((job.settings.runs_dir / name / RECORD_NAME).exists() for name in cells)
    return f"{done} of {len(cells)} cells have their record; {unfinished}"


def for_launchers(context: HydraContext) -> HydraContext:
    """The context for launchers, with our own loader and callbacks instead of Hydra's."""
    return HydraContext(config_loader=cast(Any, JobLoader()), callbacks=cast(Any, _LightReturns(context.callbacks)))


class JobLoader:
    """Gives a launcher a job's configuration, which is the job itself, composed in advance.

    Launchers use nothing else of a loader (Hydra's basic one; joblib 1.2, submitit 1.2, ray 1.2).
    """

    def __init__(self) -> None:
        self._shared: DictConfig | None = None
        """The configuration that the jobs of a launch have in common."""

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: Sequence[str]) -> DictConfig:
        """`job`: the job as text; `hydra`: the keys needed to run a job."""
        *overrides, carried = sweep_overrides
        if self._shared is None:
            hydra = master_config.hydra
            self._shared = OmegaConf.create({"hydra": HydraConf(), "job": ""})
            for key in _HYDRAS_PART:
                self._shared.hydra[key] = hydra[key]
            self._shared.hydra.sweep.dir = str(hydra.sweep.dir)  # it may refer to keys of the sweep's configuration
            # Hydra copies all of it four times for every job
            self._shared.hydra.runtime.choices, self._shared.hydra.runtime.config_sources = {}, []
            with open_dict(self._shared.hydra):
                for key in _NOT_A_JOBS:
                    del self._shared.hydra[key]
        config = copy.deepcopy(self._shared)
        config.job = carried.removeprefix(_CARRIED)
        config.hydra.overrides.task = overrides
        return config


class _LightReturns:
    """The launch's callbacks. Launchers keep every job's return value until the end; drop the two configurations in
    it."""

    def __init__(self, callbacks: Any) -> None:
        self._callbacks = callbacks

    def on_job_start(self, **named: Any) -> None:
        self._callbacks.on_job_start(**named)

    def on_job_end(self, *, job_return: JobReturn, **named: Any) -> None:
        self._callbacks.on_job_end(job_return=job_return, **named)
        job_return.cfg = job_return.hydra_cfg = None

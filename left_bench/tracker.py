"""Trackers: where a cell's configuration, steps and record go besides the disk.

They live in the parent and are fed from the cell's events, so that a tracker can neither slow nor end a measured run.
Disk is the truth; a tracker that fails costs its own data and a warning.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from left_bench.cell import Cell
from left_bench.errors import UserError, nearest
from left_bench.record import METRICS, Record


class Tracker(Protocol):
    """One run per cell attempt."""

    def start(self, cell: Cell, *, attempt: int, sweep: str | None, runs_dir: Path) -> None:
        """Open a run."""

    def log(self, step: int, **metrics: float) -> None:
        """Metrics of one optimizer step."""

    def finish(self, record: Record) -> None:
        """Everything the record holds; closes the run."""


class NoTracker:
    """The null object: records on disk are all there is."""

    def start(self, cell: Cell, *, attempt: int, sweep: str | None, runs_dir: Path) -> None:
        return None

    def log(self, step: int, **metrics: float) -> None:
        return None

    def finish(self, record: Record) -> None:
        return None


class WandbTracker:
    """Weights & Biases: online when there is a login, offline otherwise; `WANDB_MODE` decides over both."""

    def __init__(self, *, project: str, entity: str | None) -> None:
        self._project, self._entity = project, entity
        self._run: Any = None

    def start(self, cell: Cell, *, attempt: int, sweep: str | None, runs_dir: Path) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
        axes = {f"axis.{group}": name for group, name in cell.choices.items()}
        self._run = wandb.init(
            project=self._project,
            entity=self._entity,
            dir=str(runs_dir),
            id=f"{cell.id}-{attempt}",
            name=cell.id,
            group=sweep,
            job_type="train",
            tags=[name[:64] for name in dict.fromkeys(cell.choices.values())],
            config=cell.sections() | axes | {"cell_id": cell.id, "attempt": attempt},
            mode=mode,
            reinit="finish_previous",
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,  # host, user, command line: nothing a reader of the numbers needs
                x_save_requirements=False,
            ),
        )
        self._run.define_metric("train/step")
        self._run.define_metric("train/*", step_metric="train/step")
        self._run.define_metric("train/loss", step_metric="train/step", summary="min")

    def log(self, step: int, **metrics: float) -> None:
        self._run.log({"train/step": step} | {f"train/{name}": value for name, value in metrics.items()})

    def finish(self, record: Record) -> None:
        import wandb

        self._run.summary.update(
            {"status": record.status, "reason": record.reason, **record.metrics}
            | {f"seconds/{phase.name}": phase.seconds for phase in record.phases}
            | {f"memory/{name}_bytes": size for name, size in record.memory_breakdown.items()}
        )
        self._run.config.update({"environment": record.environment})
        self._run.tags = (*self._run.tags, record.status)
        if record.samples:
            columns: list[str | int] = ["prompt", "reference", "prediction", "base_prediction"]
            rows: list[Any] = [[getattr(sample, str(column)) for column in columns] for sample in record.samples]
            self._run.log({"samples": wandb.Table(columns=columns, data=rows)})
        self._run.finish(exit_code=0 if record.status in ("ok", "unsupported") else 1)
        self._run = None


def logged_in() -> bool:
    """Whether wandb has credentials; nothing is asked and nothing sent."""
    import wandb

    return wandb.login(prompt=False, verify=False)


class Shielded:
    """A tracker whose first failure is said once and ends its part; the cell goes on."""

    def __init__(self, inner: Tracker, name: str) -> None:
        self._inner, self._name, self._broken = inner, name, False

    def start(self, cell: Cell, *, attempt: int, sweep: str | None, runs_dir: Path) -> None:
        self._broken = False
        self._call("start", cell, attempt=attempt, sweep=sweep, runs_dir=runs_dir)

    def log(self, step: int, **metrics: float) -> None:
        self._call("log", step, **metrics)

    def finish(self, record: Record) -> None:
        self._call("finish", record)

    def _call(self, method: str, *arguments: Any, **named: Any) -> None:
        if self._broken:
            return
        try:
            getattr(self._inner, method)(*arguments, **named)
        except Exception as error:
            self._broken = True
            print(
                f"warning: tracker={self._name} failed in {method} ({type(error).__name__}: {error}); "
                "the record on disk is complete all the same",
                file=sys.stderr,
            )


_TRACKERS = ("wandb", "none")
STEP_METRICS = ("loss", "learning_rate", "gradient_norm", "tokens_per_second", "seconds", "tokens")


def open_tracker(section: Mapping[str, Any]) -> Tracker:
    """The tracker that the `tracker` group names.

    Raises:
        UserError: no such tracker.
    """
    name = str(section.get("name"))
    if name == "none":
        return NoTracker()
    if name == "wandb":
        return Shielded(WandbTracker(project=str(section["project"]), entity=section.get("entity")), name)
    raise UserError(f"tracker.name={name!r}: no such tracker{nearest(name, _TRACKERS) or '; use wandb or none'}")


def feed(tracker: Tracker, event: Mapping[str, Any]) -> None:
    """Pass one event of a running cell on to a tracker."""
    if event.get("event") == "step":
        tracker.log(event["step"], **{name: event[name] for name in STEP_METRICS if name in event})


def known_metric(name: str) -> bool:
    """Whether a metric's name is in the table, `base_` ones included."""
    return name.removeprefix("base_") in METRICS

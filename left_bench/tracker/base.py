"""What trackers are told, the same while a cell runs and when its record is told again."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from left_bench.spec.cell import fingerprint
from left_bench.spec.record import POLICY_FIELDS, Record

CURVE_METRICS = ("validation_loss", "tokens", "seconds", "joules")
SPENT = ("tokens", "seconds")
"""What a point of the curve had spent, below which it is drawn beside steps."""
# of a step's event as they are; its `tokens` are added up, for they are an axis
GIB = 2**30
STEP_METRICS = ("loss", "learning_rate", "gradient_norm", "tokens_per_second", "seconds", *POLICY_FIELDS)


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt at a cell: what a tracker makes a run of."""

    cell_id: str
    number: int
    """From 1."""
    choices: Mapping[str, str]
    """Group -> option."""
    config: Mapping[str, Any]
    """The resolved cell, section by section, with `seed`."""
    sweep: str | None
    launch: str | None
    """Which launch of the sweep (`launch_id`); with the cell and the number it makes the run's id."""
    run_dir: Path
    """Where the record, the adapter and the events lie."""

    @classmethod
    def of(cls, record: Record, *, run_dir: Path) -> Attempt:
        """The attempt that a record came of."""
        return cls(
            cell_id=record.cell_id,
            number=record.attempt,
            choices=record.choices,
            config=record.config,
            sweep=record.provenance.get("sweep"),
            launch=record.provenance.get("launch"),
            run_dir=run_dir,
        )

    @property
    def id(self) -> str:
        """`1f6c2a9b04-1-20260101T120000`: the cell's hash, the attempt and the launch.

        The launch is in it so that two machines that run the same cell do not overwrite each other's run.
        """
        identity = self.cell_id.rpartition("-")[2]
        return file_name("-".join([identity, str(self.number), *([self.launch] if self.launch else [])]))

    @property
    def name(self) -> str:
        """Short, to be read in a list: `lora · nf4 · s0`; what is not chosen (`none`) is left out.

        Runs may share it: their ids tell them apart.
        """
        chosen = [self.choices.get(group, "none") for group in ("peft", "quantization")]
        parts = [file_name(option) for option in chosen if option != "none"]
        return " · ".join([*parts, f"s{self.config.get('seed', 0)}"])

    @property
    def group(self) -> str | None:
        """Sweep and launch; None: a cell of its own."""
        return group_of(self.sweep, self.launch)

    @property
    def tags(self) -> list[str]:
        """The option of every group: `peft:lora`."""
        return [f"{group}:{option}" for group, option in self.choices.items()]

    def configuration(self) -> dict[str, Any]:
        """The resolved cell, flat `axis.<group>` beside it, and what the run is a part of."""
        axes = {f"axis.{group}": option for group, option in self.choices.items()}
        # not `sweep`: that is the name of W&B's own attribute, and a filter would take it for that
        part = {"cell_id": self.cell_id, "attempt": self.number, "sweep_name": self.sweep, "launch": self.launch}
        return dict(self.config) | axes | part


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A finished sweep: its table, its report and its plots."""

    sweep: str
    launch: str | None
    command: str
    columns: list[str]
    rows: list[list[str | float | None]]
    markdown: Path
    plots: list[Path]

    @property
    def id(self) -> str:
        """`report-<hash of the sweep's name>-<launch>`: the same when it is told again."""
        return file_name("-".join(["report", fingerprint(self.sweep), *([self.launch] if self.launch else [])]))

    @property
    def name(self) -> str:
        return f"report {self.sweep}"

    @property
    def group(self) -> str | None:
        return group_of(self.sweep, self.launch)


class Tracker(Protocol):
    """One run per cell attempt, and one for each finished sweep. A run that has the same id already is replaced."""

    def start(self, attempt: Attempt) -> None:
        """Open a run."""

    def log(self, step: int, *, time: float, **metrics: float) -> None:
        """Metrics of one optimizer step (from 1), at `time` in seconds since 1970."""

    def log_validation(self, step: int, *, time: float, **metrics: float) -> None:
        """A point of the curve along training: `validation_loss`, scores, and the `tokens`, `seconds` and `joules` so
        far."""

    def finish(self, record: Record) -> None:
        """Everything the record holds; closes the run."""

    def report(self, comparison: Comparison) -> None:
        """A run of its own that compares the cells of a sweep."""


@dataclass(frozen=True, kw_only=True)
class TrackerKind:
    """A tracker that can be chosen: how it is made, and what must be known before. Making one imports no package."""

    make: Callable[..., Tracker]
    """Called with `store=`, the runs folder below which local stores lie, and every setting by its name."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Setting -> what it is where nothing else is said."""
    packages: tuple[str, ...] = ()
    """Modules that must be installed."""
    extra: str | None = None
    """The extra of left_bench that installs them; None: they are installed by their own names."""


class NoTracker:
    """The null object: records on disk are all there is."""

    def start(self, attempt: Attempt) -> None:
        return None

    def log(self, step: int, *, time: float, **metrics: float) -> None:
        return None

    def log_validation(self, step: int, *, time: float, **metrics: float) -> None:
        return None

    def finish(self, record: Record) -> None:
        return None

    def report(self, comparison: Comparison) -> None:
        return None


class Feed:
    """Passes the events of a cell on to a tracker."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker, self._tokens = tracker, 0

    def event(self, event: Mapping[str, Any]) -> None:
        """A step is logged, with all tokens so far, and a point of the curve; other events are none of a tracker's."""
        if event.get("event") == "curve":
            results = {name: event[name] for name in CURVE_METRICS if event.get(name) is not None}
            at = event.get("time") or time.time()
            self._tracker.log_validation(event["step"], time=at, **results, **(event.get("scores") or {}))
        if event.get("event") != "step":
            return
        metrics = {name: event[name] for name in STEP_METRICS if name in event}
        if "peak_memory_bytes" in event:  # of the train phase so far
            metrics["memory_gib"] = event["peak_memory_bytes"] / GIB
        if "tokens" in event:
            self._tokens += event["tokens"]
            metrics["tokens"] = self._tokens
        self._tracker.log(event["step"], time=event.get("time") or time.time(), **metrics)


def curve_copies(metrics: Mapping[str, float]) -> list[tuple[str, float, str]]:
    """The qualities of a point of the curve once for each axis, as (name, value, axis): `validation_loss_over_tokens`.

    Charts of most trackers have one axis to a name.
    """
    qualities = {name: value for name, value in metrics.items() if name not in (*SPENT, "joules")}
    return [
        (f"{name}_over_{axis}", value, axis) for axis in SPENT if axis in metrics for name, value in qualities.items()
    ]


def launch_id(started_at: str) -> str:
    """`20260101T120000` of the launch's start in ISO 8601: it sorts, and fits into an id."""
    return started_at[:19].replace("-", "").replace(":", "")


def group_of(sweep: str | None, launch: str | None) -> str | None:
    return file_name("-".join([sweep, *([launch] if launch else [])])) if sweep else None


def file_name(text: str) -> str:
    """Trackers make folders and files of ids, and replace what is there; a record is text that nobody vouches for."""
    return re.sub(r"[^\w.+=@-]+", "_", text).lstrip(".") or "_"


def flat_environment(record: Record) -> dict[str, Any]:
    """`environment.machine.cpu`, `environment.versions.torch`, ...: the record's, which is an allow-list."""
    return {f"environment.{key}": value for key, value in _flat(record.environment)}


def summary_of(record: Record) -> dict[str, str | float]:
    """Every number of a record under one name each, with its status and reason; what is drawn of memory in GiB."""
    result: dict[str, str | float] = {"status": record.status, "reason": record.reason or ""}
    result |= record.metrics
    for phase in record.phases:
        result[f"seconds/{phase.name}"] = phase.seconds
        if phase.peak_memory_bytes is not None:
            result[f"peak_memory_gib/{phase.name}"] = phase.peak_memory_bytes / GIB
    if "peak_memory_bytes" in record.metrics:
        result["peak_memory_gib"] = record.metrics["peak_memory_bytes"] / GIB
    result |= {f"memory_gib/{part}": size / GIB for part, size in record.memory_breakdown.items()}
    for score in record.scores:
        known = {"value": score.value, "stderr": score.stderr, "base": score.base_value, "n": score.n}
        result |= {
            f"score/{score.task}/{score.metric}/{key}": value for key, value in known.items() if value is not None
        }
    return result


def numbers_of(record: Record) -> dict[str, float]:
    """The numbers of `summary_of`."""
    return {key: float(value) for key, value in summary_of(record).items() if not isinstance(value, str)}


SAMPLE_COLUMNS = ("prompt", "reference", "prediction", "base_prediction")


def sample_rows(record: Record) -> list[list[str | None]]:
    """The record's samples, a row each, in the order of `SAMPLE_COLUMNS`."""
    return [[getattr(sample, column) for column in SAMPLE_COLUMNS] for sample in record.samples]


def markdown_table(columns: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table of texts that may hold anything."""

    def line(cells: list[Any]) -> str:
        texts = ["" if cell is None else str(cell) for cell in cells]
        safe = [text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;") for text in texts]
        return "| " + " | ".join(" ".join(text.split()) for text in safe) + " |"

    return "\n".join([line(columns), "|" + " --- |" * len(columns), *(line(row) for row in rows)])


def ended_well(record: Record) -> bool:
    """Whether a run ends without an error: a refused cell is an answer, too."""
    return record.status in ("ok", "unsupported")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    result: list[tuple[str, Any]] = []
    for key, value in tree.items():
        result += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return result

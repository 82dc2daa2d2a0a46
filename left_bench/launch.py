"""From a composed configuration to records: one cell, or the cells of a sweep one after the other.

Hydra composes and carries the jobs; this module is what it calls. `Launch` looks at all cells of a sweep before the
first one runs and sums up after the last; `run_job` takes one of them through compatibility, isolation and tracking.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, ConfigDict

from left_bench.cell import GROUPS, Cell, fingerprint, slugify
from left_bench.device import find_device
from left_bench.errors import UserError
from left_bench.isolate import run_isolated
from left_bench.progress import say_end, watch
from left_bench.record import RECORD_NAME, Record, Status, read_record, write_atomically
from left_bench.rules import why_unsupported
from left_bench.tracker import Tracker, feed, open_tracker
from left_bench.worker import utc_now

SWEEPS_FOLDER = "sweeps"


class Settings(BaseModel):
    """What steers a launch and changes no result."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runs_dir: Path
    reports_dir: Path
    force: bool
    force_unsupported: bool
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


def run_job(config: DictConfig) -> str:
    """Hydra's task: run the composed cell, leave its record, return the status."""
    hydra: Any = HydraConfig.get()
    cell, settings = compose(config, hydra)
    number, total, sweep = 1, 1, None
    if hydra.mode is not None and hydra.mode.name == "MULTIRUN":
        sweep = sweep_name(hydra)
        path = settings.runs_dir / SWEEPS_FOLDER / f"{sweep}.json"
        total = len(json.loads(path.read_text(encoding="utf-8"))["cells"])
        number = int(hydra.job.num) + 1
    record = run_cell(cell, settings, overrides=list(hydra.overrides.task), number=number, total=total, sweep=sweep)
    return record.status


def run_cell(
    cell: Cell, settings: Settings, *, overrides: list[str], number: int = 1, total: int = 1, sweep: str | None = None
) -> Record:
    """Take one cell to its record; an `ok` record that is there already is kept."""
    run_dir = settings.runs_dir / cell.id
    previous = _previous(run_dir / RECORD_NAME)
    if previous is not None and previous.status == "ok" and not settings.force:
        say_end(previous, number=number, total=total, skipped=True)
        return previous
    attempt = previous.attempt + 1 if previous else 1
    tracker: Tracker = open_tracker(settings.tracker)
    tracker.start(cell, attempt=attempt, sweep=sweep, runs_dir=settings.runs_dir)
    refusal = None if settings.force_unsupported else why_unsupported(cell)
    if refusal is not None:
        record = _ended(cell, "unsupported", refusal)
    elif (wanting := _fetch_model(cell)) is not None:
        record = _ended(cell, "failed", wanting)
    else:
        with watch(cell, number=number, total=total) as view:

            def on_event(event: dict[str, Any]) -> None:
                view.event(event)
                feed(tracker, event)

            record = run_isolated(cell, run_dir, on_event=on_event)
    provenance = record.provenance | {"sweep": sweep, "overrides": overrides, "command": command_of(overrides)}
    record = record.model_copy(update={"attempt": attempt, "provenance": provenance})
    record.write(run_dir)
    tracker.finish(record)
    say_end(record, number=number, total=total)
    return record


def _fetch_model(cell: Cell) -> str | None:
    """Make the base model's files before the cell's clock starts; what is wrong when they cannot be had."""
    from left_bench.pretrained import model_folder

    try:
        model_folder(cell.model, dtype=cell.precision.weights_dtype)
    except (UserError, MemoryError, RuntimeError) as error:
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
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key not in ("hydra", "sweep")])
    try:
        plain: Any = OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key}: no value; give {error.full_key}=VALUE") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    choices = {group: str(hydra.runtime.choices[group]) for group in GROUPS}
    if _overridden(hydra, "model.name_or_path"):
        plain["model"], choices["model"] = _named_model(plain["model"])
    plain["hardware"] = plain["hardware"] | {"device": find_device(plain["hardware"]["device"])}
    settings = {name: plain.pop(name) for name in Settings.model_fields}
    unknown = sorted(set(plain) - {*GROUPS, "seed"})
    if unknown:
        raise UserError(f"{unknown[0]}: no such key; groups are {', '.join(GROUPS)}")
    return Cell.from_config(plain, choices=choices), Settings.model_validate(settings)


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
        with user_errors():
            cell, settings = compose(config, config.hydra)
            check_cell(cell)
            open_tracker(settings.tracker)

    def on_run_end(self, config: DictConfig, **_: Any) -> None:
        cell, settings = compose(config, config.hydra)
        _finish([cell.id], settings.runs_dir, report=None)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        with user_errors():
            composed = [compose(job, job.hydra) for job in jobs_of(config)]
            unlike = {fingerprint([cell.identity["model"], cell.identity["data"]]): cell for cell, _ in composed}
            for cell in unlike.values():
                check_cell(cell)
            settings = composed[0][1]
            open_tracker(settings.tracker)
            overrides = list(config.hydra.overrides.task)
            name = sweep_name(config.hydra)
            manifest = Manifest(
                name=name,
                command=command_of(overrides, multirun="sweep" not in config.hydra.runtime.choices),
                overrides=overrides,
                started_at=utc_now(),
                cells=list(dict.fromkeys(cell.id for cell, _ in composed)),
            )
            manifest.write(settings.runs_dir)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        runs_dir, reports_dir = Path(config.runs_dir), Path(config.reports_dir)
        path = runs_dir / SWEEPS_FOLDER / f"{sweep_name(config.hydra)}.json"
        manifest = Manifest.model_validate_json(path.read_text(encoding="utf-8"))
        manifest.finished_at = utc_now()
        manifest.write(runs_dir)
        _finish(manifest.cells, runs_dir, report=(manifest.name, reports_dir))


def jobs_of(config: DictConfig) -> list[DictConfig]:
    """Every job's configuration of a multirun, as Hydra's basic sweeper will compose them."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    loader = GlobalHydra.instance().config_loader()
    parameters = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(
        [*parameters, *config.hydra.overrides.task]
    )
    batches = BasicSweeper.split_arguments(overrides, None)
    return [loader.load_sweep_config(config, list(job)) for batch in batches for job in batch]


def sweep_name(hydra: DictConfig) -> str:
    """What names a sweep's manifest and report: Hydra's job name, which `cli` sets to the sweep's."""
    return slugify(str(hydra.job.name))


def command_of(overrides: Iterable[str], *, multirun: bool = False) -> str:
    """The command line that repeats a run or, where there is no sweep among the overrides, a multirun."""
    plain = [override.removeprefix("++") for override in overrides]
    return shlex.join(["left-bench", *(["-m"] if multirun else []), *plain])


class user_errors:
    """Turns a UserError into one line and exit code 2; Hydra would swallow it in a callback."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, UserError):
            print(f"left-bench: {error}", file=sys.stderr)
            raise SystemExit(2) from None


def _finish(cells: list[str], runs_dir: Path, *, report: tuple[str, Path] | None) -> None:
    """Print the summary, write the report, and leave with 1 when a cell ended other than ok or unsupported."""
    from left_bench.report import print_summary, write_report

    records = [record for cell in cells if (record := _previous(runs_dir / cell / RECORD_NAME)) is not None]
    print_summary(records)
    if report is not None:
        name, out = report
        print(f"report: {write_report(runs_dir, name=name, out=out)}")
    print(f"records: {runs_dir}/<cell>/{RECORD_NAME}")
    if len(records) < len(cells) or any(record.status not in ("ok", "unsupported") for record in records):
        raise SystemExit(1)


def _previous(path: Path) -> Record | None:
    if not path.exists():
        return None
    try:
        return read_record(path)
    except ValueError as error:
        print(f"warning: {error}; the cell is run again", file=sys.stderr)
        return None


def _overridden(hydra: DictConfig, key: str) -> bool:
    return any(override.lstrip("+").startswith(f"{key}=") for override in hydra.overrides.task)


def _named_model(section: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A model given by hub id or folder: the chosen option's wheel and architecture are not its."""
    name_or_path = str(section["name_or_path"])
    name = slugify(Path(name_or_path).name or name_or_path)
    return section | {"name": name, "wheel": None, "config": None, "weights": "pretrained"}, name_or_path

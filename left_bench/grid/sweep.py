"""The jobs of a sweep: listing them, and checking them against the launcher."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel

from left_bench.core.errors import UserError, nearest
from left_bench.core.files import write_atomically
from left_bench.grid.job_composer import JobComposer
from left_bench.processes.resources import SCHEDULERS
from left_bench.spec.cell import Cell, slugify
from left_bench.spec.record import METRICS, Record, find_metric

SWEEPS_FOLDER = "sweeps"


class Manifest(BaseModel):
    """`runs/sweeps/<name>.json`: the cells of a sweep, in order."""

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


def command_of(overrides: Iterable[str], *, multirun: bool = False, config_dir: str | None = None) -> str:
    """The command line that repeats a run or, if no sweep is among the overrides, a multirun."""
    plain = [override.removeprefix("++") for override in overrides]
    folder = ["--config-dir", config_dir] if config_dir else []
    return shlex.join(["left-bench", *folder, *(["-m"] if multirun else []), *plain])


def config_dir_of(hydra: DictConfig) -> str | None:
    """The user's `--config-dir`, relative to the command's working directory if it is below it."""
    results = [str(source.path) for source in hydra.runtime.config_sources if source.provider == "command-line"]
    if not results:
        return None
    below = Path(results[0]).is_relative_to(hydra.runtime.cwd)
    return str(Path(results[0]).relative_to(hydra.runtime.cwd)) if below else results[0]


def jobs_of(config: DictConfig, loader: ConfigLoader | None = None) -> Iterator[tuple[list[str], DictConfig]]:
    """The overrides and configuration of every job of a multirun, composed one after the other.

    A search's jobs are not known in advance: one represents them, with the lower end of every range.

    Args:
        loader: Hydra's loader that composed `config`; None: the one open in this process.

    Raises:
        HydraException: an unknown option or key.
        UserError: a range instead of a list of values.
    """
    loader = loader or GlobalHydra.instance().config_loader()
    composer = JobComposer(loader, config)
    for job in overrides_of_jobs(config, loader):
        yield job, composer.compose(job)


def overrides_of_jobs(config: DictConfig, loader: ConfigLoader) -> Iterator[list[str]]:
    """The overrides of every job: all combinations of a grid's values; the first parameter varies slowest."""
    parameters = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides([*parameters, *config.hydra.overrides.task])
    if searches(config.hydra):
        yield representative(parsed)
        return
    values: dict[str, list[str]] = {}
    for argument in parsed:
        key = argument.get_key_element()
        if not argument.is_sweep_override():
            values[key] = [f"{key}={argument.get_value_element_as_str()}"]
        elif argument.is_discrete_sweep():
            values[key] = [f"{key}={value}" for value in argument.sweep_string_iterator()]
        else:
            raise UserError(
                f"{argument.input_line}: ranges need a search; list the values, or add hydra/sweeper=optuna"
            )
    yield from map(list, itertools.product(*values.values()))


def representative(overrides: Iterable[Override]) -> list[str]:
    """One job that represents a search: the lower end of every range, the first of every choice."""
    chosen: dict[str, str] = {}
    for override in overrides:
        key, value = override.get_key_element(), override.value()
        if isinstance(value, IntervalSweep):
            chosen[key] = f"{key}={value.start}"
        elif override.is_sweep_override():
            chosen[key] = f"{key}={next(override.sweep_string_iterator())}"
        else:
            chosen[key] = f"{key}={override.get_value_element_as_str()}"
    return list(chosen.values())


def check_launcher(config: DictConfig) -> None:
    """Refuse, before anything runs, settings that the launcher or the search cannot use.

    Raises:
        UserError: names the key and the fix.
    """
    launcher, hydra = launcher_of(config.hydra), config.hydra
    device = str(OmegaConf.select(config, "hardware.device"))
    if device == "auto" and runs_elsewhere(hydra):
        raise UserError(
            f"hardware.device=auto: hydra/launcher={launcher} may run the cells on other machines; "
            "name the device with hardware=cpu or hardware=cuda"
        )
    if (
        launcher == "ray"
        and device not in ("auto", "cpu")
        and not OmegaConf.select(hydra, "launcher.ray.remote.num_gpus")
    ):
        raise UserError(
            f"hardware.device={device}: Ray hides GPUs from tasks that request none; "
            "add +hydra.launcher.ray.remote.num_gpus=1"
        )
    if searches(hydra):
        objective, direction = str(config.objective), hydra.sweeper.get("direction")
        metric = find_metric(objective)
        if metric is None:
            raise UserError(f"objective={objective}: no such metric{nearest(objective, METRICS)}")
        wanted = {"lower": "minimize", "higher": "maximize"}.get(metric.better)
        if wanted is not None and str(getattr(direction, "name", direction)) != wanted:
            raise UserError(f"objective={objective}: {metric.better} is better; set hydra.sweeper.direction={wanted}")


def check_objective(cell: Cell, objective: str) -> None:
    """Refuse a search for a metric that its cells will not have.

    Raises:
        UserError: random weights are not scored.
    """
    metric = find_metric(objective)
    if cell.model.weights == "random" and metric is not None and metric.kind == "quality":
        raise UserError(f"objective={objective}: random weights are not scored; search for objective=train_loss")


def best_trial(records: Sequence[Record], *, objective: str) -> str:
    """A search's best trial in one line: its choices, its value, and how many trials had no value."""
    scored = [record for record in records if record.status == "ok" and objective in record.metrics]
    without = f"{len(records) - len(scored)} of {len(records)} without a value"
    if not scored:
        return f"best: none; {without}"
    metric = find_metric(objective)
    pick = max if metric is not None and metric.better == "higher" else min
    best = pick(scored, key=lambda item: item.metrics[objective])
    overrides = [list(map(str, record.provenance.get("overrides", []))) for record in records]
    shared = set(overrides[0]).intersection(*overrides[1:])
    chosen = [
        item.lstrip("+") for item in best.provenance.get("overrides", []) if len(records) == 1 or item not in shared
    ]
    return f"best: {' '.join(chosen)} ({objective} {best.metrics[objective]:.6g}); {without}"


def quiet_optuna() -> None:
    """Show only Optuna's warnings."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)


def launcher_of(hydra: DictConfig) -> str:
    """The launcher's option: `basic`, `joblib`, `submitit_slurm`, ..."""
    return str(hydra.runtime.choices.get("hydra/launcher", "basic"))


def searches(hydra: DictConfig) -> bool:
    """Whether the sweeper chooses jobs based on earlier results."""
    return str(hydra.runtime.choices.get("hydra/sweeper", "basic")) != "basic"


def runs_elsewhere(hydra: DictConfig) -> bool:
    """Whether the launcher may run the cells on other machines."""
    launcher = launcher_of(hydra)
    here = launcher == "ray" and OmegaConf.select(hydra, "launcher.ray.init.address") in (None, "local")
    return launcher in SCHEDULERS and not here


def sweep_name(hydra: DictConfig) -> str:
    """The name of a sweep's manifest and report: Hydra's job name, which `cli` sets to the sweep's."""
    return slugify(str(hydra.job.name))

"""`+tune=`: what is tried for each method of a sweep before its comparison, and the overrides that make a trial."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from left_bench.core.errors import UserError, nearest
from left_bench.data.rows import split_rows
from left_bench.grid.sweep import searches
from left_bench.spec.cell import Cell, fingerprint

# Keys of a method's configuration that say how large it is, and its scale, which follows a rank.
_SIZES = (("r",), ("init_r", "target_r"), ("num_virtual_tokens",), ("adapter_len",), ("n_frequency",))
_SCALES = ("lora_alpha", "alpha")
_RANKS = _SIZES[:2]


class Tuning(BaseModel):
    """The section `tune`, an option of conf/tune."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    trials: int = Field(ge=2, le=1000)
    """For each method."""
    lower: float = Field(gt=0)
    """The space's lower end, as a multiple of the method's own learning rate."""
    upper: float = Field(gt=0)
    sizes: list[float] = Field(default_factory=list)
    """Multiples of the method's own rank or number of tokens; empty: its own alone."""
    sampler: Literal["tpe", "random", "qmc"] = "tpe"
    """Of Optuna, for the trials after those that are spread evenly over the space."""
    pruner: Literal["halving", "hyperband"] | None = None
    """Of Optuna; each rung is a run of its own with more steps than the one before. None: all trials take all steps."""
    reduction: int = Field(default=3, ge=2, le=100)
    rungs: int = Field(default=3, ge=2, le=10)
    widening: int | None = Field(default=None, ge=0, le=1000)
    """Further trials beyond an end at which the best lies; None: half of `trials`."""
    seed: int = Field(default=1000, ge=0, lt=2**32)
    """Of every trial."""

    @property
    def widening_trials(self) -> int:
        return self.trials // 2 if self.widening is None else self.widening

    def steps(self, whole: int) -> list[int]:
        """Optimizer steps of a trial's rungs; the last has them all."""
        if self.pruner is None:
            return [whole]
        return [max(1, whole // self.reduction ** (self.rungs - 1 - rung)) for rung in range(self.rungs)]


class Point(NamedTuple):
    """What a trial tries."""

    rate: float
    size: float = 1.0
    """A multiple of the method's own."""


def tuning_of(config: DictConfig) -> Tuning | None:
    """The section `tune` of a composed configuration; None where nothing is tuned.

    Raises:
        UserError: a key or a value is not allowed.
    """
    if "tune" not in config:
        return None
    try:
        plain: Any = OmegaConf.to_container(config.tune, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"tune: {str(error).splitlines()[0]}") from error
    if not isinstance(plain, dict) or "name" not in plain:
        given = f"tune.{next(iter(plain))}" if isinstance(plain, dict) and plain else f"tune={plain}"
        raise UserError(f"{given}: nothing is tuned yet; choose what is with +tune=rates")
    try:
        result = Tuning.model_validate(plain)
    except ValidationError as error:
        detail = error.errors()[0]
        key, *inner = map(str, detail["loc"])
        known = Tuning.model_fields
        if detail["type"] == "extra_forbidden":
            hint = nearest(key, known) or f"; tune has {', '.join(known)}"
            raise UserError(f"tune.{key}: no such key{hint}") from error
        of_list = f"[{inner[0]}]" if inner else ""
        told = detail["msg"][0].lower() + detail["msg"][1:]
        raise UserError(f"tune.{key}{of_list}={detail['input']!r}: {told}") from error
    if result.lower >= result.upper:
        raise UserError(
            f"tune.lower={result.lower:g}: the space ends at tune.upper={result.upper:g}, which is not above it; they "
            "are multiples of each method's own learning rate, such as tune.lower=0.1 tune.upper=10"
        )
    if any(size <= 0 for size in result.sizes):
        raise UserError(f"tune.sizes={result.sizes}: multiples of a method's own size are above 0, such as [0.5,1,2]")
    return result


def check_tuning(tuning: Tuning, cells: Sequence[Cell], config: DictConfig) -> None:
    """Refuse, before anything is written, what cannot be tuned.

    Args:
        cells: of the comparison.

    Raises:
        UserError: naming the key and the fix.
    """
    named = f"+tune={tuning.name}"
    if searches(config.hydra):
        raise UserError(f"{named}: hydra/sweeper= already searches; leave one of the two out")
    parameters = [str(key) for key in OmegaConf.select(config.hydra, "sweeper.params") or {}]
    for given in (*config.hydra.overrides.task, *parameters):
        key = str(given).lstrip("+").partition("=")[0]
        if key == "training.learning_rate":
            raise UserError(
                f"{str(given).lstrip('+')}: {named} looks for each method's learning rate; leave it out, or move the "
                "space with peft.learning_rate="
            )
    for cell in cells:
        if cell.model.weights == "random":
            raise UserError(f"{named}: model.weights=random is not scored, so there is nothing to tune by")
        if cell.seed == tuning.seed:
            raise UserError(
                f"tune.seed={tuning.seed}: the comparison has a cell with this seed; give the trials one of their own"
            )
        if tuning.pruner is not None and cell.training.max_seconds is not None:
            raise UserError(
                f"tune.pruner={tuning.pruner}: its rungs are optimizer steps, and training.max_seconds="
                f"{cell.training.max_seconds:g} ends training by the clock; leave one of the two out"
            )
    for data in {cell.data.model_dump_json(): cell.data for cell in cells}.values():
        if data.validation_rows == 0 and data.validation_path is None:
            raise UserError(
                f"data.validation_rows=0: {named} chooses by the loss on validation rows; give some, as in "
                "data.validation_rows=64"
            )
        of_files = data.image_column is None and (data.path is not None or data.source == "jsonl")
        if of_files and not split_rows(data).validation:
            raise UserError(
                f"data.path={data.path}: {named} chooses by the loss on validation rows, and there are none; give "
                "data.validation_rows=64 or data.validation_path=FILE"
            )


def method_of(cell: Cell) -> str:
    """The same for cells that differ in the seed alone: they are one method, and are tuned together."""
    return fingerprint({key: value for key, value in cell.identity.items() if key != "seed"})


def is_tuning(override: str) -> bool:
    """Whether an override is of the tuning itself, and of no cell."""
    key = override.lstrip("+~").partition("=")[0]
    return key == "tune" or key.startswith("tune.")


def sizes_of(cell: Cell, tuning: Tuning) -> list[float]:
    """The multiples that give this method different sizes; its own alone where it has none."""
    keys = _size_keys(cell)
    if not keys or not tuning.sizes:
        return [1.0]
    made = {tuple(_scaled(cell.peft.config[key], size) for key in keys): size for size in tuning.sizes}
    return sorted(made.values())


def chosen_overrides(cell: Cell, point: Point) -> Iterator[str]:
    """What gives a method this learning rate and size; a scale (alpha) follows a rank, their ratio stays.

    Args:
        cell: of the method as it is by itself.
    """
    yield f"++training.learning_rate={point.rate!r}"
    if point.size == 1.0:
        return
    keys = _size_keys(cell)
    scales = [key for key in _SCALES if keys in _RANKS and _is_number(cell.peft.config.get(key))]
    for key in (*keys, *scales):
        yield f"++peft.config.{key}={_scaled(cell.peft.config[key], point.size)}"


def trial_overrides(overrides: Iterable[str], cell: Cell, tuning: Tuning, point: Point, *, steps: int) -> list[str]:
    """The overrides of one trial: those of a cell of the method, whatever its seed, with what is tried.

    Early stopping keeps its own points of the curve, for it is a part of the recipe; else the loss is taken once.
    """
    kept = [item for item in overrides if item.lstrip("+").partition("=")[0] != "seed"]
    made = [*kept, f"seed={tuning.seed}", *chosen_overrides(cell, point), "++eval.trial=true"]
    if cell.training.stop_patience is None:
        made += ["++eval.points=1", "++eval.every=null"]
    made += ["++eval.curve_scores=false"] if cell.eval.curve_scores else []
    return made + ([f"++training.steps={steps}"] if steps != cell.training.steps else [])


def _size_keys(cell: Cell) -> tuple[str, ...]:
    config: Mapping[str, Any] = cell.peft.config
    return next((keys for keys in _SIZES if all(_is_number(config.get(key)) for key in keys)), ())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _scaled(value: float, size: float) -> int:
    return max(1, round(value * size))

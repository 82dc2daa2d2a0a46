"""Turns Hydra's composed configuration into a cell and settings, and refuses invalid ones before anything runs."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from left_bench.core.errors import UserError
from left_bench.core.paths import config_root
from left_bench.data.files import with_content
from left_bench.data.rows import with_shape
from left_bench.evaluation.harness import with_content as tasks_with_content
from left_bench.evaluation.judge import check as check_judge
from left_bench.evaluation.scorer import with_content as scorer_with_content
from left_bench.evaluation.scorer import with_reward_content
from left_bench.grid.class_arguments import check_arguments
from left_bench.grid.options import OnlyHydraKnows, default_options, option_folders, read_option, shipped_folders
from left_bench.grid.rules import check_extras
from left_bench.measure.auto_precision import resolved_choices
from left_bench.measure.device import find_device
from left_bench.pretrained import with_content as model_with_content
from left_bench.spec.cell import GROUPS, Cell, Data, is_task_file, slugify
from left_bench.spec.redact import refuse_secrets
from left_bench.worker.earlier_cell import with_earlier

_NO_CELLS = ("hydra", "sweep", "tune")
"""Keys of a configuration that are of the launch, and of no cell."""


class Settings(BaseModel):
    """Settings of a launch that do not affect results."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runs_dir: Path
    reports_dir: Path
    force: bool
    force_unsupported: bool
    objective: str = "eval_loss"
    """The metric that a search (Optuna) optimizes."""
    at_once: int | None = Field(default=None, ge=1)
    """Cells that run at the same time on one machine; None: from the launcher's settings."""
    share_devices: bool = False
    """Let parallel cells use the same accelerator."""
    tracker: dict[str, Any]
    price_per_kwh: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Price of energy, for the costs in a sweep's report."""
    price_per_hour: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Price of an accelerator's time, or the machine's if it has none, for the costs in the report."""


def compose(config: DictConfig, hydra: DictConfig, *, typed: Sequence[str] | None = None) -> tuple[Cell, Settings]:
    """The cell and the settings of a composed configuration; rooms below do not see OmegaConf.

    Args:
        typed: the overrides typed by the user. Keys that are only allowed on the command line must be among them,
            because a file may write into Hydra's list of overrides. None: only Hydra's list is checked.

    Raises:
        UserError: a value is missing or not allowed.
    """
    try:
        plain: dict[str, Any] = {key: _plain(config, key) for key in map(str, config) if key not in _NO_CELLS}
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key}: no value; give {error.full_key}=VALUE") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    absent = [group for group in GROUPS if group not in hydra.runtime.choices]
    if absent and any(item.startswith(f"{absent[0]}=[") for item in hydra.overrides.task):
        raise UserError(
            f"{absent[0]}=[...]: a cell has only one; for one cell of each, separate them by commas, {absent[0]}=A,B"
        )
    if absent:
        raise UserError(f"~{absent[0]}: a cell needs every group; choose another option with {absent[0]}=NAME")
    choices = {group: str(hydra.runtime.choices[group]) for group in GROUPS}
    if (whole := _whole_architecture(hydra)) is not None:
        plain["model"]["config"] = whole
    overridden = _overridden(hydra, "model.name_or_path")
    if overridden:
        _check_alone(hydra, str(plain["model"]["name_or_path"]))
    if overridden or _renamed(plain["model"], choices["model"], hydra):
        plain["model"], choices["model"] = _named_model(plain["model"], overridden=overridden)
    if plain["model"].get("trust_remote_code") and not _on_command_line(hydra, "model.trust_remote_code", typed):
        raise UserError(
            "model.trust_remote_code=true is set in a file; a model's code is only run if that is set on the command "
            "line: give model.trust_remote_code=true there"
        )
    settings = {name: plain.pop(name) for name in Settings.model_fields}
    unknown = sorted(set(plain) - {*GROUPS, "seed"})
    if unknown:
        raise UserError(f"{unknown[0]}: no such key; groups are {', '.join(GROUPS)}")
    try:
        cell, read = _on_this_machine(plain, choices), Settings.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{'.'.join(map(str, first['loc']))}={first['input']!r}: {first['msg'].lower()}") from error
    architecture = [item.lstrip("+").partition("=")[0] for item in hydra.overrides.task if ".config." in item]
    architecture = [key for key in architecture if key.startswith("model.config.")]
    if architecture and cell.model.weights != "random":
        raise UserError(
            f"{architecture[0]}: pretrained weights have their own architecture; combine it with model.weights=random"
        )
    if not cell.data.hold_out:
        raise UserError(
            "data.hold_out=false: without held-out rows a cell has no score to compare; `left-bench train CELL "
            "--all-rows` trains a finished cell's recipe on all rows, in a separate folder"
        )
    _check_only_typed(cell, hydra, typed)
    cell = with_earlier(_with_contents(cell, option_folders(hydra)), read.runs_dir)
    check_judge(cell)
    check_arguments(cell)
    check_extras(cell)
    refuse_secrets(overrides=hydra.overrides.task, config=cell.model_dump_json())
    return cell, read


def compose_option(group: str, option: str) -> Cell:
    """The default cell with one shipped option chosen: what `left-bench GROUP=OPTION` runs, composed without Hydra.

    Raises:
        UserError: a value is missing or not allowed.
        OnlyHydraKnows: the files use features that only Hydra understands.
    """
    default, chosen = default_options(), read_option(group, option, shipped_folders())
    sections: dict[str, Any] = default.sections | chosen.sections
    referring = [name for name, section in sections.items() if "${" in str(section)]
    if "???" in str(chosen.sections):
        key = min(OmegaConf.missing_keys(OmegaConf.create(chosen.sections)))
        raise UserError(f"{key}: no value; give {key}=VALUE")
    if referring:
        whole = OmegaConf.create(sections)
        try:
            sections |= {name: OmegaConf.to_container(whole[name], resolve=True) for name in referring}
        except OmegaConfBaseException as error:
            raise OnlyHydraKnows(str(error)) from error
    return _on_this_machine({**sections, "seed": 0}, default.choices | chosen.choices)


def _on_this_machine(plain: Mapping[str, Any], choices: Mapping[str, str]) -> Cell:
    """The cell of resolved sections, with device and precision of this machine if they are `auto`."""
    hardware = plain["hardware"] | {"device": find_device(plain["hardware"]["device"])}
    return Cell.from_config({**plain, "hardware": hardware}, choices=resolved_choices(choices, plain["precision"]))


def _with_contents(cell: Cell, folders: Sequence[Path]) -> Cell:
    """The cell with fingerprints of the files it names: model, rows, scorer and tasks.

    Args:
        folders: of options, searched for scorers and tasks that are not in the working directory.
    """
    cell = cell.model_copy(update={"model": model_with_content(cell.model)})
    cell = tasks_with_content(with_reward_content(scorer_with_content(cell, folders), folders), folders)
    if cell.data.path is not None or cell.data.source == "hub":
        cell = cell.model_copy(update={"data": with_shape(with_content(cell.data))})
    return cell


def check_same_files(cell: Cell) -> None:
    """Refuse a cell that was composed on another machine if the files that it names differ here.

    Raises:
        UserError: they differ.
    """
    if _with_contents(cell, ()).id != cell.id:
        raise UserError(
            f"this job's cell {cell.id} is not one of the sweep's: this machine resolves it differently from the one "
            "that started the sweep (files or version); use the same files and the same left-bench on both"
        )


def _check_only_typed(cell: Cell, hydra: DictConfig, typed: Sequence[str] | None) -> None:
    """Refuse a scorer, a task file or a judge that is set in a file.

    Code to run and addresses to send rows to are only accepted on the command line, because files of options may come
    from somebody else.

    Raises:
        UserError: names the key.
    """
    files = [task for task in cell.eval.tasks if is_task_file(task)]
    alone = (
        ("eval.scorer", cell.eval.scorer, "your own code is run"),
        ("training.reward", cell.training.reward, "your own code is run"),
        ("eval.tasks", f"[{','.join(files)}]" if files else None, "a task's file, which may contain code, is used"),
        ("eval.judge", cell.eval.judge, "rows and answers are sent"),
        ("eval.judge_key_from", cell.eval.judge_key_from, "a key is sent"),
    )
    for key, value, what in alone:
        if value is not None and not _on_command_line(hydra, key, typed):
            raise UserError(
                f"{key}={value} is set in a file; {what} only if set on the command line: give {key}={value} there"
            )


def _whole_architecture(hydra: DictConfig) -> dict[str, Any] | None:
    """`model.config={model_type: ...}` replaces the whole architecture; Hydra would merge it into the previous one.

    Single keys given after it modify it; None if no whole architecture is given.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    results: dict[str, Any] | None = None
    for override in OverridesParser.create().parse_overrides(list(hydra.overrides.task)):
        value = override.value() if override.key_or_group.startswith("model.config") else None
        if override.key_or_group == "model.config" and isinstance(value, dict) and "model_type" in value:
            results = {str(key): part for key, part in value.items()}
        elif results is not None and override.key_or_group.startswith("model.config."):
            inner = results
            *way, last = override.key_or_group.split(".")[2:]
            for step in way:
                inner = inner.setdefault(step, {})
            inner[last] = value
    return results


def _plain(config: DictConfig, key: str) -> Any:
    value = config[key]
    return OmegaConf.to_container(value, resolve=True, throw_on_missing=True) if OmegaConf.is_config(value) else value


def _overridden(hydra: DictConfig, key: str) -> bool:
    return any(override.lstrip("+").startswith(f"{key}=") for override in hydra.overrides.task)


def _on_command_line(hydra: DictConfig, key: str, typed: Sequence[str] | None) -> bool:
    """Whether the user gave the key on the command line, not a file of options or a sweep's parameters."""
    parameters = OmegaConf.select(hydra, "sweeper.params") or {}
    if typed is not None and not any(override.lstrip("+").startswith(f"{key}=") for override in typed):
        return False
    return _overridden(hydra, key) and not any(str(parameter).lstrip("+") == key for parameter in parameters)


def _named_model(section: dict[str, Any], *, overridden: bool) -> tuple[dict[str, Any], str]:
    """A model by hub id or folder, `overridden` on the command line or named in the user's own file.

    The chosen option's wheel and architecture do not apply to it.
    """
    name_or_path = str(section["name_or_path"])
    name = {"name": slugify(Path(name_or_path).name or name_or_path)}
    if not overridden and section.get("weights") == "random":
        return section | name, name_or_path
    return section | name | {"wheel": None, "config": None, "weights": "pretrained"}, name_or_path


def _check_alone(hydra: DictConfig, name_or_path: str) -> None:
    """Refuse overrides of weights or architecture that contradict the named model."""
    for override in (item.lstrip("+~") for item in hydra.overrides.task):
        if override.startswith(("model.weights=", "model.config")) and override != "model.weights=pretrained":
            raise UserError(
                f"{override}: model.name_or_path={name_or_path} names weights with their own architecture; "
                "leave one of the two out"
            )


def _renamed(section: dict[str, Any], option: str, hydra: DictConfig) -> bool:
    """Whether a sweep or recipe names another model than the option's file."""
    in_file = _name_in_file(option, option_folders(hydra))
    return in_file is not None and section.get("name_or_path") != in_file


@functools.cache
def _name_in_file(option: str, folders: tuple[Path, ...]) -> str | None:
    for folder in folders:
        path = folder / "model" / f"{option}.yaml"
        if path.is_file():
            name: str | None = OmegaConf.select(OmegaConf.load(path), "name_or_path")
            return name
    return None


def ignored_choices(config: DictConfig) -> Iterator[str]:
    """Notes about values of options chosen on the command line that the sweep, which takes precedence, overrides."""
    overrides = [item.lstrip("+") for item in config.hydra.overrides.task]
    set_directly = {argument.partition("=")[0] for argument in overrides}
    for group, _, option in (argument.partition("=") for argument in overrides):
        path = config_root() / "conf" / group / f"{option}.yaml"
        if group not in GROUPS or not path.is_file():  # several options, or the user's own
            continue
        values: Any = OmegaConf.to_container(OmegaConf.load(path))
        for key, value in values.items():
            result = OmegaConf.select(config, f"{group}.{key}", throw_on_resolution_failure=False)
            if isinstance(value, (int, float)) and result != value and f"{group}.{key}" not in set_directly:
                yield (
                    f"note: {group}.{key}={result} comes from the sweep, not the {value} of {group}={option}; "
                    f"give {group}.{key}={value} to change it"
                )


def check_cell(cell: Cell) -> None:
    """Refuse, before anything runs, what is wrong and can be checked without loading a model.

    Raises:
        UserError: names the key, the value and the fix.
    """
    from left_bench.data import load_rows
    from left_bench.data.rows import check_generated
    from left_bench.model.positions import check_positions
    from left_bench.pretrained import check_model

    check_model(cell.model)
    check_positions(cell)
    if cell.training.sft_steps and cell.training.objective == "sft":
        raise UserError(
            f"training.sft_steps={cell.training.sft_steps} come before preference tuning; set training.objective=dpo "
            "(training=dpo, kto or orpo), or leave them out"
        )
    if cell.data.second_column is not None and not cell.task.reads_pairs:
        raise UserError(
            f"data.second_column={cell.data.second_column}: model.task={cell.model.task} reads one text; leave it out, "
            "and put both columns in data.template"
        )
    if cell.data.image_column is None and (cell.data.path is not None or cell.data.source == "jsonl"):
        load_rows(cell.data)
    elif cell.data.source == "reasoning_gym" and not _as_shipped(cell):
        check_generated(cell.data)  # not for shipped options, which are tested: importing the library takes a second


def _as_shipped(cell: Cell) -> bool:
    path = config_root() / "conf" / "data" / f"{cell.choices.get('data')}.yaml"
    shipped: Any = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else {}
    deciding = ("task", "config", "template", "prompt_column", "answer_column")
    return all(getattr(cell.data, key) == shipped.get(key, Data.model_fields[key].default) for key in deciding)


def check_folder(key: str, folder: Path) -> None:
    """Refuse a folder that cannot be created or written.

    Raises:
        UserError: names the key, the part of the path that prevents it, and the fix.
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
        raise UserError(f"{where}: no permission to write to {there}; give a writable folder with {key}=")

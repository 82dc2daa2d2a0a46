"""`left-bench list`: every group's options, what each one is, and whether this machine can run it.

Hydra takes 50 ms to compose a cell, and there are over a hundred options. So the default cell's sections are read once,
an option's section from its file, and the rules are asked. Only what a file says in Hydra's own language beyond the
plain forms (`defaults` naming a sibling, or overriding another group) is left to Hydra.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape

from left_bench.core.errors import UserError
from left_bench.core.paths import config_root
from left_bench.grid import command_line
from left_bench.grid.rules import why_unsupported
from left_bench.measure.auto_precision import AUTO, fast_precision, resolved_choices
from left_bench.measure.device import find_device
from left_bench.spec.cell import GROUPS, Cell

_OVERRIDE = re.compile(r"override /(\w+)@_global_\.\1")  # as in `override /optimizer@_global_.optimizer: loraplus`


class Option(NamedTuple):
    """What choosing an option sets: its group's section and those of the groups it overrides."""

    choices: dict[str, str]
    sections: dict[str, dict[str, Any]]
    """As the files have them: `${...}` still stands."""


class OnlyHydraKnows(Exception):
    """A file uses more of Hydra's language than is read here."""


def main(argv: list[str]) -> int:
    """Print all groups, or the ones named; with `--json` for a program."""
    as_json, argv = "--json" in argv, [name for name in argv if name != "--json"]
    groups = ("sweep", "recipe", *GROUPS, "tracker")
    for name in argv:
        if name not in groups:
            raise UserError(f"unknown group '{name}'; groups are {', '.join(groups)}")
    command_line.register_resolvers()
    if as_json:
        found = [_as_data(group, option) for group in argv or groups for option in command_line.options(group)]
        print(json.dumps(found, indent=1))
        return 0
    console = Console()
    for group in argv or groups:
        console.print(f"[bold]{group}[/]")
        for option in command_line.options(group):
            told = escape(summary_of(_file(group, option)) + _here(group, option))
            text = f"  {option:24}{_verdict(group, option)}{told}"
            console.print(text, soft_wrap=True, highlight=False)
    return 0


def _as_data(group: str, option: str) -> dict[str, str | bool | None]:
    """An option; `runs_here` is null where nothing is to be tried (sweeps, recipes, trackers)."""
    reason = _why_not(group, option) if group in GROUPS else None
    return {
        "group": group,
        "option": option,
        "summary": summary_of(_file(group, option)) + _here(group, option),
        "runs_here": reason is None if group in GROUPS else None,
        "reason": reason,
    }


def _here(group: str, option: str) -> str:
    """What an option that depends on the machine stands for on this one."""
    if (group, option) != ("precision", AUTO):
        return ""
    chosen = fast_precision("auto")
    return f" Here: {chosen.option} ({chosen.why})"


def summary_of(path: Path) -> str:
    """The first comment of a YAML file that is not Hydra's package line: what the option is."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and not line.startswith("# @"):
            return line.removeprefix("#").strip()
    return ""


def composed_cell(group: str, option: str) -> Cell:
    """The default cell with one option chosen: what `left-bench GROUP=OPTION` runs.

    Raises:
        UserError: a value is missing or not allowed.
        OnlyHydraKnows: the files say something that only Hydra understands.
    """
    default, chosen = _default_options(), _read(group, option)
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
    sections["hardware"] = sections["hardware"] | {"device": find_device(sections["hardware"]["device"])}
    choices = resolved_choices(default.choices | chosen.choices, sections["precision"])
    return Cell.from_config({**sections, "seed": 0}, choices=choices)


@cache
def _default_options() -> Option:
    choices: dict[str, str] = {}
    sections: dict[str, dict[str, Any]] = {}
    for one in _load(config_root() / "conf" / "config.yaml")["defaults"]:
        for group, name in one.items() if isinstance(one, dict) else ():
            if group in GROUPS:
                option = _read(group, name)
                choices |= option.choices
                sections |= option.sections
    return Option(choices, sections)


@cache
def _read(group: str, name: str) -> Option:
    """An option from its file; values stand over those of the options it is made of, as Hydra has them."""
    own = _load(_file(group, name))
    below = own.pop("defaults", [])
    choices = {group: name}
    sections: dict[str, dict[str, Any]] = {group: own}
    for one in reversed(below):
        ((key, value),) = one.items() if isinstance(one, dict) else [(one, None)]
        override = _OVERRIDE.fullmatch(key)
        if value is None and key != "_self_":
            sibling = _read(group, key)
            merged: Any = OmegaConf.to_container(OmegaConf.merge(sibling.sections[group], sections[group]))
            sections = sibling.sections | sections | {group: merged}
            choices = sibling.choices | choices
        elif override and value is not None:
            other = _read(override[1], value)
            choices, sections = other.choices | choices, other.sections | sections
        else:
            raise OnlyHydraKnows(f"{group}/{name}: {key}")
    return Option(choices, sections)


def _load(path: Path) -> dict[str, Any]:
    if "# @package" in path.read_text(encoding="utf-8"):
        raise OnlyHydraKnows(str(path))
    found: Any = OmegaConf.to_container(OmegaConf.load(path))  # its loader: plain YAML takes `1e-3` for a word
    return found


def _file(group: str, option: str) -> Path:
    folder = config_root() / ("sweeps" if group == "sweep" else f"conf/{group}")
    return folder / f"{option}.yaml"


def _verdict(group: str, option: str) -> str:
    """`runs here`, or `not here` with the rule that refuses the default cell with this option."""
    if group not in GROUPS:
        return ""
    reason = _why_not(group, option)
    return "[green]runs here[/]  " if reason is None else f"[yellow]not here[/]   ({escape(reason)}) "


def _why_not(group: str, option: str) -> str | None:
    """Why the default cell with this option does not run here; None: it does."""
    try:
        try:
            cell = composed_cell(group, option)
        except OnlyHydraKnows:
            cell = _composed(group, option)
    except UserError as error:
        return str(error)
    return why_unsupported(cell)


def _composed(group: str, option: str) -> Cell:
    from hydra import compose as compose_config
    from hydra import initialize_config_dir

    from left_bench.grid.compose import compose

    with initialize_config_dir(version_base="1.3", config_dir=str(config_root() / "conf")):
        config = compose_config("config", overrides=[f"{group}={option}"], return_hydra_config=True)
        return compose(config, config.hydra)[0]

"""Reading option files without Hydra: which sections an option sets.

Hydra takes over 50 ms to compose a cell, and there are more than a hundred options. Simple files (values; `defaults`
that name a sibling or override another group) are read here; everything else is left to Hydra.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from left_bench.core.paths import config_root
from left_bench.spec.cell import GROUPS

_OVERRIDE = re.compile(r"override /(\w+)@_global_\.\1")  # as in `override /optimizer@_global_.optimizer: loraplus`


class Option(NamedTuple):
    """The effect of choosing an option: its group's section and those of the groups it overrides."""

    choices: dict[str, str]
    sections: dict[str, dict[str, Any]]
    """As in the files: `${...}` is not resolved."""


class OnlyHydraKnows(Exception):
    """A file uses Hydra features that are not supported here."""


def shipped_folders() -> tuple[Path, ...]:
    """The folder of the shipped options."""
    return (config_root() / "conf",)


def option_folders(hydra: DictConfig) -> tuple[Path, ...]:
    """The folders that options are read from: the shipped ones, and the user's `--config-dir`."""
    return tuple(Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file")


@cache
def default_options() -> Option:
    """The default options of a cell."""
    choices: dict[str, str] = {}
    sections: dict[str, dict[str, Any]] = {}
    for entry in _load(config_root() / "conf" / "config.yaml")["defaults"]:
        for group, name in entry.items() if isinstance(entry, dict) else ():
            if group in GROUPS:
                option = read_option(group, name, shipped_folders())
                choices |= option.choices
                sections |= option.sections
    return Option(choices, sections)


@cache
def read_option(group: str, name: str, folders: tuple[Path, ...]) -> Option:
    """An option from its file; its values override those of the options it is based on, as in Hydra.

    Raises:
        OnlyHydraKnows: the file uses unsupported features, or is in none of the folders.
    """
    own = _load(next((path for folder in folders if (path := folder / group / f"{name}.yaml").is_file()), None))
    below = own.pop("defaults", [])
    choices = {group: name}
    sections: dict[str, dict[str, Any]] = {group: own}
    for entry in reversed(below):
        ((key, value),) = entry.items() if isinstance(entry, dict) else [(entry, None)]
        override = _OVERRIDE.fullmatch(str(key))
        if value is None and key != "_self_":
            sibling = read_option(group, str(key), folders)
            merged: Any = OmegaConf.to_container(OmegaConf.merge(sibling.sections[group], sections[group]))
            sections = sibling.sections | sections | {group: merged}
            choices = sibling.choices | choices
        elif override and value is not None:
            other = read_option(override[1], value, folders)
            choices, sections = other.choices | choices, other.sections | sections
        else:
            raise OnlyHydraKnows(f"{group}/{name}: {key}")
    return Option(choices, sections)


def _load(path: Path | None) -> dict[str, Any]:
    if path is None or "# @package" in path.read_text(encoding="utf-8"):
        raise OnlyHydraKnows(str(path))
    # OmegaConf's loader, because plain YAML reads `1e-3` as a string
    loaded: Any = OmegaConf.to_container(OmegaConf.load(path))
    if not isinstance(loaded, dict):
        raise OnlyHydraKnows(str(path))
    return loaded

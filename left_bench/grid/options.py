"""Option files, read without Hydra: which sections choosing an option sets.

Hydra takes 50 ms and more to compose a cell, and there are over a hundred options. What a file says in the plain forms
(values; `defaults` naming a sibling or overriding another group) is read here; the rest of its language is Hydra's.
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
    """What choosing an option sets: its group's section and those of the groups it overrides."""

    choices: dict[str, str]
    sections: dict[str, dict[str, Any]]
    """As the files have them: `${...}` still stands."""


class OnlyHydraKnows(Exception):
    """A file uses more of Hydra's language than is read here."""


def shipped_folders() -> tuple[Path, ...]:
    """Where the options that ship lie."""
    return (config_root() / "conf",)


def option_folders(hydra: DictConfig) -> tuple[Path, ...]:
    """Where options are read from: what ships, and the user's `--config-dir`."""
    return tuple(Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file")


@cache
def default_options() -> Option:
    """What a cell is made of where nothing is chosen."""
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
    """An option from its file; values stand over those of the options it is made of, as Hydra has them.

    Raises:
        OnlyHydraKnows: the file says more than is read here, or lies in none of the folders.
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
    # OmegaConf's loader: plain YAML takes `1e-3` for a word
    loaded: Any = OmegaConf.to_container(OmegaConf.load(path))
    if not isinstance(loaded, dict):
        raise OnlyHydraKnows(str(path))
    return loaded

"""Composing thousands of jobs: what the same options have in common is composed once.

Hydra composes every job of a sweep from its files, 80 ms each time, and every job is composed twice (our check, its
launcher). A job's value overrides (`seed=3`) are applied to a finished composition, so jobs that chose the same
options can start from a copy of one. An option's section is the same whatever else was chosen, if its file writes
nowhere else: a grid of m x n options is put together from the sections of m + n - 1 jobs. What is left is composed by
Hydra, from files that are read once for a sweep.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.default_element import ConfigDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

from left_bench.core import interrupt

_KEPT = 512  # compositions of 150 kB each
_Part = tuple[tuple[Any, ...], str]
"""What a composition was asked for beside an option that fills its section alone, and that option."""


class SweepLoader(ConfigLoaderImpl):
    """Hydra's loader, the same in what it composes; test_loader.py holds it against Hydra's own."""

    def __init__(self, plain: ConfigLoaderImpl) -> None:
        super().__init__(plain.config_search_path)
        self.repository = _ReadOnce(plain.config_search_path)
        self._composed: OrderedDict[_Part, DictConfig] = OrderedDict()
        self.environment: dict[str, str] = {}
        """What every job's `hydra.job.env_set` is given: it goes wherever the job goes, whatever launches it."""
        self._groups: dict[str, bool] = {}
        self._alone: dict[str, bool] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Launchers send the loader to other processes, once for every job: without what it remembers."""
        return self.__dict__ | {
            "repository": _ReadOnce(self.config_search_path),
            "_composed": OrderedDict(),
            "_groups": {},
            "_alone": {},
        }

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        interrupt.check()  # all jobs are composed in a row, to see that they can be
        overrides = [_parse(text) for text in sweep_overrides]
        if any(override.is_hydra_override() for override in overrides):
            return self._marked(super().load_sweep_config(master_config, sweep_overrides))
        options = [override for override in overrides if self._chooses(override)]
        values = [override for override in overrides if not self._chooses(override)]
        config = self._compose(master_config, tuple(str(option.input_line) for option in options))
        self._apply_overrides_to_config(values, config)
        hydra = config.hydra
        hydra.overrides.task = [override.input_line for override in overrides]
        spelling = hydra.job.config.override_dirname
        hydra.job.override_dirname = get_overrides_dirname(
            overrides=overrides,
            kv_sep=spelling.kv_sep,
            item_sep=spelling.item_sep,
            exclude_keys=spelling.exclude_keys,
        )
        OmegaConf.copy_cache(from_config=master_config, to_config=config)
        return self._marked(config)

    def _marked(self, config: DictConfig) -> DictConfig:
        for name, value in self.environment.items():
            OmegaConf.update(config, f"hydra.job.env_set.{name}", value, force_add=True)
        return config

    def _chooses(self, override: Override) -> bool:
        """Whether it chooses an option; by the rule of `hydra._internal.defaults_list.Overrides`."""
        key = override.key_or_group
        if key not in self._groups:
            self._groups[key] = self.repository.group_exists(key)
        return self._groups[key] and not isinstance(override.value(), dict)

    def _compose(self, master_config: DictConfig, options: tuple[str, ...]) -> DictConfig:
        """By Hydra; but a job all of whose options were composed in jobs before is put together from their sections."""
        sections = {option.partition("=")[0]: option for option in options if self._fills_its_section_alone(option)}
        others = tuple(option for option in options if option not in sections.values())
        if not sections or len(sections) + len(others) < len(options):  # a group chosen twice
            sections, others = {}, options
        place = (id(master_config), others, *sections)
        parts = {group: (place, option) for group, option in sections.items()} or {"": (place, "")}
        kept = {group: self._composed[part] for group, part in parts.items() if part in self._composed}
        if len(kept) < len(parts):
            whole = super().load_sweep_config(master_config, list(options))
            self._composed |= {part: whole for part in parts.values() if part not in self._composed}
            while len(self._composed) > _KEPT:
                self._composed.popitem(last=False)
            return copy.deepcopy(whole)
        base, *_ = kept.values()
        config = copy.deepcopy(base)
        for group, composed in kept.items():
            if composed is not base:
                config[group] = composed[group]  # OmegaConf copies what it is given
                config.hydra.runtime.choices[group] = composed.hydra.runtime.choices[group]
        return config

    def _fills_its_section_alone(self, option: str) -> bool:
        """Whether it is `group=name` of a file that chooses for no other group and writes nowhere else."""
        if option not in self._alone:
            self._alone[option] = self._looks_alone(option)
        return self._alone[option]

    def _looks_alone(self, option: str) -> bool:
        group, _, name = option.partition("=")
        file = self.repository.load_config(f"{group}/{name}") if group.isidentifier() and name.isidentifier() else None
        if file is None or (file.header or {}).get("package") is not None:
            return False
        return all(
            isinstance(one, ConfigDefault)
            and one.package is None
            and (one.is_self() or self._fills_its_section_alone(f"{group}={one.path}"))
            for one in file.defaults_list or []
        )


class _ReadOnce(ConfigRepository):
    """Hydra's files of options, each read once; what is handed out is a copy, for composing writes into it."""

    def initialize_sources(self, config_search_path: ConfigSearchPath) -> None:
        super().initialize_sources(config_search_path)
        self._read: dict[str, ConfigResult | None] = {}  # other sources, other files

    def load_config(self, config_path: str) -> ConfigResult | None:
        if config_path not in self._read:
            self._read[config_path] = super().load_config(config_path)
        return copy.deepcopy(self._read[config_path])

    def __deepcopy__(self, memo: dict[int, Any]) -> _ReadOnce:
        """Hydra copies its repository for every composition, lest its list of sources change: a list of its own."""
        same = copy.copy(self)
        same.sources = list(self.sources)
        return same


def use_sweep_loader() -> SweepLoader:
    """Put it in the place of Hydra's loader, where the sweeper and the launcher will find it."""
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    plain: Any = hydra.config_loader
    if not isinstance(plain, SweepLoader):
        hydra.config_loader = SweepLoader(plain)
    found: Any = hydra.config_loader
    return found


@functools.lru_cache(maxsize=4096)
def _parse(text: str) -> Override:
    return OverridesParser.create().parse_override(text)

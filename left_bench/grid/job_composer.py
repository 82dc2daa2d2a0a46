"""Composing thousands of jobs quickly: parts that they have in common are composed once.

Hydra composes a job from its files in 80 ms. A job's values (`seed=3`) are set in a finished composition, so jobs with
the same options can start from a copy. An option's section does not depend on other choices if its file writes to no
other section: a grid of m x n options is assembled from the sections of m + n - 1 jobs. Everything else is composed by
Hydra.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Sequence

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from left_bench.core import interrupt
from left_bench.grid.options import OnlyHydraKnows, option_folders, read_option
from left_bench.grid.read_once import reading_once

_KEPT = 512  # cached compositions, 100 kB each
_NOT_A_JOBS = ("help", "hydra_help", "hydra_logging", "job_logging")
"""Parts of Hydra's own section that are long and irrelevant to a job."""
_Part = tuple[tuple[str, ...], str]
"""The other options of a composition, and the option that alone fills one section."""


class JobComposer:
    """Composes the jobs of one sweep exactly as Hydra does (test_job_composer.py compares them)."""

    def __init__(self, loader: ConfigLoader, config: DictConfig) -> None:
        """`config`: the sweep's, as Hydra passes it to a sweeper."""
        self._loader, self._config = reading_once(loader), config
        self._folders = option_folders(config.hydra)
        self._composed: OrderedDict[_Part, DictConfig] = OrderedDict()
        self._alone: dict[str, bool] = {}
        self._is_group = functools.cache(self._has_options)

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """A job's whole configuration, with the parts of `hydra` that concern a job.

        Raises:
            HydraException: an unknown option or key.
        """
        interrupt.check()  # composing all jobs takes a while
        parsed = [_parse(text) for text in overrides]
        options = [item for item in parsed if self._is_option(item)]
        values = [item for item in parsed if not self._is_option(item)]
        if all(_sets_a_value(value) for value in values):
            config = self._with_options(tuple(str(option.input_line) for option in options))
            try:
                for value in values:
                    OmegaConf.update(config, value.key_or_group, value.value(), force_add=value.is_force_add())
            except OmegaConfBaseException:
                pass  # Hydra reports it below
            else:
                config.hydra.overrides.task = [item.input_line for item in parsed]
                OmegaConf.copy_cache(from_config=self._config, to_config=config)
                return config
        return self._loader.load_sweep_config(self._config, list(overrides))

    def _is_option(self, override: Override) -> bool:
        """Whether it chooses an option of a group, rather than setting keys of its section."""
        return self._is_group(override.key_or_group) and not isinstance(override.value(), dict)

    def _has_options(self, group: str) -> bool:
        overrides = list(self._config.hydra.overrides.hydra)  # may add search paths
        return bool(self._loader.get_group_options(group, config_name="config", overrides=overrides))

    def _with_options(self, options: tuple[str, ...]) -> DictConfig:
        """Compose options: from the sections of earlier jobs if all of them were composed before, otherwise by
        Hydra."""
        sections = {option.partition("=")[0]: option for option in options if self._fills_its_section_alone(option)}
        others = tuple(option for option in options if option not in sections.values())
        if not sections or len(sections) + len(others) < len(options):  # a group was chosen twice
            sections, others = {}, options
        place = (*others, *sections)
        parts = {group: (place, option) for group, option in sections.items()} or {"": (place, "")}
        cached = {group: self._composed[part] for group, part in parts.items() if part in self._composed}
        if len(cached) < len(parts):
            whole = _of_a_job(self._loader.load_sweep_config(self._config, list(options)))
            self._composed |= {part: whole for part in parts.values() if part not in self._composed}
            while len(self._composed) > _KEPT:
                self._composed.popitem(last=False)
            return copy.deepcopy(whole)
        base, *_ = cached.values()
        config = copy.deepcopy(base)
        for group, composed in cached.items():
            if composed is not base:
                config[group] = composed[group]  # OmegaConf copies assigned values
                config.hydra.runtime.choices[group] = composed.hydra.runtime.choices[group]
        return config

    def _fills_its_section_alone(self, option: str) -> bool:
        """Whether it is `group=name` with a file that affects no other group or section."""
        if option not in self._alone:
            group, _, name = option.partition("=")
            try:
                plain = group.isidentifier() and name.isidentifier()
                self._alone[option] = plain and set(read_option(group, name, self._folders).sections) == {group}
            except OnlyHydraKnows:
                self._alone[option] = False
        return self._alone[option]


def _sets_a_value(override: Override) -> bool:
    """Whether it is a plain `key=value` or `++key=value` of the job; others are left to Hydra."""
    plain = not (override.is_delete() or override.is_add() or override.is_hydra_override())
    return plain and override.package is None


def _of_a_job(config: DictConfig) -> DictConfig:
    with read_write(config), open_dict(config.hydra):
        for key in _NOT_A_JOBS:
            del config.hydra[key]
    return config


@functools.lru_cache(maxsize=4096)
def _parse(text: str) -> Override:
    return OverridesParser.create().parse_override(text)

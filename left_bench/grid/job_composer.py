"""Composing thousands of jobs: what the same options have in common is composed once.

Hydra composes a job from its files in 80 ms. A job's values (`seed=3`) are set in a finished composition, so jobs that
chose the same options can start from a copy of one. An option's section is the same whatever else was chosen, if its
file writes nowhere else: a grid of m x n options is put together from the sections of m + n - 1 jobs. What is left is
composed by Hydra.
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

_KEPT = 512  # compositions of 100 kB each
_NOT_A_JOBS = ("help", "hydra_help", "hydra_logging", "job_logging")
"""Parts of Hydra's own section that are long and say nothing of a job."""
_Part = tuple[tuple[str, ...], str]
"""What a composition was asked for beside an option that fills its section alone, and that option."""


class JobComposer:
    """The jobs of one sweep, the same as Hydra composes them: test_job_composer.py holds it against Hydra's own."""

    def __init__(self, loader: ConfigLoader, config: DictConfig) -> None:
        """`config` is the sweep's, as Hydra hands it to a sweeper."""
        self._loader, self._config = reading_once(loader), config
        self._folders = option_folders(config.hydra)
        self._composed: OrderedDict[_Part, DictConfig] = OrderedDict()
        self._alone: dict[str, bool] = {}
        self._is_group = functools.cache(self._has_options)

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """A job's whole configuration, `hydra` with what concerns a job.

        Raises:
            HydraException: an option or key that there is not.
        """
        interrupt.check()  # all jobs are composed in a row
        parsed = [_parse(text) for text in overrides]
        options = [item for item in parsed if self._is_option(item)]
        values = [item for item in parsed if not self._is_option(item)]
        if all(_sets_a_value(value) for value in values):
            config = self._with_options(tuple(str(option.input_line) for option in options))
            try:
                for value in values:
                    OmegaConf.update(config, value.key_or_group, value.value(), force_add=value.is_force_add())
            except OmegaConfBaseException:
                pass  # Hydra says it in its own words
            else:
                config.hydra.overrides.task = [item.input_line for item in parsed]
                OmegaConf.copy_cache(from_config=self._config, to_config=config)
                return config
        return self._loader.load_sweep_config(self._config, list(overrides))

    def _is_option(self, override: Override) -> bool:
        """Whether it chooses an option of a group, and does not set the keys of its section."""
        return self._is_group(override.key_or_group) and not isinstance(override.value(), dict)

    def _has_options(self, group: str) -> bool:
        given = list(self._config.hydra.overrides.hydra)  # it may name more places to look in
        return bool(self._loader.get_group_options(group, config_name="config", overrides=given))

    def _with_options(self, options: tuple[str, ...]) -> DictConfig:
        """By Hydra; but a job all of whose options were composed in jobs before is put together from their sections."""
        sections = {option.partition("=")[0]: option for option in options if self._fills_its_section_alone(option)}
        others = tuple(option for option in options if option not in sections.values())
        if not sections or len(sections) + len(others) < len(options):  # a group chosen twice
            sections, others = {}, options
        place = (*others, *sections)
        parts = {group: (place, option) for group, option in sections.items()} or {"": (place, "")}
        kept = {group: self._composed[part] for group, part in parts.items() if part in self._composed}
        if len(kept) < len(parts):
            whole = _of_a_job(self._loader.load_sweep_config(self._config, list(options)))
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
            group, _, name = option.partition("=")
            try:
                plain = group.isidentifier() and name.isidentifier()
                self._alone[option] = plain and set(read_option(group, name, self._folders).sections) == {group}
            except OnlyHydraKnows:
                self._alone[option] = False
        return self._alone[option]


def _sets_a_value(override: Override) -> bool:
    """Whether it is `key=value` or `++key=value` of the job itself; what else there is, Hydra does."""
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

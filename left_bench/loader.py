"""Composing thousands of jobs: what the same options have in common is composed once.

Hydra composes every job of a sweep from its files, three times over (our check, its sweeper's check, its launcher):
80 ms each. A job's value overrides (`seed=3`) are applied to a finished composition, so jobs that chose the same
options can start from a copy of one; that takes 5 ms.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from left_bench import interrupt

_KEPT = 512  # compositions of 150 kB each


class SweepLoader(ConfigLoaderImpl):
    """Hydra's loader, the same in what it composes; test_loader.py holds it against Hydra's own."""

    def __init__(self, plain: ConfigLoaderImpl) -> None:
        super().__init__(plain.config_search_path)
        self._composed: OrderedDict[tuple[int, tuple[str, ...]], DictConfig] = OrderedDict()
        self._groups: dict[str, bool] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Launchers send the loader to other processes, once for every job: without what it remembers."""
        return self.__dict__ | {"_composed": OrderedDict(), "_groups": {}}

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        interrupt.check()  # the sweeper composes all jobs in a row, to see that it can
        overrides = [_parse(text) for text in sweep_overrides]
        if any(override.is_hydra_override() for override in overrides):
            return super().load_sweep_config(master_config, sweep_overrides)
        options = [override for override in overrides if self._chooses(override)]
        values = [override for override in overrides if not self._chooses(override)]
        config = copy.deepcopy(self._compose(master_config, tuple(str(option.input_line) for option in options)))
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
        return config

    def _chooses(self, override: Override) -> bool:
        """Whether it chooses an option; by the rule of `hydra._internal.defaults_list.Overrides`."""
        key = override.key_or_group
        if key not in self._groups:
            self._groups[key] = self.repository.group_exists(key)
        return self._groups[key] and not isinstance(override.value(), dict)

    def _compose(self, master_config: DictConfig, options: tuple[str, ...]) -> DictConfig:
        key = (id(master_config), options)
        if key not in self._composed:
            self._composed[key] = super().load_sweep_config(master_config, list(options))
            if len(self._composed) > _KEPT:
                self._composed.popitem(last=False)
        self._composed.move_to_end(key)
        return self._composed[key]


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

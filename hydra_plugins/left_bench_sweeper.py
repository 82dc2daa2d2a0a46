"""Where Hydra finds left_bench: it takes plugins only from this namespace package.

Both classes pass on what Hydra gives them; the work is done by `left_bench.launch.launching.Launch`, the task that the
command line gives to Hydra. Any program that uses Hydra imports this module with all other plugins, so it imports
nothing of left_bench.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class LaunchSweeper(Sweeper):
    """Takes the place of the sweeper that `hydra/sweeper=` selects (conf/config.yaml) and accepts its settings."""

    def __init__(self, **_settings: Any) -> None:
        self._launch: Any = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        if not hasattr(task_function, "sweep"):
            raise HydraException("left_bench's sweeper runs only left_bench's cells; start them with left-bench")
        self._launch, self._context, self._config = task_function, hydra_context, config

    def sweep(self, arguments: list[str]) -> None:
        self._launch.sweep(self._config, self._context)


class BatchLauncher(Launcher):
    """The launcher of a search: it passes each batch of trials to the launch, which composes and runs them."""

    def __init__(self) -> None:
        self._run_batch: Any = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._run_batch = task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        returns: Sequence[JobReturn] = self._run_batch([list(override) for override in job_overrides])
        return returns

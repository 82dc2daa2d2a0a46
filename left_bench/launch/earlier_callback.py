"""`left_bench.launch.Launch` in configurations of earlier versions, under `hydra.callbacks`."""

from __future__ import annotations

from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class Launch(Callback):
    """Makes left_bench's own sweeper run a sweep, even if a configuration of an earlier version names none."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        config.hydra.sweeper._target_ = "hydra_plugins.left_bench_sweeper.LaunchSweeper"

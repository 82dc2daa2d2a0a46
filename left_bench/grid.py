"""Hydra's basic sweeper for a grid whose jobs are known: those that are done are not composed and carried once more.

`Launch` has composed and checked every job before the sweeper begins, so the sweeper need not do so again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins


class Grid(BasicSweeper):
    """The jobs of a grid, in its order, without those that are done."""

    done: ClassVar[frozenset[tuple[str, ...]]] = frozenset()

    @staticmethod
    def split_arguments(overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        batches = BasicSweeper.split_arguments(overrides, max_batch_size)
        left = [[job for job in batch if tuple(job) not in Grid.done] for batch in batches]
        return [batch for batch in left if batch]  # a launcher may not know what to do with no job at all

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Nothing: every job was composed just before."""


def use_grid_sweeper(*, done: Collection[tuple[str, ...]]) -> None:
    """Put it in the place of Hydra's basic sweeper; another sweeper, such as Optuna's, stays as it is."""
    Grid.done = frozenset(done)
    Plugins.instance().class_name_to_class[f"{BasicSweeper.__module__}.{BasicSweeper.__qualname__}"] = Grid

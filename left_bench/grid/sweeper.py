"""Hydra's basic sweeper for a grid whose jobs are known: those that are done are not composed and carried once more.

`Launch` has composed and checked every job before the sweeper begins, so the sweeper need not do so again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from hydra.core.override_parser.types import Override


def use_grid_sweeper(*, done: Collection[tuple[str, ...]]) -> None:
    """Have Hydra's basic sweeper pass by the `done` jobs; other sweepers, as Optuna's, stay what they are.

    Two of its methods are replaced: Hydra finds its sweeper by the class's name, so another class would not be found.
    """
    # not at the head of the file: Hydra runs its plugins' modules anew, and a class imported before is another
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    sweeper: Any = BasicSweeper
    whole = getattr(sweeper, "whole_grid", sweeper.split_arguments)
    passed_by = frozenset(done)

    def split_arguments(overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        batches = whole(overrides, max_batch_size)
        left = [[job for job in batch if tuple(job) not in passed_by] for batch in batches]
        return [batch for batch in left if batch]  # a launcher may not know what to do with no job at all

    def validate_batch_is_legal(_self: Any, _batch: Sequence[Sequence[str]]) -> None:
        """Nothing: every job was composed just before."""

    sweeper.whole_grid = staticmethod(whole)
    sweeper.split_arguments = staticmethod(split_arguments)
    sweeper.validate_batch_is_legal = validate_batch_is_legal

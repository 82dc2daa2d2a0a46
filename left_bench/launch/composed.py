"""A composed job of a launch: its overrides, and what they are."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from left_bench.grid.compose import Settings
from left_bench.grid.rules import why_unsupported
from left_bench.launch.preflight import Trial
from left_bench.spec.cell import Cell


class Composed(NamedTuple):
    """A job's overrides and what they are."""

    overrides: list[str]
    cell: Cell
    settings: Settings
    trial: Trial | None
    """Where values of the person's own go to other packages' classes."""
    automatic: bool
    """Its precision is what this machine is fast in."""
    provenance: Mapping[str, Any] = MappingProxyType({})
    """What its record says besides of where it comes from: a trial's `tuning`, or how its rate was `tuned`."""

    @property
    def refused(self) -> bool:
        """By a rule: no error, but a row that says so."""
        return not self.settings.force_unsupported and why_unsupported(self.cell) is not None

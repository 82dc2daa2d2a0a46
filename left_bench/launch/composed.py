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
    """A job's overrides and the composed cell and settings."""

    overrides: list[str]
    cell: Cell
    settings: Settings
    trial: Trial | None
    """Set if the user's own values are passed to other packages' classes."""
    automatic: bool
    """Whether its precision was chosen by `precision=auto`."""
    provenance: Mapping[str, Any] = MappingProxyType({})
    """Further provenance for its record: a trial's `tuning`, or how its rate was `tuned`."""

    @property
    def refused(self) -> bool:
        """Whether a rule refuses the cell, which is then a row of the report and not an error."""
        return not self.settings.force_unsupported and why_unsupported(self.cell) is not None

"""All that one report is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from left_bench.report.axes import Axis
from left_bench.report.cells import Row
from left_bench.report.confounders import confounders
from left_bench.report.cost import NO_PRICES, Prices
from left_bench.report.judgement import Family, Margins
from left_bench.report.load import Problem, Sweep
from left_bench.report.ranking import (
    family_of,
)
from left_bench.report.values import (
    format_setting,
)

if TYPE_CHECKING:
    from left_bench.report.curves import Target
    from left_bench.report.recommend import Need


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that a report is made from; `rows`, `labels` and every axis' values run parallel."""

    name: str
    rows: Sequence[Row]
    axes: Sequence[Axis]
    labels: Sequence[str]
    baseline: Row | None
    sweep: Sweep | None = None
    problems: Sequence[Problem] = ()
    plots: Sequence[tuple[str, str]] = field(default=())
    """(file name, what it shows)."""
    needs: Sequence[Need] = ()
    """What a recommended cell has to fulfil."""
    group_by: str | None = None
    """The setting whose every value gets a leaderboard of its own."""
    claims: bool = False
    """Whether the field's usual sentences are put beside the rows."""
    where: str | None = None
    """The condition that chose the rows."""
    prices: Prices = NO_PRICES
    """What energy and hours cost."""
    target: Target | None = None
    """A quality, and when each row reached it along training."""
    margins: Margins = field(default_factory=dict)
    """Metric -> how far apart two values still count as equal."""

    @cached_property
    def records(self) -> list[Row]:
        """The rows that have a record."""
        return [row for row in self.rows if row.record]

    @cached_property
    def runs(self) -> list[tuple[Row, str]]:
        """Every single run with its name, the seeds of one row after another."""
        return [
            (run, label if not row.members else f"{label} seed {_seed(run)}")
            for row, label in zip(self.rows, self.labels, strict=True)
            for run in row.runs
        ]

    @cached_property
    def names(self) -> Mapping[int, str]:
        """`id(row)` -> label."""
        return {id(row): label for row, label in zip(self.rows, self.labels, strict=True)}

    @cached_property
    def places(self) -> Mapping[int, int]:
        """`id(row)` -> its place in `rows` and in every axis."""
        return {id(row): i for i, row in enumerate(self.rows)}

    def family(self, metric: str) -> Family:
        """What judges the differences between the rows in a metric: the same in every table."""
        if metric not in self._families:
            self._families[metric] = family_of(self.rows, metric, self.margins)
        return self._families[metric]

    @cached_property
    def _families(self) -> dict[str, Family]:
        return {}

    @cached_property
    def confounders(self) -> list[tuple[str, str]]:
        return confounders(self.rows, self.names)


def _seed(run: Row) -> str:
    """The run's seed; of a run without a record, what its id says."""
    return format_setting(run.seed) if run.record else run.cell_id.split("-")[-2].removeprefix("s")

"""The line printed before a launch's first cell, and on a terminal the one that says how to shorten the launch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from left_bench.launch.estimate import calibrate
from left_bench.launch.estimate.arithmetic import PEAK_SECONDS, Measured, seconds_of, total_of
from left_bench.launch.estimate.experience import Experience, base_of, gathered
from left_bench.launch.progress import rounded_time
from left_bench.spec.cell import Cell

_ELSEWHERE = "the launcher may run them on other machines"
_NOT_TIMED = "the model could not be timed"
_TOO_DISTURBED = 0.25
"""Share of the processor used by others during timing above which the rates are useless: at 0.5, two threads waiting
for each other's cores took ten times as long."""


class Planned(NamedTuple):
    """Cells to run that cost the same: one of them, and their number."""

    cell: Cell
    cells: int


class Estimate(NamedTuple):
    """The estimated duration of a launch."""

    cells: int
    seconds: float | None
    """None: unknown."""
    lacking: list[str]
    """Why the seconds are only a lower bound, or unknown."""
    disturbed_by: float = 0.0
    """Share of the processor used by other programs during the measurement; without them it takes less."""

    def __str__(self) -> str:
        cells = "1 cell" if self.cells == 1 else f"{self.cells:,} cells"
        why = "; ".join(self.lacking)
        if self.seconds is None:
            return f"{cells}; the duration will be known after the first, because {why}"
        measured = "measured"
        if self.disturbed_by:
            measured += f" while other programs took {self.disturbed_by:.0%} of the processor"
        if why:
            return f"{cells}, at least {rounded_time(self.seconds)} on this machine ({measured}; {why})"
        return f"{cells}, about {rounded_time(self.seconds)} on this machine ({measured})"


def say_estimate(
    planned: Sequence[Planned],
    runs_dir: Path,
    *,
    at_once: int = 1,
    elsewhere: bool = False,
    cells_follow: bool = True,
    console: Console | None = None,
) -> None:
    """Print how long the cells will take on this machine, timing the model now if no earlier launch has.

    Args:
        planned: the cells to run; if empty, nothing is printed or timed.
        at_once: cells that run at the same time.
        elsewhere: the launcher may run them on other machines, which are unknown here.
        cells_follow: the cells are started from this process too.
    """
    if not planned:
        return
    console = console or Console()
    if elsewhere:
        result = Estimate(sum(item.cells for item in planned), None, [_ELSEWHERE])
    else:
        result = _estimated(planned, runs_dir, at_once=at_once, cells_follow=cells_follow)
    console.print(str(result), markup=False, highlight=False, soft_wrap=True)
    limits = [item.cell.hardware.patience for item in planned if item.cell.hardware.patience is not None]
    if console.is_terminal and result.seconds is not None and limits and result.seconds > min(limits):
        console.print(how_to_narrow(planned, limit=min(limits)), markup=False, highlight=False, soft_wrap=True)


def _estimated(planned: Sequence[Planned], runs_dir: Path, *, at_once: int, cells_follow: bool) -> Estimate:
    reasons = {calibrate.rates_path(item.cell, at_once=at_once): item.cell for item in planned}
    why = {path: calibrate.why_not(cell) for path, cell in reasons.items()}
    timed = [item for item in planned if why[calibrate.rates_path(item.cell, at_once=at_once)] is None]
    warm = calibrate.calibrate([item.cell for item in timed], at_once=at_once, cells_follow=cells_follow)
    measured: list[Measured | str] = [
        why[calibrate.rates_path(item.cell, at_once=at_once)] or _usable(calibrate.kept(item.cell, at_once=at_once))
        for item in planned
    ]
    once = 0.0 if warm else max((item.rates.start for item in measured if isinstance(item, Measured)), default=0.0)
    if not any((runs_dir / "base").glob("peak-*.json")):
        once += PEAK_SECONDS
    result = added_up(list(zip(planned, measured, strict=True)), gathered(runs_dir, at_once=at_once))
    if result.seconds is None:
        return result
    return result._replace(seconds=once + result.seconds / min(at_once, result.cells))


def _usable(measured: Measured | None) -> Measured | str:
    """The measurement, or why it is useless."""
    if measured is None:
        return _NOT_TIMED
    others = measured.rates.disturbed_by or 0.0
    if others >= _TOO_DISTURBED:
        return f"other programs took {others:.0%} of the processor while the model was timed"
    return measured


def added_up(planned: Sequence[tuple[Planned, Measured | str]], experience: Experience) -> Estimate:
    """Seconds of all cells in sequence; a lower bound if some contributions are unknown.

    Args:
        planned: cells with their measurements, or with the reason why there are none.
    """
    seconds: float | None = None
    lacking: dict[str, None] = {}
    others = 0.0
    scored = set(experience.bases)
    for (cell, cells), known in planned:
        if isinstance(known, str):
            lacking[known] = None
            continue
        others = max(others, known.rates.disturbed_by or 0.0)
        factors, whole = experience.factors(cell)
        if not whole:
            lacking[f"the slowdown by quantization={cell.quantization.name} is known after its first cell"] = None
        if cell.training.compile:
            lacking["compilation is not included"] = None
        base = base_of(cell)
        parts = seconds_of(cell, known.rates, known.rows, factors)
        seconds = (seconds or 0.0) + total_of(parts, cells=cells, bases=base not in scored)
        scored.add(base)
    return Estimate(sum(item.cells for item, _ in planned), seconds, list(lacking), others)


def how_to_narrow(planned: Sequence[Planned], *, limit: float) -> str:
    """How these cells can be reduced, with the keys to set."""
    cells = [item.cell for item in planned]
    ways = [
        f"fewer {named} ({key}=, {len(values)} now)"
        for named, key, values in (
            ("methods", "peft", {cell.peft.name for cell in cells}),
            ("models", "model", {cell.model.name for cell in cells}),
            ("quantizations", "quantization", {cell.quantization.name for cell in cells}),
        )
        if len(values) > 1
    ]
    if any(item.cells > 1 for item in planned):
        ways.append("fewer seeds (seed=)")
    ways.append(f"training.steps= ({max(cell.training.steps for cell in cells)} now)")
    if any(cell.generates for cell in cells):
        ways.append("eval.rows= or eval=loss")
    return f"that is more than hardware.patience={rounded_time(limit)}; shorter with {', '.join(ways)}"

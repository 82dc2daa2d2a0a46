"""The line before a launch's first cell, and on a terminal the one that says how to make it shorter."""

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

_ELSEWHERE = "the launcher may take them to other machines"
_NOT_TIMED = "the model could not be timed"
_TOO_DISTURBED = 0.25
"""Share of the processor that others took while a model was timed, from which on its rates tell nothing: two threads
that wait for each other's cores were seen to take ten times as long at 0.5."""


class Planned(NamedTuple):
    """Cells that are to run and cost the same: one of them, and how many they are."""

    cell: Cell
    cells: int


class Estimate(NamedTuple):
    """What a launch will take."""

    cells: int
    seconds: float | None
    """None: nothing of it is known."""
    lacking: list[str]
    """Why the seconds are a lower bound, or why there are none."""
    disturbed_by: float = 0.0
    """Share of the processor that other programs took while it was measured: without them it takes less."""

    def __str__(self) -> str:
        cells = "1 cell" if self.cells == 1 else f"{self.cells:,} cells"
        why = "; ".join(self.lacking)
        if self.seconds is None:
            return f"{cells}; how long will be known after the first, because {why}"
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
    """Say what the cells will take on this machine, timed now where no earlier launch has done so.

    Args:
        planned: what is to run; nothing is said or timed where that is nothing.
        at_once: cells that run at the same time.
        elsewhere: a launcher may carry them to other machines, of which nothing is known here.
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
    """What was measured, or why it tells nothing."""
    if measured is None:
        return _NOT_TIMED
    others = measured.rates.disturbed_by or 0.0
    if others >= _TOO_DISTURBED:
        return f"other programs took {others:.0%} of the processor while the model was timed"
    return measured


def added_up(planned: Sequence[tuple[Planned, Measured | str]], experience: Experience) -> Estimate:
    """Seconds of all cells, one after the other; what cannot be told of some makes it a lower bound.

    Args:
        planned: with what is measured of each, or why nothing is.
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
            lacking[f"what quantization={cell.quantization.name} adds is known after its first cell"] = None
        if cell.training.compile:
            lacking["compiling comes on top"] = None
        base = base_of(cell)
        parts = seconds_of(cell, known.rates, known.rows, factors)
        seconds = (seconds or 0.0) + total_of(parts, cells=cells, bases=base not in scored)
        scored.add(base)
    return Estimate(sum(one.cells for one, _ in planned), seconds, list(lacking), others)


def how_to_narrow(planned: Sequence[Planned], *, limit: float) -> str:
    """What of these cells can be made less, with the keys to type."""
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

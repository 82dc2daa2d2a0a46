"""What fits: the largest micro-batch or length for a limit, and the changes that make a cell fit that does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from left_bench.core.paths import config_root
from left_bench.grid.rules import why_unsupported
from left_bench.model.positions import most_tokens
from left_bench.plan.peak import room_needed
from left_bench.plan.result import Plan, Rows
from left_bench.spec.cell import Cell, Optimizer, Quantization

Planner = Callable[[Cell, Rows], Plan]

_LONGEST = 2**20
_SHORTEST = 8
"""Of `training.max_length`."""
_FARTHER = 4
_ALL_LOGITS = "all"


@dataclass(frozen=True)
class Fit:
    """The largest that fits a limit."""

    limit_bytes: int
    value: int | None
    """Rows of a pass, or tokens of a row; None: not even the least fits, or the peak is not known."""
    gradient_accumulation: int = 1
    """Passes of a step that keep its number of rows."""
    needed_bytes: int | None = None
    """What has to be there, with what lies beside a step's tensors."""
    bounded: bool = False
    """Whether nothing larger was tried: all of a step's rows in one pass, all positions of the model."""


@dataclass(frozen=True)
class Remedy:
    """A change or several, and what the cell then needs."""

    overrides: tuple[str, ...]
    needed_bytes: int | None
    fits: bool


def largest_batch(cell: Cell, limit: int, *, rows: Rows, plan: Planner) -> Fit:
    """The largest micro-batch that keeps the rows of a step, which its gradient accumulation makes up for."""
    step = cell.training.batch_size * cell.training.gradient_accumulation
    sizes = [size for size in range(1, step + 1) if step % size == 0 and size % cell.hardware.processes == 0]
    if not sizes:
        return Fit(limit, None)

    def needed(index: int) -> int | None:
        changed = with_batch(cell, sizes[index])
        return room_needed(plan(changed, rows), changed)

    index, room = _largest(0, len(sizes) - 1, limit, needed)
    if index is None:
        return Fit(limit, None, needed_bytes=room)
    size = sizes[index]
    return Fit(limit, size, step // size, room, bounded=size == step)


def largest_length(cell: Cell, limit: int, *, rows: Rows, plan: Planner) -> Fit:
    """The most tokens of which every row of a pass may be."""
    most = min(most_tokens(cell) or _LONGEST, _LONGEST)

    def needed(length: int) -> int | None:
        training = cell.training.model_copy(update={"max_length": length})
        changed = cell.model_copy(update={"training": training})
        return room_needed(plan(changed, Rows(longest=length)), changed)

    length, room = _largest(_SHORTEST, most, limit, needed)
    return Fit(limit, length, cell.training.gradient_accumulation, room, bounded=length == most)


def _largest(least: int, most: int, limit: int, needed: Callable[[int], int | None]) -> tuple[int | None, int | None]:
    """The largest whole number of a range that needs no more than `limit`, and what it needs.

    What is needed grows with the number, nearly by a straight line: the next guess is where the line meets the limit.
    """
    low, low_room = least, needed(least)
    if low_room is None or low_room > limit:
        return None, low_room
    while True:
        if low == most:
            return low, low_room
        high = min(most, _FARTHER * max(1, low))
        high_room = needed(high)
        if high_room is None:
            return None, None
        if high_room > limit:
            break
        low, low_room = high, high_room
    guesses = 0
    while high - low > 1:
        guesses += 1
        share = 0.5 if guesses % 4 == 0 else (limit - low_room) / (high_room - low_room)
        guess = min(max(low + int(share * (high - low)), low + 1), high - 1)
        room = needed(guess)
        if room is None:
            return None, None
        if room <= limit:
            low, low_room = guess, room
        else:
            high, high_room = guess, room
    return low, low_room


def remedies(cell: Cell, limit: int, *, rows: Rows, plan: Planner) -> list[Remedy]:
    """The changes of a recipe that save memory, from the cheapest on, until one fits; then together, until they fit."""
    tried: list[Remedy] = []
    before = room_needed(plan(cell, rows), cell)
    useful: list[str] = []
    for overrides, changed in _changes(cell):
        remedy = _judged((overrides,), changed, limit, rows=rows, plan=plan)
        if before is not None and remedy.needed_bytes is not None and remedy.needed_bytes >= before:
            continue  # what saves nothing is no remedy
        tried.append(remedy)
        useful.append(overrides)
        if remedy.fits:
            return tried
    together = cell
    for number, overrides in enumerate(useful, start=1):
        together = dict(_changes(together)).get(overrides, together)
        if number > 1:
            tried.append(_judged(tuple(useful[:number]), together, limit, rows=rows, plan=plan))
            if tried[-1].fits:
                break
    return tried


def _judged(overrides: tuple[str, ...], cell: Cell, limit: int, *, rows: Rows, plan: Planner) -> Remedy:
    needed = room_needed(plan(cell, rows), cell)
    return Remedy(overrides, needed, fits=needed is not None and needed <= limit)


def _changes(cell: Cell) -> Iterator[tuple[str, Cell]]:
    """Each change that the cell does not have yet and may have, with its overrides, from the cheapest on."""
    training = cell.training
    tried: list[tuple[str, dict[str, Any]]] = []
    if training.output_head == _ALL_LOGITS:
        tried.append(("training.output_head=labelled", _training(cell, output_head="labelled")))
    if not training.activation_checkpointing:
        change = _training(cell, activation_checkpointing=True)
        tried.append(("training.activation_checkpointing=true", change))
    if cell.optimizer.target == "torch.optim.AdamW":
        own = Optimizer.model_validate(_option(cell, "optimizer", "adamw_8bit"))
        tried.append(("optimizer=adamw_8bit", {"optimizer": own}))
    if cell.peft.target is not None and cell.quantization.target is None:
        stored = Quantization.model_validate(_option(cell, "quantization", "nf4_dq"))
        tried.append(("quantization=nf4_dq", {"quantization": stored}))
    if training.batch_size > cell.hardware.processes:
        size = cell.hardware.processes
        step = training.batch_size * training.gradient_accumulation
        if step % size == 0:
            named = f"training.batch_size={size} training.gradient_accumulation={step // size}"
            tried.append((named, {"training": with_batch(cell, size).training}))
    for overrides, update in tried:
        changed = cell.model_copy(update=update)
        if why_unsupported(changed) is None:
            yield overrides, changed


def with_batch(cell: Cell, size: int) -> Cell:
    """The cell with passes of so many rows, and as many rows in a step as before."""
    step = cell.training.batch_size * cell.training.gradient_accumulation
    return cell.model_copy(update=_training(cell, batch_size=size, gradient_accumulation=step // size))


def _training(cell: Cell, **update: Any) -> dict[str, Any]:
    return {"training": cell.training.model_copy(update=update)}


def _option(cell: Cell, group: str, name: str) -> Any:
    """An option's file, with the one value that it takes from another group."""
    text = (config_root() / "conf" / group / f"{name}.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text.replace("${precision.compute_dtype}", cell.precision.compute_dtype))

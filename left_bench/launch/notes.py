"""Notes about a launch's cells that are printed before the first one runs."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from left_bench.evaluation.judge import what_leaves
from left_bench.measure.auto_precision import emulated, emulation_note, fast_precision
from left_bench.spec.cell import Cell


def say_what_leaves(cells: Iterable[Cell]) -> None:
    """One line for each judge to which rows and answers are sent."""
    for sent in dict.fromkeys(what for cell in cells if (what := what_leaves(cell)) is not None):
        print(sent, file=sys.stderr)


def say_what_is_emulated(cells: Iterable[Cell]) -> None:
    """One line for each dtype that this machine has to emulate, with its slowdown; the cells still run as requested."""
    slow: dict[tuple[str, str], dict[str, None]] = {}
    for cell in cells:
        device, dtype = cell.device_type, cell.precision.compute_dtype
        if emulated(device, dtype):
            slow.setdefault((device, dtype), {})[cell.precision.name] = None
    for (device_type, dtype_name), options in slow.items():
        note = emulation_note(device_type, dtype_name, list(options))
        if note is not None:
            print(note, file=sys.stderr)


def say_automatic_precision(cells: Iterable[Cell]) -> None:
    """One line about the choice of `precision=auto` for these cells, which may run on other machines."""
    devices = dict.fromkeys(cell.device_type for cell in cells)
    if not devices:
        return
    chosen = ", ".join(f"{(fast := fast_precision(device)).option} on {device} ({fast.why})" for device in devices)
    print(
        f"note: precision=auto is {chosen}, chosen for this machine; other machines use it too, unless you set "
        "precision=NAME",
        file=sys.stderr,
    )

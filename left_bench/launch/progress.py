"""Progress display: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from left_bench.spec.cell import Cell
from left_bench.spec.events import rows_in_words
from left_bench.spec.record import SCORER_PREFIX, Record

_LINE_EVERY_SECONDS = 10.0
_SIGN_EVERY_SECONDS = 1.5


class CellView(Protocol):
    """Shows one running cell."""

    def event(self, event: Mapping[str, Any]) -> None: ...


@contextmanager
def watch(
    cell: Cell, *, number: int, total: int, console: Console | None = None, bars: bool = True
) -> Iterator[CellView]:
    """Show a running cell as the `number`-th (from 1) of `total`; without `bars`, in plain lines."""
    console = console or Console()
    if bars and console.is_terminal:
        with _bars(console) as shown:
            yield _Bars(shown, cell, number=number, total=total)
    else:
        yield _Lines(console, cell, number=number, total=total)


def say_end(
    record: Record,
    *,
    number: int,
    total: int,
    skipped: bool = False,
    seconds_left: float | None = None,
    console: Console | None = None,
) -> None:
    """Print one line on how a cell ended, with the estimated time for the launch's other cells if known."""
    console = console or Console()
    style = {"ok": "green", "unsupported": "yellow"}.get(record.status, "red")
    facts = [f"{record.metrics['wall_seconds']:.0f} s"] if "wall_seconds" in record.metrics and not skipped else []
    own = [name for name in record.metrics if name.startswith(SCORER_PREFIX)]
    scored = [*own, *(name for name in ("exact_match", "rouge_l", "eval_loss") if name in record.metrics)]
    scored = scored or [name for name in ("validation_loss",) if name in record.metrics]
    facts += [f"{name} {record.metrics[name]:.3f}" for name in scored]
    if skipped:
        facts.append("kept from an earlier run")
    text = f"{_count(number, total)} [{style}]{record.status}[/] {escape(record.cell_id)}"
    detail = escape(record.reason or "") if record.status != "ok" else ", ".join(facts)
    left = "" if seconds_left is None else f"  [dim]about {rounded_time(seconds_left)} left[/]"
    console.print(f"{text}  {detail}{left}", highlight=False, soft_wrap=True)


@contextmanager
def still_at_work(stream: TextIO | None = None) -> Iterator[Callable[[str], None]]:
    """Yields `tell(what)`, which shows the current work and its duration on standard error until the block ends.

    On a terminal it is one transient line; elsewhere a new line every 1.5 seconds. It is written to the standard error
    of the block's start, even while libraries' output is discarded.
    """
    with contextlib.ExitStack() as stack:
        if stream is None:
            stream = stack.enter_context(os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace"))
        console = Console(file=stream)
        shown = _one_line(console) if console.is_terminal else _signs_of_life(console)
        yield stack.enter_context(shown)


@contextmanager
def _one_line(console: Console) -> Iterator[Callable[[str], None]]:
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
        task = bar.add_task("", total=None)
        yield lambda what: bar.update(task, description=escape(what))


@contextmanager
def _signs_of_life(console: Console) -> Iterator[Callable[[str], None]]:
    now, began, ended = "", time.monotonic(), threading.Event()

    def lines() -> None:
        while not ended.wait(_SIGN_EVERY_SECONDS):
            line = f"{now} ({time.monotonic() - began:.0f} s)"
            console.print(escape(line), highlight=False, soft_wrap=True)

    def tell(what: str) -> None:
        nonlocal now
        now = what

    thread = threading.Thread(target=lines, daemon=True)
    thread.start()
    try:
        yield tell
    finally:
        ended.set()
        thread.join()


def rounded_time(seconds: float) -> str:
    """A duration rounded for an estimate: tens of seconds, minutes, or tenths of hours."""
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _worth_saying(event: Mapping[str, Any], *, number: int) -> bool:
    """Whether to show the numbers of rows: for the first cell, because cells mostly share them, and if rows are
    lost."""
    lost = ("dropped_rows", "repeated_rows", "truncated_rows", "truncated_test_rows")
    return number == 1 or any(event[name] for name in lost)


def _count(number: int, total: int) -> str:
    return escape(f"[{number}/{total}]")


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


class _Bars:
    def __init__(self, bars: Progress, cell: Cell, *, number: int, total: int) -> None:
        self._bars, self._number, self._max_length = bars, number, cell.training.max_length
        self._steps = cell.training.steps
        bars.add_task("cells", total=total, completed=number - 1, facts="")
        self._task = bars.add_task(escape(cell.id), total=self._steps, facts="starting")
        self._phase, self._counted = "", "steps"

    def event(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "step":
            self._count("steps", event["step"], self._steps, facts=_step_facts(event))
        elif event["event"] == "progress":
            work = f"{self._phase}: {event['work']}"
            self._count(work, event["done"], event["total"], facts=escape(work))
        elif event["event"] == "data" and _worth_saying(event, number=self._number):
            line = f"rows: {rows_in_words(event, max_length=self._max_length)}"
            self._bars.console.print(escape(line), highlight=False, soft_wrap=True)
        elif event["event"] == "note":
            self._bars.console.print(f"note: {escape(event['text'])}", highlight=False, soft_wrap=True)
        elif event["event"] == "phase":
            self._phase = event["name"]
            self._bars.update(self._task, facts=event["name"])

    def _count(self, what: str, done: int, total: int, *, facts: str) -> None:
        if what != self._counted:  # a new unit: the remaining time is estimated from its speed
            self._counted = what
            self._bars.reset(self._task, total=total)
        self._bars.update(self._task, completed=done, facts=facts)


class _Lines:
    def __init__(self, console: Console, cell: Cell, *, number: int, total: int) -> None:
        self._console, self._steps, self._said = console, cell.training.steps, time.monotonic()
        self._count, self._phase = _count(number, total), ""
        self._number, self._max_length = number, cell.training.max_length
        self._say(f"start {cell.id}")

    def event(self, event: Mapping[str, Any]) -> None:
        due = time.monotonic() - self._said >= _LINE_EVERY_SECONDS
        if event["event"] == "phase":
            self._phase = event["name"]
        elif event["event"] == "data" and _worth_saying(event, number=self._number):
            self._say(f"rows: {rows_in_words(event, max_length=self._max_length)}")
        elif event["event"] == "note":
            self._say(f"note: {event['text']}")
        elif event["event"] == "step" and (due or event["step"] == self._steps):
            self._say(f"step {event['step']}/{self._steps} {_step_facts(event)}")
        elif event["event"] == "progress" and due:
            self._say(f"{self._phase} {event['work']} {event['done']}/{event['total']}")

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        self._console.print(f"{self._count} {escape(text)}", highlight=False, soft_wrap=True)


def _step_facts(event: Mapping[str, Any]) -> str:
    return f"loss {event['loss']:.3f}  {event['tokens_per_second']:.0f} tokens/s"

"""A plan's answers on paper: the table, the table of cards, JSON and CSV."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from left_bench.launch.fit import Fit, Remedy
from left_bench.plan.peak import measured_range, room_needed, verdict
from left_bench.plan.result import Pass, Plan, Rows
from left_bench.spec.cell import Cell

_PARTS = ("weights", "adapter", "adapter_frozen", "gradients", "optimizer", "activations_and_workspace")
_HEADINGS = {"adapter_frozen": "frozen", "activations_and_workspace": "activations"}
CARDS_GB = (8, 12, 16, 24, 40, 48, 80, 141)
"""Sizes of cards, of 10⁹ bytes a GB: a card that corrects memory errors has about so many left of its GiB."""
NOT_KNOWN = 3
"""Exit code: a cell's peak is not known, and of the others none is too much."""


@dataclass(frozen=True)
class Answer:
    """What is said of one cell: a plan, or in `refusal` why there is none."""

    name: str
    """What sets it apart from the others."""
    cell: Cell
    plan: Plan | None = None
    fits: str = "unsupported"
    """`yes`, `no`, `perhaps` or `?` (`verdict`); `unsupported`; `cannot run`."""
    refusal: str | None = None
    limit_bytes: int | None = None
    rows: Rows = field(default_factory=Rows)
    """What was asked about the rows."""
    largest: tuple[Fit, ...] = ()
    """The largest batch or length, for each limit that was asked about."""
    remedies: tuple[Remedy, ...] = ()

    @property
    def range_bytes(self) -> tuple[int, int] | None:
        """Between what a run's measured peak may be expected; None where that is not known."""
        return None if self.plan is None else measured_range(self.plan, self.cell)


def print_answers(answers: Sequence[Answer]) -> int:
    """One line a cell, what could not be predicted beneath; returns the exit code."""
    from rich.table import Table
    from rich.text import Text

    held = {part for answer in answers if answer.plan is not None for part in answer.plan.parts}
    parts = [part for part in _PARTS if part in held or part != "adapter_frozen"]  # few methods have the last
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("cell", overflow="fold")
    mean = any(answer.rows.with_mean for answer in answers)
    ends = (*(["mean"] if mean else []), "peak", "as measured", "limit")
    for heading in (*(_HEADINGS.get(part, part) for part in parts), *ends):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    said: dict[str, None] = {}
    for answer in answers:
        plan, name = answer.plan, answer.name
        style = {"yes": "green", "no": "red", "cannot run": "red"}.get(answer.fits, "yellow")
        verdict_text = Text(answer.fits, style=style)
        if plan is None:
            table.add_row(Text(name), *[""] * (len(parts) + len(ends)), verdict_text)
            said[f"{name}: {answer.refusal}"] = None
            continue
        between = answer.range_bytes
        measured = _size(None) if between is None else f"{_size(between[0])} to {_size(between[1])}"
        sizes = [_size(plan.parts.get(part)) for part in parts] + ([_size(plan.mean_bytes)] if mean else [])
        table.add_row(Text(name), *sizes, _size(plan.peak_bytes), measured, _size(answer.limit_bytes), verdict_text)
        said |= {f"{name}: not predicted: {item}": None for item in plan.unknown}
        if plan.paged_optimizer_bytes:
            paged = _size(plan.paged_optimizer_bytes)
            said[f"{name}: {paged} of optimizer states beside the peak, in memory that CUDA pages to the host"] = None
        said |= dict.fromkeys(_in_words(answer))
    if mean:
        said["mean: what a step of ordinary rows holds at most"] = None
    said["peak: what the tensors of a step hold at once; as measured: what a run's record will say"] = None
    _print(table, said)
    return exit_code(answers)


def exit_code(answers: Sequence[Answer]) -> int:
    """1 when a cell does not fit or cannot run, else NOT_KNOWN when a peak could not be predicted, else 0."""
    if any(answer.fits in ("no", "cannot run") for answer in answers):
        return 1
    plans = [answer.plan for answer in answers if answer.fits == "?"]
    return NOT_KNOWN if any(plan is not None and plan.peak_bytes is None for plan in plans) else 0


def print_cards(answers: Sequence[Answer], cards_gb: Sequence[float]) -> int:
    """A column for every card: one word, and what is left over or too little; 1 where a cell fits into none of them."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("cell", overflow="fold")
    for heading in ("peak", *(f"{size:g} GB" for size in cards_gb)):
        table.add_column(heading, justify="right", no_wrap=True)
    code = 0
    said: dict[str, None] = {}
    for answer in answers:
        if answer.plan is None:
            table.add_row(Text(answer.name), "", *[Text(answer.fits, style="yellow")] * len(cards_gb))
            said[f"{answer.name}: {answer.refusal}"] = None
            code = max(code, int(answer.fits == "cannot run"))
            continue
        words = [on_card(answer.plan, answer.cell, gb=size) for size in cards_gb]
        styles = {"yes": "green", "no,": "red"}
        shown = (Text(word, style=styles.get(word[:3], "yellow")) for word in words)
        table.add_row(Text(answer.name), _size(answer.plan.peak_bytes), *shown)
        code = max(code, int(all(word.startswith("no") for word in words)))
        said |= {f"{answer.name}: not predicted: {item}": None for item in answer.plan.unknown}
        said |= dict.fromkeys(_in_words(answer))
    said["yes +: what is left over, with what lies beside a step's tensors taken off (docs/plan.md)"] = None
    _print(table, said)
    return code


def print_fits(answers: Sequence[Answer], *, fit: str, cards_gb: Sequence[float]) -> int:
    """The largest batch or length of each cell, for every limit; 1 where a cell fits into none of them."""
    from rich.table import Table
    from rich.text import Text

    limits = [f"{size:g} GB" for size in cards_gb] or ["limit", f"largest {fit}"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("cell", overflow="fold")
    for heading in limits:
        table.add_column(heading, justify="right", no_wrap=True)
    said: dict[str, None] = {}
    code = 0
    for answer in answers:
        if answer.plan is None:
            table.add_row(Text(answer.name), *[Text(answer.fits, style="yellow")] * len(limits))
            said[f"{answer.name}: {answer.refusal}"] = None
            code = max(code, int(answer.fits == "cannot run"))
            continue
        words = [fit_in_words(item, fit=fit) for item in answer.largest] or ["?"]
        shown = words if cards_gb else [_size(answer.limit_bytes), *words]
        table.add_row(Text(answer.name), *map(Text, shown))
        values = [item.value for item in answer.largest]
        code = max(code, int(bool(values) and all(value is None for value in values)))
        said |= {f"{answer.name}: not predicted: {item}": None for item in answer.plan.unknown}
    if fit == "batch":
        said["rows of a pass × passes of a step (training.batch_size, training.gradient_accumulation)"] = None
        said["all: a step's rows in one pass; a step has as many rows as before"] = None
    else:
        said["tokens of every row (training.max_length); all: as many as the model has positions"] = None
    _print(table, said)
    return code


def fit_in_words(one: Fit, *, fit: str) -> str:
    """`4 × 2`, or a length; `none` where not even the least fits, `?` where that is not known."""
    if one.value is None:
        return "?" if one.needed_bytes is None else "none"
    value = f"{one.value} × {one.gradient_accumulation}" if fit == "batch" else f"{one.value:,}"
    return f"{value} (all)" if one.bounded else value


def on_card(plan: Plan, cell: Cell, *, gb: float) -> str:
    """`yes +3.1 GiB` left over, `perhaps`, `no, 1.2 GiB short`, or `?`."""
    size = int(gb * 10**9)
    word, needed = verdict(plan, size, cell=cell), room_needed(plan, cell)
    if word == "yes" and needed is not None:
        return f"yes +{_size(size - needed)}"
    return f"no, {_size(sum(plan.parts.values()) - size)} short" if word == "no" else word


def row_of(answer: Answer) -> dict[str, Any]:
    """All that is known of a cell, by plain names; sizes in bytes."""
    plan, between = answer.plan, answer.range_bytes
    row: dict[str, Any] = {"name": answer.name, "cell_id": answer.cell.id, "fits": answer.fits}
    row |= {"limit_bytes": answer.limit_bytes, "refusal": answer.refusal}
    row |= {f"{part}_bytes": plan.parts.get(part) if plan is not None else None for part in _PARTS}
    row["peak_bytes"] = None if plan is None else plan.peak_bytes
    row |= {"measured_least_bytes": between and between[0], "measured_most_bytes": between and between[1]}
    if plan is not None:
        row |= {"paged_optimizer_bytes": plan.paged_optimizer_bytes, "trainable_params": plan.trainable_params}
        row |= {"total_params": plan.total_params, "not_predicted": "; ".join(plan.unknown)}
        row |= {f"largest_pass_{name}": value for name, value in asdict(plan.largest).items()}
        if plan.mean is not None:
            row |= {"mean_bytes": plan.mean_bytes, "mean_pass_tokens": plan.mean.rows * plan.mean.length}
    row |= {"largest": [asdict(item) for item in answer.largest]} if answer.largest else {}
    row |= {"remedies": [asdict(remedy) for remedy in answer.remedies]} if answer.remedies else {}
    return row


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row for CSV: of each limit, and of each remedy, a column of its own."""
    largest, changes = row.pop("largest", []), row.pop("remedies", [])
    for item in largest:
        limit = item.pop("limit_bytes")
        row |= {f"largest_for_{limit}_{key}": value for key, value in item.items()}
    return row | {f"needed_bytes with {' '.join(one['overrides'])}": one["needed_bytes"] for one in changes}


def print_rows(answers: Sequence[Answer], *, form: str) -> int:
    """The answers as `json` (a list of objects) or `csv` on standard output; returns the exit code."""
    rows = [row_of(answer) for answer in answers]
    if form == "json":
        print(json.dumps(rows, indent=1))
    else:
        rows = list(map(_flat, rows))
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(sys.stdout, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return exit_code(answers)


def _print(table: Any, said: dict[str, None]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console.width = 200
    console.print(table)
    for line in said:
        console.print(Text(line), soft_wrap=True)


def _size(value: float | None) -> str:
    from left_bench.report.values import format_value

    return format_value("peak_memory_bytes", value)


def _in_words(answer: Answer) -> list[str]:
    """The passes that were planned, and what would make the cell fit."""
    plan = answer.plan
    assert plan is not None
    said = [f"largest pass: {_pass_in_words(plan.largest, answer)}"]
    if plan.mean is not None:
        said.append(f"mean pass: {_pass_in_words(plan.mean, answer)}")
    for remedy in answer.remedies:
        needs = f"needs {_size(remedy.needed_bytes)}" + (", and fits" if remedy.fits else "")
        said.append(f"{answer.name}: with {' '.join(remedy.overrides)} it {needs}")
    if answer.remedies and not answer.remedies[-1].fits:
        said.append(f"{answer.name}: nothing that is known here makes it fit; take a smaller model, or shorter rows")
    return said


def _pass_in_words(one: Pass, answer: Answer) -> str:
    shape = f"{one.length} tokens end to end" if one.packed else f"{one.rows} rows of {one.length} tokens"
    rows = f"{shape}, {one.answer_tokens} of them answers"
    if one.measured:
        return rows
    if answer.rows.longest is not None:
        return f"{rows} (as --length says)"
    return f"{rows} (the rows are not on this machine: training.max_length taken for each)"

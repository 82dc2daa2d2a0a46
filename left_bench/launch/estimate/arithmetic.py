"""A cell's estimated seconds, from the timed passes of a base model and the cell's settings. No torch, no files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from left_bench.data import split_passes, step_rows
from left_bench.model.positions import virtual_tokens
from left_bench.spec.cell import Cell

_SIMULATED_STEPS = 64
_SPEED_ROWS, _SPEED_PASSES, _SPEED_STEPS = 16, 2, 16
"""The work of `evaluate.generation_speed`: rows, passes over their prompts, and single tokens after them."""
_CHECKED_ROWS, _MERGE_ROWS, _TRIED_ROWS = 4, 8, 2
_AROUND_SECONDS = 1.0
"""Starting a forked worker, reading its rows, attaching and saving: 0.5 to 1.3 s, depending on the method, in the
records of reports/peft_methods.md (wall time minus the phases computed here)."""
PEAK_SECONDS = 2.0
"""Measuring the peak of matrix products in a runs folder's first cell: up to three times, about a second each."""
# How much longer a method's steps and evaluation take than those of a base model through which the gradient flows.
# Medians of three seeds in the records of reports/peft_methods.md, relative to `ln_tuning`, which adds no product;
# `pfeiffer` from reports/quantization_x_peft.md. Other methods are assumed to be like LoRA.
_OF_METHODS: Mapping[str, tuple[float, float]] = {
    "adalora": (1.75, 1.58),
    "dora": (2.13, 2.49),
    "full": (1.0, 1.13),  # its weights' gradients are added separately
    "ia3": (1.13, 1.24),
    "llama_adapter": (1.19, 1.29),
    "ln_tuning": (1.0, 1.0),
    "lora": (1.37, 1.42),
    "p_tuning": (1.31, 1.57),
    "pfeiffer": (1.0, 1.02),
    "prefix_tuning": (1.05, 1.09),
    "prompt_tuning": (1.19, 1.28),
    "vera": (1.55, 1.95),
}
# The same for a quantization relative to the unquantized model: medians over the seven methods of
# reports/quantization_x_peft.md, in bfloat16 on a CPU with instructions for it.
_OF_QUANTIZATIONS: Mapping[str, tuple[float, float]] = {
    "fp4": (1.15, 1.20),
    "int5": (1.11, 1.15),
    "int8": (1.23, 1.86),
    "nf4": (1.10, 1.17),
    "nf4_dq": (1.13, 1.23),
    "nf5": (1.03, 1.06),
}


class Line(NamedTuple):
    """Seconds as a linear function of the work's size: a fixed part and a part per unit."""

    fixed: float
    each: float

    def of(self, size: float) -> float:
        return self.fixed + self.each * size

    def times(self, factor: float) -> Line:
        return Line(self.fixed * factor, self.each * factor)

    @classmethod
    def through(cls, points: Sequence[tuple[int, float]]) -> Line:
        """The line through measured (size, seconds), smallest first; proportional if noise makes the slope or offset
        negative."""
        (small, quick), (large, slow) = points[0], points[-1]
        each = (slow - quick) / (large - small) if large > small else 0.0
        fixed = quick - each * small
        if each <= 0 or fixed <= 0:
            return cls(0.0, slow / large)
        return cls(fixed, each)


class Rates(BaseModel):
    """The speed of a base model on this machine, in seconds."""

    model_config = ConfigDict(frozen=True)

    load: float
    forward: Line
    """A pass without gradients, by its tokens including padding; the head runs at labelled positions."""
    step: Line
    """A forward and backward pass, through activations only, by its tokens including padding."""
    decode: Line
    """One generated token per row, by the number of rows."""
    update: float
    """An optimizer step, per trained parameter."""
    parameters: int
    threads: int
    start: float = 0.0
    """Until the measuring process had started: its imports, if no other process had done them."""
    disturbed_by: float | None = None
    """Share of the machine's CPU time that others took from the measured cores; None: negligible."""


class Row(NamedTuple):
    """Tokens of a row; patches of an image."""

    prompt: int
    answer: int
    worse: int = 0

    @property
    def length(self) -> int:
        return self.prompt + self.answer

    def with_worse_answer(self) -> Row:
        return Row(self.prompt, self.worse)


class Rows(BaseModel):
    """The lengths of the rows; a sample if there are very many."""

    model_config = ConfigDict(frozen=True)

    train: list[Row]
    test: list[Row]
    test_rows: int
    validation_rows: int = 0
    """They are assumed to be as long as the test rows."""
    general: list[int]
    """Tokens of the passages of general text."""
    shared: int = 0
    """Length of the test prompts' common prefix, which an evaluation processes once."""


class Measured(NamedTuple):
    """The measurements from which a cell's seconds are computed."""

    rates: Rates
    rows: Rows


class Factors(NamedTuple):
    """How many times longer a cell's work takes than the base model's."""

    train: float = 1.0
    evaluate: float = 1.0


NOTHING_MORE = Factors()


def of_method(cell: Cell) -> Factors:
    """The slowdown by the cell's method relative to the base model."""
    return Factors(*_OF_METHODS.get(cell.peft.name, _OF_METHODS["lora"]))


def of_quantization(name: str) -> Factors | None:
    """The slowdown by a quantization on a CPU with bfloat16 products; None if it was not measured."""
    result = _OF_QUANTIZATIONS.get(name)
    return None if result is None else Factors(*result)


def seconds_of(cell: Cell, rates: Rates, rows: Rows, factors: Factors = NOTHING_MORE) -> dict[str, float]:
    """A cell's seconds by phase, under the record's names; `around` is the time outside phases.

    `evaluate_base` is only spent by the first of several cells that share a base model's scores.
    """
    training, result = cell.training, {"load": rates.load, "around": _AROUND_SECONDS}
    scored = not cell.eval.trial
    if scored and cell.model.weights != "random" and not cell.task.new_output:
        result["evaluate_base"] = _evaluation(cell, rates, rows)
    if training.sft_steps:
        result["sft"] = factors.train * _steps(cell.sft_before(), rates, rows)
    if training.has_reference:
        seen = rows.train[: training.steps * training.rows_per_step]
        both = _answers(seen, cell)
        both = both * 2 if training.objective == "kto" else both  # another row's answers to the same prompts
        result["reference"] = factors.evaluate * _passes(cell, rates.forward, both, training.batch_size)
    trains = training.objective != "combine"
    result["train"] = factors.train * _steps(cell, rates, rows) if trains else 0.0
    if trains and rows.validation_rows and (points := _points(cell, rows.validation_rows)):
        read = (rows.test * (-(-rows.validation_rows // len(rows.test))))[: rows.validation_rows]
        once = _passes(cell, rates.forward, read, training.batch_size)
        result["validate"] = points * factors.evaluate * once
    if not scored:
        return result
    result["evaluate"] = factors.evaluate * (_evaluation(cell, rates, rows) + _speed(cell, rates, rows))
    if cell.eval.check_reload:
        losses = _passes(cell, rates.forward, _scored(cell, rows), cell.eval.batch_size)
        result["reload"] = rates.load + factors.evaluate * losses
    if _is_merged(cell):
        compared = rates.forward.of(_padded(rows.test[:_MERGE_ROWS], cell))
        result["merge"] = (1 + factors.evaluate) * compared + _speed(cell, rates, rows)
    return result


def _points(cell: Cell, validation_rows: int) -> int:
    """How many times the validation loss is measured during training."""
    steps, every = cell.training.steps, cell.eval.every
    return cell.curve_points(validation_rows) if every is None else -(-steps // every)


def _steps(cell: Cell, rates: Rates, rows: Rows) -> float:
    """The optimizer steps, extrapolated from some of them with their actual rows."""
    training = cell.training
    taken = min(training.steps, _SIMULATED_STEPS)
    order = step_rows(
        len(rows.train),
        rows_per_step=training.rows_per_step,
        steps=taken,
        seed=cell.seed,
    )
    seconds = 0.0
    for indices in order:
        step: list[Row] = [rows.train[index] for index in indices]
        if training.objective == "grpo":
            step = [row for row in step for _ in range(training.group_size)]
            seconds += _sampling(cell, rates, step) / training.updates_per_sample
        passes: Iterable[list[Row]] = split_passes(
            step,  # type: ignore[arg-type]
            batch_size=training.batch_size,
            batching=training.batching,
        )  # type: ignore[assignment]
        for read in passes:
            read = _answers(read, cell) if training.compares else read
            if training.objective == "kto":
                seconds += rates.forward.of(_padded(read, cell))
            size = sum(row.length for row in read) if training.batching == "packed" else _padded(read, cell)
            again = training.activation_checkpointing + (cell.peft.target is None)  # one more product per weight
            seconds += rates.step.of(size) + again * rates.forward.of(size)
        if cell.peft.target is None:
            seconds += rates.update * rates.parameters
    return seconds * training.steps / taken


def _sampling(cell: Cell, rates: Rates, rows: Sequence[Row]) -> float:
    """Answers to the rows, taken to be as long as the right ones, and the reference's look at them."""
    seconds = _passes(cell, rates.forward, rows, cell.training.batch_size) if cell.training.kl_weight else 0.0
    longest = min(max(row.answer for row in rows), cell.eval.max_new_tokens or 1)
    for part in _in_batches([Row(row.prompt, 0) for row in rows], cell.eval.batch_size):
        seconds += rates.forward.of(_padded(part, cell)) + (longest - 1) * rates.decode.of(len(part))
    return seconds


def _answers(rows: Sequence[Row], cell: Cell) -> list[Row]:
    """The rows' answers, each with its prompt."""
    return [*rows, *(row.with_worse_answer() for row in rows if cell.data.pairs)]


def _evaluation(cell: Cell, rates: Rates, rows: Rows) -> float:
    """Losses, answers and general text; answers are assumed to have the maximum length."""
    scored, batch = _scored(cell, rows), cell.eval.batch_size
    seconds = 0.0
    if rows.shared and not virtual_tokens(cell):
        tried = scored[:_TRIED_ROWS]
        seconds += rates.forward.of(rows.shared) + rates.forward.of(_padded(tried, cell))
        scored = [row._replace(prompt=row.prompt - rows.shared) for row in scored]
        seconds += rates.forward.of(_padded(scored[:_TRIED_ROWS], cell))
    seconds += _passes(cell, rates.forward, scored, batch)
    if cell.data.pairs:
        seconds += _passes(cell, rates.forward, [row.with_worse_answer() for row in scored], batch)
    if not cell.task.writes:
        seconds *= 2  # predicting the classes takes a second pass
    if cell.generates:
        tokens = cell.eval.max_new_tokens or 1
        for prompts in _in_batches([Row(row.prompt, 0) for row in scored], batch):
            seconds += rates.forward.of(_padded(prompts, cell)) + (tokens - 1) * rates.decode.of(len(prompts))
        seconds += rates.forward.of(_padded(scored[:_CHECKED_ROWS], cell))
    seconds *= min(rows.test_rows, cell.eval.rows or rows.test_rows) / len(scored)
    if cell.eval.forgetting:
        seconds += _passes(cell, rates.forward, [Row(tokens, 0) for tokens in rows.general], batch)
    return seconds


def _speed(cell: Cell, rates: Rates, rows: Rows) -> float:
    """Measuring the generation speed."""
    if not cell.generates:
        return 0.0
    timed = [Row(row.prompt, 0) for row in _scored(cell, rows)[:_SPEED_ROWS]]
    prompts = rates.forward.of(_padded(timed, cell))
    return _SPEED_PASSES * prompts + _SPEED_STEPS * rates.decode.of(len(timed))


def _scored(cell: Cell, rows: Rows) -> list[Row]:
    return rows.test[: cell.eval.rows]


def _is_merged(cell: Cell) -> bool:
    """Whether the method is a mergeable peft method: without virtual tokens and without prompts in layers."""
    target = cell.peft.target or ""
    return target.startswith("peft.") and not virtual_tokens(cell) and "Prompt" not in target


def _passes(cell: Cell, forward: Line, rows: Sequence[Row], batch_size: int) -> float:
    return sum(forward.of(_padded(batch, cell)) for batch in _in_batches(rows, batch_size))


def _in_batches(rows: Sequence[Row], batch_size: int) -> list[list[Row]]:
    """As in `evaluate.batches_by_length`."""
    ordered = sorted(rows, key=lambda row: -row.length)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def _padded(rows: Sequence[Row], cell: Cell) -> int:
    """Tokens of one pass over the rows, including padding; encoder and decoder are padded separately."""
    if not rows:
        return 0
    if cell.task.has_encoder:
        return len(rows) * (max(row.prompt for row in rows) + max(row.answer for row in rows))
    return len(rows) * max(row.length for row in rows)


def total_of(parts: Mapping[str, float], *, cells: int, bases: int) -> float:
    """Seconds of `cells` equal cells, of which `bases` score the base model."""
    once = parts.get("evaluate_base", 0.0)
    return cells * (sum(parts.values()) - once) + bases * once

"""A cell's seconds, added up from what a base model's passes take and what the cell asks for. No torch, no file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from left_bench.data import split_passes, step_rows
from left_bench.model.positions import virtual_tokens
from left_bench.spec.cell import Cell

_SIMULATED_STEPS = 64
_SPEED_ROWS, _SPEED_PASSES, _SPEED_STEPS = 16, 2, 16
"""What `evaluate.generation_speed` does: two prompts passes over so many rows, and so many single tokens after them."""
_CHECKED_ROWS, _MERGE_ROWS, _TRIED_ROWS = 4, 8, 2
_AROUND_SECONDS = 1.0
"""Starting a forked worker, reading its rows, attaching and saving: 0.5 to 1.3 s, by method, in the records of
reports/peft_methods.md (wall time less the phases that are added up here)."""
PEAK_SECONDS = 2.0
"""Measuring the peak of matrix products, which a runs folder's first cell does: up to three times a second or less."""
# How much longer a method's steps and evaluation take than those of a base model through which the gradient flows.
# Medians of three seeds in the records of reports/peft_methods.md, over those of `ln_tuning`, which adds no product;
# `pfeiffer` from reports/quantization_x_peft.md. A method that is not here is taken for LoRA.
_OF_METHODS: Mapping[str, tuple[float, float]] = {
    "adalora": (1.75, 1.58),
    "dora": (2.13, 2.49),
    "full": (1.0, 1.13),  # its weights' gradients are added up apart
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
# The same of a quantization over the unquantized model: medians over the seven methods of
# reports/quantization_x_peft.md, all of them in bfloat16 on a CPU that has instructions for it.
_OF_QUANTIZATIONS: Mapping[str, tuple[float, float]] = {
    "fp4": (1.15, 1.20),
    "int5": (1.11, 1.15),
    "int8": (1.23, 1.86),
    "nf4": (1.10, 1.17),
    "nf4_dq": (1.13, 1.23),
    "nf5": (1.03, 1.06),
}


class Line(NamedTuple):
    """Seconds of work that has a size: so many whatever the size, and so many for each unit of it."""

    fixed: float
    each: float

    def of(self, size: float) -> float:
        return self.fixed + self.each * size

    def times(self, factor: float) -> Line:
        return Line(self.fixed * factor, self.each * factor)

    @classmethod
    def through(cls, points: Sequence[tuple[int, float]]) -> Line:
        """That of measured (size, seconds), the smallest first; what noise has turned upside down is proportional."""
        (small, quick), (large, slow) = points[0], points[-1]
        each = (slow - quick) / (large - small) if large > small else 0.0
        fixed = quick - each * small
        if each <= 0 or fixed <= 0:
            return cls(0.0, slow / large)
        return cls(fixed, each)


class Rates(BaseModel):
    """What a base model's work takes on this machine, seconds."""

    model_config = ConfigDict(frozen=True)

    load: float
    forward: Line
    """Of a pass without gradients, by its tokens, padding included; the head runs where a row is labelled."""
    step: Line
    """Of a pass forward and backward, through activations alone, by its tokens, padding included."""
    decode: Line
    """Of one generated token for each of so many rows."""
    update: float
    """Of an optimizer's step, for each trained parameter."""
    parameters: int
    threads: int
    start: float = 0.0
    """Until the process that measured had begun: its imports, where no other had made them."""
    disturbed_by: float | None = None
    """Share of the machine's CPU time that others took of the cores measured on; None: not enough to matter."""


class Row(NamedTuple):
    """Tokens of a row; of a picture its patches."""

    prompt: int
    answer: int
    worse: int = 0

    @property
    def length(self) -> int:
        return self.prompt + self.answer

    def with_worse_answer(self) -> Row:
        return Row(self.prompt, self.worse)


class Rows(BaseModel):
    """How long the rows are; of very many a part that stands for all."""

    model_config = ConfigDict(frozen=True)

    train: list[Row]
    test: list[Row]
    test_rows: int
    validation_rows: int = 0
    """They are taken to be as long as the test rows."""
    general: list[int]
    """Tokens of the passages of general text."""
    shared: int = 0
    """Tokens that the test rows' prompts all begin with, which an evaluation reads once."""


class Measured(NamedTuple):
    """What the seconds of a cell are added up from."""

    rates: Rates
    rows: Rows


class Factors(NamedTuple):
    """How many times longer a cell's work takes than the base model's."""

    train: float = 1.0
    evaluate: float = 1.0


NOTHING_MORE = Factors()


def of_method(cell: Cell) -> Factors:
    """What the cell's method adds to the base model's work."""
    return Factors(*_OF_METHODS.get(cell.peft.name, _OF_METHODS["lora"]))


def of_quantization(name: str) -> Factors | None:
    """What a quantization adds on a CPU that multiplies bfloat16; None where nothing was measured."""
    result = _OF_QUANTIZATIONS.get(name)
    return None if result is None else Factors(*result)


def seconds_of(cell: Cell, rates: Rates, rows: Rows, factors: Factors = NOTHING_MORE) -> dict[str, float]:
    """A cell's seconds by phase, by the names that a record gives them; `around` is what is in none.

    `evaluate_base` is what the first of several cells that share a base model's scores spends on them.
    """
    training, result = cell.training, {"load": rates.load, "around": _AROUND_SECONDS}
    if cell.model.weights != "random" and not cell.task.new_output:
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
    result["evaluate"] = factors.evaluate * (_evaluation(cell, rates, rows) + _speed(cell, rates, rows))
    if cell.eval.check_reload:
        losses = _passes(cell, rates.forward, _scored(cell, rows), cell.eval.batch_size)
        result["reload"] = rates.load + factors.evaluate * losses
    if _is_merged(cell):
        compared = rates.forward.of(_padded(rows.test[:_MERGE_ROWS], cell))
        result["merge"] = (1 + factors.evaluate) * compared + _speed(cell, rates, rows)
    return result


def _points(cell: Cell, validation_rows: int) -> int:
    """Times that the validation rows are gone over along training."""
    steps, every = cell.training.steps, cell.eval.every
    return cell.curve_points(validation_rows) if every is None else -(-steps // every)


def _steps(cell: Cell, rates: Rates, rows: Rows) -> float:
    """The optimizer's steps: some are gone through, with the very rows that they will see, and stand for all."""
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
            again = training.activation_checkpointing + (cell.peft.target is None)  # one more product for each weight
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
    """Losses, answers and general text; answers are taken to be as long as they may."""
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
        seconds *= 2  # the classes are told by a pass of their own
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
    """The rate of generation, measured."""
    if not cell.generates:
        return 0.0
    asked = [Row(row.prompt, 0) for row in _scored(cell, rows)[:_SPEED_ROWS]]
    prompts = rates.forward.of(_padded(asked, cell))
    return _SPEED_PASSES * prompts + _SPEED_STEPS * rates.decode.of(len(asked))


def _scored(cell: Cell, rows: Rows) -> list[Row]:
    return rows.test[: cell.eval.rows]


def _is_merged(cell: Cell) -> bool:
    """Whether the method is one of peft's that go into the weights: it has no virtual tokens, nor prompts in layers."""
    target = cell.peft.target or ""
    return target.startswith("peft.") and not virtual_tokens(cell) and "Prompt" not in target


def _passes(cell: Cell, forward: Line, rows: Sequence[Row], batch_size: int) -> float:
    return sum(forward.of(_padded(batch, cell)) for batch in _in_batches(rows, batch_size))


def _in_batches(rows: Sequence[Row], batch_size: int) -> list[list[Row]]:
    """As `evaluate.batches_by_length` has them."""
    ordered = sorted(rows, key=lambda row: -row.length)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def _padded(rows: Sequence[Row], cell: Cell) -> int:
    """Tokens of one pass over the rows, padding included; encoder and decoder are padded each on its own."""
    if not rows:
        return 0
    if cell.task.has_encoder:
        return len(rows) * (max(row.prompt for row in rows) + max(row.answer for row in rows))
    return len(rows) * max(row.length for row in rows)


def total_of(parts: Mapping[str, float], *, cells: int, bases: int) -> float:
    """Seconds of so many cells that cost the same, so many of which score the base model."""
    once = parts.get("evaluate_base", 0.0)
    return cells * (sum(parts.values()) - once) + bases * once

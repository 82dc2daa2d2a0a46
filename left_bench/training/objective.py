"""What a training step makes smaller: the loss of right answers, or that of preferring them to worse ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.nn.functional import logsigmoid

from left_bench.data import Batch, Example, collate, split_passes, step_rows
from left_bench.data.batches import moved_to
from left_bench.data.lazy import LazyRows
from left_bench.model.load import autocast
from left_bench.spec.cell import Cell
from left_bench.training.loss import AnswerLoss


class Objective(Protocol):
    """A loss that is the mean over what `count` counts."""

    @property
    def loss(self) -> AnswerLoss:
        """Of single tokens."""

    @property
    def pad_id(self) -> int:
        """What rows are padded with."""

    @property
    def packed(self) -> bool:
        """Whether the rows of a pass lie end to end."""

    def sequences(self, rows: Sequence[Example]) -> list[Example]:
        """What the model reads for these rows."""

    def count(self, rows: Sequence[Example]) -> int:
        """What the loss of these rows is the mean of."""

    def batch(self, rows: Sequence[Example]) -> Any:
        """One pass over the rows, for `summed`."""

    def summed(self, batch: Any, *, gain: float) -> torch.Tensor:
        """`gain` times the loss of one pass, not yet divided by `count`; differentiable."""

    def through(self, wrapped: torch.nn.Module) -> Objective:
        """The same with forward passes taken through a wrapper around the model (DDP)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RightAnswers:
    """Supervised fine-tuning: the negative log-likelihood of an answer token, nats."""

    loss: AnswerLoss
    pad_id: int
    packed: bool = False

    def sequences(self, rows: Sequence[Example]) -> list[Example]:
        return list(rows)

    def count(self, rows: Sequence[Example]) -> int:
        return sum(row.labels for row in rows)

    def batch(self, rows: Sequence[Example]) -> Batch:
        return collate(rows, pad_id=self.pad_id, packed=self.packed)

    def summed(self, batch: Batch, *, gain: float) -> torch.Tensor:
        return self.loss.summed(batch, gain=gain)

    def through(self, wrapped: torch.nn.Module) -> RightAnswers:
        return dataclasses.replace(self, loss=self.loss.through(wrapped))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
    """One pass over right answers and, behind them, as many worse ones."""

    batch: Batch
    margins: torch.Tensor
    """What the reference model makes of each pair, nats (see `with_reference`)."""

    def to(self, device: torch.device | str) -> Pairs:
        return Pairs(batch=self.batch.to(device), margins=moved_to(self.margins, device))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preferences:
    """Direct preference optimization (Rafailov et al. 2023, eq. 7): -log sigmoid(beta x (margin - reference margin)).

    A margin is the log-probability of the right answer less that of the worse one, each summed over its tokens.
    """

    loss: AnswerLoss
    beta: float
    pad_id: int
    packed: bool = False

    def sequences(self, rows: Sequence[Example]) -> list[Example]:
        return [*rows, *map(with_worse_answer, rows)]

    def count(self, rows: Sequence[Example]) -> int:
        return len(rows)

    def batch(self, rows: Sequence[Example]) -> Pairs:
        margins = torch.tensor([row.reference_margin for row in rows], dtype=torch.float32)
        return Pairs(batch=collate(self.sequences(rows), pad_id=self.pad_id, packed=self.packed), margins=margins)

    def summed(self, batch: Pairs, *, gain: float) -> torch.Tensor:
        def loss(nll: torch.Tensor) -> torch.Tensor:
            right, worse = nll.chunk(2)
            return -gain * logsigmoid(self.beta * (worse - right - batch.margins)).sum()

        return self.loss.of_rows(batch.batch, loss)

    def through(self, wrapped: torch.nn.Module) -> Preferences:
        return dataclasses.replace(self, loss=self.loss.through(wrapped))


def make_objective(cell: Cell, loss: AnswerLoss, *, pad_id: int, packed: bool) -> Objective:
    """The loss that the cell's training asks for."""
    if cell.training.objective == "sft":
        return RightAnswers(loss=loss, pad_id=pad_id, packed=packed)
    return Preferences(loss=loss, beta=cell.training.beta, pad_id=pad_id, packed=packed)


def with_worse_answer(row: Example) -> Example:
    """The row with its worse answer in the right one's place."""
    assert row.rejected_ids is not None
    return dataclasses.replace(row, answer_ids=row.rejected_ids)


def with_reference(
    rows: Sequence[Example], cell: Cell, *, loss: AnswerLoss, pad_id: int, packed: bool, device: str
) -> Sequence[Example]:
    """The training rows with the margins of the model as it is now; only those that the cell's steps will see.

    The model before preference tuning is DPO's reference. Its margins do not change, so they are worked out once, and
    no second model is held beside the one that is trained.
    """
    settings = cell.training
    order = step_rows(
        len(rows),
        rows_per_step=settings.batch_size * settings.gradient_accumulation,
        steps=settings.steps,
        seed=cell.seed,
    )
    seen = sorted({index for indices in order for index in indices})
    objective = Preferences(loss=loss, beta=settings.beta, pad_id=pad_id, packed=packed)
    was_training = loss.model.training
    loss.model.eval()  # the reference has no dropout
    known = dict(zip(seen, _margins([rows[index] for index in seen], objective, cell, device=device), strict=True))
    loss.model.train(was_training)
    return _WithMargins(rows, known)


class _WithMargins(LazyRows[Example]):
    """Rows that know their reference margin; those that no step will see have 0, for passes that only try something."""

    def __init__(self, rows: Sequence[Example], known: Mapping[int, float]) -> None:
        self._rows, self._known = rows, known

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Example:
        return dataclasses.replace(self._rows[index], reference_margin=self._known.get(index, 0.0))


def _margins(rows: Sequence[Example], objective: Preferences, cell: Cell, *, device: str) -> Iterable[float]:
    with torch.no_grad(), autocast(cell, device=device):
        for part in split_passes(rows, batch_size=cell.training.batch_size, batching="padded"):
            batch = collate(objective.sequences(part), pad_id=objective.pad_id, packed=objective.packed).to(device)
            nll = objective.loss.of_tokens(batch).split(batch.answer_lengths)
            right, worse = torch.stack([item.sum() for item in nll]).chunk(2)
            yield from (worse - right).tolist()

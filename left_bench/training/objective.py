"""What a training step makes smaller: the loss of right answers, or one of the losses of `preferences`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from left_bench.data import Batch, Example, collate
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

    def prepare(self, rows: Sequence[Example]) -> Sequence[Example]:
        """What a step over these rows is trained on: the rows themselves, or answers to them that are made now."""

    def told(self) -> dict[str, float]:
        """What the last step has to tell besides its loss, by the names of `spec.record.PolicyPoint`."""

    def batch(self, rows: Sequence[Example], *, step: Sequence[Example] = ()) -> Any:
        """One pass over the rows, for `summed`.

        Args:
            step: all rows of the optimizer's step, where it has more than this pass.
        """

    def summed(self, batch: Any, *, gain: float) -> torch.Tensor:
        """`gain` times the loss of one pass, not yet divided by `count`; differentiable."""

    def through(self, wrapped: torch.nn.Module) -> Objective:
        """The same with forward passes taken through a wrapper around the model (DDP)."""


class OfGivenRows:
    """An objective whose steps are trained on the rows as they are, and tell of nothing but their loss."""

    def prepare(self, rows: Sequence[Example]) -> Sequence[Example]:
        return rows

    def told(self) -> dict[str, float]:
        return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RightAnswers(OfGivenRows):
    """Supervised fine-tuning: the negative log-likelihood of an answer token, nats."""

    loss: AnswerLoss
    pad_id: int
    packed: bool = False

    def sequences(self, rows: Sequence[Example]) -> list[Example]:
        return list(rows)

    def count(self, rows: Sequence[Example]) -> int:
        return sum(row.labels for row in rows)

    def batch(self, rows: Sequence[Example], *, step: Sequence[Example] = ()) -> Batch:
        return collate(rows, pad_id=self.pad_id, packed=self.packed)

    def summed(self, batch: Batch, *, gain: float) -> torch.Tensor:
        return self.loss.summed(batch, gain=gain)

    def through(self, wrapped: torch.nn.Module) -> RightAnswers:
        return dataclasses.replace(self, loss=self.loss.through(wrapped))

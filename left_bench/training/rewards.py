"""The loss of a reward model: the better of two answers is to have the higher reward."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from left_bench.data import collate
from left_bench.training.loss import AnswerLoss
from left_bench.training.objective import OfGivenRows


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankedRewards(OfGivenRows):
    """-log sigmoid(better - worse - margin) (Bradley and Terry 1952), mean over pairs, as TRL's RewardTrainer has it.

    Rewards are known up to a constant; `center` times the mean of (better + worse)^2 draws them to 0 (Eisenstein et
    al. 2023, eq. 2).
    """

    loss: AnswerLoss
    pad_id: int
    packed: bool = False
    center: float = 0.0

    def sequences(self, rows: Sequence[Any]) -> list[Any]:
        return list(rows)

    def count(self, rows: Sequence[Any]) -> int:
        return len(rows)

    def batch(self, rows: Sequence[Any], *, step: Sequence[Any] = ()) -> Any:
        return collate(rows, pad_id=self.pad_id)

    def summed(self, batch: Any, *, gain: float) -> torch.Tensor:  # a `PairBatch`
        rewards = self.loss.logits_of_tokens(batch)
        ranking = cross_entropy(rewards, batch.targets, reduction="sum")
        away = (rewards.sum(-1) + batch.margins).square().sum()  # the margin was taken off the better one
        return gain * (ranking + self.center * away)

    def through(self, wrapped: torch.nn.Module) -> RankedRewards:
        return dataclasses.replace(self, loss=self.loss.through(wrapped))

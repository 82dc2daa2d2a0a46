"""Pairs of answers as a reward model reads them: which of the two is better is all that it is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from left_bench.data.batches import moved_to
from left_bench.data.lazy import LazyRows
from left_bench.data.tokens import Example, Splits

REWARD = "reward"
"""The name of a reward model's one output."""


@dataclass(frozen=True)
class AnswerPair:
    """One question with a better and a worse answer, each read with the question."""

    not_packed: ClassVar[str] = "a reward is told of a whole row, and packed rows are one row to the model"
    labels: ClassVar[int] = 1
    """One comparison carries loss."""
    prompt_ids: list[int]
    answer_ids: list[int]
    rejected_ids: list[int]
    prompt: str
    """The user's text, uncut."""
    reference: str
    """The better answer, uncut."""
    margin: float = 0.0
    """By how much the better answer's reward is to be the higher one."""

    @property
    def length(self) -> int:
        """Tokens of both answers, each with the prompt."""
        return 2 * len(self.prompt_ids) + len(self.answer_ids) + len(self.rejected_ids)

    @property
    def identity(self) -> list[Any]:
        """What makes it another row."""
        return [self.prompt_ids, self.answer_ids, self.rejected_ids, self.margin]

    @staticmethod
    def collate(rows: Sequence[AnswerPair], *, pad_id: int) -> PairBatch:
        """One pass over the rows: the better answers and, behind them, the worse ones, padded at the right."""
        answers = [row.prompt_ids + row.answer_ids for row in rows]
        answers += [row.prompt_ids + row.rejected_ids for row in rows]
        return PairBatch(
            arguments=padded(answers, pad_id=pad_id),
            margins=torch.tensor([row.margin for row in rows]),
            tokens=sum(row.length for row in rows),
        )


@dataclass(frozen=True, eq=False)
class PairBatch:
    """The pairs of one pass. The cross-entropy of choosing between two rewards is the ranking loss,
    -log sigmoid(better - worse - margin), so that a pair is a row of two classes, the first of them right."""

    arguments: dict[str, torch.Tensor]
    margins: torch.Tensor
    tokens: int

    @property
    def targets(self) -> torch.Tensor:
        return torch.zeros(len(self.margins), dtype=torch.long, device=self.margins.device)

    @property
    def answer_lengths(self) -> list[int]:
        return [1] * len(self.margins)

    @property
    def answer_tokens(self) -> int:
        return len(self.margins)

    def labelled(self, states: torch.Tensor, *, after: int = 0) -> torch.Tensor:
        """Rewards [2 x pairs, 1] as one row for each pair, float32 [pairs, 2], the margin taken off the better one."""
        better, worse = states.float().squeeze(-1).chunk(2)
        return torch.stack([better - self.margins, worse], dim=-1)

    def inputs(self) -> dict[str, Any]:
        return dict(self.arguments)

    def to(self, device: torch.device | str) -> PairBatch:
        moved = {name: moved_to(tensor, device) for name, tensor in self.arguments.items()}
        return PairBatch(arguments=moved, margins=moved_to(self.margins, device), tokens=self.tokens)


def padded(rows: Sequence[Sequence[int]], *, pad_id: int) -> dict[str, torch.Tensor]:
    """Arguments of a pass over rows of tokens, padded at the right to the longest."""
    longest = max(map(len, rows))
    ids = [[*row, *[pad_id] * (longest - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def as_answer_pairs(splits: Splits) -> Splits:
    """The same rows for a reward model; those that are scored have no margin."""
    return dataclasses.replace(
        splits,
        train=_Pairs(splits.train, margins=True),
        validation=_Pairs(splits.validation),
        test=_Pairs(splits.test),
        classes=[REWARD],
    )


class _Pairs(LazyRows[AnswerPair]):
    def __init__(self, rows: Sequence[Example], *, margins: bool = False) -> None:
        self._rows, self._margins = rows, margins

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> AnswerPair:
        row = self._rows[index]
        assert row.rejected_ids is not None
        return AnswerPair(
            prompt_ids=row.prompt_ids,
            answer_ids=row.answer_ids,
            rejected_ids=row.rejected_ids,
            prompt=row.prompt,
            reference=row.reference,
            margin=(row.margin or 0.0) if self._margins else 0.0,
        )

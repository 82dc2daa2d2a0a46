"""Batches: which rows a step sees, in which passes, and how they are padded."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from left_bench.data.tokens import Example

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""The label that torch's cross-entropy leaves out."""


@dataclass(frozen=True, eq=False)
class Batch:
    """The rows of one pass, padded at the right to the longest; tensors of shape (rows, longest), int64."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    """1 on tokens, 0 on padding."""
    labels: torch.Tensor
    """The answer's tokens in their own places (not shifted); -100 on prompt and padding."""
    tokens: int
    """Non-padding tokens."""
    answer_tokens: int
    """Tokens that carry loss."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return dataclasses.replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            labels=self.labels.to(device),
        )


def step_rows(n_rows: int, *, rows_per_step: int, steps: int, seed: int) -> Iterator[list[int]]:
    """The rows of each optimizer step: seeded permutations of all rows, one epoch after the other.

    A step may straddle two epochs, so no row is left out at an epoch's end. Python's own generator makes the order the
    same on every device and for every method.
    """
    if n_rows < 1:
        raise ValueError("no rows to train on")
    order = _epochs(n_rows, random.Random(seed))
    for _ in range(steps):
        yield [next(order) for _ in range(rows_per_step)]


def _epochs(n_rows: int, generator: random.Random) -> Iterator[int]:
    while True:
        yield from generator.sample(range(n_rows), n_rows)


def split_passes(
    rows: Sequence[Example], *, batch_size: int, batching: Literal["padded", "grouped"]
) -> list[list[Example]]:
    """Cut a step's rows into passes of at most `batch_size`.

    `grouped` puts rows of like length together, longest first: less padding, and a step that does not fit in memory
    fails at its first pass.
    """
    ordered = sorted(rows, key=lambda row: row.length, reverse=True) if batching == "grouped" else list(rows)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def collate(examples: Sequence[Example], *, pad_id: int) -> Batch:
    """Prompt and answer of each row in one tensor, padded at the right with `pad_id`."""
    import torch

    longest = max(example.length for example in examples)
    input_ids = torch.full((len(examples), longest), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for i, example in enumerate(examples):
        answer_start, end = len(example.prompt_ids), example.length
        input_ids[i, :end] = torch.tensor(example.prompt_ids + example.answer_ids, dtype=torch.long)
        attention_mask[i, :end] = 1
        labels[i, answer_start:end] = input_ids[i, answer_start:end]
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        tokens=sum(example.length for example in examples),
        answer_tokens=sum(len(example.answer_ids) for example in examples),
    )

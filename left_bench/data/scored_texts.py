"""Texts and their numbers: rows whose answer is a number that a model is to tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from left_bench.core.errors import UserError
from left_bench.data.batches import ClassBatch
from left_bench.data.rows import split_rows
from left_bench.data.shapes import Row
from left_bench.data.texts import Text, all_rows, encode, made_splits, padded, shown
from left_bench.data.tokens import Splits
from left_bench.spec.cell import Data


@dataclass(frozen=True, kw_only=True)
class ScoredText(Text):
    """One text with its number; `reference` is the number as it stands in the data."""

    number: float

    @staticmethod
    def collate(rows: Sequence[ScoredText], *, pad_id: int) -> ClassBatch:
        """One pass over the rows, padded to the longest."""
        import torch

        return ClassBatch(
            arguments=padded(rows, pad_id=pad_id),
            targets=torch.tensor([row.number for row in rows], dtype=torch.float32),
            tokens=sum(row.length for row in rows),
        )


def load_scored_texts(section: Data, tokenizer: Any, *, max_length: int, at_left: bool = False) -> Splits:
    """Texts, or pairs of them (`data.second_column`), and their numbers as they stand, cut to `max_length` tokens.

    Args:
        at_left: as `load_classified_texts`.

    Raises:
        UserError: as `split_rows`; or an answer is no number, or all are one.
    """
    rows = split_rows(section)
    numbers = {row.answer: _number(row, section) for row in all_rows(rows)}
    if len(set(numbers.values())) < 2:
        raise UserError(
            f"data.answer_column={section.answer_column!r}: all rows have the one number {min(numbers)}; name the "
            "column with the numbers"
        )

    def make(some: Sequence[Row]) -> list[tuple[ScoredText, int]]:
        return [
            (
                ScoredText(
                    ids=encoded.ids,
                    types=encoded.types,
                    prompt=shown(row),
                    reference=row.answer,
                    at_left=at_left,
                    number=numbers[row.answer],
                ),
                encoded.length,
            )
            for row, encoded in zip(some, encode(some, section, tokenizer, max_length=max_length), strict=True)
        ]

    return made_splits(rows, make, max_length=max_length, classes=[section.answer_column])


def _number(row: Row, section: Data) -> float:
    try:
        result = float(row.answer)
    except ValueError:
        result = math.nan
    if not math.isfinite(result):
        raise UserError(
            f"data.answer_column={section.answer_column!r}: {row.answer[:80]!r} is no number; name the column with "
            "numbers, or set model.task=sequence_classification for classes"
        )
    return result

"""Texts and their classes: rows whose answer is the name of a class."""

from __future__ import annotations

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

_MOST_CLASSES = 200
"""With more different answers than this, answers that rarely repeat are taken for texts rather than classes."""


@dataclass(frozen=True, kw_only=True)
class ClassifiedText(Text):
    """One text with the number of its class; `reference` is the class's name."""

    label: int

    @staticmethod
    def collate(rows: Sequence[ClassifiedText], *, pad_id: int) -> ClassBatch:
        """One batch of the rows, padded to the longest."""
        import torch

        return ClassBatch(
            arguments=padded(rows, pad_id=pad_id),
            targets=torch.tensor([row.label for row in rows]),
            tokens=sum(row.length for row in rows),
        )


def load_classified_texts(section: Data, tokenizer: Any, *, max_length: int, at_left: bool = False) -> Splits:
    """Texts, or pairs of them (`data.second_column`), and their classes, truncated to `max_length` tokens.

    The classes are the distinct answers of all rows, sorted by name.

    Args:
        at_left: pad at the left, for a model that takes the class from the last position, wherever padding is.

    Raises:
        UserError: as `split_rows`; or all answers are the same, or are texts that rarely repeat.
    """
    rows = split_rows(section)
    everything = all_rows(rows)
    classes = sorted({row.answer for row in everything})
    _check_classes(classes, section, rows=len(everything))
    label_of = {name: label for label, name in enumerate(classes)}

    def make(some: Sequence[Row]) -> list[tuple[ClassifiedText, int]]:
        return [
            (
                ClassifiedText(
                    ids=encoded.ids,
                    types=encoded.types,
                    prompt=shown(row),
                    reference=row.answer,
                    at_left=at_left,
                    label=label_of[row.answer],
                ),
                encoded.length,
            )
            for row, encoded in zip(some, encode(some, section, tokenizer, max_length=max_length), strict=True)
        ]

    return made_splits(rows, make, max_length=max_length, classes=classes)


def _check_classes(classes: Sequence[str], section: Data, *, rows: int) -> None:
    column = f"data.answer_column={section.answer_column!r}"
    if len(classes) < 2:
        raise UserError(f"{column}: all rows have the same answer {classes[0]!r}; name the column with the classes")
    if len(classes) > _MOST_CLASSES and 2 * len(classes) > rows:
        raise UserError(
            f"{column}: {len(classes)} different answers in {rows} rows are texts, not classes; name the column with "
            "the classes, or set model.task=causal_lm to generate the answers"
        )

"""Texts and their classes: rows whose answer is the name of a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from left_bench.core.errors import UserError
from left_bench.data.batches import ClassBatch
from left_bench.data.rows import split_rows
from left_bench.data.shapes import Row
from left_bench.data.tokens import Splits
from left_bench.spec.cell import Data, fingerprint

_MOST_CLASSES = 200
"""With more different answers than this, answers that rarely repeat are taken for texts rather than classes."""


@dataclass(frozen=True)
class ClassifiedText:
    """One tokenized text with its class."""

    not_packed: ClassVar[str] = "the model gives one class per row, and packed rows would be a single row to it"
    ids: list[int]
    label: int
    prompt: str
    """The text before truncation."""
    reference: str
    """The right class, by name."""
    labels: ClassVar[int] = 1
    """One class carries loss."""

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.ids)

    @property
    def identity(self) -> list[Any]:
        """The values that distinguish this row from others."""
        return [self.ids, self.reference]

    @staticmethod
    def collate(rows: Sequence[ClassifiedText], *, pad_id: int) -> ClassBatch:
        """One batch of the rows, padded at the right to the longest."""
        import torch

        longest = max(row.length for row in rows)
        ids = [row.ids + [pad_id] * (longest - row.length) for row in rows]
        mask = [[1] * row.length + [0] * (longest - row.length) for row in rows]
        return ClassBatch(
            arguments={"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)},
            targets=torch.tensor([row.label for row in rows]),
            tokens=sum(row.length for row in rows),
        )


def load_classified_texts(section: Data, tokenizer: Any, *, max_length: int) -> Splits:
    """Texts with the tokenizer's special tokens, truncated at the right to `max_length` tokens.

    The classes are the distinct answers of all rows, sorted by name. `data.instruction` is put before each text.

    Raises:
        UserError: as `split_rows`; or all answers are the same, or are texts that rarely repeat.
    """
    rows = split_rows(section)
    classes = sorted({row.answer for row in [*rows.train, *rows.test]})
    _check_classes(classes, rows=len(rows.train) + len(rows.test))
    label_of = {name: label for label, name in enumerate(classes)}
    train, longest, cut = _read(rows.train, section, tokenizer, label_of, max_length=max_length)
    test, _, cut_test = _read(rows.test, section, tokenizer, label_of, max_length=max_length)
    return Splits(
        train=train,
        test=test,
        truncated_rows=cut,
        truncated_test_rows=cut_test,
        fingerprint=fingerprint([row.identity for row in [*train, *test]]),
        dropped_rows=len(rows.dropped),
        dropped_where=rows.dropped[:20],
        repeated_rows=rows.repeated,
        shape=rows.shape,
        longest_row=longest,
        test_there=rows.test_there,
        classes=classes,
    )


def _read(
    rows: Sequence[Row], section: Data, tokenizer: Any, label_of: dict[str, int], *, max_length: int
) -> tuple[list[ClassifiedText], int, int]:
    """The tokenized rows; the length of the longest before truncation; how many were truncated."""
    before = f"{section.instruction}\n" if section.instruction else ""
    texts = [before + row.prompt for row in rows]
    whole = [len(ids) for ids in tokenizer(texts)["input_ids"]] if texts else []
    truncated = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"] if texts else []
    made = [
        ClassifiedText(ids, label_of[row.answer], prompt=row.prompt, reference=row.answer)
        for ids, row in zip(truncated, rows, strict=True)
    ]
    return made, max(whole, default=0), sum(length > max_length for length in whole)


def _check_classes(classes: Sequence[str], *, rows: int) -> None:
    if len(classes) < 2:
        raise UserError(
            f"data.answer_column: all rows have the same answer {classes[0]!r}; name the column with the classes"
        )
    if len(classes) > _MOST_CLASSES and 2 * len(classes) > rows:
        raise UserError(
            f"data.answer_column: {len(classes)} different answers in {rows} rows are texts, not classes; name the "
            "column with the classes, or set model.task=causal_lm to generate the answers"
        )

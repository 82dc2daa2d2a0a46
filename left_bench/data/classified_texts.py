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
"""Beyond it, answers that hardly repeat are texts and no classes."""


@dataclass(frozen=True)
class ClassifiedText:
    """One text as the model reads it, with its class."""

    not_packed: ClassVar[str] = "a class is told of a whole row, and packed rows are one row to the model"
    ids: list[int]
    label: int
    prompt: str
    """The text, uncut."""
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
        """What makes it another row."""
        return [self.ids, self.reference]

    @staticmethod
    def collate(rows: Sequence[ClassifiedText], *, pad_id: int) -> ClassBatch:
        """One pass over the rows, padded at the right to the longest."""
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
    """Texts with the special tokens that the tokenizer adds, cut to `max_length` tokens at the right.

    The classes are the different answers of all rows, in the order of their names. `data.instruction` stands before
    each text.

    Raises:
        UserError: as `split_rows`; or the answers are one class, or texts that hardly repeat.
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
    """The rows as the model reads them; tokens of the longest before it was cut; how many were cut."""
    before = f"{section.instruction}\n" if section.instruction else ""
    texts = [before + row.prompt for row in rows]
    whole = [len(ids) for ids in tokenizer(texts)["input_ids"]] if texts else []
    kept = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"] if texts else []
    made = [
        ClassifiedText(ids, label_of[row.answer], prompt=row.prompt, reference=row.answer)
        for ids, row in zip(kept, rows, strict=True)
    ]
    return made, max(whole, default=0), sum(length > max_length for length in whole)


def _check_classes(classes: Sequence[str], *, rows: int) -> None:
    if len(classes) < 2:
        raise UserError(
            f"data.answer_column: all rows have the one answer {classes[0]!r}; name the column with the classes"
        )
    if len(classes) > _MOST_CLASSES and 2 * len(classes) > rows:
        raise UserError(
            f"data.answer_column: {len(classes)} different answers in {rows} rows are texts and no classes; name the "
            "column with the classes, or set model.task=causal_lm to have them written"
        )

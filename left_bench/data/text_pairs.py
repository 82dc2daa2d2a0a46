"""Texts and what is to be found by them: questions and answers whose vectors are to lie close together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from left_bench.data.batches import PairBatch
from left_bench.data.rows import split_rows
from left_bench.data.shapes import Row
from left_bench.data.texts import encode, made_splits, padded
from left_bench.data.tokens import Splits
from left_bench.spec.cell import Data


@dataclass(frozen=True, kw_only=True)
class Passage:
    """One text as the model reads it."""

    ids: list[int]
    types: ClassVar[None] = None
    at_left: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class TextPair:
    """A text, and the right one among those that are searched with it."""

    not_packed: ClassVar[str] = "each text has a vector of its own, and packed rows are one row to the model"
    query: Passage
    document: Passage
    prompt: str
    """The text that is searched with."""
    reference: str
    """The text that is to be found."""
    labels: ClassVar[int] = 1

    @property
    def length(self) -> int:
        """Tokens of both."""
        return len(self.query.ids) + len(self.document.ids)

    @property
    def identity(self) -> list[Any]:
        """What makes it another row."""
        return [self.query.ids, self.document.ids, self.reference]

    @staticmethod
    def collate(rows: Sequence[TextPair], *, pad_id: int) -> PairBatch:
        """One pass over all texts to search with and, behind them, as many to be found."""
        import torch

        documents = [row.reference for row in rows]
        repeated = [[i != j and one == other for j, other in enumerate(documents)] for i, one in enumerate(documents)]
        return PairBatch(
            arguments=padded([*(row.query for row in rows), *(row.document for row in rows)], pad_id=pad_id),
            targets=torch.arange(len(rows)),
            tokens=sum(row.length for row in rows),
            repeated=torch.tensor(repeated),
        )


def load_text_pairs(section: Data, tokenizer: Any, *, max_length: int) -> Splits:
    """Questions and answers as pairs of texts, each cut to `max_length` tokens; `data.instruction` stands before the
    questions alone.

    Raises:
        UserError: as `split_rows`.
    """
    plain = section.model_copy(update={"instruction": None})

    def make(some: Sequence[Row]) -> list[tuple[TextPair, int]]:
        answers = [Row(prompt=row.answer, answer="") for row in some]
        queries = encode(some, section, tokenizer, max_length=max_length)
        documents = encode(answers, plain, tokenizer, max_length=max_length)
        return [
            (
                TextPair(
                    query=Passage(ids=query.ids),
                    document=Passage(ids=document.ids),
                    prompt=row.prompt,
                    reference=row.answer,
                ),
                max(query.length, document.length),
            )
            for row, query, document in zip(some, queries, documents, strict=True)
        ]

    return made_splits(split_rows(section), make, max_length=max_length, classes=None)

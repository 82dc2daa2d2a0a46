"""Texts that a model reads whole and answers with a class, a number, a tag for each word, or a vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from left_bench.data.rows import RowSplits
from left_bench.data.shapes import Row
from left_bench.data.tokens import Splits
from left_bench.spec.cell import Data, fingerprint

if TYPE_CHECKING:
    import torch

_NAMED = 20  # of the dropped rows that are named one by one


class Encoded(NamedTuple):
    """A text as the model reads it."""

    ids: list[int]
    types: list[int] | None
    """Of a pair of texts: 0 for each token of the first, 1 for each of the second, where the model tells them apart."""
    length: int
    """Tokens before it was cut."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """One text as the model reads it, with the right answer."""

    not_packed: ClassVar[str] = "the model answers for a whole row, and packed rows are one row to it"
    ids: list[int]
    types: list[int] | None = None
    """See `Encoded.types`."""
    prompt: str
    """The text, uncut."""
    reference: str
    """The right answer, as text."""
    at_left: bool = False
    """Whether it is padded at the left (see `load_classified_texts`)."""

    @property
    def labels(self) -> int:
        """What of it carries loss."""
        return 1

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.ids)

    @property
    def identity(self) -> list[Any]:
        """What makes it another row."""
        known: list[Any] = [self.ids, self.reference]
        return known if self.types is None else [*known, self.types]


def padded(texts: Sequence[Any], *, pad_id: int) -> dict[str, torch.Tensor]:
    """Arguments of a forward pass over texts or anything with their `ids`, `types` and `at_left`."""
    import torch

    longest, left = max(len(text.ids) for text in texts), texts[0].at_left

    def filled(values: Sequence[int], fill: int) -> list[int]:
        padding = [fill] * (longest - len(values))
        return [*padding, *values] if left else [*values, *padding]

    result = {
        "input_ids": torch.tensor([filled(text.ids, pad_id) for text in texts]),
        "attention_mask": torch.tensor([filled([1] * len(text.ids), 0) for text in texts]),
    }
    if texts[0].types is not None:
        result["token_type_ids"] = torch.tensor([filled(text.types, 0) for text in texts])
    return result


def encode(rows: Sequence[Row], section: Data, tokenizer: Any, *, max_length: int) -> list[Encoded]:
    """The rows' texts with the special tokens that the tokenizer adds, cut to `max_length` tokens.

    `data.instruction` stands before each text. Of a pair of texts the longer one is cut, and a tokenizer that puts
    nothing between two texts gets a line break there.
    """
    if not rows:
        return []
    before = f"{section.instruction}\n" if section.instruction else ""
    first, second = [before + row.prompt for row in rows], [row.second or "" for row in rows]
    if rows[0].second is None:
        given: tuple[list[str], ...] = (first,)
    elif tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False):
        given = (first, second)
    else:
        given = ([f"{one}\n{other}" for one, other in zip(first, second, strict=True)],)
    whole = [len(ids) for ids in tokenizer(*given)["input_ids"]]
    kept = tokenizer(*given, truncation=True, max_length=max_length)
    types = kept.get("token_type_ids") if len(given) == 2 else None
    return [
        Encoded(ids, None if types is None else types[index], whole[index])
        for index, ids in enumerate(kept["input_ids"])
    ]


_Made = TypeVar("_Made", bound=Any)


def made_splits(
    rows: RowSplits,
    make: Callable[[Sequence[Row]], list[tuple[_Made, int]]],
    *,
    max_length: int,
    classes: list[str] | None,
) -> Splits:
    """Training, validation and test rows as the model reads them, and what became of them.

    Args:
        make: of some rows, each as the model reads it, and the tokens that it had before it was cut.
        classes: names of what a new output layer gives; None: there is no such layer.
    """
    splits = {name: make(list(of)) for name, of in zip(("train", "validation", "test"), _parts(rows), strict=True)}
    kept = {name: [row for row, _ in of] for name, of in splits.items()}
    cut = {name: sum(length > max_length for _, length in of) for name, of in splits.items()}
    return Splits(
        train=kept["train"],
        test=kept["test"],
        validation=kept["validation"],
        repeated_validation_rows=rows.repeated_validation,
        truncated_rows=cut["train"],
        truncated_test_rows=cut["test"],
        fingerprint=fingerprint([row.identity for row in [*kept["train"], *kept["test"]]]),
        dropped_rows=len(rows.dropped),
        dropped_where=rows.dropped[:_NAMED],
        repeated_rows=rows.repeated,
        shape=rows.shape,
        longest_row=max((length for _, length in splits["train"]), default=0),
        test_there=rows.test_there,
        classes=classes,
    )


def _parts(rows: RowSplits) -> tuple[Sequence[Row], Sequence[Row], Sequence[Row]]:
    return rows.train, rows.validation, rows.test


def all_rows(rows: RowSplits) -> list[Row]:
    """Training, validation and test rows."""
    return [row for part in _parts(rows) for row in part]


def shown(row: Row) -> str:
    """A row's text as a person reads it; of a pair one above the other."""
    return row.prompt if row.second is None else f"{row.prompt}\n{row.second}"

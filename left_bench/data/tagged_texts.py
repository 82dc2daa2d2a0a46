"""Texts whose every word has a tag: names of people and places, parts of speech."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from left_bench.core.errors import UserError
from left_bench.data.batches import TagBatch
from left_bench.data.rows import split_rows
from left_bench.data.shapes import Row
from left_bench.data.texts import Text, all_rows, made_splits, padded
from left_bench.data.tokens import Splits
from left_bench.spec.cell import Data


@dataclass(frozen=True, kw_only=True)
class TaggedText(Text):
    """One text with the tags of its words; `reference` holds those of the words that were not cut off."""

    places: list[int]
    """Of each word the token that tells its tag."""
    tags: list[int]
    """The number of each word's tag."""

    @property
    def labels(self) -> int:
        return len(self.places)

    @staticmethod
    def collate(rows: Sequence[TaggedText], *, pad_id: int) -> TagBatch:
        """One pass over the rows, padded at the right to the longest."""
        import torch

        return TagBatch(
            arguments=padded(rows, pad_id=pad_id),
            targets=torch.tensor([tag for row in rows for tag in row.tags]),
            tokens=sum(row.length for row in rows),
            label_rows=torch.tensor([number for number, row in enumerate(rows) for _ in row.places]),
            label_positions=torch.tensor([place for row in rows for place in row.places]),
            lengths=[len(row.places) for row in rows],
        )


def load_tagged_texts(section: Data, tokenizer: Any, *, max_length: int, by_last: bool = False) -> Splits:
    """Words and their tags (`data.shape=tags`), cut to `max_length` tokens.

    A word's tag is told by its first token (Devlin et al. 2019), or by its last for a model that reads from left to
    right and has not seen the rest of the word before.

    Args:
        by_last: the latter.

    Raises:
        UserError: as `split_rows`; or all words have the one tag; or the tokenizer does not say where its tokens stand.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"model.name_or_path={tokenizer.name_or_path}: its tokenizer does not say where in the text its tokens "
            "stand; choose a model with a tokenizer.json"
        )
    rows = split_rows(section)
    tags = sorted({tag for row in all_rows(rows) for tag in row.answer.split(" ")})
    if len(tags) < 2:
        raise UserError(f"data.answer_column={section.answer_column!r}: all words have the one tag {tags[0]!r}")
    number_of = {tag: number for number, tag in enumerate(tags)}

    def make(some: Sequence[Row]) -> list[tuple[TaggedText, int]]:
        if not some:
            return []
        texts = [row.prompt for row in some]
        whole = [len(ids) for ids in tokenizer(texts)["input_ids"]]
        kept = tokenizer(texts, truncation=True, max_length=max_length, return_offsets_mapping=True)
        made = []
        for row, length, ids, spans in zip(some, whole, kept["input_ids"], kept["offset_mapping"], strict=True):
            places = _places(row.prompt.split(" "), spans, by_last=by_last)
            answer = row.answer.split(" ")[: len(places)]
            text = TaggedText(
                ids=ids,
                prompt=row.prompt,
                reference=" ".join(answer),
                places=places,
                tags=[number_of[tag] for tag in answer],
            )
            made.append((text, length))
        return made

    return made_splits(rows, make, max_length=max_length, classes=tags)


def _places(words: Sequence[str], spans: Sequence[tuple[int, int]], *, by_last: bool) -> list[int]:
    """The token of each word that is there whole: its first or its last.

    Args:
        spans: where in the text, its words joined by single blanks, each token stands; empty for special tokens.
    """
    places: list[int] = []
    end = -1
    tokens = [(number, first, last) for number, (first, last) in enumerate(spans) if last > first]
    at = 0
    for word in words:
        begin = end + 1
        end = begin + len(word)
        while at < len(tokens) and tokens[at][2] <= begin:
            at += 1
        of_word = at
        while of_word < len(tokens) and tokens[of_word][2] < end:
            of_word += 1
        if of_word == len(tokens):  # cut off, or a word that the tokenizer makes nothing of at the end
            break
        places.append(tokens[of_word if by_last else at][0])
    return places

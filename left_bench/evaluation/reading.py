"""What a model that reads a text answers, besides classes (`evaluate.classify`): a number, a tag for each word, the
rank of the right text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from left_bench.data import Passage, TextPair, collate, padded
from left_bench.data.batches import mean_vectors, similarities
from left_bench.evaluation.evaluate import Counted, pad_of
from left_bench.methods.attach import virtual_positions
from left_bench.spec.cell import Cell
from left_bench.spec.events import Tell


def numbers(
    model: torch.nn.Module, reader: Any, rows: Sequence[Any], cell: Cell, *, device: str, tell: Tell, **_: Any
) -> list[str]:
    """The number that the model tells of each row, in six digits."""
    told = partial(tell, "numbers")
    return [
        f"{value:.6g}"
        for logits, _ in _passes(model, reader, rows, cell, device, told)
        for value in logits[:, 0].tolist()
    ]


def tags(
    model: torch.nn.Module, reader: Any, rows: Sequence[Any], cell: Cell, *, device: str, tell: Tell, **_: Any
) -> list[str]:
    """The likeliest tag of each word, by name, with blanks between them."""
    names, result = _names(model), []
    for logits, batch in _passes(model, reader, rows, cell, device, partial(tell, "tags")):
        of_rows = torch.tensor(_best(logits)).split(batch.answer_lengths)
        result += [" ".join(names[index] for index in of_row.tolist()) for of_row in of_rows]
    return result


def ranks(
    model: torch.nn.Module, reader: Any, rows: Sequence[Any], cell: Cell, *, device: str, tell: Tell, **_: Any
) -> list[str]:
    """At which place each row's text is found among the texts of all rows, as `3 of 128`: by cosine similarity.

    Texts that are as similar as the right one count as before it: a model that finds them all alike finds none.
    """
    pairs: Sequence[TextPair] = list(rows)
    documents = {pair.reference: pair.document for pair in pairs}
    passages = [*(pair.query for pair in pairs), *documents.values()]
    done = Counted(len(passages), partial(tell, "vectors"))
    vectors = []
    for some in _batches(passages, cell.eval.batch_size):
        vectors.append(_vectors(model, some, reader, device=device))
        done.add(len(some))
    queries, found = torch.cat(vectors).split([len(pairs), len(documents)])
    similar = similarities(queries, found)
    places = {text: place for place, text in enumerate(documents)}
    right = torch.tensor([places[pair.reference] for pair in pairs], device=similar.device)[:, None]
    rank = (similar >= similar.gather(1, right)).sum(1).tolist()
    return [f"{place} of {len(documents)}" for place in rank]


def _vectors(model: Any, passages: Sequence[Passage], reader: Any, *, device: str) -> torch.Tensor:
    """A unit vector for each passage, float32 [passages, width]."""
    inputs = {name: tensor.to(device) for name, tensor in padded(passages, pad_id=pad_of(reader)).items()}
    states = model(**inputs).last_hidden_state
    return mean_vectors(states[:, virtual_positions(model) :], inputs["attention_mask"])


def _passes(
    model: Any, reader: Any, rows: Sequence[Any], cell: Cell, device: str, tell: Callable[[int, int], None]
) -> Iterator[tuple[torch.Tensor, Any]]:
    """Logits of the labels of some rows at a time, and their batch."""
    done, after = Counted(len(rows), tell), virtual_positions(model)
    for some in _batches(rows, cell.eval.batch_size):
        batch: Any = collate(some, pad_id=pad_of(reader)).to(device)
        yield batch.labelled(model(**batch.inputs()).logits, after=after).float(), batch
        done.add(len(some))


def _batches(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _best(logits: torch.Tensor) -> list[int]:
    result: list[int] = logits.argmax(-1).tolist()
    return result


def _names(model: Any) -> dict[int, str]:
    return {int(index): str(name) for index, name in model.config.id2label.items()}

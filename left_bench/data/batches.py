"""Batches: which rows a step sees, in which passes, and how they are padded."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from left_bench.data.tokens import Example

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

_SIMILARITY_SCALE = 20.0
"""What cosine similarities are multiplied by, as sentence-transformers does."""
IGNORED = -100
"""The label that torch's cross-entropy ignores."""


@dataclass(frozen=True, eq=False)
class Batch:
    """The rows of one pass: padded at the right to the longest, or packed end to end into one row.

    Token tensors have the shape (rows, longest) or (1, tokens); label tensors have one entry per answer token. Where an
    encoder reads the prompt, `input_ids` holds prompts, and labels refer to `decoder_input_ids`.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    """The answer's tokens at their own positions (not shifted); -100 on prompt and padding."""
    label_rows: torch.Tensor
    """For each answer token, the row of the logits that predict it."""
    label_positions: torch.Tensor
    """The position in that row: the one before the token (its own where the decoder's input is shifted)."""
    targets: torch.Tensor
    """The answer tokens."""
    answer_lengths: list[int]
    """Number of answer tokens of each example, in the order of examples and labels."""
    attention_mask: torch.Tensor | None
    """1 on tokens, 0 on padding; None when packed."""
    position_ids: torch.Tensor | None
    """When packed: positions, from 0 in each example."""
    boundaries: torch.Tensor | None
    """When packed: int32 (examples + 1), where each example begins, and the end."""
    tokens: int
    """Non-padding tokens."""
    longest: int
    """Tokens of the longest example."""
    decoder_input_ids: torch.Tensor | None = None
    """For an encoder-decoder: the start token and the answer without its last token, shape (rows, longest answer)."""

    def labelled(self, states: torch.Tensor, *, after: int = 0) -> torch.Tensor:
        """Select the logits or hidden states [rows, positions, width] that predict a label: [labels, width].

        `after`: number of virtual positions that a method puts before the input.
        """
        return at_positions(states, self.label_rows, self.label_positions + after)

    @property
    def answer_tokens(self) -> int:
        """Tokens that carry loss."""
        return sum(self.answer_lengths)

    def inputs(self) -> dict[str, Any]:
        """The arguments of the model's forward pass, by their names in transformers."""
        if self.boundaries is None:
            inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "use_cache": False}
            decoder = self.decoder_input_ids
            return inputs if decoder is None else inputs | {"decoder_input_ids": decoder}
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "use_cache": False,
            # also read by FlashAttention's kernels; our segment attention reads the first
            "cu_seq_lens_q": self.boundaries,
            "cu_seq_lens_k": self.boundaries,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
        }

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; copies to CUDA are asynchronous."""
        moved: dict[str, Any] = {
            field.name: moved_to(value, device)
            for field in dataclasses.fields(self)
            if hasattr(value := getattr(self, field.name), "to")
        }
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True, eq=False)
class ClassBatch:
    """The rows of one pass with one label each, a class or a number, whatever the model's inputs are."""

    arguments: dict[str, torch.Tensor]
    """Arguments of the model's forward pass, by their names in transformers; the first dimension is the rows."""
    targets: torch.Tensor
    """The right class of each row, int64 [rows]; or the number, float32, whose loss is the squared error."""
    tokens: int
    """Non-padding tokens, or their equivalent."""

    @property
    def answer_lengths(self) -> list[int]:
        return [1] * len(self.targets)

    @property
    def answer_tokens(self) -> int:
        return len(self.targets)

    def labelled(self, states: torch.Tensor, *, after: int = 0) -> torch.Tensor:
        """The logits [rows, classes] or [rows, 1] unchanged: every row has one label."""
        return states

    def inputs(self) -> dict[str, Any]:
        return dict(self.arguments)

    def to(self, device: torch.device | str) -> Self:
        moved: dict[str, Any] = {
            field.name: moved_to(value, device)
            for field in dataclasses.fields(self)
            if hasattr(value := getattr(self, field.name), "to")
        }
        moved["arguments"] = {name: moved_to(tensor, device) for name, tensor in self.arguments.items()}
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True, eq=False)
class TagBatch(ClassBatch):
    """The rows of one pass with a class at several positions of each."""

    label_rows: torch.Tensor
    """Row of each label, int64 [labels]."""
    label_positions: torch.Tensor
    """Its position in that row."""
    lengths: list[int]
    """Labels of each row."""

    @property
    def answer_lengths(self) -> list[int]:
        return self.lengths

    def labelled(self, states: torch.Tensor, *, after: int = 0) -> torch.Tensor:
        """Of logits [rows, positions, classes] those at the labels, [labels, classes]."""
        return at_positions(states, self.label_rows, self.label_positions + after)


@dataclass(frozen=True, eq=False)
class PairBatch(ClassBatch):
    """Texts to search with and, behind them, as many to be found: the right one of each among all of the pass.

    The loss is that of Henderson et al. 2017 (arXiv 1705.00652): the other rows' texts are the wrong answers.
    """

    repeated: torch.Tensor
    """bool [rows, rows]: whether another row's text to be found is the same as this row's, and so no wrong answer."""

    def labelled(self, states: torch.Tensor, *, after: int = 0) -> torch.Tensor:
        """Of last states [2 x rows, positions, width] the scaled cosine similarities, float32 [rows, rows]."""
        queries, documents = mean_vectors(states[:, after:], self.arguments["attention_mask"]).chunk(2)
        return (_SIMILARITY_SCALE * similarities(queries, documents)).masked_fill(self.repeated, -math.inf)


def mean_vectors(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of each text's states, of length 1: states [texts, positions, width] -> float32 [texts, width]."""
    import torch

    weights = mask[..., None].float()
    mean = (states.float() * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1)


def similarities(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """The cosine of each query with each document, of unit vectors, float32; not rounded by autocast."""
    import torch

    with torch.autocast(queries.device.type, enabled=False):
        return queries @ documents.T


def at_positions(states: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`states[rows, positions]` for distinct positions; plain indexing would sort the indices in its backward on
    CUDA."""
    return states.flatten(0, 1).index_select(0, rows * states.shape[1] + positions)


def moved_to(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The tensor on another device; asynchronous for CUDA."""
    import torch

    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    # a copy from pageable memory would wait for all work queued on the device
    return tensor.pin_memory().to(device, non_blocking=True)


def step_rows(n_rows: int, *, rows_per_step: int, steps: int, seed: int) -> Iterator[list[int]]:
    """The rows of each optimizer step: seeded permutations of all rows, one epoch after the other.

    A step may straddle two epochs, so no row is dropped at an epoch's end. Python's own generator makes the order
    identical on every device and for every method.
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
    rows: Sequence[Example], *, batch_size: int, batching: Literal["padded", "grouped", "packed"]
) -> list[list[Example]]:
    """Cut a step's rows into passes of at most `batch_size`.

    `grouped` puts rows of similar length together, longest first: less padding, and a step that does not fit in memory
    fails in its first pass.
    """
    ordered = sorted(rows, key=lambda row: row.length, reverse=True) if batching == "grouped" else list(rows)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def collate(examples: Sequence[Example], *, pad_id: int, packed: bool = False) -> Batch:
    """Prompt and answer of each row in one tensor: padded at the right with `pad_id`, or packed end to end.

    Nothing predicts the first token of a row, so an answer without a prompt has no label there. For an encoder-decoder,
    prompts and answers are padded separately.
    """
    import torch

    own: Callable[..., Any] | None = getattr(type(examples[0]), "collate", None)
    if own is not None:  # rows that are not `Example`
        return own(examples, pad_id=pad_id)
    if examples[0].decoder_start is not None:
        return _collate_for_decoder(examples, pad_id=pad_id)
    longest = max(example.length for example in examples)
    total = sum(example.length for example in examples)
    starts = list(itertools.accumulate((example.length for example in examples), initial=0))
    shape = (1, total) if packed else (len(examples), longest)
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    labels = torch.full_like(input_ids, IGNORED)
    attention_mask = None if packed else torch.zeros_like(input_ids)
    label_rows, label_positions, answer_lengths = [], [], []
    for i, example in enumerate(examples):
        row, start = (0, starts[i]) if packed else (i, 0)
        answer_start, end = start + len(example.prompt_ids), start + example.length
        input_ids[row, start:end] = torch.tensor(example.prompt_ids + example.answer_ids, dtype=torch.long)
        if attention_mask is not None:
            attention_mask[row, start:end] = 1
        places = torch.arange(answer_start, end)
        if example.unlabelled is not None:
            places = places[torch.tensor(example.of_answer)]
        labels[row, places] = input_ids[row, places]
        places = places[places > start]
        label_positions.append(places - 1)
        label_rows.append(torch.full((len(places),), row))
        answer_lengths.append(len(places))
    rows, positions = torch.cat(label_rows), torch.cat(label_positions)
    return Batch(
        input_ids=input_ids,
        labels=labels,
        label_rows=rows,
        label_positions=positions,
        targets=input_ids[rows, positions + 1],
        answer_lengths=answer_lengths,
        attention_mask=attention_mask,
        position_ids=torch.cat([torch.arange(example.length) for example in examples])[None] if packed else None,
        boundaries=torch.tensor(starts, dtype=torch.int32) if packed else None,
        tokens=total,
        longest=longest,
    )


def _collate_for_decoder(examples: Sequence[Example], *, pad_id: int) -> Batch:
    import torch

    def padded(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
        width = max(map(len, rows))
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])

    start = examples[0].decoder_start
    assert start is not None
    prompts, answers = [example.prompt_ids for example in examples], [example.answer_ids for example in examples]
    input_ids, answer_lengths = padded(prompts, pad_id), [len(answer) for answer in answers]
    return Batch(
        input_ids=input_ids,
        labels=padded(answers, IGNORED),
        label_rows=torch.repeat_interleave(torch.arange(len(answers)), torch.tensor(answer_lengths)),
        label_positions=torch.cat([torch.arange(length) for length in answer_lengths]),
        targets=torch.tensor(list(itertools.chain(*answers))),
        answer_lengths=answer_lengths,
        attention_mask=padded([[1] * len(prompt) for prompt in prompts], 0),
        position_ids=None,
        boundaries=None,
        tokens=sum(example.length for example in examples),
        longest=max(example.length for example in examples),
        # padding comes after all labels, so in a causal decoder nothing attends to it
        decoder_input_ids=padded([[start, *answer[:-1]] for answer in answers], pad_id),
    )

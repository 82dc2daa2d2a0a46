"""Tokens: rows rendered with the model's prompt format, tokenized once and cached on disk for a whole sweep."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from left_bench.core.errors import UserError
from left_bench.core.paths import cache_dir
from left_bench.data.files import content_of
from left_bench.data.lazy import LazyRows
from left_bench.data.published import published_content
from left_bench.data.rendering import (
    answers_to_ids,
    fit,
    prompts_to_ids,
    start_ids,
    turn_end,
    turn_lead,
    turn_to_ids,
    without_oldest_turn,
)
from left_bench.data.rows import RowSplits, filled, split_rows
from left_bench.data.shapes import Row
from left_bench.spec.cell import Data, fingerprint

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

_LAYOUT = 6  # increase it when the same rows would give other tokens or files, so that older folders are ignored
_FACTS_NAME = "splits.json"
_NAMED = 20  # dropped rows that are listed individually


@dataclass(frozen=True)
class Example:
    """One row as the model sees it."""

    prompt_ids: list[int]
    """Everything before the answer: template, system message, user's turn, start of the assistant's turn."""
    answer_ids: list[int]
    """The answer and the tokens that end a turn (see `turn_end`), which are missing if the answer was truncated. For a
    conversation in one row: everything from its first answer on."""
    prompt: str
    """The user's text before truncation."""
    reference: str
    """The right answer before truncation."""
    rejected_ids: list[int] | None = None
    """A worse answer and what ends a turn, for preference tuning."""
    rejected: str | None = None
    """The worse answer, before truncation."""
    margin: float | None = None
    """By how much the right answer is better, where rows say so (reward models)."""
    desirable: bool | None = None
    """Whether the answer is a good one, where rows say so (KTO); None: it is the right one."""
    unrelated_ids: list[list[int]] | None = None
    """Answers of another row, for KTO."""
    reference_logps: list[float] | None = None
    """Log-probabilities of the row's answers under the reference model, nats: the right one's, the worse one's; of KTO
    the unrelated answers' behind them."""
    unlabelled: list[list[int]] | None = None
    """Ranges [begin, end) of `answer_ids` that are other speakers' turns and carry no loss; None: none."""
    decoder_start: int | None = None
    """The decoder's start token, for an encoder-decoder; None: a decoder-only model."""

    @property
    def length(self) -> int:
        """Tokens of prompt and answer together."""
        return len(self.prompt_ids) + len(self.answer_ids)

    @property
    def labels(self) -> int:
        """Number of tokens that carry loss: the answer's, except a first token of the row, which nothing predicts."""
        between = sum(end - begin for begin, end in self.unlabelled or ())
        return len(self.answer_ids) - between - (not self.prompt_ids and self.decoder_start is None)

    @property
    def of_answer(self) -> list[bool]:
        """For each of `answer_ids`, whether it belongs to an answer and not to another turn."""
        result = [True] * len(self.answer_ids)
        for begin, end in self.unlabelled or ():
            result[begin:end] = [False] * (end - begin)
        return result

    @property
    def identity(self) -> list[Any]:
        """The values that distinguish this row from others."""
        known: list[Any] = [self.prompt_ids, self.answer_ids, self.reference, self.rejected_ids]
        known += [item for item in (self.margin, self.desirable) if item is not None]
        return known if self.unlabelled is None else [*known, self.unlabelled]


class Examples(LazyRows[Example]):
    """Examples memory-mapped from disk, so that a large data set does not count as the run's memory."""

    def __init__(self, dataset: datasets.Dataset, *, decoder_start: int | None = None) -> None:
        self._dataset = dataset
        self._decoder_start = decoder_start

    def __len__(self) -> int:
        return len(self._dataset)

    def row(self, index: int) -> Example:
        return Example(**self._dataset[index], decoder_start=self._decoder_start)

    def lengths(self) -> tuple[list[int], list[int]]:
        """For each row, the number of tokens without loss and with loss, counted without reading the tokens."""
        import pyarrow.compute as pc

        table = self._dataset.data
        before, answers = (
            pc.list_value_length(table.column(name)).to_pylist() for name in ("prompt_ids", "answer_ids")
        )
        for index, between in enumerate(table.column("unlabelled").to_pylist()):
            surplus = sum(end - begin for begin, end in between or ()) + (
                before[index] == 0 and self._decoder_start is None
            )
            before[index], answers[index] = before[index] + surplus, answers[index] - surplus
        return before, answers

    def __iter__(self) -> Iterator[Example]:  # iterating in order, datasets reads many rows at a time
        return (Example(**row, decoder_start=self._decoder_start) for row in self._dataset)


@dataclass(frozen=True)
class Splits:
    """Training, validation and test rows, ready for the model."""

    train: Sequence[Any]
    """Rows of type `Example`, or of the task's own type."""
    test: Sequence[Any]
    truncated_rows: int
    """Number of training rows truncated to the maximum length."""
    fingerprint: str
    """Hash of the training and test rows' tokens and references: equal for cells with the same rows, on any machine."""
    truncated_test_rows: int = 0
    dropped_rows: int = 0
    """Rows of the source without a prompt or an answer."""
    repeated_rows: int = 0
    """Rows of the source left out because a test row has the same question."""
    shape: str | None = None
    """The detected shape of the source's records, in words; None: plain columns."""
    dropped_where: Sequence[str] = ()
    """The first dropped rows, each with what it lacks."""
    longest_row: int = 0
    """Tokens of the longest training row before truncation."""
    test_there: int | None = None
    """Number of distinct questions in the source's own test rows; None: it has none."""
    classes: list[str] | None = None
    """Names of the new output layer's outputs: the data's classes, or the one number; None for a model that generates
    text or vectors."""
    validation: Sequence[Any] = ()
    repeated_validation_rows: int = 0
    """Validation rows left out because their question is a training or test row's, or repeated."""


def load_data(
    section: Data,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    decoder_start: int | None = None,
    one_answer_a_row: bool = False,
) -> Splits:
    """Tokenized rows, from the cache if an earlier cell has stored them.

    The prompt is the tokenizer's chat template with `data.instruction` as system message (before the user's text if the
    template takes no system message); without a template, plain lines with the start token that the tokenizer would
    add. An encoder's prompt (`decoder_start` is given) is plain lines with all special tokens the tokenizer adds. A row
    longer than `max_length` tokens is truncated by `fit`.

    A conversation is one training row in which every answer carries loss, if it fits and if the template renders
    earlier turns the same way as it rendered them when they were the answer. Otherwise, and with `one_answer_a_row`,
    each answer is a row of its own; the training signal is the same. Plain text is cut into blocks of `max_length`
    tokens.

    Raises:
        UserError: as `load_rows`; or the tokenizer has no end token; or the cache cannot be written.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.name_or_path={tokenizer.name_or_path!r}: its tokenizer has no end token (eos_token), so no answer"
            " would ever end; choose a model whose tokenizer_config.json names one"
        )
    shape = _Shape(max_length=max_length, encoder=decoder_start is not None, apart=one_answer_a_row)
    folder = cache_dir() / "data" / _cache_key(section, tokenizer, shape)
    for _ in range(3):  # another process may remove a damaged folder between our writing and our reading
        splits = _read(folder, decoder_start=decoder_start)
        if splits is not None:
            return splits
        _write(folder, split_rows(section), section=section, tokenizer=tokenizer, shape=shape)
    raise RuntimeError(f"tokenized rows in {folder} disappear as soon as they are written")


def prompt_of(
    text: str,
    section: Data,
    tokenizer: PreTrainedTokenizerBase,
    *,
    earlier: Sequence[Mapping[str, str]] = (),
    encoder: bool = False,
) -> list[int]:
    """Tokens of a question, rendered like a training row: `data.template`, `data.instruction` and the chat template.

    Args:
        earlier: the turns before the question, oldest first, as chat templates take them.
    """
    question = filled(section, text)
    before = (*earlier, {"role": "user", "content": question}) if earlier else None
    row = Row(prompt=question, answer="", before=before)
    [(ids, _)] = prompts_to_ids([row], instruction=section.instruction, tokenizer=tokenizer, encoder=encoder)
    return ids


# --- rows to tokens ---


class _Shape(NamedTuple):
    """Everything else that determines the tokens of a row."""

    max_length: int
    encoder: bool
    apart: bool
    """Whether each answer of a conversation is a row of its own."""


class _Tokenized(NamedTuple):
    """A tokenized row and its original length."""

    example: Example
    length: int
    """Tokens before truncation."""


def _examples(
    rows: list[Row], *, section: Data, tokenizer: PreTrainedTokenizerBase, shape: _Shape, training: bool
) -> list[_Tokenized]:
    if not rows:  # where nothing is held out
        return []
    if shape.encoder and section.train_on == "all":
        raise UserError("data.train_on=all: an encoder's prompt carries no loss; leave it out")
    if rows[0].plain:
        documents = _text_ids(rows, tokenizer)
        return _blocks(documents, shape.max_length) if training else _openings(rows, documents, shape.max_length)
    common: dict[str, Any] = {"instruction": section.instruction, "tokenizer": tokenizer, "encoder": shape.encoder}
    turns = [turn for row in rows for turn in (*row.earlier, row)]
    prompts = prompts_to_ids(turns, **common)
    end = [tokenizer.eos_token_id] if shape.encoder else turn_end(tokenizer)
    lead = "" if shape.encoder else turn_lead(tokenizer)
    answers = answers_to_ids([lead + row.answer for row in turns], tokenizer, end=end)
    worse = answers_to_ids([lead + (row.rejected or "") for row in turns], tokenizer, end=end)
    results = []
    for row, (prompt_ids, text), answer_ids, rejected_ids in zip(turns, prompts, answers, worse, strict=True):
        reference = row.answer
        if row.turn is not None:
            answer_ids = turn_to_ids(row, instruction=section.instruction, tokenizer=tokenizer, end=end)
            reference = str(tokenizer.decode(answer_ids[: -len(end)], skip_special_tokens=True)).strip()
        longer = max(answer_ids, rejected_ids, key=len)  # both answers follow the same prompt
        length = len(prompt_ids) + len(longer)
        shorter = row
        while len(prompt_ids) + len(longer) > shape.max_length and (shorter := without_oldest_turn(shorter)).before:
            [(prompt_ids, text)] = prompts_to_ids([shorter], **common)
        prompt_ids, longer = fit(prompt_ids, longer, max_length=shape.max_length, text=text)
        answer_ids = answer_ids[: len(longer)]
        if training and section.train_on == "all":
            ids = prompt_ids + answer_ids
            prompt_ids, answer_ids = ids[:1], ids[1:]
        example = Example(
            prompt_ids=prompt_ids,
            answer_ids=answer_ids,
            prompt=row.prompt,
            reference=reference,
            rejected_ids=None if row.rejected is None else rejected_ids[: len(longer)],
            rejected=row.rejected,
            margin=row.margin,
            desirable=row.desirable,
        )
        results.append(_Tokenized(example, length))
    if not training or shape.apart or shape.encoder:
        return results
    every = iter(results)
    return [item for row in rows for item in _joined([next(every) for _ in (*row.earlier, row)])]


def _joined(turns: Sequence[_Tokenized]) -> list[_Tokenized]:
    """Join a conversation's answers into one row, where each prompt begins with the whole row before it."""
    result: list[_Tokenized] = []
    for turn in turns:
        last, (here, length) = result[-1].example if result else None, turn
        if last is None or here.prompt_ids[: last.length] != last.prompt_ids + last.answer_ids:
            result.append(turn)
            continue
        between = here.prompt_ids[last.length :]
        begin = len(last.answer_ids)
        together = replace(
            here,
            prompt_ids=last.prompt_ids,
            answer_ids=last.answer_ids + between + here.answer_ids,
            unlabelled=[*(last.unlabelled or []), [begin, begin + len(between)]],
        )
        result[-1] = _Tokenized(together, max(length, result[-1].length))
    return result


# --- plain text ---


def _text_ids(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Each document's tokens, with start and end tokens."""
    start, end = start_ids(tokenizer), tokenizer.eos_token_id
    encoded = tokenizer([row.answer for row in rows], add_special_tokens=False)["input_ids"]
    return [[*start, *ids, end] for ids in encoded]


def _blocks(documents: list[list[int]], max_length: int) -> list[_Tokenized]:
    """The concatenated documents, cut every `max_length` tokens; only a block's first token carries no loss."""
    stream = list(itertools.chain.from_iterable(documents))
    blocks = [stream[begin : begin + max_length] for begin in range(0, len(stream), max_length)]
    return [
        _Tokenized(Example(prompt_ids=ids[:1], answer_ids=ids[1:], prompt="", reference=""), len(ids))
        for ids in blocks
        if len(ids) > 1
    ]


def _openings(rows: list[Row], documents: list[list[int]], max_length: int) -> list[_Tokenized]:
    """Each document separately, truncated, so that test rows remain independent draws."""
    return [
        _Tokenized(Example(prompt_ids=ids[:1], answer_ids=ids[1:max_length], prompt="", reference=row.answer), len(ids))
        for row, ids in zip(rows, documents, strict=True)
    ]


# --- the cache ---


def _cache_key(section: Data, tokenizer: PreTrainedTokenizerBase, shape: _Shape) -> str:
    """A key of everything that changes the tokens, computed without expensive imports."""
    plain = section.model_dump(mode="json", exclude={"name", "metrics", "max_new_tokens", "content"})
    content: dict[str, str] = {}
    if (result := content_of(section)) is not None:
        plain.pop("path")  # the same file elsewhere is the same data
        plain.pop("test_path")
        plain.pop("validation_path")
        content["sha256"] = result
        if section.content not in (None, result):
            key = f"data.path={section.path!r}" if section.path else f"data.hub_id={section.hub_id!r}"
            raise UserError(f"{key}: the file has changed since this launch composed its cells; start it again")
    elif section.source == "reasoning_gym":
        content["reasoning_gym"] = metadata.version("reasoning_gym")
    elif section.source == "wheel":
        content["wheel"] = published_content(section)
    return fingerprint(
        {
            "layout": _LAYOUT,
            "data": plain,
            "content": content,
            "tokenizer": _tokenizer_identity(tokenizer),
            "shape": shape._asdict(),
            "transformers": metadata.version("transformers"),
        }
    )


def _tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        model = json.loads(backend.to_str())
        # These may be left over from the tokenizer's last call; our own calls set neither.
        model.pop("padding", None)
        model.pop("truncation", None)
    else:
        model = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return fingerprint([model, getattr(tokenizer, "chat_template", None), special, tokenizer.special_tokens_map])


def _read(folder: Path, *, decoder_start: int | None) -> Splits | None:
    """The cached splits; None if there are none or the folder is damaged (it is then removed)."""
    if not folder.is_dir():
        return None
    import datasets

    try:
        facts = json.loads((folder / _FACTS_NAME).read_text(encoding="utf-8"))
        train, validation, test = (
            Examples(datasets.Dataset.load_from_disk(str(folder / name)), decoder_start=decoder_start)
            if facts["rows"][name]
            else []
            for name in ("train", "validation", "test")
        )
        return Splits(
            train=train,
            validation=validation,
            test=test,
            repeated_validation_rows=facts["repeated_validation_rows"],
            truncated_rows=facts["truncated_rows"],
            truncated_test_rows=facts["truncated_test_rows"],
            dropped_rows=facts["dropped_rows"],
            repeated_rows=facts["repeated_rows"],
            shape=facts["shape"],
            dropped_where=facts["dropped_where"],
            longest_row=facts["longest_row"],
            test_there=facts["test_there"],
            fingerprint=facts["fingerprint"],
        )
    except (OSError, ValueError, KeyError):
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _write(
    folder: Path,
    row_splits: RowSplits,
    *,
    section: Data,
    tokenizer: PreTrainedTokenizerBase,
    shape: _Shape,
) -> None:
    """Write the folder atomically; if another process was first, its folder is kept."""
    common: dict[str, Any] = {"section": section, "tokenizer": tokenizer, "shape": shape}
    made = {
        "train": _examples(row_splits.train, training=True, **common),
        "validation": _examples(list(row_splits.validation), training=False, **common),
        "test": _examples(row_splits.test, training=False, **common),
    }
    splits = {name: [row.example for row in rows] for name, rows in made.items()}
    cut = {name: sum(row.length > shape.max_length for row in rows) for name, rows in made.items()}
    facts = {
        "truncated_rows": cut["train"],
        "truncated_test_rows": cut["test"],
        "longest_row": max(item.length for item in made["train"]),
        "dropped_rows": len(row_splits.dropped),
        "dropped_where": row_splits.dropped[:_NAMED],
        "test_there": row_splits.test_there,
        "repeated_rows": row_splits.repeated,
        "shape": row_splits.shape,
        "repeated_validation_rows": row_splits.repeated_validation,
        "rows": {name: len(examples) for name, examples in splits.items()},
        "fingerprint": _content_fingerprint({name: splits[name] for name in ("train", "test")}),
    }
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
        for name, examples in splits.items():
            if not examples:  # datasets cannot reload an empty data set
                continue
            _dataset(examples).save_to_disk(str(temporary / name))
        (temporary / _FACTS_NAME).write_text(json.dumps(facts) + "\n", encoding="utf-8")
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    except OSError as error:
        raise UserError(
            f"LEFT_BENCH_CACHE={cache_dir()}: tokenized rows cannot be written there ({error});"
            " set it to a writable folder with enough space"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _dataset(examples: list[Example]) -> datasets.Dataset:
    from datasets import Dataset, Features, List, Value

    token_ids, text = List(Value("int32")), Value("string")
    features = Features(
        prompt_ids=token_ids,
        answer_ids=token_ids,
        prompt=text,
        reference=text,
        rejected_ids=token_ids,
        rejected=text,
        margin=Value("float64"),
        desirable=Value("bool"),
        unlabelled=List(token_ids),
    )
    stored = [asdict(example) for example in examples]
    for row in stored:
        for name in ("decoder_start", "unrelated_ids", "reference_logps"):  # of a model or a training, not the row's
            del row[name]
    return Dataset.from_list(stored, features=features)


def _content_fingerprint(splits: dict[str, list[Example]]) -> str:
    digest = hashlib.sha256()
    for name, examples in splits.items():
        digest.update(name.encode())
        for example in examples:
            parts: list[Any] = [example.prompt_ids, example.answer_ids, example.reference]
            if example.rejected_ids is not None:
                parts.append(example.rejected_ids)
            parts += [item for item in (example.margin, example.desirable) if item is not None]
            if example.unlabelled is not None:
                parts.append(example.unlabelled)
            digest.update(json.dumps(parts).encode())
    return digest.hexdigest()[:10]

"""Tokens: rows rendered as the model's own kind of prompt, tokenized once and kept on disk for a whole sweep."""

from __future__ import annotations

import hashlib
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
from left_bench.data.rows import RowSplits, split_rows
from left_bench.data.shapes import Row
from left_bench.spec.cell import Data, fingerprint

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

_LAYOUT = 4  # raise it when the same rows would give other tokens or files: older folders are then not found
_FACTS_NAME = "splits.json"
# What a chat template may ask for. Reasoning models would spend the answer's tokens on thoughts, and the date (this
# one is the Llama templates' own fallback) would make other tokens of the same row tomorrow.
_TEMPLATE_ARGUMENTS: dict[str, Any] = {"enable_thinking": False, "date_string": "26 Jul 2024"}


@dataclass(frozen=True)
class Example:
    """One row as the model sees it."""

    prompt_ids: list[int]
    """Everything before the answer: template, system message, user's turn, start of the assistant's turn."""
    answer_ids: list[int]
    """The answer and what ends a turn (see `turn_end`); without its end where the answer was cut."""
    prompt: str
    """The user's text, uncut."""
    reference: str
    """The right answer, uncut."""
    rejected_ids: list[int] | None = None
    """A worse answer and the end token, for preference tuning."""
    rejected: str | None = None
    """The worse answer, uncut."""
    reference_margin: float | None = None
    """Log-probability of the right answer less that of the worse one under the reference model of DPO, nats."""
    decoder_start: int | None = None
    """The token a decoder begins its answer with, where an encoder reads the prompt; None: one model reads both."""

    @property
    def length(self) -> int:
        """Tokens of prompt and answer together."""
        return len(self.prompt_ids) + len(self.answer_ids)

    @property
    def labels(self) -> int:
        """Tokens that carry loss: the answer's, but for a first one that nothing precedes."""
        return len(self.answer_ids) - (not self.prompt_ids and self.decoder_start is None)

    @property
    def identity(self) -> list[Any]:
        """What makes it another row."""
        return [self.prompt_ids, self.answer_ids, self.reference, self.rejected_ids]


class Examples(LazyRows[Example]):
    """Examples memory-mapped from disk: the rows of a large data set do not count as the run's memory."""

    def __init__(self, dataset: datasets.Dataset, *, decoder_start: int | None = None) -> None:
        self._dataset = dataset
        self._decoder_start = decoder_start

    def __len__(self) -> int:
        return len(self._dataset)

    def row(self, index: int) -> Example:
        return Example(**self._dataset[index], decoder_start=self._decoder_start)

    def __iter__(self) -> Iterator[Example]:  # in order, datasets reads many at a time
        return (Example(**row, decoder_start=self._decoder_start) for row in self._dataset)


@dataclass(frozen=True)
class Splits:
    """Training and test rows as a model reads them."""

    train: Sequence[Any]
    """Of `Example`, or of `Picture`."""
    test: Sequence[Any]
    truncated_rows: int
    """Training rows cut to the maximum length."""
    fingerprint: str
    """Hash of the tokens and references themselves: equal where two cells saw the same rows, on any machine."""
    truncated_test_rows: int = 0
    dropped_rows: int = 0
    """Rows of the source without a prompt or an answer."""
    repeated_rows: int = 0
    """Rows of the source left out because their question is a test row's."""
    shape: str | None = None
    """What the source's records were found to be, in words; None: columns by their names."""
    classes: list[str] | None = None
    """Names of the classes, where pictures are classified."""


def load_data(
    section: Data,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    decoder_start: int | None = None,
) -> Splits:
    """Tokenized rows, from the cache where an earlier cell has left them.

    The prompt is the tokenizer's chat template with `data.instruction` as system message (in front of the user's text
    where the template takes no system message), else plain lines with the start token the tokenizer itself would add.
    An encoder's prompt (`decoder_start` is given) is plain lines with all special tokens the tokenizer adds. A row
    longer than `max_length` tokens is cut by `fit`.
    Raises:
        UserError: as `load_rows`; or a tokenizer without an end token; or a cache that cannot be written.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.name_or_path={tokenizer.name_or_path!r}: its tokenizer has no end token (eos_token), so no answer"
            " would ever end; choose a model whose tokenizer_config.json names one"
        )
    shape = _Shape(max_length=max_length, encoder=decoder_start is not None)
    folder = cache_dir() / "data" / _cache_key(section, tokenizer, shape)
    for _ in range(3):  # another process may sweep a damaged folder away between our writing and our reading
        splits = _read(folder, decoder_start=decoder_start)
        if splits is not None:
            return splits
        _write(folder, split_rows(section), section=section, tokenizer=tokenizer, shape=shape)
    raise RuntimeError(f"tokenized rows in {folder} vanish as soon as they are written")


def fit(
    prompt_ids: list[int], answer_ids: list[int], *, max_length: int, text: tuple[int, int]
) -> tuple[list[int], list[int]]:
    """Cut a row to `max_length` tokens: each half may have what the other leaves, and is sure of half.

    The prompt loses the left of the user's text, farthest from the answer; start token, system message and the marks of
    a template stay whole while there is text to cut, for models lean on them. The answer loses its right end, and with
    it the end token, so that nothing teaches to stop in mid-sentence.

    Args:
        text: where among the prompt's tokens the user's text begins and ends.
    """
    if len(prompt_ids) + len(answer_ids) <= max_length:
        return prompt_ids, answer_ids
    answer_ids = answer_ids[: max(max_length // 2, max_length - len(prompt_ids))]
    surplus = len(prompt_ids) + len(answer_ids) - max_length
    if surplus > 0:
        begin, end = text
        cut = min(surplus, end - begin)
        prompt_ids = prompt_ids[:begin] + prompt_ids[begin + cut :]
        prompt_ids = prompt_ids[surplus - cut :]  # no text is left, and the rest is still too long
    return prompt_ids, answer_ids


def turn_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends an answer: the tokens that the chat template writes after an assistant's turn, up to its first marker.

    Without a template, or where that writes no marker, the tokenizer's end token.
    """
    if getattr(tokenizer, "chat_template", None):
        from jinja2 import TemplateError

        answer = "An answer."
        turns = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": answer}]
        try:
            text = str(tokenizer.apply_chat_template(turns, tokenize=False, **_TEMPLATE_ARGUMENTS))
        except TemplateError:  # it renders questions alone
            text = ""
        after = tokenizer(text.rpartition(answer)[2], add_special_tokens=False)["input_ids"] if answer in text else []
        markers = {*tokenizer.all_special_ids}
        markers |= {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        for position, id in enumerate(after):
            if id in markers:
                return list(after[: position + 1])
    return [tokenizer.eos_token_id]


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The start token, where the tokenizer itself would put one before a plain text; else nothing."""
    bos_id = tokenizer.bos_token_id
    return [bos_id] if bos_id is not None and tokenizer("a")["input_ids"][0] == bos_id else []


# --- rows to tokens ---


class _Shape(NamedTuple):
    """What else decides the tokens of a row."""

    max_length: int
    encoder: bool


def _examples(
    rows: list[Row], *, instruction: str | None, tokenizer: PreTrainedTokenizerBase, shape: _Shape
) -> tuple[list[Example], int]:
    """Examples, and how many of them were cut."""
    common: dict[str, Any] = {"instruction": instruction, "tokenizer": tokenizer, "encoder": shape.encoder}
    prompts = _prompt_ids(rows, **common)
    end = [tokenizer.eos_token_id] if shape.encoder else turn_end(tokenizer)
    answers = _answer_ids([row.answer for row in rows], tokenizer, end=end)
    worse = _answer_ids([row.rejected or "" for row in rows], tokenizer, end=end)
    examples, cut = [], 0
    for row, (prompt_ids, text), answer_ids, rejected_ids in zip(rows, prompts, answers, worse, strict=True):
        longer = max(answer_ids, rejected_ids, key=len)  # both answers follow one and the same prompt
        cut += len(prompt_ids) + len(longer) > shape.max_length
        shorter = row
        while len(prompt_ids) + len(longer) > shape.max_length and (shorter := _without_oldest_turn(shorter)).before:
            [(prompt_ids, text)] = _prompt_ids([shorter], **common)
        prompt_ids, longer = fit(prompt_ids, longer, max_length=shape.max_length, text=text)
        examples.append(
            Example(
                prompt_ids=prompt_ids,
                answer_ids=answer_ids[: len(longer)],
                prompt=row.prompt,
                reference=row.answer,
                rejected_ids=None if row.rejected is None else rejected_ids[: len(longer)],
                rejected=row.rejected,
            )
        )
    return examples, cut


def _answer_ids(answers: list[str], tokenizer: PreTrainedTokenizerBase, *, end: list[int]) -> list[list[int]]:
    return [[*ids, *end] for ids in tokenizer(answers, add_special_tokens=False)["input_ids"]]


def _without_oldest_turn(row: Row) -> Row:
    """The conversation from its next question on, the system message kept; with `before` None where there is none."""
    turns = list(row.before or ())
    head = turns[:1] if turns and turns[0]["role"] == "system" else []
    asked = [index for index, turn in enumerate(turns) if turn["role"] == "user"]
    return replace(row, before=(*head, *turns[asked[1] :]) if len(asked) > 1 else None)


def _prompt_ids(
    rows: Sequence[Row], *, instruction: str | None, tokenizer: PreTrainedTokenizerBase, encoder: bool
) -> list[tuple[list[int], tuple[int, int]]]:
    """Each prompt's tokens, and where among them the user's text begins and ends."""
    start: list[int] = []  # a template writes its own start token, and so do an encoder's special tokens
    if not encoder and getattr(tokenizer, "chat_template", None):
        texts = _chat_texts(rows, instruction=instruction, tokenizer=tokenizer)
    else:
        head, tail = f"{instruction}\n" if instruction else "", "" if encoder else "\n"
        texts = [f"{head}{_said(row)}{tail}" for row in rows]
        start = [] if encoder else start_ids(tokenizer)
    offsets = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(texts, add_special_tokens=encoder, return_offsets_mapping=offsets)
    found = []
    for index, (text, prompt) in enumerate(zip(texts, (row.prompt for row in rows), strict=True)):
        ids = list(encoded["input_ids"][index])
        begin, end = 0, len(ids)
        first = text.rfind(prompt)
        if offsets and first >= 0:  # a template may have changed the text; then all of the prompt may be cut
            inside = [
                position
                for position, (left, right) in enumerate(encoded["offset_mapping"][index])
                if left < right and first <= left and right <= first + len(prompt)
            ]
            if inside:
                begin, end = inside[0], inside[-1] + 1
        found.append((start + ids, (len(start) + begin, len(start) + end)))
    return found


def _said(row: Row) -> str:
    """All turns up to the answer, a line each, for a model without a chat template."""
    return "\n".join(turn["content"] for turn in row.before) if row.before else row.prompt


def _chat_texts(rows: Sequence[Row], *, instruction: str | None, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    from jinja2 import TemplateError

    def render(turns: Sequence[Mapping[str, Any]]) -> str:
        given = [dict(turn) for turn in turns]
        text = tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True, **_TEMPLATE_ARGUMENTS)
        assert isinstance(text, str)
        return text

    def takes_system() -> bool:
        """Some templates refuse a system message, others drop it without a word."""
        asked = "A system message."
        try:
            return asked in render([{"role": "system", "content": asked}, {"role": "user", "content": "?"}])
        except TemplateError:
            return False

    def turns_of(row: Row, *, system: bool) -> list[dict[str, Any]]:
        turns = [dict(turn) for turn in row.before] if row.before else [{"role": "user", "content": row.prompt}]
        if instruction and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": instruction})
        if turns[0]["role"] == "system" and not system:
            first = turns.pop(0)["content"]
            question = next((turn for turn in turns if turn["role"] == "user"), None)
            if question is not None:
                question["content"] = f"{first}\n\n{question['content']}"
        return turns

    try:
        wanted = bool(instruction) or any(row.before and row.before[0]["role"] == "system" for row in rows)
        system = wanted and takes_system()
        return [render(turns_of(row, system=system)) for row in rows]
    except TemplateError as error:
        raise UserError(
            f"model.name_or_path={tokenizer.name_or_path!r}: its chat template cannot render a user's turn ({error});"
            " choose a model whose template can"
        ) from error


# --- the cache ---


def _cache_key(section: Data, tokenizer: PreTrainedTokenizerBase, shape: _Shape) -> str:
    """Everything that changes the tokens, and nothing that costs an import to know."""
    plain = section.model_dump(mode="json", exclude={"name", "metrics", "max_new_tokens", "content"})
    content: dict[str, str] = {}
    if (found := content_of(section)) is not None:
        plain.pop("path")  # the same file elsewhere is the same data
        plain.pop("test_path")
        content["sha256"] = found
        if section.content not in (None, found):
            key = f"data.path={section.path!r}" if section.path else f"data.hub_id={section.hub_id!r}"
            raise UserError(f"{key}: the file has changed since this launch composed its cells; start it again")
    elif section.source == "reasoning_gym":
        content["reasoning_gym"] = metadata.version("reasoning_gym")
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
        # Left behind by whoever called the tokenizer last; our own calls set neither.
        model.pop("padding", None)
        model.pop("truncation", None)
    else:
        model = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return fingerprint([model, getattr(tokenizer, "chat_template", None), special, tokenizer.special_tokens_map])


def _read(folder: Path, *, decoder_start: int | None) -> Splits | None:
    """The cached splits; None where there are none, or a damaged folder (which is removed)."""
    if not folder.is_dir():
        return None
    import datasets

    try:
        facts = json.loads((folder / _FACTS_NAME).read_text(encoding="utf-8"))
        return Splits(
            train=Examples(datasets.Dataset.load_from_disk(str(folder / "train")), decoder_start=decoder_start),
            test=Examples(datasets.Dataset.load_from_disk(str(folder / "test")), decoder_start=decoder_start),
            truncated_rows=facts["truncated_rows"],
            truncated_test_rows=facts["truncated_test_rows"],
            dropped_rows=facts["dropped_rows"],
            repeated_rows=facts["repeated_rows"],
            shape=facts["shape"],
            fingerprint=facts["fingerprint"],
        )
    except (OSError, ValueError, KeyError):
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _write(
    folder: Path,
    found: RowSplits,
    *,
    section: Data,
    tokenizer: PreTrainedTokenizerBase,
    shape: _Shape,
) -> None:
    """Write the folder whole or not at all; where another process was first, its folder stays."""
    splits, cut = {}, {}
    for name, rows in (("train", found.train), ("test", found.test)):
        splits[name], cut[name] = _examples(rows, instruction=section.instruction, tokenizer=tokenizer, shape=shape)
    facts = {
        "truncated_rows": cut["train"],
        "truncated_test_rows": cut["test"],
        "dropped_rows": found.dropped,
        "repeated_rows": found.repeated,
        "shape": found.shape,
        "fingerprint": _content_fingerprint(splits),
    }
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
        for name, examples in splits.items():
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
            " set it to a folder that can be written and has room"
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
    )
    stored = [asdict(example) for example in examples]
    for row in stored:
        del row["decoder_start"], row["reference_margin"]  # a model's, not the row's
    return Dataset.from_list(stored, features=features)


def _content_fingerprint(splits: dict[str, list[Example]]) -> str:
    digest = hashlib.sha256()
    for name, examples in splits.items():
        digest.update(name.encode())
        for example in examples:
            parts = [example.prompt_ids, example.answer_ids, example.reference]
            if example.rejected_ids is not None:
                parts.append(example.rejected_ids)
            digest.update(json.dumps(parts).encode())
    return digest.hexdigest()[:10]

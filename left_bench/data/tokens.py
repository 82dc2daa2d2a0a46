"""Tokens: rows rendered as the model's own kind of prompt, tokenized once and kept on disk for a whole sweep."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from left_bench.cell import Data, fingerprint
from left_bench.data.lazy import LazyRows
from left_bench.data.rows import Row, data_file, load_rows
from left_bench.errors import UserError
from left_bench.paths import cache_dir, file_sha256

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

_LAYOUT = 2  # raise it when the same rows would give other tokens or files: older folders are then not found
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
    """The answer and the end token; without the end token where the answer was cut."""
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
        _write(folder, *load_rows(section), section=section, tokenizer=tokenizer, shape=shape)
    raise RuntimeError(f"tokenized rows in {folder} vanish as soon as they are written")


def fit(
    prompt_ids: list[int], answer_ids: list[int], *, max_length: int, bos_id: int | None
) -> tuple[list[int], list[int]]:
    """Cut a row to `max_length` tokens: each half may have what the other leaves, and is sure of half.

    The prompt loses its left end, farthest from the answer, but for a start token (models lean on it); the answer
    loses its right end, and with it the end token, so that nothing teaches to stop in mid-sentence.
    """
    if len(prompt_ids) + len(answer_ids) <= max_length:
        return prompt_ids, answer_ids
    answer_ids = answer_ids[: max(max_length // 2, max_length - len(prompt_ids))]
    room = max_length - len(answer_ids)
    if len(prompt_ids) > room:
        start = prompt_ids[:1] if prompt_ids[0] == bos_id else []
        prompt_ids = start + prompt_ids[len(prompt_ids) - room + len(start) :]
    return prompt_ids, answer_ids


# --- rows to tokens ---


class _Shape(NamedTuple):
    """What else decides the tokens of a row."""

    max_length: int
    encoder: bool


def _examples(
    rows: list[Row], *, instruction: str | None, tokenizer: PreTrainedTokenizerBase, shape: _Shape
) -> tuple[list[Example], int]:
    """Examples, and how many of them were cut."""
    prompts = _prompt_ids(
        [row.prompt for row in rows], instruction=instruction, tokenizer=tokenizer, encoder=shape.encoder
    )
    answers = _answer_ids([row.answer for row in rows], tokenizer)
    worse = _answer_ids([row.rejected or "" for row in rows], tokenizer)
    examples, cut = [], 0
    for row, prompt_ids, answer_ids, rejected_ids in zip(rows, prompts, answers, worse, strict=True):
        longer = max(answer_ids, rejected_ids, key=len)  # both answers follow one and the same prompt
        cut += len(prompt_ids) + len(longer) > shape.max_length
        prompt_ids, longer = fit(prompt_ids, longer, max_length=shape.max_length, bos_id=tokenizer.bos_token_id)
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


def _answer_ids(answers: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(answers, add_special_tokens=False)["input_ids"]]


def _prompt_ids(
    prompts: list[str], *, instruction: str | None, tokenizer: PreTrainedTokenizerBase, encoder: bool
) -> list[list[int]]:
    if encoder:
        head = f"{instruction}\n" if instruction else ""
        return [list(ids) for ids in tokenizer([f"{head}{prompt}" for prompt in prompts])["input_ids"]]
    if getattr(tokenizer, "chat_template", None):
        texts = _chat_texts(prompts, instruction=instruction, tokenizer=tokenizer)
        start: list[int] = []  # the template writes its own start token
    else:
        head = f"{instruction}\n" if instruction else ""
        texts = [f"{head}{prompt}\n" for prompt in prompts]
        bos_id = tokenizer.bos_token_id
        start = [bos_id] if bos_id is not None and tokenizer("a")["input_ids"][0] == bos_id else []
    return [start + ids for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _chat_texts(prompts: list[str], *, instruction: str | None, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    from jinja2 import TemplateError

    def render(user: str, system: str | None) -> str:
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": user})
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **_TEMPLATE_ARGUMENTS)
        assert isinstance(text, str)
        return text

    def takes_system(system: str) -> bool:
        """Some templates refuse a system message, others drop it without a word."""
        try:
            return system.strip() in render("?", system)
        except TemplateError:
            return False

    try:
        if instruction and not takes_system(instruction):
            return [render(f"{instruction}\n\n{prompt}", None) for prompt in prompts]
        return [render(prompt, instruction) for prompt in prompts]
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
    if section.path is not None or section.source == "jsonl":
        plain.pop("path")  # the same file elsewhere is the same data
        content["sha256"] = file_sha256(data_file(section))
        if section.content not in (None, content["sha256"]):
            raise UserError(
                f"data.path={section.path!r}: the file has changed since this launch composed its cells; start it again"
            )
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
            fingerprint=facts["fingerprint"],
        )
    except (OSError, ValueError, KeyError):
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _write(
    folder: Path,
    train: list[Row],
    test: list[Row],
    *,
    section: Data,
    tokenizer: PreTrainedTokenizerBase,
    shape: _Shape,
) -> None:
    """Write the folder whole or not at all; where another process was first, its folder stays."""
    splits, cut = {}, {}
    for name, rows in (("train", train), ("test", test)):
        splits[name], cut[name] = _examples(rows, instruction=section.instruction, tokenizer=tokenizer, shape=shape)
    facts = {"truncated_rows": cut["train"], "fingerprint": _content_fingerprint(splits)}
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

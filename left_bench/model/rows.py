"""A cell's rows as its model reads them: what a task names as `load_rows`."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from left_bench.core.errors import UserError
from left_bench.data import Splits, load_classified_texts, load_data, load_pictures
from left_bench.data.answer_pairs import as_answer_pairs
from left_bench.pretrained import source
from left_bench.spec.cell import Cell


def decoder_rows(cell: Cell, tokenizer: Any, *, folder: str) -> Splits:
    """Prompts and answers as one text (see `data.load_data`)."""
    return _text_rows(cell, tokenizer, decoder_start=None)


def encoder_rows(cell: Cell, tokenizer: Any, *, folder: str) -> Splits:
    """Prompts for the encoder, answers for the decoder, which begins with the model's own start token.

    Raises:
        UserError: the model's configuration names no such token.
    """
    start = _config_of(cell, folder).decoder_start_token_id
    if start is None:
        raise UserError(
            f"model.task={cell.model.task}: {cell.model.name_or_path} names no decoder_start_token_id in its "
            "config.json; set it there, or model.task=causal_lm for a model without an encoder"
        )
    return _text_rows(cell, tokenizer, decoder_start=start)


def picture_rows(cell: Cell, processor: Any, *, folder: str) -> Splits:
    """Pictures and their classes (see `data.load_pictures`)."""
    return load_pictures(cell.data, processor, patches=_patches(_config_of(cell, folder)))


def classified_text_rows(cell: Cell, tokenizer: Any, *, folder: str) -> Splits:
    """Texts and their classes (see `data.load_classified_texts`), as long as the model has positions."""
    positions = getattr(_config_of(cell, folder), "max_position_embeddings", None)
    longest = min(cell.training.max_length, positions) if isinstance(positions, int) else cell.training.max_length
    return load_classified_texts(cell.data, tokenizer, max_length=longest)


def answer_pair_rows(cell: Cell, tokenizer: Any, *, folder: str) -> Splits:
    """Pairs of answers, each read with its question (see `data.answer_pairs`)."""
    return as_answer_pairs(_text_rows(cell, tokenizer, decoder_start=None))


def _text_rows(cell: Cell, tokenizer: Any, *, decoder_start: int | None) -> Splits:
    return load_data(
        cell.data,
        tokenizer,
        max_length=cell.training.max_length,
        decoder_start=decoder_start,
        one_answer_a_row=cell.one_answer_a_row,
    )


def _config_of(cell: Cell, folder: str) -> Any:
    revision = cell.model.revision if source(cell.model) == "hub" else None
    return AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=cell.model.trust_remote_code)


def _patches(config: Any) -> int:
    """The squares a vision transformer cuts a picture into; 1 where the model cuts nothing."""
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    return (size // patch) ** 2 if isinstance(size, int) and isinstance(patch, int) else 1

"""Loading a cell's rows for its model: the functions that tasks name as `load_rows`."""

from __future__ import annotations

from typing import Any

from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoConfig

from left_bench.core.errors import UserError
from left_bench.data import (
    Splits,
    load_classified_texts,
    load_data,
    load_pictures,
    load_scored_texts,
    load_tagged_texts,
    load_text_pairs,
)
from left_bench.data.answer_pairs import as_answer_pairs
from left_bench.model.positions import virtual_tokens
from left_bench.pretrained import source
from left_bench.spec.cell import Cell


def decoder_rows(cell: Cell, tokenizer: Any, *, folder: str) -> Splits:
    """Prompts and answers as one sequence (see `data.load_data`)."""
    return _text_rows(cell, tokenizer, decoder_start=None)


def encoder_rows(cell: Cell, tokenizer: Any, *, folder: str) -> Splits:
    """Prompts for the encoder, and answers for the decoder, which begin with the model's own start token.

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
    """Images and their classes (see `data.load_pictures`)."""
    return load_pictures(cell.data, processor, patches=_patches(_config_of(cell, folder)))


def classified_text_rows(cell: Cell, tokenizer: Any, *, folder: str) -> Splits:
    """Texts and their classes (see `data.load_classified_texts`)."""
    config = _config_of(cell, folder)
    return load_classified_texts(
        cell.data, tokenizer, max_length=_longest(cell, tokenizer, config), at_left=_reads_last_position(cell, config)
    )


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


def scored_text_rows(cell: Cell, tokenizer: Any, *, folder: str) -> Splits:
    """Texts and their numbers (see `data.load_scored_texts`)."""
    config = _config_of(cell, folder)
    return load_scored_texts(
        cell.data, tokenizer, max_length=_longest(cell, tokenizer, config), at_left=_reads_last_position(cell, config)
    )


def tagged_text_rows(cell: Cell, tokenizer: Any, *, folder: str) -> Splits:
    """Texts and their words' tags (see `data.load_tagged_texts`)."""
    config = _config_of(cell, folder)
    longest = _longest(cell, tokenizer, config)
    return load_tagged_texts(cell.data, tokenizer, max_length=longest, by_last=not _is_encoder(config))


def text_pair_rows(cell: Cell, tokenizer: Any, *, folder: str) -> Splits:
    """Pairs of texts (see `data.load_text_pairs`)."""
    return load_text_pairs(cell.data, tokenizer, max_length=_longest(cell, tokenizer, _config_of(cell, folder)))


def _longest(cell: Cell, tokenizer: Any, config: Any) -> int:
    """Tokens of a text: as asked for, and no more than the model has positions beside the method's virtual tokens."""
    positions = getattr(config, "max_position_embeddings", None)
    room = positions if isinstance(positions, int) else cell.training.max_length
    return min(cell.training.max_length, tokenizer.model_max_length, room - virtual_tokens(cell))


def _reads_last_position(cell: Cell, config: Any) -> bool:
    """Whether the class is taken from the last position, wherever padding stands.

    A decoder looks for the last token that is no padding; where a method hands it embeddings in place of tokens, it
    cannot see which those are.
    """
    hands_embeddings = cell.peft.is_one_of("PromptTuning", "MultitaskPromptTuning", "PromptEncoder", "CPT")
    return hands_embeddings and not _is_encoder(config)


def _is_encoder(config: Any) -> bool:
    """Whether a token sees those behind it, too: the architecture fills gaps in a text."""
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING


def _config_of(cell: Cell, folder: str) -> Any:
    revision = cell.model.revision if source(cell.model) == "hub" else None
    return AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=cell.model.trust_remote_code)


def _patches(config: Any) -> int:
    """The number of patches of a vision transformer; 1 if the model has none."""
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    return (size // patch) ** 2 if isinstance(size, int) and isinstance(patch, int) else 1

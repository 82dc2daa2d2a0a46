"""Rows and answers longer than a model has positions are refused in one sentence, and not by an IndexError."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from left_bench.core.errors import UserError
from left_bench.model.positions import check_generation, check_positions, positions_of

GPT2 = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}


def gpt2(folder: Path) -> list[str]:
    """A saved GPT-2 with 64 positions, as the overrides that name it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from left_bench.pretrained.make import byte_tokenizer

    settings = {key: value for key, value in GPT2.items() if key != "model_type"}
    GPT2LMHeadModel(GPT2Config(**settings, bos_token_id=1, eos_token_id=1)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return [f"model.name_or_path={folder}", "peft=ln_tuning", "eval.forgetting=false"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPT2, 64),
        ({"model_type": "opt", "max_position_embeddings": 2048}, 2048),
        ({"model_type": "llama", "max_position_embeddings": 2048}, None),  # rotary
        ({"model_type": "t5"}, None),
        ({"model_type": "gpt2"}, None),  # the class's own default stands in no file
        ({}, None),
    ],
)
def test_positions_are_those_of_an_embedding(config, expected):
    assert positions_of(config) == expected


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.max_length=65"], ["training.max_length=65", "64 positions", "training.max_length=64 or less"]),
        (
            ["training.max_length=60", "peft=prompt_tuning", "peft.config.num_virtual_tokens=8"],
            ["peft.config.num_virtual_tokens=8", "64 positions", "training.max_length=56 or less"],
        ),
        ([], ["training.max_length=512"]),  # the default is too long as well
    ],
)
def test_rows_longer_than_the_positions_are_refused_before_anything_runs(overrides, words, left_bench, tmp_path):
    given = [*gpt2(tmp_path / "gpt2"), *overrides]
    named = {override.partition("=")[0] for override in overrides}
    kept = [argument for argument in given[:2] if argument.partition("=")[0] not in named]
    answer = left_bench(*kept, *given[2:], "tracker=none", f"runs_dir={tmp_path / 'runs'}")
    assert answer.code == 2
    assert all(word in answer.err for word in words), answer.err
    assert not list((tmp_path / "runs").glob("*/record.json"))


def test_rows_that_fit_are_not_refused(tiny_cell, tmp_path):
    check_positions(tiny_cell(*gpt2(tmp_path / "gpt2"), "training.max_length=64"))


def test_rows_beyond_configured_positions_are_refused(tiny_cell):
    check_positions(tiny_cell("training.max_length=512"))
    with pytest.raises(UserError, match=r"max_length=513: tiny_llama is configured for 512 positions; .*=512 or less"):
        check_positions(tiny_cell("training.max_length=513"))
    longer = ["training.max_length=1024", "model.config.rope_parameters={rope_type: linear, factor: 2.0}"]
    check_positions(tiny_cell(*longer))


def test_answers_beyond_the_positions_end_the_cell_in_one_sentence(tiny_cell, work_in_process, tmp_path):
    fits = tiny_cell(*gpt2(tmp_path / "gpt2"), "training.max_length=64", "eval.max_new_tokens=1", "data.test_rows=2")
    with pytest.raises(UserError, match=r"eval\.max_new_tokens=60: the longest prompt has \d+ tokens .* 64 positions"):
        work_in_process(fits.model_copy(update={"eval": fits.eval.model_copy(update={"max_new_tokens": 60})}))


@given(prompt=st.integers(1, 64), answer=st.integers(1, 64))
def test_generation_is_refused_exactly_where_it_would_run_out_of_positions(prompt, answer, tiny_cell):
    cell = tiny_cell()
    cell = cell.model_copy(update={"eval": cell.eval.model_copy(update={"max_new_tokens": answer})})
    try:
        check_generation(cell, GPT2, longest_prompt=prompt)
    except UserError:
        assert prompt + answer > 64
    else:
        assert prompt + answer <= 64

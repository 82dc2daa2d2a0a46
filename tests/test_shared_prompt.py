"""A beginning that all prompts share is read once, and changes nothing but the time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from left_bench.data import Example
from left_bench.evaluation.evaluate import evaluate_model, greedy_answers, row_losses
from left_bench.evaluation.shared_prompt import read_shared_prompt
from left_bench.methods.attach import attach_adapter, trainable_parameters

SYSTEM = [2 + byte for byte in b"You add numbers. "]


@pytest.fixture
def rows(addition_rows):
    """Eight rows behind a system message, which share 25 tokens with the beginning of the question."""
    return [replace(row, prompt_ids=[*SYSTEM, *row.prompt_ids]) for row in addition_rows]


@pytest.fixture
def read(tiny_cell):
    return lambda model, rows: read_shared_prompt(model, rows, tiny_cell(), pad_id=0, device="cpu")


def disturbed(model):
    """An adapter's parameters away from their start, where most methods change nothing."""
    draw = torch.Generator().manual_seed(1)
    for parameter in trainable_parameters(model):
        parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    return model.eval()


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_neox", "tiny_opt"])
@pytest.mark.parametrize("peft", ["full", "lora", "ia3", "houlsby", "bitfit", "llama_adapter"])
def test_losses_and_answers_after_a_shared_beginning_are_those_of_whole_rows(
    name, peft, tiny_cell, load_tiny, rows, read
):
    if (name, peft) in [("tiny_llama", "bitfit"), ("tiny_opt", "llama_adapter"), ("tiny_neox", "llama_adapter")]:
        pytest.skip("refused by rule")
    cell = tiny_cell(f"model={name}", f"peft={peft}", "eval.max_new_tokens=5", "eval.batch_size=3")
    base, tokenizer = load_tiny(cell)
    with torch.no_grad():
        base.get_output_embeddings().weight *= 50  # random weights hardly prefer one token to another
        model = disturbed(attach_adapter(base, cell, tokenizer=tokenizer, rows=rows))
        shared = read(model, rows)
        assert len(shared.ids) == 25 or peft == "llama_adapter"
        arguments = {"pad_id": 0, "device": "cpu"}
        together = row_losses(model, rows, cell, shared=shared, **arguments)
        apart = row_losses(model, rows, cell, **arguments)
        assert together.nll == pytest.approx(apart.nll, rel=1e-4)
        assert together.answer_tokens == apart.answer_tokens
        assert together.tokens == apart.tokens - len(shared.ids) * (len(rows) - 1 if shared.ids else 0)
        answers = greedy_answers(model, tokenizer, rows, cell, shared=shared, device="cpu")
        assert answers == greedy_answers(model, tokenizer, rows, cell, device="cpu")


def test_an_evaluation_reads_the_beginning_once(tiny_cell, load_tiny, rows):
    cell = tiny_cell("eval.forgetting=false")
    model, tokenizer = load_tiny(cell)
    result = evaluate_model(model, tokenizer, rows, cell, device="cpu")
    assert result.tokens == 25 + sum(row.length - 25 for row in rows)


def test_a_row_keeps_the_last_token_of_its_prompt(tiny_cell, load_tiny, rows, read):
    model, _ = load_tiny(tiny_cell())
    alike = [rows[0], replace(rows[0], answer_ids=[7, 1])]
    with torch.no_grad():
        assert read(model, alike).ids == rows[0].prompt_ids[:-1]


@pytest.mark.parametrize("peft", ["prompt_tuning", "prefix_tuning", "p_tuning"])
def test_nothing_is_shared_behind_virtual_tokens(peft, tiny_cell, load_tiny, rows, read):
    cell = tiny_cell(f"peft={peft}")
    base, tokenizer = load_tiny(cell)
    with torch.no_grad():
        assert read(attach_adapter(base, cell, tokenizer=tokenizer, rows=rows), rows).ids == []


def test_nothing_is_shared_where_the_model_looks_at_its_whole_input(tiny_cell, load_tiny, rows, read):
    """A method that takes something from all of its input, as some routers do, reads otherwise what is cut in two."""
    model, _ = load_tiny(tiny_cell())
    layer = model.model.layers[0]
    layer.register_forward_hook(lambda _module, _inputs, output: output + output.mean(dim=1, keepdim=True))
    with torch.no_grad():
        assert read(model, rows).ids == []


def test_nothing_is_shared_where_a_layer_forgets(tiny_cell, load_tiny, rows, read):
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=8,
    )  # fmt: skip
    with torch.no_grad():
        assert read(MistralForCausalLM(config).eval(), rows).ids == []


@pytest.mark.parametrize("unlike", [[], [9]], ids=["empty", "unlike from the first"])
def test_nothing_is_shared_by_prompts_that_begin_otherwise(unlike, tiny_cell, load_tiny, rows, read):
    model, _ = load_tiny(tiny_cell())
    other = Example(prompt_ids=unlike, answer_ids=[7, 8, 1], prompt="", reference="")
    with torch.no_grad():
        assert read(model, [*rows, other]).ids == []
        assert read(model, rows[:1]).ids == []

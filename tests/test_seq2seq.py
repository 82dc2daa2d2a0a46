"""Encoders with a decoder: the prompt is read by one, the answer written by the other, everything else is as ever."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers

from left_bench.core.errors import UserError
from left_bench.data import collate
from left_bench.evaluation import evaluate
from left_bench.grid.rules import why_unsupported
from left_bench.methods.attach import attach_adapter, virtual_positions
from left_bench.model.load import load_model, load_rows_of, open_pretrained
from left_bench.training.loss import AnswerLoss

BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 512}
METHODS = ["full", "lora", "dora", "ia3", "prompt_tuning", "prefix_tuning", "p_tuning", "ln_tuning", "layer_freeze"]


@pytest.fixture(scope="module")
def rows(addition_rows):
    return [dataclasses.replace(row, decoder_start=0) for row in addition_rows]


def family(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    if name == "bart":
        return transformers.BartForConditionalGeneration(transformers.BartConfig(**BART, **ids)).eval()
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 512}
    config = transformers.T5Config(**sizes, dropout_rate=0.0, **ids)
    model = transformers.T5ForConditionalGeneration(config).eval()
    return untie(model) if name == "t5, untied" else model


def untie(model: torch.nn.Module) -> torch.nn.Module:
    """Give the output head a matrix of its own, as FLAN-T5's checkpoints do (transformers ties what has no weights)."""
    torch.manual_seed(1)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model


@pytest.mark.parametrize("name", ["t5, tied", "t5, untied", "bart"])
def test_loss_and_gradients_are_the_models_own(name, rows):
    model, batch = family(name), collate(rows, pad_id=0)
    loss = AnswerLoss(model)
    theirs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    (theirs * batch.answer_tokens).backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ours = loss.summed(batch)
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item() * batch.answer_tokens, rel=1e-5)
    for key, parameter in model.named_parameters():
        if key in gradients:
            torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["t5, tied", "bart"])
def test_a_rows_loss_does_not_depend_on_the_others(name, rows):
    loss = AnswerLoss(family(name))
    with torch.no_grad():
        together = loss.of_tokens(collate(rows, pad_id=0))
        apart = torch.cat([loss.of_tokens(collate([row], pad_id=0)) for row in rows])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_generation_is_the_argmax_of_the_decoder_row_by_row(tiny_cell, load_tiny, rows):
    cell = tiny_cell("model=tiny_t5", "eval.max_new_tokens=4")
    model, tokenizer = load_tiny(cell)
    untie(model)
    expected = []
    for row in rows:
        written = [row.decoder_start]
        while len(written) < 5 and written[-1] != tokenizer.eos_token_id:
            ids, so_far = torch.tensor([row.prompt_ids]), torch.tensor([written])
            written.append(model(input_ids=ids, decoder_input_ids=so_far).logits[0, -1].argmax().item())
        expected.append(written[1:])
    assert evaluate.greedy_answers(model, tokenizer, rows, cell, device="cpu") == expected
    assert len(set(map(tuple, expected))) > 1


def test_the_prompt_ends_as_the_tokenizer_ends_an_encoders(tiny_cell):
    cell = tiny_cell("model=tiny_t5")
    folder, tokenizer = open_pretrained(cell)
    splits = load_rows_of(cell, tokenizer, folder=folder)
    row = splits.train[0]
    assert row.decoder_start == 0
    assert row.prompt_ids == tokenizer(f"{cell.data.instruction}\n{row.prompt}")["input_ids"]
    assert row.answer_ids == [*tokenizer(row.reference, add_special_tokens=False)["input_ids"], 1]
    assert row.labels == len(row.answer_ids)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains(method, tiny_cell, work_in_process):
    result = work_in_process(tiny_cell("model=tiny_t5", f"peft={method}", "training.batching=packed"))
    metrics, effective = result["metrics"], result["environment"]["effective"]
    assert metrics["train_loss"] != metrics["first_train_loss"]
    assert metrics["generate_tokens_per_second"] > 0
    assert "model_flops_utilization" not in metrics  # not counted for two halves
    assert effective["batching"] == "padded"
    assert "encoder" in effective["batching_fallback"]
    assert ("init_text" in effective) == (method == "prefix_tuning")


def test_virtual_tokens_are_the_encoders(tiny_cell, load_tiny, rows):
    cell = tiny_cell("model=tiny_t5", "peft=prompt_tuning")
    model, tokenizer = load_tiny(cell)
    adapted = attach_adapter(model, cell, tokenizer=tokenizer, rows=rows)
    assert virtual_positions(adapted) == 0
    batch = collate(rows, pad_id=0)
    assert adapted(**batch.inputs()).logits.shape[:2] == batch.labels.shape


def test_a_prefix_has_the_attentions_width(tiny_cell, load_tiny, rows):
    """FLAN-T5-small's heads are wider together than the model is."""
    cell = tiny_cell("model=tiny_t5", "model.config.d_kv=24", "peft=prefix_tuning")
    model, tokenizer = load_tiny(cell)
    adapted = attach_adapter(model, cell, tokenizer=tokenizer, rows=rows)
    adapted(**collate(rows, pad_id=0).inputs()).logits.sum().backward()
    assert adapted.prompt_encoder.default.embedding.weight.grad.abs().sum() > 0


def test_a_decoder_is_no_encoder(tiny_cell):
    for asked, of in (("model=tiny_llama", "seq2seq_lm"), ("model=tiny_t5", "causal_lm")):
        cell = tiny_cell(asked)
        folder, _ = open_pretrained(cell)
        wrong = cell.model_copy(update={"model": cell.model.model_copy(update={"task": of})})
        with pytest.raises(UserError, match=rf"model\.task={of}.*set model\.task"):
            load_model(wrong, folder=folder, device="cpu")


@pytest.mark.parametrize("method", ["eva", "llama_adapter", "bitfit", "cpt", "pfeiffer"])
def test_what_cannot_be_has_a_rule(method, tiny_cell):
    assert why_unsupported(tiny_cell("model=tiny_t5", f"peft={method}"))

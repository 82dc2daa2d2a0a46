"""Merging: the merged model is the adapted model, and what has no merge says why."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from left_bench.data import Example
from left_bench.evaluation.merge_check import answer_logits, merge, why_not
from left_bench.measure.device import CpuDevice
from left_bench.measure.meter import Meter
from left_bench.spec.events import EventWriter

ROWS = [
    Example(prompt_ids=[5, 6, 7], answer_ids=[8, 1], prompt="", reference=""),
    Example(prompt_ids=[5, 6, 7, 9, 3], answer_ids=list(range(10, 22)), prompt="", reference=""),
]


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


@pytest.fixture
def meter(tmp_path) -> Meter:
    return Meter(CpuDevice(), EventWriter(tmp_path / "events.jsonl"))


def test_a_merged_lora_gives_the_attached_ones_logits(meter, tiny_cell):
    cell = tiny_cell()
    model = get_peft_model(tiny(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    attached = answer_logits(model, ROWS, cell, pad_id=0, device="cpu")
    merged, note = merge(model, ROWS, cell, meter=meter, pad_id=0)
    assert merged is not None
    assert note.startswith("merged")
    assert not any("lora" in name for name, _ in merged.named_modules())
    again = answer_logits(merged, ROWS, cell, pad_id=0, device="cpu")
    torch.testing.assert_close(again, attached, rtol=1e-4, atol=1e-5)
    difference = (again - attached).abs().max().item()
    assert meter.metrics["merge_max_abs_difference"] == pytest.approx(difference)
    base = answer_logits(tiny(), ROWS, cell, pad_id=0, device="cpu")
    assert (again - base).abs().max() > 1e-2  # the adapter does something


def test_the_compared_logits_are_the_models_own_at_the_first_answer_tokens(tiny_cell):
    model = tiny().eval()
    result = answer_logits(model, ROWS, tiny_cell(), pad_id=0, device="cpu")
    with torch.no_grad():
        whole = [model(torch.tensor([row.prompt_ids + row.answer_ids])).logits[0] for row in ROWS]
    # the token before an answer predicts its first; of the long answer eight are compared
    torch.testing.assert_close(result, torch.cat([whole[0][2:4], whole[1][4:12]]))


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_not_merged(config, meter, tiny_cell):
    model = get_peft_model(tiny(), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    merged, note = merge(model, ROWS, tiny_cell(), meter=meter, pad_id=0)
    assert merged is None
    assert "virtual tokens" in note
    assert "merge_max_abs_difference" not in meter.metrics


def test_a_model_without_an_adapter_has_nothing_to_merge():
    assert "no peft adapter" in (why_not(tiny()) or "")


def test_a_merge_into_quantized_weights_says_that_they_are_quantized_again(tiny_cell, work_in_process):
    cell = tiny_cell("quantization=nf4", "training.steps=1", "eval.generate=false", "eval.check_reload=false")
    result = work_in_process(cell)
    assert result["environment"]["effective"]["merge"].startswith("merged and quantized again; ")
    assert result["metrics"]["merge_max_abs_difference"] > 0


@pytest.mark.parametrize("adapted", ["lm_head", "embed_tokens"])
def test_one_of_two_tied_layers_is_merged_without_the_other(adapted, meter, tiny_cell):
    """Merged into the weight that both share, a head's adapter changed the embedding: 0.156 in the logits."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )
    assert base.lm_head.weight is base.model.embed_tokens.weight
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", adapted]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    merged, note = merge(model, ROWS, tiny_cell(), meter=meter, pad_id=0)
    assert merged is not None and note.startswith("merged")
    assert meter.metrics["merge_max_abs_difference"] < 1e-5

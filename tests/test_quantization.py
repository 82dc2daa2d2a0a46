"""How far quantized weights are from the unquantized ones, against hand-made arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from left_bench.compat.bitsandbytes import keep_trainable
from left_bench.fivebit import FiveBitConfig
from left_bench.model.load import quantized_weights
from left_bench.model.quantization_error import quantization_error
from left_bench.quantization import dequantized


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    made = tmp_path_factory.mktemp("dense")
    model.save_pretrained(made)
    return str(made)


CONFIGS = {
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "nf5": lambda: FiveBitConfig(scheme="nf5"),
    "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "fp4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
}


def load(folder: str, name: str):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=CONFIGS[name](), dtype=torch.float32)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_error_is_the_mean_over_layers(name, folder):
    model = load(folder, name)
    dense = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
    errors = []
    for layer, weight in quantized_weights(model).items():
        reference = dense[f"{layer}.weight"]
        errors.append(((dequantized(weight) - reference).norm() / reference.norm()).item())
    assert len(errors) == 2 * 7
    assert quantization_error(model, Path(folder)) == pytest.approx(sum(errors) / len(errors))


def test_more_bits_less_error(folder):
    errors = {name: quantization_error(load(folder, name), Path(folder)) for name in CONFIGS}
    assert errors["int8"] < errors["nf5"] < errors["nf4"] < errors["fp4"]


def test_the_dequantized_weight_is_what_the_layer_multiplies_by(folder):
    model = load(folder, "nf4")
    keep_trainable(model)  # the first product in eval mode would repack the weights
    layer = model.model.layers[0].mlp.up_proj
    eye = torch.eye(64)
    torch.testing.assert_close(layer(eye).T, dequantized(layer.weight), atol=1e-4, rtol=1e-3)


def test_no_local_checkpoint_no_error_figure(folder):
    assert quantization_error(load(folder, "nf4"), None) is None

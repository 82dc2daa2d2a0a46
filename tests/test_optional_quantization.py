"""Quantizations behind an extra: LoRA trains over them, and their bits are counted from what is stored."""

from __future__ import annotations

import pytest
import torch

from left_bench.core.paths import is_installed
from left_bench.quantization import dequantized

MODULES = {"hqq": "hqq", "quanto": "optimum.quanto", "torchao": "torchao"}
# groups of 64 with two float32 constants; 3 bits are packed ten in 32; in these small layers constants weigh more
BITS = {"hqq_4": 4 + 1, "hqq_3": 3.389 + 1, "hqq_2": 2 + 1, "quanto_int4": 4.889, "torchao_int8": 8.556}


@pytest.mark.parametrize("name", BITS)
def test_lora_trains_over_it(name, tiny_cell, work_in_process):
    if not is_installed(MODULES[name.partition("_")[0]]):
        pytest.skip("not installed")
    result = work_in_process(tiny_cell("training.steps=4", "eval.check_reload=false", f"quantization={name}"))
    metrics = result["metrics"]
    assert metrics["quantized_modules"] == 14
    assert metrics["quantized_bits_per_param"] == pytest.approx(BITS[name], abs=0.06)
    assert metrics["train_loss"] < metrics["first_train_loss"]
    assert "generate_tokens_per_second" in metrics


def test_the_dequantized_weight_is_what_an_hqq_layer_multiplies_by(tiny_cell, load_tiny):
    pytest.importorskip("hqq")
    model, _ = load_tiny(tiny_cell("quantization=hqq_4"))
    layer = model.model.layers[0].mlp.up_proj
    assert dequantized(layer.weight).shape == (layer.out_features, layer.in_features)
    torch.testing.assert_close(layer(torch.eye(layer.in_features)).T, dequantized(layer.weight), atol=1e-6, rtol=1e-5)


def test_hqq_quantizes_alike_each_time(tiny_cell, load_tiny):
    """What a saved adapter relies on: the base model is quantized again when it is loaded."""
    pytest.importorskip("hqq")
    models = [load_tiny(tiny_cell("quantization=hqq_3"))[0] for _ in range(2)]
    weights = [model.model.layers[1].self_attn.k_proj.weight for model in models]
    assert torch.equal(*weights)
    assert torch.equal(*map(dequantized, weights))

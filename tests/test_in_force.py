"""Reading stored integers as weights, and learning nothing, are noticed; what is right passes."""

from __future__ import annotations

import pytest
import torch

from left_bench.core.errors import NotInForce
from left_bench.methods.verify import check_forward, check_gradient, stored_integers_are_not_read
from left_bench.model.load import quantized_weights

QUANTIZED = ["int8", "nf4", "nf4_dq", "nf5_dq", "int5"]


@pytest.fixture(scope="module")
def quantized(tiny_cell, load_tiny):
    return {name: load_tiny(tiny_cell(f"quantization={name}"))[0] for name in QUANTIZED}


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_quantizations_own_code_may_read(name, quantized):
    model = quantized[name].train()
    state = torch.get_rng_state()
    check_forward(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("read", ["float", "product", "view"])
def test_other_code_may_not(name, read, quantized):
    layer = "model.layers.1.mlp.up_proj"
    weight = quantized_weights(quantized[name])[layer].data
    with (
        pytest.raises(NotInForce, match=rf"test_in_force reads the stored integers of '{layer}'"),
        stored_integers_are_not_read(quantized[name]),
    ):
        if read == "float":
            weight.to(torch.float32)
        elif read == "product":
            weight * torch.ones(1)
        else:
            weight.view(-1)[3:7].float()


def test_looking_at_shape_and_copying_the_codes_is_no_reading(quantized):
    weight = quantized_weights(quantized["nf4"])["model.layers.0.mlp.up_proj"].data
    with stored_integers_are_not_read(quantized["nf4"]):
        assert weight.clone().view(-1)[:2].shape == (2,)


def test_an_unquantized_model_is_not_watched(tiny_cell, load_tiny):
    model, _ = load_tiny(tiny_cell())
    with stored_integers_are_not_read(model):
        model.model.layers[0].mlp.up_proj.weight.to(torch.float64)


def test_a_gradient_of_zero_is_refused():
    check_gradient(1e-12)
    check_gradient(float("nan"))  # that is divergence, and said elsewhere
    with pytest.raises(NotInForce, match="no trainable parameter received a gradient"):
        check_gradient(0.0)

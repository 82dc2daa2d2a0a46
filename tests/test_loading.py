"""A model whose weights are not all its checkpoint's, or that is no causal one, is no baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel

from left_bench.core.errors import NotInForce
from left_bench.model import load as models


@pytest.fixture
def saved(tiny_cell, load_tiny, tmp_path) -> Path:
    load_tiny(tiny_cell())[0].save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewritten(folder: Path, change: Any) -> None:
    """The folder's weights, by name, as `change` leaves them."""
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


def test_a_whole_checkpoint_loads(saved, tiny_cell):
    _, result = models.load_model(tiny_cell(), folder=str(saved), device="cpu")
    assert "unexpected_weights" not in result


def test_names_with_a_prefix_are_refused_and_shown(saved, tiny_cell):
    rewritten(saved, lambda weights: {f"_orig_mod.{name}": value for name, value in weights.items()})
    with pytest.raises(NotInForce, match=r"21 tensors .* not in its checkpoint .*_orig_mod\.\S+ and others"):
        models.load_model(tiny_cell(), folder=str(saved), device="cpu")


def test_a_missing_tensor_is_refused_by_name(saved, tiny_cell):
    gone = "model.layers.0.self_attn.q_proj.weight"
    rewritten(saved, lambda weights: {name: value for name, value in weights.items() if name != gone})
    with pytest.raises(NotInForce, match=rf"1 tensors .*{gone}"):
        models.load_model(tiny_cell(), folder=str(saved), device="cpu")


def test_tensors_that_the_model_does_not_know_are_counted(saved, tiny_cell):
    rewritten(saved, lambda weights: weights | {"vision.weight": torch.zeros(2)})
    _, result = models.load_model(tiny_cell(), folder=str(saved), device="cpu")
    assert result["unexpected_weights"] == 1


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_neox"])
def test_a_causal_model_passes(name, tiny_cell, load_tiny):
    cell = tiny_cell(f"model={name}")
    models.check_causal(load_tiny(cell)[0], cell, device="cpu")


@pytest.mark.parametrize("is_decoder", [True, False])
def test_an_encoder_opened_as_a_causal_model_is_refused(is_decoder, tiny_cell):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    bert = BertLMHeadModel(BertConfig(vocab_size=64, is_decoder=is_decoder, **size)).eval()
    if is_decoder:
        models.check_causal(bert, tiny_cell(), device="cpu")
        return
    with pytest.raises(NotInForce, match="BertLMHeadModel is not a causal language model"):
        models.check_causal(bert, tiny_cell(), device="cpu")

"""Every optimizer option takes steps, keeps the states it is chosen for, and refuses what is not in force."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from left_bench.core.errors import NotInForce, UserError
from left_bench.core.paths import is_installed
from left_bench.grid.rules import EXTRAS
from left_bench.spec.cell import Cell, Optimizer
from left_bench.training.loop import embedding_noise, make_optimizer, optimizer_state_dtypes, state_tensors

CONF = sorted((Path(__file__).resolve().parents[1] / "conf" / "optimizer").glob("*.yaml"))


class Layer(torch.nn.Module):
    """Two matrices named as LoRA names its own, and a vector; large enough that 8-bit states are used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lora_A = torch.nn.Linear(128, 64, bias=False)
        self.lora_B = torch.nn.Linear(64, 128, bias=True)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.lora_B(self.lora_A(inputs))


def with_optimizer(cell: Cell, path: Path) -> Cell:
    return cell.model_copy(update={"optimizer": Optimizer.model_validate(yaml.safe_load(path.read_text()))})


def missing(cell: Cell) -> bool:
    return any(cell.optimizer.target.startswith(target) and not is_installed(module) for target, module, _ in EXTRAS)


@pytest.mark.parametrize("path", CONF, ids=lambda path: path.stem)
def test_an_option_lowers_a_loss(path, tiny_cell):
    cell = with_optimizer(tiny_cell(), path)
    if missing(cell):
        with pytest.raises(UserError, match=cell.optimizer.target.split(".")[0]):
            make_optimizer(Layer(), cell, device="cpu")
        return
    if "Paged" in cell.optimizer.target:
        with pytest.raises(NotInForce, match="CUDA"):
            make_optimizer(Layer(), cell, device="cpu")
        return
    layer = Layer()
    optimizer = make_optimizer(layer, cell, device="cpu")
    inputs, losses = torch.randn(32, 128), []
    for _ in range(8):
        loss = (layer(inputs) - inputs).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


def state_bytes(name: str, tiny_cell: Callable[..., Cell]) -> tuple[int, str]:
    cell = with_optimizer(tiny_cell(), CONF[0].with_name(f"{name}.yaml"))
    layer = Layer()
    optimizer = make_optimizer(layer, cell, device="cpu")
    layer(torch.randn(4, 128)).sum().backward()
    optimizer.step()
    return sum(tensor.nbytes for tensor in state_tensors(optimizer)), optimizer_state_dtypes(optimizer)


def test_states_are_as_large_as_promised(tiny_cell):
    parameters = sum(parameter.numel() for parameter in Layer().parameters())
    adamw, dtype = state_bytes("adamw", tiny_cell)
    assert adamw == pytest.approx(8 * parameters, rel=0.01)  # two float32 moments
    assert dtype == "float32"
    eight, dtypes = state_bytes("adamw_8bit", tiny_cell)
    assert eight < 0.5 * adamw
    assert "uint8" in dtypes
    lion, _ = state_bytes("lion", tiny_cell)
    assert lion == pytest.approx(4 * parameters, rel=0.01)  # one float32 momentum


def test_lora_plus_gives_b_a_faster_rate(tiny_cell):
    cell = with_optimizer(tiny_cell(), CONF[0].with_name("loraplus.yaml"))
    layer = Layer()
    rates = {
        id(parameter): group["lr"]
        for group in make_optimizer(layer, cell, device="cpu").param_groups
        for parameter in group["params"]
    }
    assert rates[id(layer.lora_A.weight)] == pytest.approx(cell.learning_rate)
    assert rates[id(layer.lora_B.weight)] == pytest.approx(16 * cell.learning_rate)
    with pytest.raises(UserError, match="LoRA"):
        make_optimizer(torch.nn.Linear(4, 4), cell, device="cpu")


def test_neftune_noise_is_bounded_and_ends(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    ids = torch.arange(12).reshape(1, 12)
    plain = model.get_input_embeddings()(ids)
    with embedding_noise(model, 5.0):
        noise = model.get_input_embeddings()(ids) - plain
    assert 0 < noise.abs().max() <= 5.0 / (12 * 32) ** 0.5
    assert torch.equal(model.get_input_embeddings()(ids), plain)

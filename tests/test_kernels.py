"""Other packages' kernels: put in where they fit, counted, refused where they cannot be, and gone after training."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from left_bench import kernels
from left_bench.kernels import float8_products, use_liger
from left_bench.model import NotInForce
from left_bench.paths import is_installed
from left_bench.rules import why_unsupported

ON_CUDA = ["hardware=cuda", "precision=bf16"]


def fake_liger(monkeypatch: pytest.MonkeyPatch, *, of: str) -> dict[str, Any]:
    """A package of that name which replaces the forward pass of modules called `of`; what it was asked."""
    asked: dict[str, Any] = {}
    package = ModuleType("liger_kernel.transformers")

    def forward(self: Any, states: torch.Tensor) -> torch.Tensor:
        return states

    forward.__module__ = "liger_kernel.transformers.rms_norm"

    def apply(*, model: Any, **named: Any) -> None:
        asked.update(named)
        for module in model.modules():
            if type(module).__name__ == of:
                module.forward = forward.__get__(module)

    package._apply_liger_kernel_to_instance = apply
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    return asked


def test_ligers_layers_are_counted_and_its_loss_is_left_out(tiny_cell, load_tiny, monkeypatch):
    model, _ = load_tiny(tiny_cell())
    asked = fake_liger(monkeypatch, of="LlamaRMSNorm")
    assert use_liger(model) == "liger: 5 LlamaRMSNorm"  # two in each of two layers, and the last
    assert asked == {"cross_entropy": False, "fused_linear_cross_entropy": False}


def test_an_architecture_that_liger_leaves_alone_fails_the_cell(tiny_cell, load_tiny, monkeypatch):
    model, _ = load_tiny(tiny_cell())
    fake_liger(monkeypatch, of="NoSuchLayer")
    with pytest.raises(NotInForce, match="none for llama"):
        use_liger(model)


@pytest.mark.skipif(not is_installed("liger_kernel"), reason="liger-kernel is not installed")
def test_the_installed_liger_has_the_function_that_is_called():
    import inspect

    from liger_kernel.transformers import _apply_liger_kernel_to_instance, apply_liger_kernel_to_llama

    assert "model" in inspect.signature(_apply_liger_kernel_to_instance).parameters
    named = inspect.signature(apply_liger_kernel_to_llama).parameters
    assert {"cross_entropy", "fused_linear_cross_entropy", "model"} <= named.keys()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.kernels=liger", "model=tiny_opt"], "no kernels for this architecture"),
        (["training.kernels=liger"], None),
        (["training.float8=true", "peft=lora"], "full fine-tuning"),
        (["training.float8=true", "peft=full", "precision=fp32"], "full fine-tuning"),
        (["training.float8=true", "peft=full", "training.compile=true"], "without torch.compile"),
        (["training.float8=true", "peft=full"], None),
        (["training.attention=flash_attention_2"], None),
        (["training.attention=flash_attention_3"], None),
    ],
)
def test_on_cuda_the_rules_look_at_what_is_combined(overrides, words, tiny_cell, monkeypatch):
    monkeypatch.setattr("left_bench.rules.is_installed", lambda _module: True)
    named = {one.partition("=")[0] for one in overrides}
    reason = why_unsupported(tiny_cell(*(one for one in ON_CUDA if one.partition("=")[0] not in named), *overrides))
    assert reason is None if words is None else words in str(reason)


@pytest.mark.parametrize(
    ("overrides", "package"),
    [
        (["training.kernels=liger"], "liger-kernel"),
        (["training.float8=true", "peft=full"], "torchao"),
        (["training.attention=flash_attention_2"], "flash_attn"),
        (["training.attention=flash_attention_3"], "flash_attn_interface"),
    ],
)
def test_a_package_that_is_not_installed_is_named(overrides, package, tiny_cell, monkeypatch):
    monkeypatch.setattr("left_bench.rules.is_installed", lambda _module: False)
    assert package in str(why_unsupported(tiny_cell(*ON_CUDA, *overrides)))


@pytest.mark.skipif(not is_installed("torchao"), reason="torchao is not installed")
def test_float8_products_train_the_same_weights_and_are_gone_afterwards(tiny_cell, load_tiny):
    model, _ = load_tiny(tiny_cell("peft=full"))
    before = dict(model.named_modules())
    ids = torch.arange(12)[None] + 5
    plain = model(input_ids=ids, labels=ids).loss
    with float8_products(model, emulate=True) as layers:
        assert layers == sum(type(module) is torch.nn.Linear for module in before.values()) - 1  # all but the head
        rounded = model(input_ids=ids, labels=ids).loss
        rounded.backward()
    assert 0 < abs(rounded.item() - plain.item()) < 0.05
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert dict(model.named_modules()) == before
    assert model(input_ids=ids, labels=ids).loss.item() == plain.item()


@pytest.mark.skipif(not is_installed("torchao"), reason="torchao is not installed")
def test_a_card_without_float8_fails_the_cell(monkeypatch):
    fake = SimpleNamespace(get_device_capability=lambda: (8, 0), get_device_name=lambda: "A100")
    monkeypatch.setattr(torch, "cuda", fake)
    with pytest.raises(NotInForce, match="A100 has no float8"), float8_products(torch.nn.Linear(16, 16)):
        pass
    assert kernels.FLOAT8_CAPABILITY == (8, 9)

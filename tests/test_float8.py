"""Products in 8-bit floating point while training, and nothing of it afterwards; rounded, not multiplied, on a CPU."""

from __future__ import annotations

import pytest
import torch
import transformers

from left_bench.core.errors import NotInForce
from left_bench.training import float8

pytest.importorskip("torchao")


@pytest.fixture(scope="module")
def cell(tiny_cell):
    return tiny_cell("training.float8=true", "peft=full", "precision=bf16", "hardware=cuda")


def small(**sizes: int) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config | {"num_attention_heads": 2} | sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # what is rounded then shows in the loss
    return model.bfloat16()


def test_the_layers_round_while_training_and_are_themselves_again(cell):
    model, ids = small(), torch.arange(2, 15)[None]  # 13 tokens: no multiple of 16
    before, linear = model(ids, labels=ids).loss, dict(model.named_modules())
    parameters = dict(model.named_parameters())
    with float8.in_float8(model, cell, emulate=True) as result:
        assert result == {"float8_layers": 2 * 7}
        assert type(model.lm_head) is torch.nn.Linear
        assert {name: id(item) for name, item in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
        inside = model(ids, labels=ids).loss
        inside.backward()
    assert 1e-3 < abs(inside.item() - before.item()) < 0.3
    assert all(parameter.grad.abs().max() > 0 for parameter in parameters.values())
    assert all(module is linear[name] for name, module in model.named_modules())
    assert model(ids, labels=ids).loss.item() == before.item()


def test_layers_that_the_hardware_cannot_take_are_left_out(cell):
    with float8.in_float8(small(intermediate_size=56), cell, emulate=True) as result:
        assert result == {"float8_layers": 2 * 4}  # attention's alone
    with (
        pytest.raises(NotInForce, match="multiples of 16"),
        float8.in_float8(small(hidden_size=24, num_attention_heads=1), cell, emulate=True),
    ):
        pass


def test_without_it_nothing_is_touched(tiny_cell):
    with float8.in_float8(torch.nn.Linear(16, 16), tiny_cell("peft=full", "precision=bf16")) as result:
        assert result == {}


@pytest.mark.parametrize(("capability", "fits"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_a_gpu_without_such_products_is_refused(capability, fits, cell, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    if fits:
        float8.check(cell, device="cuda")
        return
    with pytest.raises(NotInForce, match=r"capability {}\.{}".format(*capability)):
        float8.check(cell, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_cuda_it_multiplies(cell):
    float8.check(cell, device="cuda")
    model, ids = small().to("cuda"), torch.arange(2, 15, device="cuda")[None]
    before = model(ids, labels=ids).loss.item()
    with float8.in_float8(model, cell):
        loss = model(ids, labels=ids).loss
        loss.backward()
    assert 1e-4 < abs(loss.item() - before) < 0.3
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())

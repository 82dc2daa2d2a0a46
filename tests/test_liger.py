"""Liger's loss and kernels against ours. On a CPU they run in Triton's interpreter, which is asked for before Triton is
imported: so these tests run once more in a process of their own."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy
import pytest
import torch
import transformers
from transformers.models.llama import modeling_llama

from left_bench.core.errors import NotInForce, UserError
from left_bench.core.paths import is_installed
from left_bench.data import collate
from left_bench.evaluation.shared_baseline import base_key
from left_bench.grid.rules import LIGER_FAMILIES
from left_bench.methods.attach import attach_adapter
from left_bench.model import liger
from left_bench.training.loss import AnswerLoss

HERE = Path(__file__)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
there = pytest.mark.skipif(not (is_installed("liger_kernel") and is_installed("triton")), reason="no liger-kernel here")
SMALL = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


@pytest.fixture
def kernels(device, monkeypatch):
    """The device, where Liger's kernels run on it."""
    if device == "cpu" and not INTERPRETED:
        pytest.skip("run by test_in_tritons_interpreter")
    if INTERPRETED:
        from triton import language
        from triton.runtime import interpreter

        as_is = interpreter._implicit_cvt

        def convert(argument):
            """Numbers with a point too, which the interpreter hands over as Python's and the compiler as Triton's."""
            if not isinstance(argument, float):
                return as_is(argument)
            number = interpreter.TensorHandle(numpy.array([argument], dtype=numpy.float32), language.float32)
            return language.tensor(number, language.float32)

        monkeypatch.setattr(interpreter, "_implicit_cvt", convert)
        # the device's library of functions is not there
        monkeypatch.setattr("liger_kernel.ops.rms_norm.rsqrt", lambda x: language.math.rsqrt(x))
        monkeypatch.setattr("liger_kernel.ops.cross_entropy.tanh", lambda x: 2 / (1 + language.math.exp(-2 * x)) - 1)
    return device


def model_of(kind: str = "Llama", **more) -> torch.nn.Module:
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{kind}Config")(**SMALL, num_attention_heads=2, **ids, **more)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def close(one: torch.Tensor, other: torch.Tensor, name: str = "") -> None:
    torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4, msg=lambda text: f"{name}: {text}")


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    results = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return results


@there
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is what it runs")
def test_in_tritons_interpreter():
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", "cpu", str(HERE)]
    variables = os.environ | {
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, cwd=HERE.parent.parent)
    if "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip("Triton's interpreter does not know this numpy (triton 3.6: numpy 2.3 goes, 2.5 does not)")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout


@there
@pytest.mark.parametrize("trained", ["all", "all but the head", "the head alone"])
def test_the_loss_and_its_gradients_are_ours(trained, addition_rows, kernels):
    model, batch = model_of().to(kernels), collate(addition_rows, pad_id=0).to(kernels)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained == "all" or (name == "lm_head.weight") == (trained == "the head alone"))
    ours, theirs = AnswerLoss(model), AnswerLoss(model, by_liger=True)
    assert (theirs.output_head, theirs.output_head_fallback) == ("liger", None)
    results = []
    for loss in (ours, theirs):
        summed = loss.summed(batch, gain=0.25)
        summed.backward()
        results.append((summed, gradients_of(model)))
    (wanted, wanted_gradients), (got, gradients) = results
    close(got, wanted)
    assert gradients.keys() == wanted_gradients.keys() and gradients
    for name, gradient in gradients.items():
        assert wanted_gradients[name].abs().max() > 0
        close(gradient, wanted_gradients[name], name)


@there
def test_soft_capped_logits_too(addition_rows, kernels):
    model = model_of("Gemma2", num_key_value_heads=1, head_dim=16, final_logit_softcapping=3.0).to(kernels)
    batch = collate(addition_rows, pad_id=0).to(kernels)
    theirs = AnswerLoss(model, by_liger=True)
    assert theirs.output_head == "liger"
    close(theirs.summed(batch), AnswerLoss(model).summed(batch))


@pytest.fixture
def llama_restored(monkeypatch):
    """What Liger puts in place of transformers' own is the whole process's."""
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))


@there
def test_replaced_layers_compute_the_same(addition_rows, kernels, llama_restored):
    model, batch = model_of().to(kernels), collate(addition_rows[:2], pad_id=0).to(kernels)
    before = AnswerLoss(model).summed(batch)
    before.backward()
    wanted = gradients_of(model)
    assert liger.replace_layers(model) == "liger: 5 LigerRMSNorm, 2 LigerSwiGLUMLP, rotary positions"
    after = AnswerLoss(model).summed(batch)
    after.backward()
    close(after, before)
    result = gradients_of(model)
    assert result.keys() == wanted.keys()
    for name, gradient in result.items():
        close(gradient, wanted[name], name)


@there
@pytest.mark.parametrize("quantization", ["none", "nf4", "nf5"])
def test_replaced_layers_take_an_adapter_over_quantized_weights(
    quantization, tiny_cell, load_tiny, addition_rows, kernels, llama_restored
):
    cell = tiny_cell("peft=lora", f"quantization={quantization}")
    batch = collate(addition_rows[:2], pad_id=0).to(kernels)
    losses = []
    for chosen in (cell, tiny_cell("peft=lora", f"quantization={quantization}", "training.kernels=liger")):
        model, tokenizer = load_tiny(chosen)
        model = attach_adapter(model, cell, tokenizer=tokenizer, rows=addition_rows).to(kernels).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
        losses.append(AnswerLoss(model).summed(batch))
        losses[-1].backward()
        assert all(gradient.abs().max() > 0 for gradient in gradients_of(model).values())
    assert {module._get_name() for module in model.modules()} >= {"LigerRMSNorm", "LigerSwiGLUMLP"}
    close(*losses)


@there
def test_a_cell_says_what_ran(tiny_cell, work_in_process, kernels, llama_restored):
    cheap = ["training.steps=1", "training.batch_size=1", "data.train_rows=1", "data.test_rows=1"]
    cheap += ["eval.generate=false", f"hardware={kernels}"]
    options = ["training.kernels=liger", "training.output_head=liger"]
    result = work_in_process(tiny_cell("peft=full", *cheap, *options))
    effective = result["environment"]["effective"]
    assert effective["output_head"] == "liger" and "output_head_fallback" not in effective
    assert effective["kernels"] == "liger: 5 LigerRMSNorm, 2 LigerSwiGLUMLP, rotary positions"
    assert result["metrics"]["train_steps"] == 1


@there
def test_what_liger_does_not_know_is_not_taken_for_replaced():
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL, num_attention_heads=2))
    with pytest.raises(NotInForce, match="no gpt_neox models"):
        liger.replace_layers(model)


@there
def test_the_package_is_as_we_take_it():
    from liger_kernel.transformers import _apply_liger_kernel_to_instance, functional
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    assert MODEL_TYPE_TO_APPLY_LIGER_FN.keys() >= LIGER_FAMILIES
    taken = inspect.signature(functional.liger_fused_linear_cross_entropy).parameters
    assert inspect.signature(fused).parameters.keys() <= taken.keys()
    inspect.signature(_apply_liger_kernel_to_instance).bind(model=None, fused_linear_cross_entropy=False)


# --- without the package ---


def fused(input, weight, target, bias=None, reduction="mean", softcap=None, accum_dtype=None):
    """Those of `liger_fused_linear_cross_entropy`'s arguments that we give, in plain products."""
    logits = torch.nn.functional.linear(input, weight, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return torch.nn.functional.cross_entropy(logits.float(), target, reduction=reduction)


@pytest.fixture
def faked(monkeypatch):
    functional = types.ModuleType("liger_kernel.transformers.functional")
    functional.liger_fused_linear_cross_entropy = fused
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, functional.__name__, functional)


CAPPED = {"num_key_value_heads": 1, "head_dim": 16, "final_logit_softcapping": 3.0}


@pytest.mark.parametrize(("kind", "more"), [("Llama", {}), ("Gemma2", CAPPED), ("Phi", {})], ids=["", "cap", "bias"])
def test_liger_is_given_the_whole_head(kind, more, addition_rows, faked):
    model, batch = model_of(kind, **more), collate(addition_rows, pad_id=0)
    results = []
    for loss in (AnswerLoss(model), AnswerLoss(model, by_liger=True)):
        summed = loss.summed(batch, gain=0.25)
        summed.backward()
        results.append((summed, gradients_of(model)))
    assert loss.output_head == "liger"
    close(results[1][0], results[0][0])
    assert results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[1][1].items():
        close(gradient, results[0][1][name], name)


def test_evaluation_and_preferences_stay_with_our_own(addition_rows, monkeypatch):
    def refuse(*_args, **_named):
        raise AssertionError("asked")

    monkeypatch.setattr(liger, "summed_loss", refuse)
    model, batch = model_of(), collate(addition_rows, pad_id=0)
    ours, theirs = AnswerLoss(model), AnswerLoss(model, by_liger=True)
    assert torch.equal(theirs.of_tokens(batch), ours.of_tokens(batch))
    assert torch.equal(theirs.of_rows(batch, torch.sum), ours.of_rows(batch, torch.sum))
    with pytest.raises(AssertionError, match="asked"):
        theirs.through(model).summed(batch)


@pytest.mark.parametrize(
    ("kind", "more", "words"),
    [
        ("Granite", {"num_key_value_heads": 1, "logits_scaling": 3.0}, "factor"),
        ("Cohere", {"num_key_value_heads": 1, "logit_scale": 0.2}, "factor"),
    ],
)
def test_a_head_that_liger_cannot_run_falls_back(kind, more, words, addition_rows):
    model, batch = model_of(kind, **more), collate(addition_rows, pad_id=0)
    loss = AnswerLoss(model, by_liger=True)
    assert loss.output_head == "labelled positions, in chunks"
    assert words in loss.output_head_fallback
    assert torch.equal(loss.summed(batch), AnswerLoss(model).summed(batch))


@pytest.mark.parametrize("trained", ["peft.config.target_modules=[lm_head]", "++peft.config.modules_to_save=[lm_head]"])
def test_a_head_with_an_adapter_falls_back(trained, tiny_cell, load_tiny, addition_rows):
    cell = tiny_cell("peft=lora", trained)
    model, tokenizer = load_tiny(cell)
    model = attach_adapter(model, cell, tokenizer=tokenizer, rows=addition_rows)
    assert "no plain matrix but peft." in AnswerLoss(model, by_liger=True).output_head_fallback
    assert AnswerLoss(model, by_liger=True, in_chunks=False).output_head_fallback.startswith(
        "the head is not run apart"
    )


@pytest.mark.parametrize("option", ["kernels", "output_head"])
def test_a_forced_cell_is_told_what_is_missing(option, tiny_cell, monkeypatch):
    cell = tiny_cell(f"training.{option}=liger")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(liger, "is_installed", lambda module: True)
    liger.check(cell, device="cuda")
    with pytest.raises(NotInForce, match="do not run on cpu"):
        liger.check(cell, device="cpu")
    monkeypatch.setattr(liger, "is_installed", lambda module: False)
    with pytest.raises(UserError, match=rf"training\.{option}=liger .*left-bench\[liger\]"):
        liger.check(cell, device="cuda")
    liger.check(tiny_cell(), device="cpu")


def test_base_scores_are_shared_where_they_are_the_same(tiny_cell, addition_rows):
    rows = [types.SimpleNamespace(identity=row.reference) for row in addition_rows]
    plain, head, kernels = (
        base_key(tiny_cell(*option), rows)
        for option in ([], ["training.output_head=liger"], ["training.kernels=liger"])
    )
    assert plain == head != kernels

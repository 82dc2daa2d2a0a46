"""Each rule in both directions: what it refuses really does not run, and its nearest neighbour does."""

from __future__ import annotations

import pytest
import torch

from left_bench.isolate import run_isolated
from left_bench.rules import EXTRAS, RULES, _installed, model_type, why_unsupported

BF16 = ["precision=bf16"]
CHEAP = ["training.steps=2", "eval.generate=false", "eval.check_reload=false"]

# what is refused; words of the reason; the nearest neighbour that is not
PAIRS: list[tuple[list[str], str, list[str]]] = [
    (["peft=full", "quantization=nf4"], "full fine-tuning", ["peft=full"]),
    (["peft=full", "quantization=int8"], "full fine-tuning", ["peft=lora", "quantization=int8"]),
    (["precision=tf32"], "TF32", ["precision=fp32"]),
    (["peft=llama_adapter", "model=tiny_neox"], "LLaMA-Adapter", ["peft=llama_adapter"]),
    (["optimizer=paged_adamw_8bit"], "paged", ["optimizer=adamw_8bit"]),
    (["training.attention=flash_attention_2"], "FlashAttention", ["training.attention=sdpa"]),
    (["peft=dora", "quantization=int8", *BF16], "DoRA", ["peft=dora", "quantization=nf4", *BF16]),
    (["peft=dora", "quantization=int8"], "DoRA", ["peft=dora"]),
    (["peft=pissa", "quantization=nf4"], "floating-point weights", ["peft=pissa"]),
    (["peft=delora", "quantization=nf4"], "floating-point weights", ["peft=delora"]),
    (["peft=loha", "quantization=nf4"], "packed 4-bit", ["peft=loha", "quantization=int8"]),
    (["peft=lokr", "quantization=nf4"], "packed 4-bit", ["peft=lokr"]),
    (["peft=ia3", "quantization=nf4", *BF16], "dtypes", ["peft=ia3", "quantization=nf4", "precision=bf16_mixed"]),
    (
        ["peft=layer_freeze", "quantization=nf4", "peft.config.last_layers=1"],
        "whole layers",
        ["peft=layer_freeze", "peft.config.last_layers=1"],
    ),
    (["peft=bitfit"], "BitFit", ["peft=bitfit", "model=tiny_neox"]),
]
# refused not because they fail but because they would do something else without a word
SILENT = [
    (["peft=hra", "quantization=nf4"], ["peft=hra"]),
    (["peft=deft", "quantization=nf4"], ["peft=deft"]),
]
# needing hardware or packages this machine may lack: only asked
ASKED = [
    (["quantization=gptq"], "CUDA"),
    (["peft=loftq"], "LoftQ"),
    (["quantization=hqq_4"], "hqq|HQQ"),
]


def names(pair: tuple) -> str:
    return "+".join(pair[0])


@pytest.mark.parametrize(("refused", "words", "allowed"), PAIRS, ids=map(names, PAIRS))
def test_a_refused_cell_fails_when_it_is_forced(refused, words, allowed, tiny_cell, work_in_process):
    cell = tiny_cell(*CHEAP, *refused)
    reason = why_unsupported(cell)
    assert reason is not None
    assert words in reason
    with pytest.raises(Exception):  # noqa: B017 - whatever torch, peft or bitsandbytes say; the next test runs the neighbour
        work_in_process(cell)


@pytest.mark.parametrize("allowed", [pair[2] for pair in PAIRS] + [pair[1] for pair in SILENT], ids="+".join)
def test_the_nearest_neighbour_runs(allowed, tiny_cell, work_in_process):
    cell = tiny_cell(*CHEAP, *allowed)
    assert why_unsupported(cell) is None
    found = work_in_process(cell)
    assert found["metrics"]["train_steps"] == 2


@pytest.mark.parametrize(("refused", "allowed"), SILENT, ids=map(names, SILENT))
def test_what_would_go_wrong_silently_is_refused(refused, allowed, tiny_cell):
    assert "silently" in str(why_unsupported(tiny_cell(*refused)))
    assert why_unsupported(tiny_cell(*allowed)) is None


@pytest.mark.parametrize(("refused", "words"), ASKED, ids=map(names, ASKED))
def test_what_this_machine_lacks(refused, words, tiny_cell):
    if torch.cuda.is_available():
        pytest.skip("this machine has it")
    assert any(word in str(why_unsupported(tiny_cell(*refused))) for word in words.split("|"))


@pytest.mark.parametrize(
    "overrides", [["hardware=cuda", "precision=tf32"], ["hardware=cuda", "optimizer=paged_adamw_8bit"]]
)
def test_rules_of_the_cpu_do_not_bind_cuda(overrides, tiny_cell):
    assert why_unsupported(tiny_cell(*overrides)) is None


def test_every_reason_is_one_line_and_every_rule_a_tuple():
    for refuses, reason in RULES:
        assert callable(refuses)
        assert "\n" not in reason
        assert 20 < len(reason) < 200


@pytest.mark.parametrize(("target", "module", "extra"), EXTRAS)
def test_a_missing_package_names_its_extra(target, module, extra, tiny_cell, monkeypatch):
    option = {
        "torchao": "optimizer._target_",
        "galore_torch": "optimizer._target_",
        "apollo_torch": "optimizer._target_",
    }
    key = option.get(module, "quantization._target_") if target.endswith(".") else "quantization._target_"
    name = target + "X" if target.endswith(".") else target
    cell = tiny_cell(f"{key}={name}", "quantization.config={}", "optimizer.config={}", "optimizer.matrices={}")
    monkeypatch.setattr("left_bench.rules._installed", lambda asked: asked != module)
    assert f"left-bench[{extra}]" in str(why_unsupported(cell))


def test_installed():
    assert _installed("json")
    assert not _installed("no_such_package")
    assert not _installed("no_such_package.inside")


def test_the_family_is_read_from_a_local_folder(compose_cell, tmp_path):
    cell = compose_cell(f"model.name_or_path={tmp_path}")
    assert model_type(cell) is None
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox"}')
    assert model_type(cell) == "gpt_neox"
    refused = compose_cell(f"model.name_or_path={tmp_path}", "peft=llama_adapter")
    assert "LLaMA-Adapter" in str(why_unsupported(refused))


def test_the_family_of_a_hub_model_is_not_known_and_not_refused(compose_cell):
    cell = compose_cell("model.name_or_path=someone/some-model", "peft=llama_adapter")
    assert model_type(cell) is None
    assert why_unsupported(cell) is None


def test_a_forced_cell_leaves_a_record(tiny_cell, tmp_path):
    record = run_isolated(tiny_cell(*CHEAP, "peft=full", "quantization=nf4"), tmp_path, on_event=lambda event: None)
    assert record.status == "failed"
    assert "gradient" in str(record.reason) or "grad" in record.provenance["log_tail"]

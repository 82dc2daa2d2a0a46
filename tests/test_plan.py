"""`left-bench plan`: predicted bytes beside what runs really hold, here and in the committed records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from left_bench.cli.plan import BESIDE_TENSORS_BYTES, NOT_KNOWN, verdict
from left_bench.core.paths import is_installed
from left_bench.grid.compose import compose
from left_bench.plan import predict as predicting
from left_bench.plan.predict import Pass, Plan, largest_pass, predict
from left_bench.spec.cell import Cell

ROOT = Path(__file__).resolve().parents[1]
RECORDS = Path(__file__).parent.parent / "reports" / "records"
PARTS = ("weights", "adapter", "gradients", "optimizer")
NEEDS = {"hqq": "hqq", "quanto": "optimum.quanto", "torchao": "torchao"}
FORMATS = (
    *("nf4", "nf4_dq", "fp4", "int8", "nf5", "nf5_dq", "int5"),
    *("hqq_2", "hqq_3", "hqq_4", "quanto_int4", "quanto_int8", "torchao_int8"),
)


@pytest.mark.parametrize("name", FORMATS)
def test_a_formats_bytes_are_those_that_its_library_stores(name, tiny_cell, load_tiny):
    from left_bench.model.load import base_metrics

    module = NEEDS.get(name.partition("_")[0])
    if module is not None and not is_installed(module):
        pytest.skip("not installed")
    cell = tiny_cell(f"quantization={name}", "precision=bf16")
    model, _ = load_tiny(cell)
    stored = base_metrics(model)["weights_bytes"]  # HQQ's way into transformers leaves two rotary tables in one
    assert predict(cell).parts["weights"] == pytest.approx(stored, abs=32 if name.startswith("hqq") else 0)


@pytest.mark.parametrize(
    "overrides",
    [
        ["peft=lora"],
        ["peft=dora", "quantization=nf4"],
        ["peft=full", "precision=bf16"],
        ["peft=full", "optimizer=adamw_8bit"],
        ["peft=ln_tuning", "precision=bf16", "optimizer=sgd"],
        ["peft=prefix_tuning", "optimizer=lion"],
        ["peft=pissa", "training.gradient_accumulation=2"],
        ["peft=lora", "optimizer=adafactor", "training.activation_checkpointing=true"],
    ],
    ids=" ".join,
)
def test_the_parts_are_those_of_a_run(overrides, tiny_cell, work_in_process):
    cell = tiny_cell(*overrides)
    plan, measured = predict(cell), work_in_process(cell)
    assert plan.unknown == []
    assert {part: plan.parts.get(part) for part in PARTS} == {
        part: measured["memory_breakdown"].get(part) for part in PARTS
    }
    assert plan.trainable_params == measured["metrics"]["trainable_params"]
    assert plan.total_params == measured["metrics"]["total_params"]


@pytest.mark.parametrize("kind", ["none-lora-bf16", "nf4_dq-lora-bf16", "none-full-bf16"])
def test_committed_records_beside_their_plans(kind, monkeypatch):
    """The default model's parts to the byte, and its peak to within what docs/plan.md says of the CPU."""
    # what `largest_pass` finds where the default model's tokenizer is at hand, which tests must not count on
    monkeypatch.setattr(predicting, "largest_pass", lambda cell: Pass(8, 42, 30, measured=True))
    paths = sorted(RECORDS.glob(f"smollm2_135m-{kind}-chain_sum-s0-*/record.json"))
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    record = next(one for one in records if one["config"]["training"]["name"] == "default")
    plan = predict(Cell.from_config(record["config"], choices=record["choices"]))
    for part in PARTS:
        assert plan.parts.get(part) == record["memory_breakdown"].get(part), part
    beside = record["metrics"]["peak_memory_bytes"] - plan.peak_bytes
    assert 150 * 2**20 < beside < BESIDE_TENSORS_BYTES["cpu"]


def test_a_peak_follows_its_causes(tiny_cell):
    def beyond(*overrides: str) -> int:
        return predict(tiny_cell("peft=lora", "training.batch_size=8", *overrides)).parts["activations_and_workspace"]

    plain = beyond()
    assert beyond("training.activation_checkpointing=true") < plain
    assert beyond("training.batch_size=4") < plain
    assert beyond("precision=bf16_mixed") < plain  # what is kept for the backward pass is half as wide
    assert beyond("training.output_head=all") > plain  # all the logits at once


def test_a_plan_has_the_chunks_of_its_device(tiny_cell):
    def beyond(*hardware: str) -> int:
        wide = ["peft=lora", "training.batch_size=64", "data.train_rows=64", "model.config.vocab_size=65536"]
        return predict(tiny_cell(*wide, *hardware)).parts["activations_and_workspace"]

    # 128 tokens' logits at a time on a CPU; on a GPU 512
    assert beyond("hardware=cuda") > beyond("hardware=cpu") + 2**24


def test_rows_that_are_not_here_are_taken_at_their_longest(tiny_cell):
    cell = tiny_cell("data=gsm8k", "training.batch_size=4", "training.max_length=64")
    assert predict(cell).largest == Pass(rows=4, length=64, answer_tokens=4 * 64, measured=False)


def test_what_cannot_be_predicted_is_said(tiny_cell):
    plan = predict(tiny_cell("peft=lora", "quantization=gptq", "hardware=cuda"))
    assert "weights" not in plan.parts and plan.peak_bytes is None
    assert any("gptq" in line for line in plan.unknown)


def test_a_verdict_knows_what_it_does_not_know():
    whole = dict.fromkeys((*PARTS, "activations_and_workspace"), 100 * 2**20)
    plan = Plan(Pass(1, 1, 1, measured=True), parts=whole)
    assert verdict(plan, 2**30 * 2, device="cpu") == "yes"
    assert verdict(plan, 2**20 * 600, device="cpu") == "perhaps"
    assert verdict(plan, 2**20 * 400, device="cpu") == "no"
    assert verdict(plan, None, device="cpu") == "?"
    del plan.parts["optimizer"]
    assert verdict(plan, 2**30 * 2, device="cpu") == "?"
    assert verdict(plan, 2**20 * 300, device="cpu") == "no"  # what is known is too much already


def test_a_sweep_is_planned_and_nothing_is_run(left_bench, tmp_path):
    runs = tmp_path / "runs"
    answer = left_bench(
        *("plan", "-m", "model=tiny_llama", "peft=lora,full", "quantization=none,nf4", "seed=0,1"),
        *(f"runs_dir={runs}", "training.max_length=64", "hardware.memory_limit=1MiB"),
    )
    assert answer.code == 1  # something does not fit
    assert "lora nf4" in answer.out.replace("nf4 lora", "lora nf4") and "unsupported" in answer.out
    assert " no" in answer.out and "largest pass: 8 rows" in answer.out
    assert not runs.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["peft=lroa"], "unknown peft 'lroa'"),
        (["nonsense"], "'nonsense' is no override"),
        (["training.steps=0"], "training.steps=0"),
        (["peft=lora,full"], "add -m"),
        (["--out=x"], "--out: no such option"),
        (["model.name_or_path=no-such-org/nothing"], "model.name_or_path=no-such-org/nothing cannot be loaded"),
    ],
)
def test_a_wrong_plan_is_one_line(arguments, words, left_bench, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the variable was read at its import
    answer = left_bench("plan", *arguments)
    assert answer.code == 2
    assert words in answer.err and len(answer.err.splitlines()) == 1


def test_packed_rows_are_planned_end_to_end(tiny_cell):
    padded = largest_pass(tiny_cell())
    packed = largest_pass(tiny_cell("training.batching=packed"))
    assert (packed.rows, packed.packed) == (1, True)
    assert padded.rows > 1 and not padded.packed
    assert packed.length <= padded.rows * padded.length


def test_what_cuda_widens_is_planned_wider_than_on_a_cpu():
    """Layer norms under autocast give float32 on CUDA, and bfloat16 on a CPU: torch's lists differ."""
    from left_bench.plan.predict import _as_on

    states = torch.randn(2, 8, dtype=torch.bfloat16)
    for device, expected in {"cpu": torch.bfloat16, "cuda": torch.float32}.items():
        with _as_on(device, autocasting=True):
            assert torch.nn.functional.layer_norm(states, (8,)).dtype == expected
    with _as_on("cuda", autocasting=False):
        assert torch.nn.functional.layer_norm(states, (8,)).dtype == torch.bfloat16


def test_a_folder_of_ones_own_options_is_planned_too(left_bench, tmp_path):
    (tmp_path / "own" / "model").mkdir(parents=True)
    own = (ROOT / "conf/model/tiny_llama.yaml").read_text(encoding="utf-8").replace("tiny_llama", "mine")
    (tmp_path / "own" / "model" / "mine.yaml").write_text(own, encoding="utf-8")
    answer = left_bench("plan", "--config-dir", str(tmp_path / "own"), "model=mine", "hardware=cpu")
    assert answer.code == 0, answer.err
    assert " yes" in answer.out


def test_a_mistyped_layer_is_a_mistake_and_no_limit_of_planning(left_bench):
    answer = left_bench("plan", "model=tiny_llama", "hardware=cpu", "peft.config.target_modules=[q_porj]")
    assert answer.code == 2
    assert "did you mean 'q_proj'" in answer.err


def test_what_does_not_go_together_is_planned_as_a_row(left_bench):
    methods = ["-m", "peft=lora,prefix_tuning", "training=checkpointing"]
    answer = left_bench("plan", "model=tiny_llama", "hardware=cpu", *methods)
    assert answer.code == 0
    assert "unsupported" in answer.out and "gradient checkpointing" in answer.out and " yes" in answer.out


def test_what_cannot_be_predicted_has_an_exit_code_of_its_own(left_bench):
    answer = left_bench("plan", "model=tiny_llama", "hardware=cuda", "quantization=gptq", "hardware.memory_limit=1GiB")
    assert answer.code == NOT_KNOWN


def test_paged_states_are_planned_without_a_gpu_and_beside_the_peak(tiny_cell):
    large = ["peft=full", "hardware=cuda", "model.config.vocab_size=2048"]  # 2048 x 64 weights are enough to be paged
    plain = predict(tiny_cell(*large, "optimizer=adamw_8bit"))
    paged = predict(tiny_cell(*large, "optimizer=paged_adamw_8bit"))
    assert paged.parts["optimizer"] + paged.paged_optimizer_bytes == plain.parts["optimizer"]
    assert paged.paged_optimizer_bytes >= 2 * 2 * 2048 * 64  # two states of a byte, for embedding and head
    few = predict(tiny_cell("peft=lora", "hardware=cuda", "optimizer=paged_adamw_8bit"))
    assert few.paged_optimizer_bytes == 0 < few.parts["optimizer"]


def test_a_whole_architecture_takes_the_place_of_the_options_own(composed):
    whole = "model.config={model_type:gpt_neox,vocab_size:512,hidden_size:64,num_hidden_layers:2}"
    config = composed("model=tiny_llama", whole, "model.config.num_hidden_layers=3")
    cell, _ = compose(config, config.hydra)
    assert cell.model.config == {"model_type": "gpt_neox", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 3}

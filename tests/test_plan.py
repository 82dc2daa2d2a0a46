"""`left-bench plan`: predicted bytes beside what runs really hold, here and in the committed records."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import BOFTConfig, get_peft_model
from recorded.committed import committed_runs
from test_train import SMALLER
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from left_bench.cli.plan_tables import NOT_KNOWN, on_card
from left_bench.core.paths import config_root, is_installed
from left_bench.grid.compose import compose
from left_bench.grid.rules import why_unsupported
from left_bench.launch.progress import still_at_work
from left_bench.measure.meter import stored_bytes
from left_bench.measure.method_buffers import frozen_tensors, modules_of
from left_bench.methods.attach import after_optimizer_step, attach_adapter, trainable_parameters
from left_bench.plan import predict as predicting
from left_bench.plan.follow import Storages
from left_bench.plan.peak import measured_range, verdict
from left_bench.plan.predict import Known, largest_pass, predict
from left_bench.plan.result import Pass, Plan
from left_bench.plan.shapes import model_of_shapes
from left_bench.processes.ranks import ALONE
from left_bench.spec.cell import Cell
from left_bench.spec.events import NullEventWriter
from left_bench.worker import stages

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("weights", "adapter", "adapter_frozen", "gradients", "optimizer")
RECORDED_WEIGHTS = ("none", "fp4", "nf4", "nf4_dq", "nf5", "int5", "int8")
METHODS = sorted(path.stem for path in (config_root() / "conf" / "peft").glob("*.yaml"))
NEEDS = {"hqq": "hqq", "quanto": "optimum.quanto", "torchao": "torchao"}
FORMATS = (
    *("nf4", "nf4_dq", "fp4", "int8", "nf5", "nf5_dq", "int5"),
    *("hqq_2", "hqq_3", "hqq_4", "quanto_int4", "quanto_int8", "torchao_int8"),
)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """`trained(cell)`: what is measured of a run up to the end of its training; nothing is scored, saved or merged."""
    monkeypatch.setattr("left_bench.evaluation.shared_baseline.shared_peak", lambda *_, **__: None)  # takes seconds
    monkeypatch.setattr("left_bench.measure.device._give_back_freed_memory", lambda: None)  # and so does this

    def trained(cell):
        result = {"provenance": {}}
        events = NullEventWriter(tmp_path / "events.jsonl")
        run = stages.begin(cell, run_dir=tmp_path, draft=result, events=events, exceeded=pytest.fail, team=ALONE)
        stages.train(run, stages.attach_method(run, stages.load_base(run)))
        return result

    return trained


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
        ["peft=vera", "peft.config.r=8", "quantization=nf4", "precision=bf16"],
    ],
    ids=" ".join,
)
def test_the_parts_are_those_of_a_run(overrides, tiny_cell, trained):
    assert_as_in_a_run(tiny_cell(*overrides), trained)


@pytest.mark.parametrize("name", METHODS)
def test_every_methods_parts_are_those_of_a_run(name, tiny_cell, trained):
    """What it trains and what it holds frozen, to the byte, however it starts: from shapes, numbers or rows."""
    cell = tiny_cell(f"peft={name}", *SMALLER.get(name, []), "training.steps=10", "precision=bf16")
    refusal = why_unsupported(cell)
    if refusal is not None:
        pytest.skip(refusal)
    assert_as_in_a_run(cell, trained)


NIGHTLY = ("dora", "randlora", "fourierft", "shira", "waveft", "unilora", "boft", "full")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("lora", "adalora", "vera", "prompt_tuning"),
        *(pytest.param(name, marks=pytest.mark.nightly) for name in NIGHTLY),
    ],
)
def test_the_default_models_parts_are_those_of_a_run(name, compose_cell, work_in_process):
    quick = ["eval.generate=false", "eval.rows=2", "eval.forgetting=false", "hardware=cpu", "tracker=none"]
    few = ["training.steps=10", "training.batch_size=1", "precision=bf16"]
    assert_as_in_a_run(compose_cell(f"peft={name}", *quick, *few), work_in_process)


def assert_as_in_a_run(cell, trained):
    plan, measured = predict(cell), trained(cell)
    assert plan.unknown == []
    assert {part: plan.parts.get(part) for part in PARTS} == {
        part: measured["memory_breakdown"].get(part) for part in PARTS
    }
    assert plan.trainable_params == measured["metrics"]["trainable_params"]
    assert plan.total_params == measured["metrics"]["total_params"]
    assert plan.parts["activations_and_workspace"] > 0


@pytest.mark.parametrize("name", ["vera", "adalora", "shira", "fourierft"])
def test_what_a_method_holds_frozen_is_neither_the_base_models_nor_trained(name, tiny_cell, load_tiny, addition_rows):
    cell = tiny_cell(f"peft={name}", *SMALLER.get(name, []), "training.steps=10")
    model, tokenizer = load_tiny(cell)
    base, weights = modules_of(model), list(model.parameters())
    adapted = attach_adapter(model, cell, tokenizer=tokenizer, rows=addition_rows)
    own = {tensor.data_ptr() for tensor in [*weights, *trainable_parameters(adapted)]}
    result = frozen_tensors(adapted, base=base)
    assert not own & {tensor.data_ptr() for tensor in result}
    if name == "adalora":
        assert stored_bytes(result) < 100  # ranks alone; the scores of importance come with the first step
        for parameter in trainable_parameters(adapted):
            parameter.grad = torch.ones_like(parameter)
        after_optimizer_step(adapted, 0)
        trained = stored_bytes(trainable_parameters(adapted))
        assert stored_bytes(frozen_tensors(adapted, base=base)) == stored_bytes(result) + 3 * trained
    else:
        assert stored_bytes(result) > 0


def test_methods_that_ask_for_numbers_are_told_the_ordinary_case():
    """Without numbers: no bound is passed, a mask may choose everything, no layer is dropped, entries stay."""
    with FakeTensorMode(allow_non_fake_inputs=True), Storages() as storages:
        storages.answering = True
        values = torch.empty(6)
        assert not values.isinf().any()
        assert torch.rand(1) > 0.5
        assert (values > 0).nonzero().shape == (6, 1)
        assert values[values > 0].shape == (6,)
        sparse = torch.sparse_coo_tensor(torch.zeros((2, 3), dtype=torch.long), torch.empty(3), (4, 4))
        assert sparse.coalesce()._nnz() == 3
        storages.answering = False
        with pytest.raises(DataDependentOutputException):
            bool(values.isinf().any())


@pytest.fixture(scope="module")
def known():
    """What was followed for one quantization is not followed again for the others."""
    return Known()


def committed(kind: str) -> list[dict]:
    """The default model's committed records, ok and with the default training."""
    records = [run.record for run in committed_runs()]
    named = [record for record in records if record.cell_id.startswith(f"smollm2_135m-{kind}-bf16-chain_sum-s")]
    return [item.model_dump() for item in named if item.status == "ok" and item.config["training"]["name"] == "default"]


@pytest.mark.parametrize("kind", [*(f"{name}-lora" for name in RECORDED_WEIGHTS), "nf4_dq-ln_tuning", "none-full"])
def test_committed_records_beside_their_plans(kind, monkeypatch, known):
    """Their parts to the byte, and every measured peak within what the plan says a run will measure."""
    # what `largest_pass` finds where the default model's tokenizer is at hand, which tests must not count on
    monkeypatch.setattr(predicting, "largest_pass", lambda cell: Pass(8, 42, 30, measured=True))
    records = committed(kind)
    assert len(records) >= 3
    for record in records:
        cell = Cell.from_config(record["config"], choices=record["choices"])
        plan = predict(cell, known=known)
        for part in PARTS:
            assert plan.parts.get(part) == record["memory_breakdown"].get(part), part
        least, most = measured_range(plan, cell)
        assert plan.peak_bytes < least <= record["metrics"]["peak_memory_bytes"] <= most


@pytest.mark.slow
@pytest.mark.nightly
def test_every_committed_record_lies_within_its_plan():
    """The whole of `benchmarks/planned.py`, which wants the default model's files."""
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks/planned.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


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


def test_a_verdict_knows_what_it_does_not_know(tiny_cell):
    whole = dict.fromkeys(("weights", "adapter", "gradients", "optimizer", "activations_and_workspace"), 100 * 2**20)
    plan, cell = Plan(Pass(1, 1, 1, measured=True), parts=whole), tiny_cell()
    assert verdict(plan, 2**30 * 2, cell=cell) == "yes"
    assert verdict(plan, 2**20 * 550, cell=cell) == "perhaps"
    assert verdict(plan, 2**20 * 400, cell=cell) == "no"
    assert verdict(plan, None, cell=cell) == "?"
    del plan.parts["optimizer"]
    assert verdict(plan, 2**30 * 2, cell=cell) == "?"
    assert verdict(plan, 2**20 * 300, cell=cell) == "no"  # what is known is too much already


def test_cards_are_told_in_a_word_each_with_what_is_left(tiny_cell):
    parts = dict.fromkeys(("weights", "gradients", "optimizer", "activations_and_workspace"), 4 * 2**30)
    plan, cell = Plan(Pass(1, 1, 1, measured=True), parts=parts), tiny_cell("hardware=cuda")
    assert on_card(plan, cell, gb=12) == "no, 4.82 GiB short"  # 16 GiB against 12 milliard bytes
    assert on_card(plan, cell, gb=17.2) == "perhaps"
    word, _, left = on_card(plan, cell, gb=24).partition(" +")
    assert (word, left[-4:]) == ("yes", " GiB") and 4 < float(left[:-4]) < 6
    assert on_card(Plan(plan.largest, parts={"weights": 2**30}), cell, gb=24) == "?"


def test_a_plan_as_json_csv_and_cards(left_bench):
    tiny = ["plan", "-m", "model=tiny_llama", "peft=lora,prefix_tuning", "training.max_length=64"]
    rows = json.loads(left_bench(*tiny, "--json", "hardware=cpu").out)
    assert [row["name"] for row in rows] == ["lora", "prefix_tuning"]
    assert rows[0]["peak_bytes"] < rows[0]["measured_least_bytes"] < rows[0]["measured_most_bytes"]
    assert rows[0]["trainable_params"] == 32768 and rows[0]["fits"] == "yes"
    table = list(csv.DictReader(io.StringIO(left_bench(*tiny, "--csv", "hardware=cpu").out)))
    assert [row["peak_bytes"] for row in table] == [str(row["peak_bytes"]) for row in rows]
    cards = left_bench(*tiny, "--cards=8,24")
    assert cards.code == 0
    assert "24 GB" in cards.out and cards.out.count("yes +") == 5  # two methods, two cards, and the line that explains


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
        (["--cards=large"], "--cards=large: sizes are numbers of GB"),
        (["--json", "--csv"], "--json and --csv at once"),
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
    from left_bench.plan.follow import as_on

    states = torch.randn(2, 8, dtype=torch.bfloat16)
    for device, expected in {"cpu": torch.bfloat16, "cuda": torch.float32}.items():
        with as_on(device, autocasting=True):
            assert torch.nn.functional.layer_norm(states, (8,)).dtype == expected
    with as_on("cuda", autocasting=False):
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


def test_what_peft_leaves_on_the_host_is_no_part_of_an_accelerators_memory(tiny_cell):
    """BOFT's permutations: made on the host, and copied to the device in every pass."""
    model = model_of_shapes(tiny_cell())
    adapted = get_peft_model(model, BOFTConfig(boft_block_size=4, target_modules=["q_proj"]))
    layer = next(module for module in adapted.modules() if hasattr(module, "boft_P"))
    assert (layer.boft_P.device.type, layer.boft_R["default"].device.type) == ("cpu", "meta")
    here, there = (predict(tiny_cell("peft=boft", f"hardware={device}")) for device in ("cpu", "cuda"))
    assert here.parts["adapter_frozen"] > 0 and "adapter_frozen" not in there.parts
    assert here.parts["adapter"] == there.parts["adapter"]


def test_planning_is_never_silent_for_long(left_bench, monkeypatch):
    """What a launch prints every 1.5 s, here every 0.05."""
    told = io.StringIO()
    monkeypatch.setattr("left_bench.launch.progress._SIGN_EVERY_SECONDS", 0.05)
    monkeypatch.setattr("left_bench.cli.plan.still_at_work", lambda: still_at_work(told))
    planned = predicting.predict

    def slowly(cell, **named):
        time.sleep(0.2)
        return planned(cell, **named)

    monkeypatch.setattr(predicting, "predict", slowly)
    answer = left_bench("plan", "-m", "model=tiny_llama", "hardware=cpu", "peft=lora,ia3", "--length", "40")
    assert answer.code == 0
    for words in ("composing the cells", "planned 0 of 2: lora", "planned 1 of 2: ia3"):
        assert words in told.getvalue()

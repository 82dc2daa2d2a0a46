"""`hardware.sharding=fsdp2`: what one process of several holds, planned and measured on two processes of a CPU."""

from __future__ import annotations

import sys

import pytest

from left_bench.launch.supervise import run_isolated
from left_bench.plan import predict as predicting
from left_bench.plan import repeat
from left_bench.plan.predict import predict

PARTS = ("weights", "adapter", "adapter_frozen", "gradients", "optimizer")
SHARDED = ("hardware.processes=2", "hardware.sharding=fsdp2")
linux = pytest.mark.skipif(sys.platform != "linux", reason="workers and their ranks are forked on Linux")


@linux
@pytest.mark.parametrize(
    "overrides",
    [
        ["peft=full", "training.gradient_accumulation=2", "model=tiny_neox"],
        ["peft=lora", "precision=bf16"],
        ["peft=lora", "quantization=nf4"],
    ],
    ids=" ".join,
)
def test_the_parts_of_a_process_are_those_that_it_holds(overrides, tiny_cell, tmp_path):
    cell = tiny_cell(*overrides, *SHARDED, "eval.generate=false")
    record = run_isolated(cell, tmp_path / "run", on_event=lambda event: None)
    assert record.status == "ok", (record.reason, record.provenance)
    plan = predict(cell)
    assert plan.unknown == []
    assert {part: plan.parts.get(part) for part in PARTS} == {part: record.memory_breakdown.get(part) for part in PARTS}
    assert plan.trainable_params == record.metrics["trainable_params"]


def test_gathered_layers_and_waiting_gradients_are_in_the_peak(tiny_cell):
    """One row a process: what lies beyond the parts is the gathered layers, and gradients that are still whole."""
    deep = ("peft=full", "model.config.num_hidden_layers=5", "training.batch_size=2", "training.max_length=16")

    def plan(*overrides):
        return predict(tiny_cell(*deep, *overrides))

    alone, sharded = plan("training.batch_size=1"), plan(*SHARDED)
    kept = plan(*SHARDED, "hardware.sharding_config={reshard_after_forward:false}")
    twice = plan(*SHARDED, "training.gradient_accumulation=2")
    layer = (alone.parts["weights"] - 2 * 512 * 64 * 4) // 5
    beyond = [one.parts["activations_and_workspace"] for one in (alone, sharded, kept, twice)]
    assert layer < beyond[1] - beyond[0] < 5 * layer
    assert beyond[2] > beyond[1] + layer
    assert twice.parts["gradients"] == sharded.parts["gradients"]
    assert beyond[3] > beyond[1] + sharded.parts["gradients"] // 2


def test_more_processes_hold_less_each(tiny_cell):
    many = [predict(tiny_cell("peft=full", f"hardware.processes={n}", *SHARDED[1:])) for n in (2, 4)]
    for part in ("weights", "gradients", "optimizer"):
        assert many[1].parts[part] == pytest.approx(many[0].parts[part] / 2, rel=0.05)


def test_layers_that_repeat_are_followed_once_when_sharded(tiny_cell, monkeypatch):
    monkeypatch.setattr(repeat, "_FEWEST_LAYERS", 4)
    cell = tiny_cell("peft=lora", *SHARDED, "model.config.num_hidden_layers=5", "precision=bf16")
    extrapolated, taken = predicting.extrapolated, []
    monkeypatch.setattr(predicting, "extrapolated", lambda *walks: taken.append(1) or extrapolated(*walks))
    short = predict(cell)
    monkeypatch.setattr(predicting, "repeats_of", lambda *_: None)
    assert taken and predict(cell) == short


def test_formats_whose_division_is_not_known_say_so(tiny_cell):
    plan = predict(tiny_cell("peft=lora", "quantization=nf5", *SHARDED))
    assert "weights" not in plan.parts and any("divided over processes" in line for line in plan.unknown)

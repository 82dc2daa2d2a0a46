"""`hardware.sharding=fsdp2`: what one process of several holds, planned and measured on two processes of a CPU."""

from __future__ import annotations

import sys

import pytest

from left_bench.launch.supervise import run_isolated
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


def beyond(cell) -> int:
    return predict(cell).parts["activations_and_workspace"]


def test_gathered_layers_are_in_the_peak_as_long_as_they_are_alive(tiny_cell):
    """One row a process: what lies beyond the parts is the gathered layers, and their gradients."""
    deep = ("peft=full", "model.config.num_hidden_layers=10", "training.batch_size=2", "training.max_length=16")
    alone = predict(tiny_cell(*deep, "training.batch_size=1"))
    plan = predict(tiny_cell(*deep, *SHARDED))
    layer = (alone.parts["weights"] - 2 * 512 * 64 * 4) // 10
    more = plan.parts["activations_and_workspace"] - alone.parts["activations_and_workspace"]
    assert layer < more < 8 * layer
    kept = tiny_cell(*deep, *SHARDED, "hardware.sharding_config={reshard_after_forward:false}")
    assert beyond(kept) > plan.parts["activations_and_workspace"] + 5 * layer


def test_gradients_that_wait_for_the_last_pass_are_whole(tiny_cell):
    deep = ("peft=full", "model.config.num_hidden_layers=10", "training.batch_size=2", "training.max_length=16")
    once, twice = (predict(tiny_cell(*deep, *SHARDED, f"training.gradient_accumulation={number}")) for number in (1, 2))
    assert once.parts["gradients"] == twice.parts["gradients"]
    assert (
        beyond(tiny_cell(*deep, *SHARDED, "training.gradient_accumulation=2"))
        > beyond(tiny_cell(*deep, *SHARDED)) + twice.parts["gradients"] // 2
    )


def test_more_processes_hold_less_each(tiny_cell):
    many = [predict(tiny_cell("peft=full", f"hardware.processes={n}", *SHARDED[1:])) for n in (2, 4)]
    for part in ("weights", "gradients", "optimizer"):
        assert many[1].parts[part] == pytest.approx(many[0].parts[part] / 2, rel=0.05)


def test_layers_that_repeat_are_followed_once_when_sharded(tiny_cell, monkeypatch):
    from left_bench.plan import predict as predicting

    cell = tiny_cell("peft=lora", *SHARDED, "model.config.num_hidden_layers=9", "precision=bf16")
    extrapolated, taken = predicting.extrapolated, []
    monkeypatch.setattr(predicting, "extrapolated", lambda *walks: taken.append(1) or extrapolated(*walks))
    short = predict(cell)
    monkeypatch.setattr(predicting, "repeats_of", lambda *_: None)
    assert taken and predict(cell) == short


def test_formats_whose_division_is_not_known_say_so(tiny_cell):
    plan = predict(tiny_cell("peft=lora", "quantization=nf5", *SHARDED))
    assert "weights" not in plan.parts and any("divided over processes" in line for line in plan.unknown)

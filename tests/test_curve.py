"""Validation loss along training: what it leaves alone, where its points are, when it ends training."""

from __future__ import annotations

import json
from typing import Any

import pytest

from left_bench.core.errors import UserError
from left_bench.grid.rules import why_unsupported
from left_bench.spec.events import EVENTS_NAME
from left_bench.spec.record import CurvePoint

QUICK = ["eval.generate=false", "training.steps=8", "training.measure_after=0", "data.validation_rows=6"]


def losses(found: dict[str, Any]) -> list[tuple[float, float]]:
    return [(event["loss"], event["gradient_norm"]) for event in events(found, "step")]


def events(found: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (found["run_dir"] / EVENTS_NAME).read_text().splitlines())
    return [event for event in lines if event["event"] == kind]


def steps(found: dict[str, Any]) -> list[int]:
    return [point.step for point in found["curve"]]


# --- it changes nothing else ---

CELLS = {
    "lora with dropout": ["peft=lora", "peft.config.lora_dropout=0.5"],
    "noise": ["peft=ia3", "training.neftune_alpha=5"],
    "full, accumulated": ["peft=full", "training.batch_size=2", "training.gradient_accumulation=2"],
    "packed": ["peft=lora", "training.batching=packed"],
    "adalora": ["peft=adalora"],
    "prefix": ["peft=prefix_tuning"],
    "int8": ["peft=lora", "quantization=int8"],
    "dpo": ["training=dpo", "training.sft_steps=2", "data=chain_sum_pairs"],
}


@pytest.mark.parametrize("name", CELLS)
def test_training_takes_the_same_steps_with_a_curve_and_without(name, tiny_cell, work_in_process):
    common = [*QUICK, *CELLS[name], "training.steps=4"]
    without = work_in_process(tiny_cell(*common, "eval.points=0"))
    result = work_in_process(tiny_cell(*common, "eval.points=4"))
    assert losses(result) == losses(without) and len(losses(result)) == 4
    assert steps(result) == [1, 2, 3, 4] and not without["curve"]
    last = result["curve"][-1].validation_loss
    assert result["metrics"]["validation_loss"] == last
    # afterwards, padded and in larger batches, it is the same number
    assert without["metrics"]["validation_loss"] == pytest.approx(last, rel=1e-4)


def test_what_is_measured_of_training_leaves_the_evaluations_out(tiny_cell, work_in_process, monkeypatch):
    import time

    from left_bench.training import curve

    loss = curve.Curve._loss

    def slow(*given: Any) -> float:
        time.sleep(0.3)
        return loss(*given)

    monkeypatch.setattr(curve.Curve, "_loss", slow)
    start = time.perf_counter()
    result = work_in_process(tiny_cell(*QUICK, "eval.points=4"))
    wall = time.perf_counter() - start
    phases = {phase.name: phase.seconds for phase in result["phases"]}
    assert phases["validate"] >= 1.2
    assert sum(phases.values()) <= wall  # what is counted twice would be more than there was
    assert result["metrics"]["train_seconds"] == phases["train"]
    assert sum(event["seconds"] for event in events(result, "step")) <= phases["train"]
    points = result["curve"]
    assert points[-1].seconds == pytest.approx(sum(event["seconds"] for event in events(result, "step")))
    assert points[-1].tokens == result["metrics"]["train_tokens"]


def test_a_phases_peak_is_its_own(tmp_path):
    from left_bench.measure.meter import Meter
    from left_bench.spec.events import EventWriter

    class Counted:
        """A device whose peak is what was allocated since it was last forgotten."""

        kind, peak_source, peak = "cpu", "", 0

        def synchronize(self) -> None: ...
        def set_baseline(self) -> int:
            return 0

        def reset_peak(self) -> None:
            self.peak = 0

        forget_peak = reset_peak

        def peak_bytes(self) -> int:
            return self.peak

        def peak_reserved_bytes(self) -> None: ...

    device: Any = Counted()
    meter = Meter(device, EventWriter(tmp_path / "events.jsonl"))
    with meter.phase("train"):
        device.peak = 10
        with meter.aside("validate"):
            device.peak = 50
        device.peak = 7
    assert [(phase.name, phase.peak_memory_bytes) for phase in meter.phases] == [("train", 10), ("validate", 50)]


# --- where the points are ---


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (["eval.points=3"], [3, 5, 8]),
        (["eval.points=100"], [1, 2, 3, 4, 5, 6, 7, 8]),
        (["eval.every=3"], [3, 6, 8]),
        (["eval.points=0"], []),
    ],
)
def test_points_are_where_they_were_asked_for(asked, expected, tiny_cell, work_in_process):
    result = work_in_process(tiny_cell(*QUICK, *asked))
    assert steps(result) == expected
    told = [
        CurvePoint(**{k: v for k, v in event.items() if k in CurvePoint.model_fields})
        for event in events(result, "curve")
    ]
    assert told == result["curve"]
    by = result["provenance"]["training_ended"]
    assert by == {"by": "steps", "steps": 8, "weights_of_step": 8}


def test_answers_are_scored_along_the_way_if_asked_for(tiny_cell, work_in_process):
    scored = [*QUICK[1:], "eval.points=2", "eval.curve_scores=true"]
    result = work_in_process(tiny_cell(*scored))
    assert [list(point.scores) for point in result["curve"]] == [["exact_match"]] * 2
    packed = tiny_cell(*scored, "training.batching=packed")
    assert "eval.curve_scores" in str(why_unsupported(packed))


def test_a_curve_asked_for_without_validation_rows_is_refused(tiny_cell, work_in_process):
    none = [*QUICK[:-1], "data.validation_rows=0"]
    assert not work_in_process(tiny_cell(*none))["curve"]
    for key in ("eval.every=2", "training.stop_patience=2"):
        with pytest.raises(UserError, match=rf"{key}: there are no validation rows.*data.validation_rows=NUMBER"):
            work_in_process(tiny_cell(*none, key))


# --- how training ends ---


def test_a_time_limit_ends_training_and_the_schedule_with_it(tiny_cell, work_in_process, monkeypatch):
    from left_bench.training import loop

    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            self.now += 0.5  # each step reads it twice
            return self.now

    monkeypatch.setattr(loop, "time", Clock())
    asked = [*QUICK, "training.steps=1000", "training.max_seconds=5", "eval.points=5", "training.schedule=linear"]
    result = work_in_process(tiny_cell(*asked))
    rates = [event["learning_rate"] for event in events(result, "step")]
    assert len(rates) == 10 == result["metrics"]["train_steps"]
    assert result["provenance"]["training_ended"] == {"by": "max_seconds", "steps": 10, "weights_of_step": 10}
    assert steps(result) == [2, 4, 6, 8, 10]
    assert rates == pytest.approx([rates[0] * (10 - n) / 10 for n in range(10)])


def test_early_stopping_keeps_the_best_weights(tiny_cell, work_in_process):
    # a rate at which the loss soon rises
    rising = [*QUICK, "eval.every=1", "training.steps=12", "peft=full", "training.learning_rate=0.02"]
    result = work_in_process(tiny_cell(*rising, "training.schedule=constant", "training.stop_patience=2"))
    ended, curve = result["provenance"]["training_ended"], result["curve"]
    best = min(curve, key=lambda point: point.validation_loss)
    assert ended == {"by": "stop_patience", "steps": best.step + 2, "weights_of_step": best.step}
    assert len(curve) == best.step + 2 < 12
    assert result["metrics"]["validation_loss"] == best.validation_loss
    stopped = work_in_process(tiny_cell(*rising, f"training.steps={best.step}", "training.schedule=constant"))
    assert held_out(result) == held_out(stopped)
    assert not list(result["run_dir"].glob("checkpoints/best-*"))


def held_out(found: dict[str, Any]) -> list[float]:
    return [json.loads(line)["nll"] for line in (found["run_dir"] / "rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("overrides", "validation_rows", "points"),
    [
        (["training.steps=40", "training.batch_size=8"], 32, 3),
        (["training.steps=1000", "training.batch_size=8"], 32, 8),
        (["training.steps=4", "training.batch_size=8"], 32, 1),  # the last is taken in any case
        (["training.steps=40", "training.batch_size=8", "eval.points=20"], 32, 20),
        (["training.steps=40", "training.batch_size=8", "eval.points=0"], 32, 0),
        (["training.steps=40", "training.batch_size=8", "training.stop_patience=2"], 32, 8),
    ],
)
def test_a_curve_left_open_has_as_many_points_as_are_cheap(overrides, validation_rows, points, tiny_cell):
    assert tiny_cell(*overrides).curve_points(validation_rows) == points

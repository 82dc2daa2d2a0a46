from __future__ import annotations

import json
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from left_bench.measure.device import CpuDevice
from left_bench.measure.meter import Meter, Step, logical_numel, measured_steps, stored_bytes, summarize_steps
from left_bench.model.load import base_metrics, quantized_weights
from left_bench.spec.events import EventWriter

MB = 10**6
linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark")


def step(seconds: float = 1.0, tokens: int = 10, rows: int = 2, loss: float = 1.0) -> Step:
    return Step(seconds=seconds, tokens=tokens, answer_tokens=tokens // 2, rows=rows, loss=loss)


@pytest.fixture
def meter(tmp_path):
    return Meter(CpuDevice(), EventWriter(tmp_path / "events.jsonl"))


# --- bytes ---


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.int8, 1), (torch.uint8, 1)]
)
def test_a_plain_tensor(dtype, size):
    assert stored_bytes([torch.zeros(3, 5, dtype=dtype)]) == 15 * size


def test_shared_storage_is_counted_once():
    weight = torch.zeros(10, 10)
    assert stored_bytes([weight, weight, weight.T, weight[2:4], weight.view(100)]) == 400
    assert stored_bytes([weight[2:4]]) == 400  # the rest of the storage is held all the same
    assert stored_bytes([torch.zeros(10), torch.zeros(10)]) == 80
    assert stored_bytes([]) == 0
    assert stored_bytes([torch.zeros(10, device="meta")]) == 0


def test_tied_weights_are_counted_once(tiny_cell, load_tiny):
    apart, _ = load_tiny(tiny_cell("eval.generate=false"))
    tied, _ = load_tiny(tiny_cell("model.config.tie_word_embeddings=true"))
    embedding = 512 * 64
    assert base_metrics(apart)["total_params"] == 139_584
    assert base_metrics(tied)["total_params"] == 139_584 - embedding
    assert base_metrics(apart)["weights_bytes"] - base_metrics(tied)["weights_bytes"] == 4 * embedding
    assert base_metrics(tied)["stored_bits_per_param"] == pytest.approx(32, abs=0.1)


LINEARS = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3)  # q and o, k and v, the three of the MLP, in two layers


def four_bit_bytes(numel: int, *, double: bool) -> int:
    """QLoRA's storage by hand: half a byte a weight; a scale each 64 weights; the 16-entry code in float32."""
    blocks = numel // 64
    scales = 4 * blocks
    if double:  # 8-bit scales; a float32 scale for each 256 of them; their mean; the 256-entry code
        scales = blocks + 4 * -(-blocks // 256) + 4 + 4 * 256
    return numel // 2 + scales + 4 * 16


@pytest.mark.parametrize(("option", "double"), [("nf4", False), ("nf4_dq", True), ("fp4", False)])
def test_four_bit_weights_by_hand(option, double, tiny_cell, load_tiny):
    model, _ = load_tiny(tiny_cell(f"quantization={option}"))
    weights = quantized_weights(model)
    assert len(weights) == 14
    shapes = [64 * 64, 64 * 32, 64 * 32, 64 * 64, 64 * 128, 64 * 128, 64 * 128] * 2
    assert [logical_numel(weight) for weight in weights.values()] == shapes
    for weight, numel in zip(weights.values(), shapes, strict=True):
        alone = four_bit_bytes(numel, double=double)
        assert stored_bytes([weight]) == alone, (option, numel)
    metrics = base_metrics(model)
    assert metrics["total_params"] == 139_584
    assert metrics["quantized_modules"] == 14
    assert metrics["quantized_bits_per_param"] == pytest.approx(8 * stored_bytes(weights.values()) / LINEARS)
    assert metrics["weights_bytes"] == pytest.approx(4 * (139_584 - LINEARS) + stored_bytes(weights.values()), abs=256)


def test_eight_bit_weights_by_hand(tiny_cell, load_tiny):
    model, _ = load_tiny(tiny_cell("quantization=int8"))
    weights = quantized_weights(model)
    assert len(weights) == 14
    for name, weight in weights.items():
        rows, columns = weight.shape
        assert stored_bytes([weight]) == rows * columns + 4 * rows, name  # a byte a weight, a float32 scale a row
    assert base_metrics(model)["quantized_bits_per_param"] == pytest.approx(8.5, abs=0.2)
    assert base_metrics(model)["total_params"] == 139_584


def test_what_is_not_quantized_has_no_quantized_numbers(tiny_cell, load_tiny):
    model, _ = load_tiny(tiny_cell())
    assert quantized_weights(model) == {}
    assert set(base_metrics(model)) == {"total_params", "weights_bytes", "stored_bits_per_param"}


# --- steps ---


def test_a_summary_by_hand():
    steps = [step(9, 1000, 50, 5.0), step(1, 10, 2, 4.0), step(2, 30, 4, 3.0), step(3, 20, 6, 2.0)]
    result = summarize_steps(steps, measure_after=1)
    assert result["train_tokens_per_second"] == pytest.approx(60 / 6)
    assert result["train_samples_per_second"] == pytest.approx(12 / 6)
    assert result["step_seconds_p50"] == 2
    assert result["step_seconds_p95"] == pytest.approx(2.9)
    assert result["train_steps"] == 4
    assert result["train_tokens"] == 1060
    assert result["train_answer_tokens"] == 530
    assert result["first_train_loss"] == 5.0
    assert result["train_loss"] == 2.0


def test_the_training_loss_is_of_the_last_tenth():
    steps = [step(loss=float(i)) for i in range(40)]
    assert summarize_steps(steps, measure_after=0)["train_loss"] == pytest.approx((36 + 37 + 38 + 39) / 4)


@given(st.integers(0, 30), st.integers(1, 20))
def test_warm_up_is_at_most_half(measure_after, n):
    steps = [step() for _ in range(n)]
    measured = measured_steps(steps, measure_after=measure_after)
    assert len(measured) == max(n - measure_after, n - n // 2)
    assert measured[-1] is steps[-1]


@given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.integers(1, 10**6)), min_size=1, max_size=20))
def test_throughput_is_between_the_slowest_and_the_fastest_step(pairs):
    result = summarize_steps([step(seconds, tokens) for seconds, tokens in pairs], measure_after=0)
    rates = [tokens / seconds for seconds, tokens in pairs]
    assert min(rates) * 0.999 <= result["train_tokens_per_second"] <= max(rates) * 1.001


def test_no_steps_no_numbers():
    assert summarize_steps([], measure_after=0) == {}


# --- the meter ---


@linux
def test_a_peak_belongs_to_its_phase(meter):
    with meter.phase("load"):
        kept = torch.ones(25 * MB)
    with meter.phase("train"):
        more = torch.ones(50 * MB)
        del more
    with meter.phase("evaluate"):
        pass
    del kept
    with meter.phase("save"):
        pass
    peaks = {phase.name: phase.peak_memory_bytes for phase in meter.phases}
    assert peaks["load"] == pytest.approx(100 * MB, abs=15 * MB)
    assert peaks["train"] == pytest.approx(300 * MB, abs=15 * MB)
    assert peaks["evaluate"] == pytest.approx(100 * MB, abs=15 * MB)
    assert peaks["save"] < 15 * MB
    metrics = meter.finish(measure_after=0)
    assert metrics["peak_memory_bytes"] == peaks["train"]
    assert metrics["load_peak_memory_bytes"] == peaks["load"]
    assert metrics["baseline_memory_bytes"] > 50 * MB


def test_seconds_and_counts(meter):
    with meter.phase("train") as counts:
        time.sleep(0.2)
        counts.steps, counts.tokens = 3, 70
    [phase] = meter.phases
    assert 0.2 <= phase.seconds < 1
    assert (phase.name, phase.steps, phase.tokens) == ("train", 3, 70)
    assert meter.finish(measure_after=0)["train_seconds"] == phase.seconds


def test_a_phase_that_fails_is_measured_too(meter):
    with pytest.raises(ZeroDivisionError), meter.phase("train"):
        1 / 0  # noqa: B018
    assert [phase.name for phase in meter.phases] == ["train"]


def test_what_was_not_measured_is_absent(meter):
    assert set(meter.finish(measure_after=0)) == {"baseline_memory_bytes"}


def test_clocks_are_read_after_the_device_is_synchronized(tmp_path):
    class Device(CpuDevice):
        def synchronize(self):
            time.sleep(0.1)  # queued work

    meter = Meter(Device(), EventWriter(tmp_path / "events.jsonl"))
    with meter.phase("train"):
        pass
    assert meter.phases[0].seconds >= 0.1
    assert meter.phases[0].seconds < 0.2  # and none of what was queued before it


def test_events_tell_the_same(meter, tmp_path):
    with meter.phase("train"):
        meter.step(step(seconds=0.5, tokens=30), learning_rate=0.1)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["phase", "step", "phase_end"]
    assert events[1]["tokens_per_second"] == 60
    assert (events[1]["step"], events[1]["learning_rate"]) == (1, 0.1)
    assert events[2]["seconds"] == meter.phases[0].seconds

"""The machine's peak: measured in quiet, doubted where a cell beats it, printed beside the machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recorded.build import LAPTOP, make_record

from left_bench.evaluation import shared_baseline
from left_bench.measure import cpu_contention
from left_bench.measure.cpu_contention import Quiet, measured_quietly
from left_bench.measure.device import CpuDevice, describe_machine
from left_bench.measure.instruction_sets import FLAGS_VARIABLE
from left_bench.measure.meter import Meter
from left_bench.report import load_records
from left_bench.report.cells import machine_line, row_of
from left_bench.report.confounders import confounders
from left_bench.report.ranking import best_rows, comparable, places, rankable
from left_bench.spec.events import EventWriter
from left_bench.spec.record import Record, read_record

MODERN = LAPTOP | {"instruction_sets": ["avx2", "avx512f", "avx512_bf16"], "id": "0a0a0a0a"}
OLDER = LAPTOP | {"instruction_sets": ["avx2"], "id": "0b0b0b0b"}


@pytest.fixture
def others(monkeypatch):
    """`others(share, ...)`: what others take of the machine in one measurement after the other."""

    def others(*shares: float | None) -> list[float | None]:
        left = list(shares)

        class Others:
            def share(self) -> float | None:
                return left.pop(0)

        monkeypatch.setattr(cpu_contention, "Neighbours", Others)
        monkeypatch.setattr("os.cpu_count", lambda: 4)
        return left

    return others


def test_the_first_quiet_measurement_ends_it(others):
    speeds = iter([5.0, 9.0, 7.0])
    left = others(0.6, 0.01, 0.0)
    assert measured_quietly(lambda: next(speeds), cores=4, attempts=3) == Quiet(9.0, None)
    assert left == [0.0]


def test_load_that_stays_is_told(others):
    speeds = iter([5.0, 9.0, 7.0])
    others(0.6, 0.3, 0.5)
    value, share = measured_quietly(lambda: next(speeds), cores=4, attempts=3)
    assert (value, share) == (9.0, pytest.approx(0.3))


def test_what_runs_on_other_cores_is_no_load(others):
    others(0.5)
    assert measured_quietly(lambda: 3.0, cores=2, attempts=3) == Quiet(3.0, None)
    others(0.9)
    assert measured_quietly(lambda: 3.0, cores=0, attempts=3) == Quiet(3.0, None)  # an accelerator's
    others(None)
    assert measured_quietly(lambda: 3.0, cores=4, attempts=3) == Quiet(3.0, None)


@pytest.fixture
def peak_of(tiny_cell, tmp_path, monkeypatch):
    """`peak_of(cells)`: what `shared_peak` gives when a measurement comes to the next of `speeds`."""

    def peak_of(speed: float, **how: bool) -> Quiet:
        monkeypatch.setattr(shared_baseline, "matrix_product_peak", lambda *_args, **_how: speed)
        meter = Meter(CpuDevice(), EventWriter(tmp_path / "events.jsonl"))
        return shared_baseline.shared_peak(tiny_cell(), meter=meter, runs_dir=tmp_path, threads=4, at_once=1, **how)

    return peak_of


def test_a_disturbed_peak_is_measured_again_until_it_is_not(peak_of, others):
    others(0.5, 0.5, 0.5)
    assert peak_of(2.0) == Quiet(2.0, 0.5)
    others(0.5)
    assert peak_of(1.0) == Quiet(2.0, 0.5), "load makes a peak lower: the higher stays"
    others(0.0)
    assert peak_of(4.0) == Quiet(4.0, None)
    others()
    assert peak_of(8.0) == Quiet(4.0, None), "kept"
    others(0.0)
    assert peak_of(16.0, doubted=True) == Quiet(16.0, None)
    others()
    assert peak_of(32.0) == Quiet(16.0, None)


def test_a_damaged_file_is_replaced(peak_of, others, tmp_path):
    others(0.0)
    peak_of(2.0)
    [path] = tmp_path.glob("base/peak-*.json")
    path.write_text("{")
    others(0.0)
    assert peak_of(3.0) == Quiet(3.0, None)
    assert json.loads(path.read_text())["flops_per_second"] == 3.0


def test_a_peak_that_a_cell_beats_is_measured_anew_in_it(tiny_cell, work_in_process, monkeypatch):
    speeds = iter([1.0, 1e15])
    monkeypatch.setattr(shared_baseline, "measured_quietly", lambda *_args, **_how: Quiet(next(speeds), None))
    result = work_in_process(tiny_cell("eval.generate=false"))
    assert 0 < result["metrics"]["model_flops_utilization"] < 1
    effective = result["environment"]["effective"]
    assert effective["peak_flops_per_second"] == 1e15
    assert "utilization_withheld" not in effective
    [path] = (result["run_dir"].parent / "base").glob("peak-*.json")
    assert json.loads(path.read_text())["flops_per_second"] == 1e15


def test_a_utilization_above_one_is_never_a_number(tiny_cell, work_in_process, monkeypatch):
    monkeypatch.setattr(shared_baseline, "measured_quietly", lambda *_args, **_how: Quiet(1.0, 0.4))
    result = work_in_process(tiny_cell("eval.generate=false"))
    assert "model_flops_utilization" not in result["metrics"]
    effective = result["environment"]["effective"]
    assert "times the measured peak, which must be wrong" in effective["utilization_withheld"]
    assert (effective["peak_flops_per_second"], effective["peak_other_cpu_share"]) == (1.0, 0.4)


# --- machines ---


def test_machines_of_unlike_instruction_sets_are_two(monkeypatch):
    results = []
    for flags in ("avx2", "avx2 avx512f", "avx2 avx512f avx512_bf16", "avx2 avx512f avx512_bf16"):
        monkeypatch.setenv(FLAGS_VARIABLE, flags)
        results.append(describe_machine(CpuDevice()))
    assert results[2]["instruction_sets"] == ["avx2", "avx512f", "avx512_bf16"]
    assert len({machine["id"] for machine in results}) == 3
    assert results[2]["id"] == results[3]["id"]


def cell(name: str, speed: float, machine: dict[str, object], **effective: object) -> Record:
    return make_record(
        changes={"peft.name": name}, tokens_per_second=speed, machine=machine, effective={"processes": 1} | effective
    )


@pytest.mark.parametrize(
    "other",
    [OLDER, LAPTOP, LAPTOP | {"id": MODERN["id"]}],
    ids=["another instruction set", "unknown instruction sets", "unknown ones under the same id"],
)
def test_unlike_machines_are_never_ranked_by_speed(other):
    rows = [row_of(one) for one in (cell("full", 900, MODERN), cell("lora", 100, MODERN), cell("ia3", 20, other))]
    for metric in ("train_tokens_per_second", "wall_seconds"):
        assert rankable(rows[:2], metric)
        assert not rankable(rows, metric)
        assert best_rows(rows, metric) == []
        assert places(rows, metric) is None
        assert not comparable(rows[2], rows[0], metric)
    assert rankable(rows, "eval_loss")


def test_older_records_of_one_machine_are_ranked_among_themselves():
    rows = [row_of(cell("full", 900, LAPTOP)), row_of(cell("lora", 100, LAPTOP))]
    assert best_rows(rows, "train_tokens_per_second") == rows[:1]


# --- what reports say ---


def test_the_peak_is_printed_beside_the_machine():
    peaks = (442e9, 430e9)
    rows = [row_of(cell("lora", 100, MODERN, peak_flops_per_second=peak)) for peak in peaks]
    assert machine_line(rows[0], rows, several=False).endswith(", bfloat16 products at 430 GFLOP/s to 442 GFLOP/s)")
    assert "products" not in machine_line(row_of(cell("lora", 100, LAPTOP)), rows[:0], several=False)
    gpu = row_of(cell("lora", 100, MODERN, peak_flops_per_second=0.98e15))
    assert "bfloat16 products at 980 TFLOP/s" in machine_line(gpu, [gpu], several=False)


def test_peaks_far_apart_are_told():
    def told(*peaks: float) -> dict[str, str]:
        rows = [
            row_of(cell(name, 100, MODERN, peak_flops_per_second=peak))
            for name, peak in zip(("full", "lora", "ia3"), peaks, strict=True)
        ]
        names = {id(row): name for row, name in zip(rows, ("full", "lora", "ia3"), strict=True)}
        return dict(confounders(rows, names))

    assert "peak" not in told(400e9, 330e9, 420e9)
    text = told(400e9, 200e9, 420e9)["peak"]
    assert "420 GFLOP/s for ia3" in text and "200 GFLOP/s for lora" in text and "2.1 times" in text


def test_a_recorded_utilization_above_one_is_not_a_number_in_a_report(tmp_path: Path):
    old = make_record(machine=LAPTOP, metrics={"model_flops_utilization": 1.65})
    path = old.write(tmp_path / old.cell_id)
    record = read_record(path)
    assert "model_flops_utilization" not in record.metrics
    assert "1.65 times the measured peak" in record.environment["effective"]["utilization_withheld"]
    frame = load_records(tmp_path)
    assert "model_flops_utilization" not in frame
    row = row_of(record)
    results = dict(confounders([row], {id(row): "full"}))
    assert (
        "1.65 times the measured peak" in results["model_flops_utilization"]
        and "(full)" in results["model_flops_utilization"]
    )


def test_a_utilization_below_one_stays(tmp_path: Path):
    record = make_record(machine=LAPTOP, metrics={"model_flops_utilization": 0.42})
    assert read_record(record.write(tmp_path / record.cell_id)) == record

"""`hardware.plan_first`: what cannot fit is a row before anything is loaded; reports show predicted beside measured."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from recorded.build import make_record

from left_bench.core.clock import utc_now
from left_bench.launch import plan_first, planning
from left_bench.launch.plan_first import Prediction, plan_ahead
from left_bench.measure.device import gpu_memory_bytes
from left_bench.plan.predict import predict
from left_bench.plan.result import Pass, Plan, Rows
from left_bench.report.axes import find_axes, labels
from left_bench.report.cells import row_of
from left_bench.report.document import write_document
from left_bench.report.report import Report
from left_bench.spec.record import outcome_of, read_record

MIB = 2**20
TINY = ("model=tiny_llama", "hardware=cpu", "precision=fp32", "tracker=none", "hardware.plan_first=true")


@pytest.fixture
def launch(left_bench, tmp_path, monkeypatch):
    """`launch(*overrides)`: the exit code, each method's record, and the cells that came to a worker."""

    def run_isolated(cell, run_dir, *, on_event):
        launch.run.append(cell.peft.name)
        return outcome_of(
            cell, "ok", None, started_at=utc_now(), measured={"metrics": {"peak_memory_bytes": 120.0 * MIB}}
        )

    def launch(*overrides: str):
        folders = [f"runs_dir={tmp_path / 'runs'}", f"reports_dir={tmp_path / 'reports'}"]
        answer = left_bench(*TINY, *folders, *overrides)
        records = [read_record(path) for path in (tmp_path / "runs").glob("*/record.json")]
        return answer, {record.choices["peft"]: record for record in records}

    launch.run = []
    monkeypatch.setattr("left_bench.launch.run_cell.run_isolated", run_isolated)
    return launch


def test_a_cell_that_cannot_fit_is_unsupported_and_never_started(launch):
    answer, records = launch("peft=full", "hardware.memory_limit=1MiB")
    record = records["full"]
    assert (answer.code, record.status, launch.run) == (0, "unsupported", [])
    assert "planned to hold" in record.reason and "1.00 MiB of hardware.memory_limit" in record.reason
    assert "--remedies" in record.reason
    assert record.metrics["predicted_peak_memory_bytes"] > MIB
    parts = record.provenance["prediction"]["parts"]
    assert sum(parts.values()) == record.metrics["predicted_peak_memory_bytes"]


def test_a_sweep_runs_what_fits_and_reports_the_prediction(launch, tmp_path, compose_cell):
    needed = [sum(predict(compose_cell(*TINY, f"peft={name}")).parts.values()) for name in ("lora", "full")]
    answer, records = launch("-m", "peft=lora,full", f"hardware.memory_limit={sum(needed) // 2}")
    assert answer.code == 0, answer.err
    assert {name: record.status for name, record in records.items()} == {"lora": "ok", "full": "unsupported"}
    assert launch.run == ["lora"]
    metrics = records["lora"].metrics
    assert metrics["predicted_peak_memory_bytes"] < metrics["predicted_least_memory_bytes"]
    assert metrics["predicted_least_memory_bytes"] <= 120 * MIB <= metrics["predicted_most_memory_bytes"]
    [report] = (tmp_path / "reports").glob("*.md")
    told = report.read_text(encoding="utf-8").split("## Memory, predicted and measured")[1]
    assert "| lora |" in told and "120 MiB | within |" in told


def test_what_is_forced_runs_and_keeps_its_prediction(launch):
    _, records = launch("peft=full", "hardware.memory_limit=1MiB", "force_unsupported=true")
    assert launch.run == ["full"] and "predicted_peak_memory_bytes" in records["full"].metrics


def test_without_the_setting_nothing_is_planned(launch, monkeypatch):
    monkeypatch.setattr(plan_first, "outcomes", lambda *_, **__: pytest.fail("planned"))
    _, records = launch("peft=full", "hardware.memory_limit=1MiB", "hardware.plan_first=false")
    assert "prediction" not in records["full"].provenance


def test_planning_that_breaks_off_keeps_no_cell_from_running(launch, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("planning ended without an answer")

    monkeypatch.setattr(plan_first, "outcomes", broken)
    answer, records = launch("peft=lora")
    assert records["lora"].status == "ok" and "not planned" in answer.err


def prediction(tiny_cell, *, limit: int | None, measured: bool, device: str = "cpu") -> Prediction:
    parts = {"weights": 40 * MIB, "gradients": 10 * MIB, "optimizer": 20 * MIB, "activations_and_workspace": 400 * MIB}
    plan = Plan(Pass(1, 64, 64, measured=measured), parts=parts)
    return Prediction(tiny_cell(f"hardware={device}"), plan, None if limit is None else limit * MIB)


def test_rows_that_were_not_seen_refuse_no_cell_by_their_activations(tiny_cell):
    assert prediction(tiny_cell, limit=300, measured=True).refusal is not None
    assert prediction(tiny_cell, limit=300, measured=False).refusal is None
    assert "optimizer 20.0 MiB" in prediction(tiny_cell, limit=60, measured=False).refusal


def test_what_may_fit_is_not_refused(tiny_cell):
    """470 MiB planned: on CUDA a run was seen to hold a part in 26 less."""
    assert prediction(tiny_cell, limit=460, measured=True, device="cuda").refusal is None
    assert prediction(tiny_cell, limit=440, measured=True, device="cuda").refusal is not None
    assert prediction(tiny_cell, limit=None, measured=True).refusal is None


def test_cells_planned_ahead_are_not_planned_again(tiny_cell, monkeypatch):
    cells = [tiny_cell(f"peft={name}", "hardware.plan_first=true") for name in ("ia3", "vera")]
    plan_ahead(cells)
    monkeypatch.setattr(planning, "answer", lambda *_, **__: pytest.fail("planned again"))
    assert all(plan_first.predicted(cell) is not None for cell in cells)


def test_reports_without_predictions_do_not_speak_of_them():
    def told(**metrics: float) -> str:
        rows = [row_of(make_record(metrics=metrics))]
        axes = find_axes(rows)
        return write_document(Report(name="x", rows=rows, axes=axes, labels=labels(rows, axes), baseline=rows[0]))

    between = {"predicted_least_memory_bytes": 910.0 * MIB, "predicted_most_memory_bytes": 950.0 * MIB}
    assert "predicted" not in told()
    assert "| 800 MiB | 910 MiB to 950 MiB | 900 MiB | **outside** |" in told(
        predicted_peak_memory_bytes=800.0 * MIB, **between
    )


@pytest.mark.parametrize(("mig", "expected"), [(0, 80 * 10**9), (1, None)])
def test_a_gpus_memory_is_told_without_torch(mig, expected, monkeypatch):
    nvml = SimpleNamespace(
        NVMLError=type("NVMLError", (Exception,), {}),
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMigMode=lambda handle: (mig, mig),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=(24, 80)[handle] * 10**9),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert gpu_memory_bytes() == expected


def test_a_plan_for_the_same_cell_is_kept_whether_or_not_it_is_planned_first(tiny_cell):
    from left_bench.plan.kept import keep, kept_plan

    plan = Plan(Pass(1, 2, 2, measured=True))
    keep(plan, tiny_cell("peft=ln_tuning"), Rows(longest=2))
    assert kept_plan(tiny_cell("peft=ln_tuning", "hardware.plan_first=true"), Rows(longest=2)) == plan


def test_the_prediction_in_a_record_is_plain_json(tiny_cell):
    facts = prediction(tiny_cell, limit=60, measured=True).facts
    assert json.loads(json.dumps(facts)) == facts

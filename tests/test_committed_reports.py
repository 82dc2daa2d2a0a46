"""The committed reports follow from the committed records: nothing in them was written by hand."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from recorded.committed import RECORDS, committed_runs

from left_bench.report import read_runs, read_sweeps, write_report

REPORTS = RECORDS.parent
NAMES = sorted(path.stem for path in RECORDS.glob("*.jsonl"))


def test_there_is_the_proof_of_the_main_job():
    assert "peft_methods" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_report_is_made_again_word_for_word(name, tmp_path):
    if (REPORTS.parent / "runs" / "sweeps" / f"{name}.json").exists():
        pytest.skip(f"{name} was run in this checkout: its report lies where the committed one was")
    again = write_report(RECORDS / f"{name}.jsonl", name=name, out=tmp_path)
    assert again.read_text() == (REPORTS / f"{name}.md").read_text()
    assert again.with_suffix(".html").read_text() == (REPORTS / f"{name}.html").read_text()
    plots = {path.name for path in tmp_path.glob("*.svg")}
    assert plots == {path.name for path in REPORTS.glob(f"{name}_*.svg")} and not [*REPORTS.glob("*.png")]


def test_a_report_of_one_axis_has_the_answer_first_and_at_most_200_lines_unfolded():
    text = (REPORTS / "peft_methods.md").read_text()
    headings = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert headings[:2] == ["Recommendation", "Leaderboard"]
    assert text.index("_pareto.svg") < text.index("## By ") < text.index("## Settings")
    unfolded = re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)
    assert len(unfolded.splitlines()) <= 200


@pytest.mark.parametrize("name", NAMES)
def test_its_cells_are_all_there_and_of_one_machine(name):
    ((sweep,), problems) = read_sweeps(RECORDS / f"{name}.jsonl")
    runs, unread = read_runs(RECORDS / f"{name}.jsonl")
    assert not problems and not unread
    records = [run.record for run in runs]
    assert {record.cell_id for record in records} == set(sweep.cells) and len(records) == len(sweep.cells)
    assert {record.status for record in records} <= {"ok", "unsupported"}
    assert len({record.environment["machine"]["id"] for record in records if record.status == "ok"}) == 1


def test_lora_learns_what_the_base_model_cannot():
    records = [run.record for run in committed_runs()]
    seeds = [
        record
        for record in records
        if record.choices["peft"] == "lora" and record.provenance["sweep"] == "peft_methods"
    ]
    assert len(seeds) == 3
    for lora in seeds:
        assert lora.metrics["exact_match"] > lora.metrics["base_exact_match"] + 0.4


def test_the_page_of_a_gpu_follows_from_what_its_window_left():
    script = Path(__file__).parents[1] / "benchmarks" / "gpu" / "report.py"
    spec = importlib.util.spec_from_file_location("gpu_report", script)
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    kept = json.loads((report.KEPT / "window.json").read_text(encoding="utf-8"))
    lines = (report.KEPT / "records.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert report.page(records, kept["steps"], kept["plans"]) == (report.KEPT.parent / "gpu.md").read_text(
        encoding="utf-8"
    )
    for record in records:  # a plan is worth something where it is near
        planned = kept["plans"][record["cell_id"]]["peak"]
        assert abs(planned / record["metrics"]["peak_memory_bytes"] - 1) < 0.11

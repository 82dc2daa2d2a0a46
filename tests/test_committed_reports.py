"""The committed reports follow from the committed records: nothing in them was written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from left_bench.record import read_record
from left_bench.report import read_sweeps, write_report

REPORTS = Path(__file__).resolve().parents[1] / "reports"
RECORDS = REPORTS / "records"
NAMES = sorted(path.stem for path in (RECORDS / "sweeps").glob("*.json"))


def test_there_is_the_proof_of_the_main_job():
    assert "peft_methods" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_report_is_made_again_word_for_word(name, tmp_path):
    if (REPORTS.parent / "runs" / "sweeps" / f"{name}.json").exists():
        pytest.skip(f"{name} was run in this checkout: its report lies where the committed one was")
    again = write_report(RECORDS, name=name, out=tmp_path)
    assert again.read_text() == (REPORTS / f"{name}.md").read_text()
    assert again.with_suffix(".html").read_text() == (REPORTS / f"{name}.html").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_its_cells_are_all_there_and_of_one_machine(name):
    sweeps, problems = read_sweeps(RECORDS)
    assert not problems
    (sweep,) = [sweep for sweep in sweeps if sweep.name == name]
    records = [read_record(RECORDS / cell / "record.json") for cell in sweep.cells]
    assert {record.status for record in records} <= {"ok", "unsupported"}
    assert len({record.environment["machine"]["id"] for record in records if record.status == "ok"}) == 1


def test_lora_learns_what_the_base_model_cannot():
    records = [read_record(path) for path in RECORDS.glob("*/record.json")]
    seeds = [
        record
        for record in records
        if record.choices["peft"] == "lora" and record.provenance["sweep"] == "peft_methods"
    ]
    assert len(seeds) == 3
    for lora in seeds:
        assert lora.metrics["exact_match"] > lora.metrics["base_exact_match"] + 0.4

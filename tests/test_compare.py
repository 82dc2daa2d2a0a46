"""Two sets of records beside each other, and the gate."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from recorded.build import SERVER, make_record, peft, write_rows, write_runs, write_steps

from left_bench.core.errors import UserError
from left_bench.report.changes import compare
from left_bench.report.compare import failures, main
from left_bench.report.gate import parse_gate
from left_bench.spec.record import Record


def write_side(
    folder: Path, records: list[Record], *, slower: float = 1.0, right: int | None = None, draw: int = 0
) -> Path:
    write_runs(folder, records)
    for record in records:
        if record.status == "ok":
            rng = random.Random(f"{draw} {record.choices['peft']}")
            steps = [slower * (1 + 0.3 * ((i * 7) % 5)) * rng.uniform(0.97, 1.03) for i in range(40)]
            write_steps(folder / record.cell_id, steps)
            if right is not None:
                write_rows(folder / record.cell_id, right=[i < right for i in range(128)], nll=[1.0] * 128)
    return folder


def cells(speed: float = 800, **more: Any) -> list[Record]:
    return [
        make_record(
            changes=peft(name, kind=name) | more.get("changes", {}),
            tokens_per_second=speed,
            exact_match=more.get("score"),
        )
        for name in ("lora", "ia3")
    ]


def judged(found: Any, metric: str) -> list[str]:
    return [change.judgement for change in found.changes if change.metric == metric]


def test_the_same_records_show_no_change(tmp_path: Path) -> None:
    a = write_side(tmp_path / "a", cells())
    result = compare(a, a)
    assert len(result.matched) == 2 and {change.judgement for change in result.changes} == {"same", "not resolved"}
    assert not result.only_a and not result.only_b and not result.differing


def test_json_holds_the_whole_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_side(tmp_path / "a", cells(800))
    b = write_side(tmp_path / "b", cells(800 / 1.1), slower=1.1, draw=1)
    assert main([str(a), str(b), "--json", "--fail-on", "train_tokens_per_second<-5%"]) == 1
    told = json.loads(capsys.readouterr().out)
    result = compare(a, b)
    assert told["matched"] == [name for name, _, _ in result.matched] and len(told["failed"]) == 2
    changes = told["changes"]
    assert [(change["metric"], change["judged"]) for change in changes] == [
        (c.metric, c.judgement) for c in result.changes
    ]
    speed = next(change for change in changes if change["metric"] == "train_tokens_per_second")
    low, high = speed["interval"]
    assert speed["unit"] == "tokens/s" and low < speed["after"] - speed["before"] < high
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "95 % interval" in capsys.readouterr().out


def test_a_slowdown_beyond_the_steps_noise_fails_the_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_side(tmp_path / "a", cells(800))
    b = write_side(tmp_path / "b", cells(800 / 1.1), slower=1.1, draw=1)
    result = compare(a, b)
    assert judged(result, "train_tokens_per_second") == ["worse", "worse"]
    assert main([str(a), str(b), "--fail-on", "train_tokens_per_second<-5%"]) == 1
    out = capsys.readouterr().out
    assert "FAILED train_tokens_per_second<-5%: lora went from 800 to 727" in out and "-9.1%" in out
    assert main([str(a), str(b), "--fail-on", "train_tokens_per_second<-20%"]) == 0
    assert main([str(a), str(b)]) == 0  # without a gate it only tells
    assert main([str(b), str(a), "--fail-on", "train_tokens_per_second<-5%"]) == 0  # faster is no regression


def test_noise_passes_the_gate(tmp_path: Path) -> None:
    a, b = write_side(tmp_path / "a", cells(800)), write_side(tmp_path / "b", cells(799), draw=1)
    assert judged(compare(a, b), "train_tokens_per_second") == ["not resolved", "not resolved"]
    assert main([str(a), str(b), "--fail-on", "train_tokens_per_second<-0.01%"]) == 0


def test_quality_is_paired_by_row(tmp_path: Path) -> None:
    a = write_side(tmp_path / "a", cells(score=64 / 128), right=64)
    b = write_side(tmp_path / "b", cells(score=56 / 128), right=56)
    result = compare(a, b)
    [change, _] = [change for change in result.changes if change.metric == "exact_match"]
    assert change.how == "paired rows" and change.judgement == "worse" and change.interval is not None
    gate = parse_gate("exact_match<-0.02")
    assert len(failures(result, [gate])) == 2 and not failures(result, [parse_gate("exact_match<-0.1")])


def test_what_is_counted_changes_by_any_difference(tmp_path: Path) -> None:
    a = write_side(tmp_path / "a", [make_record(trainable=1000)])
    b = write_side(tmp_path / "b", [make_record(trainable=1001)])
    assert judged(compare(a, b), "trainable_params") == ["worse"]
    assert main([str(a), str(b), "--fail-on", "trainable_params>0"]) == 1
    assert main([str(a), str(b), "--fail-on", "trainable_params>1%"]) == 0


def test_one_measurement_each_is_shown_not_judged_and_gated_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_side(tmp_path / "a", [make_record(peak_mib=1000)])
    b = write_side(tmp_path / "b", [make_record(peak_mib=1200)])
    assert judged(compare(a, b), "peak_memory_bytes") == ["not judged"]
    assert main([str(a), str(b), "--fail-on", "peak_memory_bytes>10%"]) == 1
    assert "one measurement each" in capsys.readouterr().out


def test_seeds_judge_what_was_measured_once_each(tmp_path: Path) -> None:
    sides = []
    for name, extra in (("a", 0), ("b", 100)):
        records = [make_record(changes={"seed": seed}, peak_mib=1000 + extra + seed) for seed in range(3)]
        sides.append(write_side(tmp_path / name, records))
    assert judged(compare(*sides), "peak_memory_bytes") == ["worse"]


def test_versions_machine_and_commit_may_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_side(tmp_path / "a", [make_record(provenance={"commit": "abc"})])
    newer = make_record(machine=SERVER, provenance={"commit": "def"})
    newer = newer.model_copy(
        update={"environment": newer.environment | {"versions": newer.environment["versions"] | {"peft": "0.99.0"}}}
    )
    b = write_side(tmp_path / "b", [newer])
    assert len(compare(a, b).matched) == 1
    assert main([str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert "version of peft: 0.21.0 in A, 0.99.0 in B" in out and "commit: abc in A, def in B" in out
    assert "machine: AMD Ryzen 7 7840U (1f6c2a9b) in A, Intel Xeon Gold 6338 (9d03e7aa) in B" in out


def test_settings_match_unless_they_are_ignored(tmp_path: Path) -> None:
    a = write_side(tmp_path / "a", [make_record(changes={"training.steps": 40})])
    b = write_side(tmp_path / "b", [make_record(changes={"training.steps": 50})])
    result = compare(a, b)
    assert not result.matched and len(result.only_a) == len(result.only_b) == 1
    assert len(compare(a, b, ignore=["training.steps"]).matched) == 1
    assert len(compare(a, b, ignore=["training"]).matched) == 1
    with pytest.raises(UserError, match=r"did you mean 'training\.steps'"):
        compare(a, b, ignore=["training.step"])
    assert main([str(a), str(b), "--fail-on", "exact_match<0"]) == 2  # a gate that compared nothing does not pass


def test_a_setting_that_came_with_a_version_is_told_and_does_not_part_the_cells(tmp_path: Path) -> None:
    a = write_side(tmp_path / "a", [make_record()])
    b = write_side(tmp_path / "b", [make_record(changes={"training.shiny": True})])
    result = compare(a, b)
    assert len(result.matched) == 1 and ("setting training.shiny", "not there", "True") in result.differing


def test_missing_and_failing_cells_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_side(tmp_path / "a", [*cells(), make_record(changes=peft("dora", kind="dora"))])
    broken = make_record(changes=peft("ia3", kind="ia3"), status="failed", reason="x")
    b = write_side(tmp_path / "b", [cells()[0], broken, make_record(changes=peft("vera", kind="vera"))])
    assert main([str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert "only in A: dora" in out and "only in B: vera" in out and "ia3: ok in A, failed in B" in out
    assert main([str(a), str(b), "--fail-on", "missing"]) == 1
    out = capsys.readouterr().out
    assert "FAILED missing: B has no dora" in out and "FAILED ia3 was ok and is failed now" in out


def test_a_summary_is_appended_for_github(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = "<script>|x"
    a = write_side(tmp_path / "a", [make_record(choices={"peft": hostile}), make_record(changes=peft("lora"))])
    b = write_side(
        tmp_path / "b", [make_record(choices={"peft": hostile}, exact_match=0.1), make_record(changes=peft("lora"))]
    )
    summary = tmp_path / "summary.md"
    summary.write_text("before\n", encoding="utf-8")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert main([str(a), str(b), "--fail-on", "exact_match<-0.2"]) == 1
    text = summary.read_text(encoding="utf-8")
    assert text.startswith("before\n") and "## left-bench compare" in text and "| exact match | 0.500 | 0.100 |" in text
    assert "<script>" not in text and "&lt;script&gt;" in text and "FAILED" in text


def test_the_newest_run_of_a_cell_counts(tmp_path: Path) -> None:
    a = write_side(tmp_path / "a", [make_record(exact_match=0.5)])
    old, new = make_record(exact_match=0.1), make_record(exact_match=0.5, minute=30)
    write_runs(tmp_path / "b" / "1", [old])
    write_runs(tmp_path / "b" / "2", [new])
    merged = tmp_path / "c"
    for i, record in enumerate((old, new)):
        (merged / f"run{i}").mkdir(parents=True)
        (merged / f"run{i}" / "record.json").write_text(record.model_dump_json(exclude_none=True), encoding="utf-8")
    assert judged(compare(a, merged), "exact_match") == ["not resolved"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exact_mach<-0.1", "did you mean 'exact_match'"),
        ("exact_match", "write METRIC, < or >"),
        ("exact_match<abc", "write METRIC, < or >"),
        ("exact_match<-0.1; import os", "write METRIC, < or >"),
    ],
)
def test_a_gate_that_is_none_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    a = write_side(tmp_path / "a", [make_record()])
    assert main([str(a), str(a), "--fail-on", text]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "before", "after", "hit"),
    [
        ("a_metric<-5%", 100, 94, True),
        ("a_metric<-5%", 100, 95, False),
        ("a_metric<=-5%", 100, 95, True),
        ("a_metric>5%", -1.0, -0.9, True),
        ("a_metric<-0.5", 2, 1.4, True),
        ("a_metric>0", 1, 1, False),
        ("a_metric<-5%", 0, -1, True),
    ],
)
def test_gates_take_shares_and_differences(
    monkeypatch: pytest.MonkeyPatch, text: str, before: float, after: float, hit: bool
) -> None:
    from left_bench.spec.record import METRICS, Metric

    monkeypatch.setitem(METRICS, "a_metric", Metric("", "higher", "fact", ""))
    assert parse_gate(text).hit(before, after) is hit


def test_records_are_wanted_on_both_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_side(tmp_path / "a", [make_record()])
    (tmp_path / "empty").mkdir()
    assert main([str(a), str(tmp_path / "empty")]) == 2 and "B=" in capsys.readouterr().err
    (tmp_path / "b" / "x").mkdir(parents=True)
    (tmp_path / "b" / "x" / "record.json").write_text(json.dumps({"schema_version": 0}), encoding="utf-8")
    assert main([str(a), str(tmp_path / "b")]) == 2 and "schema version 0" in capsys.readouterr().err


DORA = peft("lora") | {"peft.config.use_dora": True}


def test_an_argument_that_one_side_alone_has_makes_another_cell(tmp_path: Path, capsys: Any) -> None:
    """DoRA is LoRA with one argument more: neither takes the other's place."""
    full = make_record()
    a = write_side(tmp_path / "a", [full, make_record(changes=peft("lora"))])
    b = write_side(tmp_path / "b", [full, make_record(changes=DORA, tokens_per_second=500)])
    result = compare(a, b)
    assert len(result.matched) == len(result.only_a) == len(result.only_b) == 1
    assert main([str(a), str(b), "--fail-on", "missing"]) == 1
    both = [make_record(changes=DORA, tokens_per_second=500), full, make_record(changes=peft("lora"))]
    c = write_side(tmp_path / "c", both)
    assert main([str(a), str(c), "--fail-on", "train_tokens_per_second<-5%", "--fail-on", "missing"]) == 0
    assert len(compare(a, b, ignore=["peft.config.use_dora"]).matched) == 2


def test_rows_of_the_same_content_are_the_same_wherever_they_lie(tmp_path: Path) -> None:
    def side(name: str, content: str) -> Path:
        where = {"data.source": "jsonl", "data.path": f"/{name}/rows.jsonl", "data.content": content}
        return write_side(tmp_path / name, [make_record(changes=where)])

    assert len(compare(side("a", "one"), side("b", "one")).matched) == 1
    assert not compare(side("c", "one"), side("d", "two")).matched


def test_a_gate_does_not_pass_over_what_cannot_be_read_or_has_no_such_metric(tmp_path: Path, capsys: Any) -> None:
    a = write_side(tmp_path / "a", cells(score=0.5))
    b = write_side(
        tmp_path / "b", [cells(score=0.5)[0], make_record(changes=peft("ia3", kind="ia3"), exact_match=None)]
    )
    assert main([str(a), str(b), "--fail-on", "exact_match<-0.02"]) == 1
    assert "ia3 has no exact_match in B" in capsys.readouterr().out
    c = write_side(tmp_path / "c", cells(score=0.5))
    [torn, *_] = c.glob("*lora*/record.json")
    torn.write_text(torn.read_text()[:100])
    assert main([str(a), str(c)]) == 0
    assert main([str(a), str(c), "--fail-on", "exact_match<-0.02"]) == 1
    assert "FAILED B has a file that cannot be read" in capsys.readouterr().out

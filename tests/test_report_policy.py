"""What a report says of cells that go on from others, and of rewards along training."""

from __future__ import annotations

from pathlib import Path

from recorded.build import make_record, peft, write_runs

from left_bench.report.command import write_reports
from left_bench.spec.record import PolicyPoint, Record


def point(step: int, reward: float, **other: float) -> PolicyPoint:
    known = {"reward_spread": 0.4, "equal_groups": 0.25, "answer_length": 3.5, "cut_answers": 0, "entropy_nats": 1.25}
    known |= {"clipped": 0, "generated_tokens": 112, "generating_seconds": 2, "rewarding_seconds": 0.01}
    return PolicyPoint(step=step, reward=reward, **known | other)


def document(tmp_path: Path, *records: Record) -> str:
    write_runs(tmp_path / "runs", list(records))
    [page] = write_reports([tmp_path / "runs"], out=tmp_path / "out")
    return page.read_text(encoding="utf-8")


def test_rewards_stand_from_the_first_step_to_the_last_tenth(tmp_path):
    plain = make_record(changes=peft("lora"))
    rewarded = make_record(changes=peft("dora"), minute=1)
    points = [point(step, 0.1 * step, kl_nats=0.01 * step) for step in range(1, 21)]
    metrics = rewarded.metrics | {"train_seconds": 80.0}
    rewarded = rewarded.model_copy(update={"policy": points, "metrics": metrics})
    text = document(tmp_path, plain, rewarded)
    [line] = [line for line in text.partition("## Rewards along training")[2].splitlines() if "→ 1.95" in line]
    assert "0.100 → 1.95" in line and "0.0100 → 0.195" in line and "1.25 → 1.25" in line
    assert "50%" in line  # 40 of 80 seconds were spent sampling


def test_the_chain_of_cells_stands_first_cell_first(tmp_path):
    links = [{"cell": "first-cell-1", "objective": "sft"}, {"cell": "second-cell-2", "objective": "dpo"}]
    made = make_record(changes=peft("lora"))
    record = made.model_copy(update={"provenance": made.provenance | {"started_from": links}})
    text = document(tmp_path, record)
    assert "`first-cell-1` (sft) → `second-cell-2` (dpo)" in text.partition("## Where these cells began")[2]


def test_without_such_cells_nothing_is_said(tmp_path):
    text = document(tmp_path, make_record(changes=peft("lora")))
    assert "Rewards along training" not in text and "Where these cells began" not in text

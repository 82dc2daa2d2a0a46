"""`left-bench init`: what it writes runs as it is printed."""

from __future__ import annotations

import json
import shlex

import pytest

from left_bench.cli.init import main, write_project

QUICK = [
    *("model=tiny_llama", "precision=fp32", "hardware=cpu", "hardware.threads=1", "training.steps=1", "tracker=none"),
    *("eval=loss", "seed=0", "peft=mine"),
]


def test_the_printed_command_runs(tmp_path, monkeypatch, capsys, left_bench):
    monkeypatch.chdir(tmp_path)
    assert main(["my project"]) == 0
    printed = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert printed[0] == "left-bench" and printed[-1] == "+sweep=mine"
    answer = left_bench(*printed[1:], *QUICK)
    assert answer.code == 0, answer.err
    (record,) = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*/record.json")]
    assert record["status"] == "ok"
    assert record["choices"]["peft"] == record["choices"]["data"] == "mine"
    assert record["config"]["peft"]["config"]["r"] == 4
    assert (tmp_path / "reports" / "mine.md").is_file()


def test_nothing_is_overwritten(tmp_path, left_bench):
    files = write_project(tmp_path)
    files[0].write_text("mine")
    answer = left_bench("init", str(tmp_path))
    assert answer.code == 2
    assert "is there already" in answer.err and len(answer.err.splitlines()) == 1
    assert files[0].read_text() == "mine"


def test_no_placeholder_is_left(tmp_path):
    for path in write_project(tmp_path / "new"):
        assert "@" not in path.read_text().replace("# @package", "")


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["--help"]])
def test_usage(arguments, capsys):
    assert main(arguments) == (0 if arguments == ["--help"] else 2)
    assert "usage" in capsys.readouterr().out


def test_rows_are_alike_and_distinct(tmp_path):
    (rows,) = [path for path in write_project(tmp_path) if path.name == "rows.jsonl"]
    results = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len({row["question"] for row in results}) == 20

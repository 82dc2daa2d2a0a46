"""The commands beside a run: wrong arguments are one line, a reader that leaves is no error."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from recorded.build import make_record, peft, write_runs


@pytest.fixture
def records(tmp_path, monkeypatch):
    """Two records in `runs`, with the test in their folder."""
    write_runs(tmp_path / "runs", [make_record(), make_record(changes=peft("lora"))])
    (tmp_path / "file").write_text("no folder")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "nowhere"], ["nowhere"]),
        (["report", "file"], ["file"]),
        (["report", "runs", "--out", "file"], ["file"]),
        (["report", "runs", "--out", "file/deeper"], ["file"]),
        (["report", "runs", "--format", "pdf"], ["pdf", "md"]),
        (["report", "runs", "--where", "1 +"], ["1 +"]),
        (["report", "runs", "--where", "__import__('os')"], ["__import__"]),
        (["report", "runs", "--baseline", "peft=nope"], ["peft=nope"]),
        (["report", "runs", "--group-by", "nope"], ["nope"]),
        (["report", "runs", "--budget-memory", "lots"], ["lots", "6GiB"]),
        (["report", "runs", "--min-exact-macth", "0.5"], ["min-exact-macth", "exact"]),
        (["report", "runs", "--min-exact-match", "half"], ["half"]),
        (["compare", "runs", "nowhere"], ["nowhere"]),
        (["compare", "runs", "runs", "--fail-on", "speed<-5%"], ["speed"]),
        (["compare", "runs", "runs", "--fail-on", "exact_match"], ["exact_match"]),
        (["compare", "runs", "runs", "--where", "peft =="], ["peft =="]),
        (["export", "nope"], ["nope"]),
        (["export", "runs"], ["runs"]),
        (["export", "runs", "--format", "parquet"], ["--out"]),
        (["export", "runs", "--format", "xml"], ["xml", "model-card"]),
        (["export", "runs", "--format", "csv", "--out", "file/cells.csv"], ["file"]),
        (["export", "runs", "--format", "parquet", "--out", "file/cells.parquet"], ["file"]),
        (["export", "runs", "--to", "merge", "out"], ["merge", "did you mean 'merged'"]),
        (["export", "runs", "--to", "merged", "out"], ["runs", "2 cells"]),
        (["export", "runs", "--to", "merged", "file"], ["file"]),
        (["export", "runs", "--to", "merged", "out", "--format", "csv"], ["--format", "--to"]),
        (["export", "runs", "--to", "merged", "out", "--push", "a b"], ["a b", "owner/name"]),
        (["export", "runs", "--to", "gguf", "out", "--llama-cpp", "nowhere"], ["nowhere", "convert_hf_to_gguf.py"]),
        (["export", "runs", "--push", "me/mine"], ["--push", "--to"]),
        (["best", "nowhere"], ["nowhere"]),
        (["best", "runs", "--metric", "exact_macth"], ["exact_macth", "did you mean 'exact_match'"]),
        (["best", "runs", "--metric", "wall_seconds"], ["wall_seconds", "not a score"]),
        (["best", "runs", "--min-exact-macth", "0.5"], ["min-exact-macth", "exact"]),
        (["chat", "nope"], ["nope"]),
        (["chat", "runs"], ["runs", "2 cells"]),
        (["chat", "runs", "--temperature", "-1"], ["--temperature -1"]),
        (["train", "runs"], ["--all-rows"]),
        (["train", "runs", "--all-rows"], ["runs", "2 cells"]),
        (["track", "runs", "--tracker", "wandbb"], ["wandbb", "did you mean 'wandb'"]),
        (["track", "runs", "--tracker", "jsonl", "--set", "nope=1"], ["nope=1"]),
        (["track", "nowhere", "--tracker", "jsonl"], ["nowhere"]),
        (["track", "runs", "--tracker", "jsonl", "--sweep", "nope"], ["nope"]),
        (["dashboard", "--sweep", "x", "--metric", "exact_macth"], ["exact_macth", "did you mean 'exact_match'"]),
        (["init", "file"], ["file"]),
        (["init", "file/deeper"], ["file/deeper"]),
        (["list", "pefd"], ["pefd", "peft"]),
        (["plan", "runs"], ["runs", "GROUP=OPTION"]),
        (["plan", "peft=lorra"], ["lorra", "did you mean 'lora'"]),
        (["plan", "peft.config.r=x"], ["peft.config.r='x'"]),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, words, records, left_bench):
    before = sorted(records.rglob("*"))
    answer = left_bench(*arguments)
    assert answer.code == 2, answer
    assert "Traceback" not in answer.err
    assert len(answer.err.strip().splitlines()) == 1, answer.err
    for word in words:
        assert word in answer.err, answer.err
    assert sorted(records.rglob("*")) == before  # nothing is half written


@pytest.mark.parametrize("command", ["report", "best", "compare", "export", "chat", "train", "track", "dashboard"])
@pytest.mark.parametrize("option", [[], ["--nonsense"]])
def test_what_argparse_refuses_is_its_usage_and_exit_code_2(command, option, records, left_bench):
    answer = left_bench(command, *option)
    assert answer.code == 2
    assert f"left-bench {command}: error:" in answer.err


@pytest.mark.parametrize(
    "command",
    ["report", "best", "compare", "export", "chat", "train", "track", "dashboard", "init", "doctor", "plan", "data"],
)
def test_every_command_has_help(command, left_bench):
    answer = left_bench(command, "--help")
    assert answer.code == 0
    assert f"left-bench {command}" in answer.out


def test_a_reader_that_leaves_is_no_error(tmp_path):
    """`left-bench list | head -1`."""
    left = subprocess.Popen(
        [sys.executable, "-m", "left_bench", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert left.stdout is not None and left.stderr is not None
    left.stdout.close()
    said = left.stderr.read()
    assert left.wait() in (1, 141)  # rich leaves with 1, where it was rich that wrote
    assert said == ""


@pytest.mark.skipif(shutil.which("env") is None, reason="no env")
@pytest.mark.parametrize("variables", [["-u", "HOME"], ["LANG=C", "LC_ALL=C"], ["TERM=dumb"], ["HOME=/nonexistent"]])
def test_bare_surroundings(variables, records):
    """No home, no locale, no terminal: a report is still made, and the cells are still named."""
    command = ["env", *variables, sys.executable, "-m", "left_bench", "report", "runs", "--out", "reports"]
    done = subprocess.run(command, cwd=records, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert list(Path(records / "reports").glob("*.md"))

"""`left-bench data`: a run's rows as its model reads them, told to a person or as JSON; no model is loaded."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_data import jsonl

from left_bench.cli.data import _print, _printable, describe, histogram


def written(folder: Path) -> str:
    rows: list[dict[str, Any]] = [{"prompt": f"Question {number}?", "answer": "a" * number} for number in range(12)]
    return jsonl(folder / "rows.jsonl", [*rows, {"prompt": "Question 11?", "answer": "again"}])


@pytest.fixture
def given_rows(tmp_path, monkeypatch):
    """Overrides for a file of thirteen rows, one of them without an answer, and two with one question."""
    monkeypatch.setenv("LEFT_BENCH_CACHE", str(tmp_path / "cache"))
    return [
        *("data=jsonl", f"data.path={written(tmp_path)}", "data.test_rows=4", "model=tiny_llama", "precision=fp32"),
        *("hardware=cpu", "training.max_length=16", "training.steps=5", "training.batch_size=2"),
    ]


def test_what_became_of_the_rows_is_said_and_no_model_is_made(given_rows, left_bench, tmp_path, monkeypatch):
    importlib.import_module("left_bench.worker.stages")  # imported below, it would keep what stands in for the loader

    monkeypatch.setattr("left_bench.model.load.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    answer = left_bench("data", *given_rows, "--rows", "1")
    assert answer.code == 0, answer
    lines = answer.out.splitlines()
    assert lines[0] == "data=jsonl for tiny_llama"
    assert lines[1].startswith("train ") and "test 4, dropped 1 (no prompt or answer)" in lines[1]
    assert "epochs" in lines[1] and "(longer than training.max_length=16)" in lines[1]
    assert "dropped: line 1: no answer" in lines
    assert any("tokens: from training.max_length=2" in line and line.endswith("on none is cut") for line in lines)
    assert any(line.startswith("training row 1: ") and "between" in line for line in lines)
    assert answer.out.rstrip().endswith("a\u27e7") and answer.out.count("\u27e6") == 2  # in the heading and the row
    assert not (tmp_path / "cache" / "models").exists()  # random weights are not drawn for it


def test_json_has_each_token_and_agrees_with_a_run(given_rows, left_bench, compose_cell, work_in_process):
    answer = left_bench("data", *given_rows, "--rows", "2", "--json")
    result = json.loads(answer.out)
    ran = work_in_process(compose_cell(*given_rows, "tracker=none", "eval.forgetting=false", "eval.max_new_tokens=2"))
    for name in ("train_rows", "test_rows", "dropped_rows", "repeated_rows", "truncated_rows", "train_epochs"):
        assert result[name] == ran["metrics"][name], name
    assert len(result["rows"]) == 2
    for row in result["rows"]:
        assert sum(token["loss"] for token in row["tokens"]) == row["loss_tokens"]
        assert row["runs"][-1]["loss"] and row["tokens"][-1]["loss"]
    counted = result["lengths"]["with_loss"]["histogram"]
    assert sum(item["rows"] for item in counted) == result["train_rows"]


def test_sets_of_rows_that_differ_are_shown_once_each(given_rows, left_bench):
    answer = left_bench("data", "-m", *given_rows, "training.max_length=16,64", "seed=0,1", "--json", "--rows=0")
    assert [json.loads(line)["max_length"] for line in answer.out.splitlines()] == [16, 64]


def test_a_test_set_that_is_drawn_from_says_how_many_there_are(given_rows, left_bench, tmp_path):
    apart = jsonl(tmp_path / "t.jsonl", [{"prompt": f"T{number}", "answer": "t"} for number in range(9)])
    answer = left_bench("data", *given_rows, f"data.test_path={apart}")
    assert "the test set has 9 different questions; data.test_rows=9 asks all of them" in answer.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rows.jsonl"], ["left-bench data: 'rows.jsonl' is no override", "KEY=VALUE"]),
        (["data=jsonl", "data.path=nowhere.jsonl"], ["data.path=nowhere.jsonl: no such file"]),
        (["--rows=-1"], ["--rows=-1: give the number of rows"]),
        (["--jsn"], ["--jsn: no such option"]),
        (["data=jsnl"], ["did you mean 'jsonl'"]),
    ],
)
def test_what_a_run_refuses_is_refused_in_one_sentence(arguments, words, left_bench):
    answer = left_bench("data", *arguments)
    assert answer.code == 2 and len(answer.err.strip().splitlines()) == 1, answer
    assert all(word in answer.err for word in words), answer.err


def test_a_combination_that_cannot_run_is_shown_with_its_reason(given_rows, left_bench):
    answer = left_bench("data", *given_rows, "peft=full", "quantization=nf4", "--rows=0")
    assert answer.code == 0 and "this cell will not run: full fine-tuning needs unquantized weights" in answer.out


@pytest.mark.parametrize(("terminal", "no_color"), [(True, False), (True, True), (False, False)])
def test_tokens_with_loss_are_coloured_where_there_is_colour(terminal, no_color, given_rows, compose_cell, tmp_path):
    cell = compose_cell(*given_rows)
    path = tmp_path / "shown"
    with path.open("w", encoding="utf-8") as file:
        console = Console(
            file=file, force_terminal=terminal, no_color=no_color, color_system="standard" if terminal else None
        )
        _print(describe(cell, rows=1), cell, console)
    shown = path.read_text(encoding="utf-8")
    coloured = terminal and not no_color
    assert ("\x1b[32m" in shown) == coloured
    assert ("\u27e6" in shown) == (not coloured)


def test_pairs_show_the_worse_answer(tmp_path, left_bench, monkeypatch):
    monkeypatch.setenv("LEFT_BENCH_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"P{n}", "chosen": "good", "rejected": "bad"} for n in range(3)]
    path = jsonl(tmp_path / "r.jsonl", rows)
    answer = left_bench(
        "data", "data=preferences", f"data.path={path}", "data.test_rows=1", "model=tiny_llama", "--rows=1"
    )
    assert answer.out.rstrip().endswith("the worse answer:\nbad<eos>")


def test_pictures_have_no_tokens_to_show(left_bench, tmp_path, monkeypatch):
    monkeypatch.setenv("LEFT_BENCH_CACHE", str(tmp_path / "cache"))
    answer = left_bench("data", "data=digits", "model=tiny_vit")
    assert answer.code == 0 and "pictures of 10 classes (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)" in answer.out


def test_nothing_in_a_row_steers_the_terminal():
    assert _printable("a\x1b[31mb\tc\nd\u202ee\x9b", "utf-8") == "a\\x1b[31mb\tc\nd\\x202ee\\x9b"
    assert _printable("é ✓", "ascii") == "\\xe9 \\u2713"


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=50))
def test_a_histogram_counts_every_row_once(lengths):
    bins = histogram(lengths)
    assert sum(item.rows for item in bins) == len(lengths) and len(bins) <= 8
    for length in lengths:
        assert sum(item.tokens_from <= length <= item.tokens_to for item in bins) == 1
    assert bins[0].rows and bins[-1].rows

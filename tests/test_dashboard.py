"""Dashboards as code: what is built, and that saving asks for a login in one sentence."""

from __future__ import annotations

import importlib.util
import json

import pytest

from left_bench.tracker.dashboard import method_colors, quality_metric

wanted = pytest.mark.skipif(
    importlib.util.find_spec("wandb_workspaces") is None, reason="pip install 'left-bench[dashboard]' for dashboards"
)
NAMED = {"sweep": "peft_methods", "project": "p", "metric": "exact_match", "colors": {"a-1": "#0072b2"}}


@wanted
def test_the_workspace_shows_what_the_tracker_logs():
    from left_bench.tracker.dashboard import specification

    plain = specification(**NAMED)
    section = plain["workspace"]["spec"]["section"]
    shown = [panel for item in section["panelBankConfig"]["sections"] for panel in item["panels"]]
    kinds = [panel["viewType"] for panel in shown]
    assert {"Scatter Plot", "Bar Chart", "Parallel Coordinates Plot", "Run History Line Plot", "Run Comparer"} == set(
        kinds
    )
    scatter, bars, parallel = (panel["config"] for panel in shown[:3])
    assert (scatter["xAxis"], scatter["yAxis"]) == ("summary:peak_memory_gib", "summary:exact_match")
    assert "summary_metrics.peak_memory_gib/train" in bars["metrics"]
    accessors = [column["accessor"] for column in parallel["columns"]]
    assert {"config:peft.value.name", "config:quantization.value.name", "summary:exact_match"} <= set(accessors)
    assert shown[3]["config"]["xAxis"] == "train/tokens"
    assert section["customRunColors"]["a-1"] == "#0072b2"
    [runs] = section["runSets"]
    assert "sweep_name" in json.dumps(runs["filters"]) and "peft_methods" in json.dumps(runs["filters"])


@wanted
def test_the_report_has_the_same_panels_over_the_same_runs():
    from left_bench.tracker.dashboard import build_report, panels

    report = build_report(**NAMED)
    grids = [block for block in report.blocks if type(block).__name__ == "PanelGrid"]
    assert [len(grid.panels) for grid in grids] == [len(shown) for shown in panels("exact_match").values()]
    assert all("sweep_name" in grid.runsets[0].filters for grid in grids)
    assert "peft_methods" in report.title


def test_runs_of_one_method_share_a_colour():
    colors = method_colors({"a": "lora", "b": "ia3", "c": "lora"})
    assert colors["a"] == colors["c"] != colors["b"]


def test_quality_is_what_was_scored():
    assert quality_metric(["eval_loss", "rouge_l"]) == "rouge_l"
    assert quality_metric(["eval_loss"]) == quality_metric([]) == "eval_loss"


@wanted
def test_saving_without_a_login_is_one_sentence(left_bench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    answer = left_bench("dashboard", "--sweep", "peft_methods")
    assert answer.code == 2
    assert "saving needs a login" in answer.err and len(answer.err.splitlines()) == 1
    answer = left_bench("dashboard", "--sweep", "peft_methods", "--out", "spec.json")
    assert answer.code == 0, answer
    assert set(json.loads((tmp_path / "spec.json").read_text())) == {"workspace", "report"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dashboard", "--sweep", "x", "--metric", "exact_mach"], ["did you mean 'exact_match'?"]),
        (["track", "runs", "--tracker", "wandbb"], ["did you mean 'wandb'?"]),
        (["track", "runs", "--tracker", "jsonl", "--set", "nope=1"], ["--set nope=1"]),
        (["track", "nowhere", "--tracker", "jsonl"], ["RUNS=nowhere"]),
    ],
)
def test_wrong_requests_are_one_sentence(arguments, words, left_bench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = left_bench(*arguments)
    assert answer.code == 2, answer
    assert len(answer.err.splitlines()) == 1
    for word in words:
        assert word in answer.err


@wanted
def test_a_sweep_that_is_not_there_is_named(left_bench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "sweeps").mkdir(parents=True)
    (tmp_path / "runs" / "sweeps" / "smoke.json").write_text('{"name": "smoke", "cells": []}')
    answer = left_bench("dashboard", "--sweep", "smok", "--out", "x")
    assert answer.code == 2
    assert "did you mean 'smoke'?" in answer.err

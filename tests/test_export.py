"""Model cards and tables for other tools."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas
import pytest
import yaml
from huggingface_hub import ModelCard
from recorded.build import make_record, peft, write_runs

from left_bench.cli.export import main
from left_bench.report.export import model_card

RECORDED = Path(__file__).parent / "recorded"


def test_a_model_card_says_what_the_record_says(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    record = make_record(changes=peft("lora") | {"model.name_or_path": "owner/a-model", "quantization.name": "nf4"})
    write_runs(tmp_path, [record])
    assert main([record.cell_id[:25], "--runs", str(tmp_path), "--format", "model-card"]) == 0
    text = capsys.readouterr().out
    card = ModelCard(text).data
    assert card.base_model == "owner/a-model" and card.library_name == "peft" and "nf4" in card.tags
    scores = {result.metric_name: result for result in card.eval_results}
    assert scores["exact_match"].metric_value == 0.5 and scores["exact_match"].dataset_name == "chain_sum"
    assert scores["eval_loss"].metric_args["before_training"] == 2.413
    plain = yaml.safe_load(text.split("---")[1])
    assert plain["model-index"][0]["name"] == "smollm2_135m-lora"
    assert record.cell_id in text


def test_what_is_no_hub_id_is_no_base_model() -> None:
    assert "base_model" not in model_card(make_record())


def test_hostile_names_stay_text() -> None:
    hostile = 'x: y\n- !!python/object:os.system "|<script>'
    record = make_record(changes={"model.name": hostile, "data.task": hostile})
    record = record.model_copy(update={"cell_id": "a\nb: c"})
    plain = yaml.safe_load(model_card(record).split("---\n")[1])
    assert plain["model-index"][0]["name"].startswith("x: y - !!python/object") and "b" not in plain


def test_a_csv_file_computes_nothing_in_a_spreadsheet(tmp_path: Path) -> None:
    names = ["=HYPERLINK(1)", "+1+cmd", "-2+3", "@SUM(A1)", "-9", "plain-name"]
    write_runs(
        tmp_path, [make_record(changes={"model.name": name}, metrics={"forgetting_nats": -0.5}) for name in names]
    )
    assert main([str(tmp_path), "--format", "csv", "--out", str(tmp_path / "all.csv")]) == 0
    table = pandas.read_csv(tmp_path / "all.csv", dtype=str)
    assert sorted(table["config.model.name"]) == sorted([*("'" + name for name in names[:4]), *names[4:]])
    assert set(table["forgetting_nats"]) == {"-0.5"}


def test_tables_hold_what_the_records_hold(tmp_path: Path) -> None:
    for name in ("csv", "parquet"):
        out = tmp_path / f"x.{name}"
        assert main([str(RECORDED / "methods"), "--format", name, "--out", str(out), "--where", "status == 'ok'"]) == 0
    frames = pandas.read_csv(tmp_path / "x.csv"), pandas.read_parquet(tmp_path / "x.parquet")
    for frame in frames:
        assert len(frame) == 6 and "config.training.steps" in frame and frame["exact_match"].max() == 0.640625


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "--runs", "no/such"], "no folder no/such"),
        (["smollm3_135m-none-lora-bf16-chain_sum", "--runs", str(RECORDED / "ranks")], "did you mean 'smollm2"),
        ([str(RECORDED / "ranks")], "a model card is of one cell, and these are 7"),
        ([str(RECORDED / "ranks"), "--format", "card"], "did you mean 'model-card'"),
        ([str(RECORDED / "ranks"), "--format", "parquet"], "name a file with --out"),
        ([str(RECORDED / "random_weights"), "--where", "peft == 'lora'"], "random weights are not scored"),
        ([str(RECORDED / "methods"), "--where", "status == 'oom'"], "its status is oom"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_table_names_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = shutil.copytree(RECORDED / "ranks", tmp_path / "runs")
    torn = sorted(runs.glob("*/record.json"))[0]
    torn.write_text("{")
    assert main([str(runs), "--format", "csv", "--out", str(tmp_path / "x.csv")]) == 0
    assert str(torn) in capsys.readouterr().err


def test_pictures_have_a_task_of_their_own() -> None:
    record = make_record(changes={"model.task": "image_classification"})
    assert "pipeline_tag: image-classification" in model_card(record)
    assert "pipeline_tag: text-generation" in model_card(make_record())

"""Models that read a text and tell a number: rows, the squared error, correlations, a cell that learns."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from left_bench.core.errors import UserError
from left_bench.data import collate
from left_bench.grid.rules import why_unsupported
from left_bench.model.load import load_model, load_rows_of, open_pretrained
from left_bench.spec.record import outcome_of
from left_bench.spec.row_scores import ANSWER_METRICS
from left_bench.spec.run_files import CELL_NAME
from left_bench.training.loss import AnswerLoss
from left_bench.worker import reload_check

COLUMNS = ("data=jsonl", "data.prompt_column=text", "data.answer_column=score")
BERT = ("model=tiny_bert", "model.task=regression", *COLUMNS, "training.max_length=64")
METRICS = "data.metrics=[pearson,spearman]"


def write_rows(path: Path, rows: int, **changes: object) -> Path:
    """Texts whose number is the share of `z` among their letters."""
    draw = random.Random(1)
    lines = []
    for number in range(rows):
        word = "".join(draw.choices("za", weights=(draw.random(), draw.random()), k=10)) + chr(97 + number % 26)
        lines.append(json.dumps({"text": word, "score": word[:10].count("z") / 10} | changes) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def splits_of(cell):
    folder, reader = open_pretrained(cell)
    return load_rows_of(cell, reader, folder=folder), reader, folder


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_are_those_of_scipy(ties):
    from scipy.stats import pearsonr, spearmanr

    draw = random.Random(ties)
    right = [draw.randint(0, 5) if ties else draw.random() for _ in range(50)]
    told = [value + draw.gauss(0, 1) for value in right]
    texts = [list(map(str, values)) for values in (told, right)]
    assert ANSWER_METRICS["pearson"].of_answers(*texts) == pytest.approx(pearsonr(told, right).statistic)
    assert ANSWER_METRICS["spearman"].of_answers(*texts) == pytest.approx(spearmanr(told, right).statistic)
    assert ANSWER_METRICS["pearson"].of_answers(["1"] * 50, texts[1]) == 0.0


def test_the_loss_is_the_squared_error_and_the_models_own(tiny_cell, tmp_path):
    cell = tiny_cell(*BERT, f"data.path={write_rows(tmp_path / 'rows.jsonl', 20)}")
    splits, reader, folder = splits_of(cell)
    model, _ = load_model(cell, folder=folder, device="cpu", classes=splits.classes)
    assert splits.classes == ["score"] and model.config.num_labels == 1
    assert model.config.problem_type == "regression"
    batch = collate(splits.train, pad_id=reader.pad_token_id)
    assert batch.targets.tolist() == pytest.approx([float(row.reference) for row in splits.train])
    model.eval()
    with torch.no_grad():
        outputs = model(**batch.inputs(), labels=batch.targets)
        losses = AnswerLoss(model).of_tokens(batch)
    assert torch.allclose(losses, (outputs.logits[:, 0] - batch.targets) ** 2)
    assert losses.mean().item() == pytest.approx(outputs.loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"score": "high"}, "'high' is not a number"),
        ({"score": "nan"}, "'nan' is not a number"),
        ({"score": 2}, "all rows have the one number 2"),
    ],
)
def test_what_holds_no_numbers_is_refused_in_one_sentence(changes, words, tiny_cell, tmp_path):
    cell = tiny_cell(*BERT, f"data.path={write_rows(tmp_path / 'rows.jsonl', 20, **changes)}")
    with pytest.raises(UserError, match=words) as refused:
        splits_of(cell)
    assert "data.answer_column='score'" in str(refused.value) and "\n" not in str(refused.value)


def test_two_texts_may_have_a_number(tiny_cell):
    cell = tiny_cell("model=minilm_l6", "model.task=regression", "data=stsb", "training.max_length=64")
    assert (cell.data.prompt_column, cell.data.second_column) == ("sentence1", "sentence2")
    assert cell.eval.metrics == ["pearson", "spearman"]
    assert why_unsupported(cell) is None


@pytest.fixture(scope="module")
def learned(tiny_cell, work_in_process, tmp_path_factory):
    from left_bench.pretrained import model_folder

    folder = tmp_path_factory.mktemp("bert")
    shutil.copytree(model_folder(tiny_cell("model=tiny_bert").model, dtype="float32"), folder / "published")
    cell = tiny_cell(
        *(*BERT, f"model.name_or_path={folder / 'published'}", f"data.path={write_rows(folder / 'rows.jsonl', 220)}"),
        *("peft=houlsby", "training.steps=150", "training.batch_size=32", "training.learning_rate=2e-2", METRICS),
        *("data.train_rows=150", "data.test_rows=50", "data.validation_rows=16"),
    )
    result = work_in_process(cell)
    run_dir = result.pop("run_dir")
    (run_dir / CELL_NAME).write_text(cell.model_dump_json(by_alias=True), encoding="utf-8")
    record = outcome_of(cell, "ok", None, started_at="2026-01-01T00:00:00Z", measured=result)
    record.write(run_dir)
    return record, run_dir


def test_a_published_encoder_learns_the_numbers(learned):
    record, run_dir = learned
    scores = {score.metric: score for score in record.scores}
    lines = [json.loads(line) for line in (run_dir / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    right = np.array([float(line["reference"]) for line in lines])
    told = np.array([float(line["prediction"]) for line in lines])
    assert scores["pearson"].value > 0.8
    assert scores["pearson"].value == pytest.approx(np.corrcoef(told, right)[0, 1])
    assert record.metrics["eval_loss"] == pytest.approx(((told - right) ** 2).mean(), rel=1e-3)
    assert record.metrics["eval_loss"] < 0.4 * right.var()
    assert all(scores[name].stderr > 0 and scores[name].base_value is None for name in ("pearson", "spearman"))
    assert "eval_perplexity" not in record.metrics  # the squared error is no likelihood


def test_an_error_may_be_large_and_is_no_divergence(tiny_cell, work_in_process, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", 20)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps(row | {"score": 1000 * row["score"]}) + "\n" for row in rows), encoding="utf-8")
    result = work_in_process(tiny_cell(*BERT, f"data.path={path}", "peft=lora"))
    assert result["metrics"]["train_loss"] > 1000


def test_what_was_saved_tells_the_same_numbers(learned):
    assert reload_check.compare_losses(learned[1]) == reload_check.EQUAL


def test_the_report_shows_the_correlations(learned, left_bench, tmp_path):
    assert left_bench("report", str(learned[1].parent), "--out", str(tmp_path)).code == 0
    (report,) = tmp_path.glob("*.md")
    assert "Pearson" in report.read_text(encoding="utf-8")


def test_an_adapter_that_cannot_be_merged_is_refused_in_one_sentence(learned, left_bench, tmp_path):
    done = left_bench("export", str(learned[1]), "--to", "merged", str(tmp_path / "out"))
    assert done.code == 2 and "cannot be merged" in done.err and len(done.err.strip().splitlines()) == 1

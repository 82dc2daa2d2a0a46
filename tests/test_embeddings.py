"""Models whose vectors of texts are compared: pairs, the contrastive loss, ranks, a cell that learns."""

from __future__ import annotations

import json
import math
import random
import shutil

import pytest
import torch

from left_bench.data import collate
from left_bench.evaluation.reading import ranks
from left_bench.grid.rules import why_unsupported
from left_bench.methods.attach import attach_adapter
from left_bench.model.load import load_model, load_rows_of, open_pretrained
from left_bench.spec.record import outcome_of
from left_bench.spec.row_scores import ANSWER_METRICS
from left_bench.spec.run_files import CELL_NAME
from left_bench.training.loss import AnswerLoss
from left_bench.worker import reload_check

BERT = ("model=tiny_bert", "model.task=embeddings", "data=jsonl", "training.max_length=64")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Questions whose answer is their letter in capitals, four times: as bytes the two have nothing in common."""
    draw = random.Random(4)
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = {f"{one * 3}{other * 3}": f"{one.upper() * 4}{other.upper() * 4}" for one in letters for other in letters}
    rows = draw.sample(sorted(pairs), 300)
    path.write_text("".join(json.dumps({"prompt": row, "answer": pairs[row]}) + "\n" for row in rows), encoding="utf-8")
    return path


def splits_of(cell):
    folder, reader = open_pretrained(cell)
    return load_rows_of(cell, reader, folder=folder), reader, folder


def mean_vector(model, reader, text):
    with torch.no_grad():
        states = model(**reader([text], return_tensors="pt")).last_hidden_state
    return torch.nn.functional.normalize(states[0].mean(0), dim=0)


@pytest.mark.parametrize(
    ("rank", "expected"),
    [("1 of 9", (1, 1, 1)), ("3 of 9", (0, 1, 0.5)), ("7 of 90", (0, 0, 1 / 3)), ("11 of 90", (0, 0, 0))],
)
def test_scores_of_a_rank_are_known(rank, expected):
    scores = [ANSWER_METRICS[name].of_answer(rank, "text") for name in ("recall_at_1", "recall_at_5", "ndcg_at_10")]
    assert scores == pytest.approx(expected)


def test_ndcg_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    for rank in (1, 2, 5, 10):
        relevance, scores = [[float(place == rank) for place in range(1, 21)]], [[-float(p) for p in range(1, 21)]]
        theirs = metrics.ndcg_score(relevance, scores, k=10)
        assert ANSWER_METRICS["ndcg_at_10"].of_answer(f"{rank} of 20", "") == pytest.approx(theirs)


def test_the_loss_is_that_of_in_batch_negatives(tiny_cell, file):
    cell = tiny_cell(*BERT, f"data.path={file}")
    splits, reader, folder = splits_of(cell)
    model, _ = load_model(cell, folder=folder, device="cpu")
    model.eval()
    rows = splits.train[:5]
    batch = collate(rows, pad_id=reader.pad_token_id)
    assert batch.tokens == sum(row.length for row in rows)
    queries = torch.stack([mean_vector(model, reader, row.prompt) for row in rows])
    documents = torch.stack([mean_vector(model, reader, row.reference) for row in rows])
    expected = torch.nn.functional.cross_entropy(20 * queries @ documents.T, torch.arange(5), reduction="none")
    with torch.no_grad():
        assert torch.allclose(AnswerLoss(model).of_tokens(batch), expected, atol=1e-4)
    model.train()
    assert AnswerLoss(model).summed(batch).requires_grad


def test_the_same_text_of_another_row_is_no_wrong_answer(tiny_cell, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"question {number}", "answer": "yes"} for number in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    cell = tiny_cell(*BERT, f"data.path={path}")
    splits, reader, folder = splits_of(cell)
    model, _ = load_model(cell, folder=folder, device="cpu")
    with torch.no_grad():
        losses = AnswerLoss(model.eval()).of_tokens(collate(splits.train, pad_id=reader.pad_token_id))
    assert losses.abs().max() < 1e-6  # nothing to be told apart
    assert set(ranks(model, reader, splits.test, cell, device="cpu", tell=lambda *_: None)) == {"1 of 1"}


def test_ranks_are_those_of_the_similarities(tiny_cell, file):
    cell = tiny_cell(*BERT, f"data.path={file}", "data.test_rows=12", "eval.batch_size=5")
    splits, reader, folder = splits_of(cell)
    model, _ = load_model(cell, folder=folder, device="cpu")
    model.eval()
    with torch.no_grad():
        told = ranks(model, reader, splits.test, cell, device="cpu", tell=lambda *_: None)
    queries = torch.stack([mean_vector(model, reader, row.prompt) for row in splits.test])
    documents = torch.stack([mean_vector(model, reader, row.reference) for row in splits.test])
    similar = queries @ documents.T
    expected = [int((row >= row[place] - 1e-6).sum()) for place, row in enumerate(similar)]
    assert told == [f"{rank} of 12" for rank in expected]


def test_similarities_are_not_rounded_by_autocast(tiny_cell, file):
    splits, reader, folder = splits_of(tiny_cell(*BERT, f"data.path={file}"))
    model, _ = load_model(tiny_cell(*BERT, f"data.path={file}"), folder=folder, device="cpu")
    batch = collate(splits.train, pad_id=reader.pad_token_id)
    states = torch.randn(16, batch.arguments["input_ids"].shape[1], 8)
    exact = batch.labelled(states)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(batch.labelled(states), exact)
        assert AnswerLoss(model.eval()).of_tokens(batch).dtype == torch.float32


def test_a_model_that_finds_all_texts_alike_finds_none(tiny_cell, file):
    cell = tiny_cell(*BERT, f"data.path={file}", "data.test_rows=6")
    splits, reader, _ = splits_of(cell)

    class Alike(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return type("Output", (), {"last_hidden_state": torch.ones(*input_ids.shape, 4)})()

    assert set(ranks(Alike(), reader, splits.test, cell, device="cpu", tell=lambda *_: None)) == {"6 of 6"}


@pytest.mark.parametrize("method", ["lora", "ia3", "prompt_tuning", "prefix_tuning", "bitfit"])
@pytest.mark.parametrize("model", ["tiny_bert", "tiny_llama"])
def test_padding_and_virtual_tokens_are_in_no_vector(method, model, tiny_cell, file):
    cell = tiny_cell(f"model={model}", *BERT[1:], f"data.path={file}", f"peft={method}")
    if why_unsupported(cell) is not None:
        assert (method, model) == ("bitfit", "tiny_llama")
        return
    splits, reader, folder = splits_of(cell)
    base, _ = load_model(cell, folder=folder, device="cpu")
    adapted = attach_adapter(base, cell, tokenizer=reader, rows=splits.train).eval()
    batch = collate(splits.train[:3], pad_id=reader.pad_token_id)
    wider = {name: torch.nn.functional.pad(value, (0, 5)) for name, value in batch.arguments.items()}
    with torch.no_grad():
        losses = AnswerLoss(adapted).of_tokens(batch)
        padded = AnswerLoss(adapted).of_tokens(type(batch)(**vars(batch) | {"arguments": wider}))
    assert torch.allclose(losses, padded, atol=1e-4)


def test_options_have_their_columns_and_metrics(tiny_cell):
    for data, columns in (("natural_questions", ("query", "answer")), ("reverse_dictionary", ("definition", "word"))):
        cell = tiny_cell("model=minilm_l6", "model.task=embeddings", f"data={data}", "training.max_length=64")
        assert (cell.data.prompt_column, cell.data.answer_column) == columns
        assert cell.eval.metrics == ["recall_at_1", "recall_at_5", "ndcg_at_10"]
        assert why_unsupported(cell) is None


@pytest.fixture(scope="module")
def learned(tiny_cell, work_in_process, file, tmp_path_factory):
    from left_bench.pretrained import model_folder

    folder = tmp_path_factory.mktemp("bert") / "published"
    tiny = tiny_cell("model=tiny_bert", "model.task=embeddings")
    shutil.copytree(model_folder(tiny.model, dtype="float32"), folder)
    cell = tiny_cell(
        *(*BERT, f"model.name_or_path={folder}", f"data.path={file}", "peft=lora", "training.steps=80"),
        *("training.batch_size=16", "training.learning_rate=1e-2", "data.metrics=[recall_at_1,recall_at_5,ndcg_at_10]"),
        *("data.train_rows=200", "data.test_rows=40", "data.validation_rows=16"),
    )
    result = work_in_process(cell)
    run_dir = result.pop("run_dir")
    (run_dir / CELL_NAME).write_text(cell.model_dump_json(by_alias=True), encoding="utf-8")
    record = outcome_of(cell, "ok", None, started_at="2026-01-01T00:00:00Z", measured=result)
    record.write(run_dir)
    return record, run_dir


def test_a_published_encoder_finds_more_than_before(learned):
    record, run_dir = learned
    scores = {score.metric: score for score in record.scores}
    assert scores["ndcg_at_10"].value > scores["ndcg_at_10"].base_value + 0.2
    assert scores["recall_at_5"].value > scores["recall_at_5"].base_value + 0.2
    assert record.metrics["eval_loss"] < record.metrics["base_eval_loss"]
    lines = [json.loads(line) for line in (run_dir / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [int(line["prediction"].split()[0]) for line in lines]
    assert scores["recall_at_1"].value == pytest.approx(sum(rank == 1 for rank in found) / len(found))
    gain = sum(1 / math.log2(1 + rank) for rank in found if rank <= 10) / len(found)
    assert scores["ndcg_at_10"].value == pytest.approx(gain)
    assert record.metrics["merge_max_abs_difference"] < 1e-2


def test_what_was_saved_gives_the_same_vectors(learned):
    assert reload_check.compare_losses(learned[1]) == reload_check.EQUAL


def test_chat_is_refused_and_the_merged_export_works(learned, left_bench, tmp_path):
    done = left_bench("chat", str(learned[1]), "--prompt", "hello")
    assert done.code == 2 and "answers no question" in done.err
    done = left_bench("export", str(learned[1]), "--to", "merged", str(tmp_path / "model"))
    assert done.code == 0, done.err
    assert "sentence-similarity" in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")

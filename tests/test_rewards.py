"""Reward models: trained to rank pairs, scored on held-out ones, saved and loaded again."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from left_bench.core.errors import UserError
from left_bench.data import load_rows
from left_bench.data.answer_pairs import AnswerPair
from left_bench.evaluation.evaluate import Evaluation, scores
from left_bench.model import load
from left_bench.spec.run_files import ROWS_NAME
from left_bench.spec.task import new_layers_of
from left_bench.training.loss import AnswerLoss
from left_bench.training.preferences import with_worse_answer

REWARD = ("training=reward", "data=preferences", "training.steps=20", "training.learning_rate=1e-2")


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no", "by": 0.5} for i in range(16)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("peft", ["full", "lora", "ia3", "pfeiffer", "bitfit"])
def test_it_learns_which_answer_is_better(peft, tiny_cell, work_in_process, pairs_file):
    model = ["model=tiny_neox"] if peft == "bitfit" else []
    cell = tiny_cell(*REWARD, *model, f"peft={peft}", f"data.path={pairs_file}")
    assert cell.model.task == "reward_model"
    result = work_in_process(cell)
    metrics = result["metrics"]
    assert metrics["train_loss"] < metrics["first_train_loss"] - 0.1
    rows = [json.loads(line) for line in (result["run_dir"] / ROWS_NAME).read_text().splitlines()]
    assert len(rows) == 4
    assert all(row["rejected_nll"] - row["nll"] > 0.5 for row in rows)  # the better answer's reward is the higher one
    assert all(row["prediction"] is None for row in rows)


def test_its_scores_are_those_of_pairs_and_have_errors(tiny_cell, pairs_file):
    """Random weights are not scored, so the scores are worked out here."""
    cell = tiny_cell(*REWARD, f"data.path={pairs_file}")
    rewards = Evaluation(nll=[0.2, 1.0, 0.1], rejected_nll=[1.7, 0.5, 2.4], answer_tokens=[1, 1, 1])
    result = {score.metric: score for score in scores(rewards, None, [SimpleNamespace(reference="yes")] * 3, cell)}
    assert result["preference_accuracy"].value == pytest.approx(2 / 3)
    assert result["preference_accuracy"].stderr is not None and result["preference_accuracy"].base_value is None
    assert "exact_match" not in result


def test_the_margin_is_of_training_and_not_of_the_scores(tiny_cell, work_in_process, pairs_file):
    columns = ("data.prompt_column=prompt", "data.answer_column=chosen", "data.rejected_column=rejected")
    cell = tiny_cell(*REWARD, *columns, f"data.path={pairs_file}", "data.margin_column=by", "training.steps=2")
    assert {row.margin for row in load_rows(cell.data)[0]} == {0.5}
    first = [
        work_in_process(item)["metrics"]["first_train_loss"]
        for item in (cell, tiny_cell(*REWARD, *columns, f"data.path={pairs_file}", "training.steps=2"))
    ]
    assert first[0] > first[1] + 0.1
    folder, tokenizer = load.open_pretrained(cell)
    splits = load.load_rows_of(cell, tokenizer, folder=folder)
    assert {row.margin for row in splits.train} == {0.5} and {row.margin for row in splits.test} == {0.0}


def test_a_margin_that_is_no_number_is_refused(tiny_cell, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no", "by": "much"} for i in range(4)]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = tiny_cell("data=preferences", f"data.path={path}").data.model_copy(update={"margin_column": "by"})
    with pytest.raises(UserError, match="write a number"):
        load_rows(data)


def test_the_loss_of_a_pair_the_other_way_round_differs_by_its_rewards(tiny_cell, addition_rows):
    cell = tiny_cell("training=reward", "data=chain_sum_pairs")
    folder, _ = load.open_pretrained(cell)
    model, _ = load.load_model(cell, folder=folder, device="cpu", classes=["reward"])
    assert model.num_labels == 1 and new_layers_of(model) == ["score"]
    rows = [
        AnswerPair(row.prompt_ids, row.answer_ids, other.answer_ids, row.prompt, row.reference)
        for row, other in zip(addition_rows[:4], addition_rows[4:], strict=True)
    ]
    loss, pad_id = AnswerLoss(model.eval()), model.config.pad_token_id
    with torch.no_grad():
        batch = AnswerPair.collate(rows, pad_id=pad_id)
        better, worse = model(**batch.inputs()).logits[:, 0].chunk(2)
        turned = [with_worse_answer(row) for row in rows]
        change = loss.row_sums(AnswerPair.collate(turned, pad_id=pad_id)) - loss.row_sums(batch)
    torch.testing.assert_close(change, better - worse, rtol=1e-4, atol=1e-5)

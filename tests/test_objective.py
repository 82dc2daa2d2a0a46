"""Preference tuning: losses and their gradients, the reference, and what a cell of it measures."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn.functional import logsigmoid

import left_bench.training.loss
from left_bench.core.errors import UserError
from left_bench.data import collate, load_rows
from left_bench.evaluation.evaluate import Evaluation, scores
from left_bench.grid.rules import why_unsupported
from left_bench.training.loss import AnswerLoss
from left_bench.training.preferences import DPO, KTO, ORPO, with_reference, with_worse_answer

BY_DPO = ("training=dpo", "data=chain_sum_pairs")


@pytest.fixture(scope="module")
def pairs(addition_rows):
    """Every row with the next one's answer as the worse one, and some margin of a reference."""
    following = [*addition_rows[1:], addition_rows[0]]
    return [
        dataclasses.replace(
            row, rejected_ids=other.answer_ids, rejected=other.reference, reference_logps=[0.1 * i, 0.0]
        )
        for i, (row, other) in enumerate(zip(addition_rows, following, strict=True))
    ]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(left_bench.training.loss, "chunk_logits", lambda kind: 5 * 512)


def plain_dpo(model, rows, *, beta):
    """The paper's equation 7 from whole logits, summed over pairs."""

    def log_probability(row):
        batch = collate([row], pad_id=0)
        logits = model(**batch.inputs()).logits[0, :-1].log_softmax(-1)
        labels = batch.labels[0, 1:]
        return sum(logits[i, label] for i, label in enumerate(labels.tolist()) if label != -100)

    return sum(
        -logsigmoid(beta * (log_probability(row) - log_probability(with_worse_answer(row)) - row.reference_logps[0]))
        for row in rows
    )


@pytest.mark.parametrize("head", ["labelled", "all"])
@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradients_are_the_papers(head, packed, tiny_cell, load_tiny, pairs, small_chunks):
    from left_bench.training.packing import attending_in_segments

    model, _ = load_tiny(tiny_cell())
    model.eval()
    theirs = plain_dpo(model, pairs, beta=0.3)
    (0.5 * theirs).backward()
    gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    objective = DPO(loss=AnswerLoss(model, everywhere=head == "all"), beta=0.3, pad_id=0, packed=packed)
    if packed:
        with attending_in_segments(model, kernel=None):
            ours = objective.summed(objective.batch(pairs), gain=0.5)
            ours.backward()
    else:
        ours = objective.summed(objective.batch(pairs), gain=0.5)
        ours.backward()
    assert ours.item() == pytest.approx(0.5 * theirs.item(), rel=1e-5)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-3, atol=1e-5)


def test_a_model_that_is_its_own_reference_loses_ln_2(tiny_cell, load_tiny, pairs):
    cell = tiny_cell(*BY_DPO, "training.batch_size=3", "training.steps=2")
    model, _ = load_tiny(cell)
    loss = AnswerLoss(model)
    rows = with_reference(pairs, cell, loss=loss, pad_id=0, packed=False, device="cpu")
    objective = DPO(loss=loss, beta=0.1, pad_id=0)
    seen = [row for row in rows if row.reference_logps]
    assert len(seen) == 6  # those of two steps of three
    assert objective.summed(objective.batch(seen), gain=1 / 6).item() == pytest.approx(math.log(2), rel=1e-5)


def test_preferring_the_right_answer_makes_it_likelier(tiny_cell, work_in_process, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(f'{{"prompt": "q{i}", "chosen": "yes", "rejected": "no"}}' for i in range(12)))
    cell = tiny_cell(
        *("training=dpo", "data=preferences", f"data.path={path}", "peft=full"),
        *("training.steps=20", "training.sft_steps=3", "training.learning_rate=1e-2"),
    )
    result = work_in_process(cell)
    metrics = result["metrics"]
    assert metrics["first_train_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["train_loss"] < 0.3
    assert metrics["train_steps"] == 20
    assert [phase.name for phase in result["phases"]].count("sft") == 1
    [sft] = [phase for phase in result["phases"] if phase.name == "sft"]
    assert sft.steps == 3
    # both answers of every pair are read
    assert metrics["train_answer_tokens"] > 2 * 20 * cell.training.batch_size


def test_the_steps_before_take_the_methods_own_rate(tiny_cell):
    cell = tiny_cell(*BY_DPO, "training.sft_steps=7")
    first = cell.sft_before()
    assert first.learning_rate == cell.peft.learning_rate
    assert cell.learning_rate == pytest.approx(cell.peft.learning_rate * cell.training.learning_rate_scale)
    assert (first.training.objective, first.training.steps) == ("sft", 7)


def test_pairs_are_scored_by_which_answer_is_likelier(tiny_cell, pairs):
    cell = tiny_cell(*BY_DPO)
    after = Evaluation(nll=[1.0, 2.0, 3.0, 1.0], rejected_nll=[2.0, 1.0, 5.0, 4.0], answer_tokens=[2, 2, 2, 2])
    before = Evaluation(nll=[1.0] * 4, rejected_nll=[0.5] * 4, answer_tokens=[2] * 4)
    results = {score.metric: score for score in scores(after, before, pairs[:4], cell)}
    assert results["preference_accuracy"].value == 0.75
    assert results["preference_accuracy"].base_value == 0
    assert results["preference_margin_nats"].value == pytest.approx((1 - 1 + 2 + 3) / 4)
    assert results["preference_margin_nats"].base_value == -0.5


def test_another_rows_answer_stands_for_a_worse_one(tiny_cell):
    data = tiny_cell("data=chain_sum_pairs", "data.train_rows=30").data
    for split in load_rows(data):
        assert all(row.rejected not in (None, row.answer) for row in split)
        assert {row.rejected for row in split} <= {row.answer for row in split}


def test_worse_answers_from_a_column(tiny_cell, tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = [f'{{"prompt": "q{i}", "chosen": "yes {i}", "rejected": "{"no" if i else "yes 0"}"}}' for i in range(6)]
    path.write_text("\n".join(lines))
    data = tiny_cell("data=preferences", f"data.path={path}", "data.train_rows=null", "data.test_rows=2").data
    train, test = load_rows(data)
    rows = [*train, *test]
    assert len(rows) == 5  # a pair of equal answers is none
    assert {row.rejected for row in rows} == {"no"}
    with pytest.raises(UserError, match="rejected_column"):
        load_rows(data.model_copy(update={"rejected_column": "worse"}))


def test_one_answer_to_everything_has_no_worse_one(tiny_cell, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(f'{{"prompt": "q{i}", "answer": "yes"}}' for i in range(6)))
    data = tiny_cell("data=jsonl", f"data.path={path}", "data.pairs=true", "data.train_rows=4", "data.test_rows=2").data
    with pytest.raises(UserError, match="rejected_column=null"):
        load_rows(data)


def test_preferences_want_pairs(tiny_cell):
    assert "data.pairs" in (why_unsupported(tiny_cell("training=dpo")) or "")
    assert why_unsupported(tiny_cell(*BY_DPO)) is None


def test_kto_of_a_model_that_is_its_own_reference_costs_a_half(tiny_cell, load_tiny, pairs):
    """Neither rewards nor a divergence: each answer costs 1 - sigmoid(0)."""
    cell = tiny_cell("training=kto", "data=chain_sum_pairs", "training.batch_size=3", "training.steps=2")
    model, _ = load_tiny(cell)
    rows = with_reference(pairs, cell, loss=AnswerLoss(model), pad_id=0, packed=False, device="cpu")
    objective = KTO(loss=AnswerLoss(model), beta=0.1, pad_id=0)
    seen = [row for row in rows if row.reference_logps]
    assert [len(row.reference_logps or ()) for row in seen] == [4] * 6  # two answers, and as many of another row
    assert objective.count(seen) == 12
    assert objective.summed(objective.batch(seen), gain=1 / 12).item() == pytest.approx(0.5, abs=1e-6)


def test_the_weights_of_good_and_bad_answers_are_theirs(tiny_cell, load_tiny, pairs):
    model, _ = load_tiny(tiny_cell())
    answered = [dataclasses.replace(row, unrelated_ids=[row.answer_ids] * 2, reference_logps=None) for row in pairs[:3]]

    def loss(**weights):
        objective = KTO(loss=AnswerLoss(model), beta=1e-6, pad_id=0, **weights)
        return objective.summed(objective.batch(answered), gain=1 / 6).item()

    assert loss() == pytest.approx(0.5, abs=1e-3)
    assert loss(good_weight=3.0) == pytest.approx(1.0, abs=1e-3)
    assert loss(bad_weight=2.0) == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize("name", ["kto", "orpo"])
def test_the_passes_of_a_step_add_up_to_the_loss_of_all_its_rows(name, tiny_cell, load_tiny, pairs):
    model, _ = load_tiny(tiny_cell())
    objective = ORPO(loss=AnswerLoss(model), beta=0.3, pad_id=0)
    if name == "kto":
        pairs = [
            dataclasses.replace(row, unrelated_ids=[row.answer_ids] * 2, reference_logps=[1e3] * 4) for row in pairs
        ]
        objective = KTO(loss=AnswerLoss(model), beta=1e-3, pad_id=0)  # so low a reward that no divergence is left
    gain = 1 / objective.count(pairs)
    whole = objective.summed(objective.batch(pairs), gain=gain)
    parts = [objective.summed(objective.batch(part, step=pairs), gain=gain) for part in (pairs[:3], pairs[3:])]
    assert sum(part.item() for part in parts) == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize("training", ["kto", "orpo"])
def test_a_cell_of_pairs_learns_to_prefer(training, tiny_cell, work_in_process, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(f'{{"prompt": "q{i}", "chosen": "yes", "rejected": "no"}}' for i in range(12)))
    cell = tiny_cell(
        *(f"training={training}", "data=preferences", f"data.path={path}", "peft=full"),
        *("training.steps=20", "training.sft_steps=0", "training.learning_rate=1e-2"),
    )
    result = work_in_process(cell)
    metrics = result["metrics"]
    assert metrics["train_loss"] < metrics["first_train_loss"] - 0.1
    assert ("reference" in [phase.name for phase in result["phases"]]) == (training == "kto")


def test_kto_learns_from_rows_that_are_good_or_bad(tiny_cell, work_in_process, tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [
        f'{{"prompt": "q{i}", "answer": "{"no" if i % 2 else "yes"}", "ok": {"false" if i % 2 else "true"}}}'
        for i in range(24)
    ]
    path.write_text("\n".join(lines))
    cell = tiny_cell(
        *(
            "training=kto",
            "data=jsonl",
            f"data.path={path}",
            "data.label_column=ok",
            "peft=full",
            "data.train_rows=16",
        ),
        *("training.steps=20", "training.sft_steps=0", "training.learning_rate=1e-2"),
    )
    train, test = load_rows(cell.data)
    assert {row.desirable for row in train} == {True, False}
    assert {row.answer for row in test} == {"yes"}  # held-out answers are good ones
    metrics = work_in_process(cell)["metrics"]
    assert metrics["first_train_loss"] == pytest.approx(0.5, abs=1e-5)
    assert metrics["train_loss"] < 0.4


def test_a_label_that_is_neither_true_nor_false_is_refused(tiny_cell, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(f'{{"prompt": "q{i}", "answer": "yes", "ok": "maybe"}}' for i in range(6)))
    data = tiny_cell("data=jsonl", "data.train_rows=2").data
    data = data.model_copy(update={"path": str(path), "label_column": "ok"})
    with pytest.raises(UserError, match="write true or false"):
        load_rows(data)
    path.write_text("\n".join(f'{{"prompt": "q{i}", "answer": "yes", "ok": false}}' for i in range(6)))
    with pytest.raises(UserError, match="no row that it calls good"):
        load_rows(data)

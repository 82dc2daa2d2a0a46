"""The losses of preferences, rewards and policies, held against TRL's own of the same batch."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from left_bench.data import collate
from left_bench.data.answer_pairs import REWARD, AnswerPair
from left_bench.training.loss import AnswerLoss
from left_bench.training.policy import GRPO, SampledAnswer
from left_bench.training.preferences import DPO, KTO, ORPO, with_worse_answer
from left_bench.training.rewards import RankedRewards

trl = pytest.importorskip("trl", reason="needs left-bench[benchmarks]")

BETA = 0.3


@pytest.fixture(scope="module")
def model(tiny_cell, load_tiny):
    """A policy that differs from its reference; both without dropout."""
    return load_tiny(tiny_cell())[0]


@pytest.fixture(scope="module")
def reference(model):
    torch.manual_seed(1)
    result = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in result.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return result


@pytest.fixture(scope="module")
def tokenizer(tiny_cell, load_tiny):
    return load_tiny(tiny_cell())[1]


@pytest.fixture(scope="module")
def pairs(addition_rows):
    following = [*addition_rows[1:], addition_rows[0]]
    return [
        dataclasses.replace(row, rejected_ids=other.answer_ids, rejected=other.reference)
        for row, other in zip(addition_rows, following, strict=True)
    ]


def options(folder: Any, **more: Any) -> dict[str, Any]:
    return {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False, **more}


def whole(rows: Any) -> dict[str, torch.Tensor]:
    """A batch as TRL's collators make one, padded at the right."""
    batch = collate(rows, pad_id=0)
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "completion_mask": (batch.labels != -100).long(),
    }


def row_sums(model: Any, rows: Any) -> list[float]:
    with torch.no_grad():
        return (-AnswerLoss(model).row_sums(collate(rows, pad_id=0))).tolist()


def text_pairs(**more: Any) -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"prompt": "Which?", "chosen": " one", "rejected": " two", **more}] * 2)


def test_dpo_is_trls(model, reference, tokenizer, pairs, tmp_path):
    worse = [with_worse_answer(row) for row in pairs]
    args = trl.DPOConfig(**options(tmp_path, beta=BETA))
    trainer = trl.DPOTrainer(
        copy.deepcopy(model), copy.deepcopy(reference), args, train_dataset=text_pairs(), processing_class=tokenizer
    )
    theirs = trainer.compute_loss(trainer.model.eval(), whole([*pairs, *worse])).item()
    known = zip(row_sums(reference, pairs), row_sums(reference, worse), strict=True)
    rows = [dataclasses.replace(row, reference_logps=list(two)) for row, two in zip(pairs, known, strict=True)]
    objective = DPO(loss=AnswerLoss(model), beta=BETA, pad_id=0)
    assert objective.summed(objective.batch(rows), gain=1 / len(rows)).item() == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("kind", ["pairs", "good and bad rows"])
def test_kto_is_trls(kind, model, reference, tokenizer, pairs, tmp_path):
    from datasets import Dataset

    before = [pairs[-1], *pairs[:-1]]
    rows = [
        dataclasses.replace(row, unrelated_ids=[other.answer_ids, other.rejected_ids])
        for row, other in zip(pairs, before, strict=True)
    ]
    answers, labels = [*rows, *map(with_worse_answer, rows)], [True] * len(rows) + [False] * len(rows)
    unrelated = [dataclasses.replace(row, answer_ids=row.unrelated_ids[place]) for place in (0, 1) for row in rows]
    if kind != "pairs":
        answers, unrelated, labels = rows, unrelated[: len(rows)], [i % 3 == 0 for i in range(len(rows))]
        rows = [
            dataclasses.replace(row, rejected_ids=None, desirable=good, unrelated_ids=row.unrelated_ids[:1])
            for row, good in zip(rows, labels, strict=True)
        ]
    args = trl.KTOConfig(**options(tmp_path, beta=BETA, desirable_weight=1.5, undesirable_weight=0.5))
    texts = Dataset.from_list([{"prompt": "Which?", "completion": " one", "label": good} for good in (True, False)])
    trainer = trl.KTOTrainer(
        copy.deepcopy(model), copy.deepcopy(reference), args, train_dataset=texts, processing_class=tokenizer
    )
    batch = whole(answers) | {f"KL_{name}": tensor for name, tensor in whole(unrelated).items()}
    theirs = trainer.compute_loss(trainer.model.eval(), batch | {"label": torch.tensor(labels)}).item()

    known = torch.tensor([row_sums(reference, answers), row_sums(reference, unrelated)])
    of_rows = known.view(2, -1, len(rows)).flatten(0, 1).T.tolist()
    rows = [dataclasses.replace(row, reference_logps=item) for row, item in zip(rows, of_rows, strict=True)]
    objective = KTO(loss=AnswerLoss(model), beta=BETA, pad_id=0, good_weight=1.5, bad_weight=0.5)
    ours = objective.summed(objective.batch(rows), gain=1 / objective.count(rows)).item()
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_orpo_is_trls(model, tokenizer, pairs, tmp_path):
    """TRL counts the prompt's tokens in the supervised part, and the paper does not: prompts of one token have none."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    rows = [dataclasses.replace(row, prompt_ids=row.prompt_ids[-1:]) for row in pairs]
    args = ORPOConfig(**options(tmp_path, beta=BETA, max_length=64))
    trainer = ORPOTrainer(model=copy.deepcopy(model), args=args, train_dataset=text_pairs(), processing_class=tokenizer)
    batch = {}
    for name, part in (("chosen", rows), ("rejected", [with_worse_answer(row) for row in rows])):
        read = collate(part, pad_id=0)
        batch |= {f"{name}_input_ids": read.input_ids, f"{name}_labels": read.labels}
        batch[f"{name}_attention_mask"] = read.attention_mask
    theirs, _ = trainer.get_batch_loss_metrics(trainer.model.eval(), batch)
    objective = ORPO(loss=AnswerLoss(model), beta=BETA, pad_id=0)
    ours = objective.summed(objective.batch(rows), gain=1 / objective.count(rows))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


@pytest.fixture(scope="module")
def reward_model(tiny_cell):
    from left_bench.model import load

    cell = tiny_cell("training=reward", "data=chain_sum_pairs")
    folder, _ = load.open_pretrained(cell)
    return load.load_model(cell, folder=folder, device="cpu", classes=[REWARD])[0].eval()


@pytest.mark.parametrize("margins", [None, [0.5, 0.0, 1.5, -1.0, 0.2, 0.3, 0.0, 2.0]])
@pytest.mark.parametrize("center", [0.0, 0.05])
def test_a_reward_models_loss_is_trls(center, margins, reward_model, tokenizer, pairs, tmp_path):
    args = trl.RewardConfig(**options(tmp_path, center_rewards_coefficient=center or None))
    trainer = trl.RewardTrainer(
        copy.deepcopy(reward_model), args, train_dataset=text_pairs(), processing_class=tokenizer
    )
    rows = [
        AnswerPair(row.prompt_ids, row.answer_ids, row.rejected_ids, row.prompt, row.reference, margin)
        for row, margin in zip(pairs, margins or [0.0] * len(pairs), strict=True)
    ]
    batch = AnswerPair.collate(rows, pad_id=reward_model.config.pad_token_id)
    given = batch.arguments | ({} if margins is None else {"margin": torch.tensor(margins)})
    theirs = trainer.compute_loss(trainer.model.eval(), dict(given)).item()
    objective = RankedRewards(loss=AnswerLoss(reward_model), pad_id=reward_model.config.pad_token_id, center=center)
    assert objective.summed(objective.batch(rows), gain=1 / len(rows)).item() == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("kl_weight", [0.0, 0.07])
def test_a_policys_loss_is_trls(kl_weight, updates, model, reference, tokenizer, addition_rows, tmp_path):
    """Of answers of unlike lengths; with a second update they were sampled by a model that has changed since."""
    from datasets import Dataset

    torch.manual_seed(3)
    sampler = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in sampler.parameters():
            parameter += 0.01 * torch.randn_like(parameter)

    def logps(by, row):
        with torch.no_grad():
            return (-AnswerLoss(by).of_tokens(collate([row], pad_id=0))).tolist()

    rows = [
        SampledAnswer(
            prompt_ids=row.prompt_ids,
            answer_ids=row.answer_ids,
            prompt=row.prompt,
            reference=row.reference,
            advantage=advantage,
            old_logps=logps(sampler, row) if updates > 1 else None,
            reference_logps=logps(reference, row) if kl_weight else None,
        )
        for row, advantage in zip(addition_rows, [1.2, -0.7, 0.3, -1.5, 0.0, 2.0, -2.0, 0.7], strict=True)
    ]
    args = trl.GRPOConfig(
        **options(tmp_path, beta=kl_weight, epsilon=0.02, loss_type="grpo", num_generations=2),
        per_device_train_batch_size=8,
    )
    trainer = trl.GRPOTrainer(
        model=copy.deepcopy(model),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "Which?"}] * 8),
        processing_class=tokenizer,
    )
    theirs = trainer._compute_loss(trainer.model.eval(), as_trl_has_them(rows))
    theirs.backward()
    model.zero_grad()
    objective = GRPO(loss=AnswerLoss(model), rollouts=Uncounted(), kl_weight=kl_weight, clip=0.02, pad_id=0)
    ours = objective.summed(objective.batch(rows), gain=1 / objective.count(rows))
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4, abs=1e-6)
    for own, other in zip(model.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-3, atol=1e-6)
    model.zero_grad()


class Uncounted:
    """Rollouts that nobody asks."""

    def saw(self, **_: Any) -> None:
        return None


def as_trl_has_them(rows: Any) -> dict[str, Any]:
    """Prompts padded at the left, answers at the right, what is known of tokens beside them."""
    prompts, answers = max(len(row.prompt_ids) for row in rows), max(len(row.answer_ids) for row in rows)

    def right(values: Any, fill: float) -> Any:
        return [*values, *[fill] * (answers - len(values))]

    left = [prompts - len(row.prompt_ids) for row in rows]
    batch = {
        "prompt_ids": torch.tensor([[0] * n + row.prompt_ids for n, row in zip(left, rows, strict=True)]),
        "prompt_mask": torch.tensor([[0] * n + [1] * len(row.prompt_ids) for n, row in zip(left, rows, strict=True)]),
        "completion_ids": torch.tensor([right(row.answer_ids, 0) for row in rows]),
        "completion_mask": torch.tensor([right([1] * len(row.answer_ids), 0) for row in rows]),
        "advantages": torch.tensor([row.advantage for row in rows]),
    }
    for name, values in (("old", "old_logps"), ("ref", "reference_logps")):
        if getattr(rows[0], values) is not None:
            batch[f"{name}_per_token_logps"] = torch.tensor([right(getattr(row, values), 0.0) for row in rows])
    return batch

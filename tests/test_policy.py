"""Policy optimization: what is sampled, how it is rewarded, what a step makes of it and what is told of it."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from left_bench.core.errors import UserError
from left_bench.data import collate, load_rows
from left_bench.evaluation import sampling, scorer
from left_bench.grid.rules import why_unsupported
from left_bench.measure.device import open_device
from left_bench.methods.attach import attach_adapter
from left_bench.spec.events import EVENTS_NAME
from left_bench.spec.record import METRICS, POLICY_FIELDS
from left_bench.training.loss import AnswerLoss
from left_bench.training.policy import GRPO, FrozenCopy, Rollouts

SMALL = ("training=grpo", "training.sft_steps=0", "training.batch_size=8", "training.group_size=4", "training.steps=3")
SCORER = """
def many_a(prediction, reference, row):
    return sum(letter == "a" for letter in prediction)

def two(prediction, reference, row):
    return {"one": 1.0, "other": 2.0}
"""


@pytest.fixture(scope="module")
def scorer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("scorer") / "score.py"
    path.write_text(SCORER)
    return path


def test_a_policy_learns_what_its_scorer_rewards(tiny_cell, work_in_process, scorer_file):
    """A model with random weights says each of 512 tokens as often; after training one of them much oftener."""
    cell = tiny_cell(
        *("training=grpo", "training.sft_steps=0", "training.batch_size=64", "training.group_size=32"),
        *("training.steps=25", "training.learning_rate=3e-2", "peft=full", "training.kl_weight=0"),
        *(f"training.reward={scorer_file}:many_a", "eval.max_new_tokens=8", "eval.batch_size=64"),
    )
    result = work_in_process(cell)
    metrics = result["metrics"]
    assert metrics["train_reward"] > metrics["first_train_reward"] + 1
    assert metrics["policy_entropy_nats"] < math.log(512) - 1
    assert "policy_kl_nats" not in metrics


@pytest.fixture(scope="module")
def small(tiny_cell, work_in_process):
    return work_in_process(tiny_cell(*SMALL, "peft=lora", "eval.max_new_tokens=6"))


def test_what_each_step_told_stands_in_events_and_record(small):
    lines = map(json.loads, (small["run_dir"] / EVENTS_NAME).read_text().splitlines())
    steps = [line for line in lines if line["event"] == "step"]
    assert [point.step for point in small["policy"]] == [1, 2, 3]
    for line, point in zip(steps, small["policy"], strict=True):
        assert {name: line[name] for name in POLICY_FIELDS} == point.model_dump(exclude={"step"})
        assert line["rows"] == 2  # questions; with four answers each
        assert point.generated_tokens == pytest.approx(8 * point.answer_length)
        assert 0 < point.generating_seconds < line["seconds"]
        assert line["answer_tokens"] == point.generated_tokens
        assert point.clipped == 0  # every step has answers of its own
    assert small["policy"][0].kl_nats == pytest.approx(0, abs=1e-6)
    assert small["policy"][0].entropy_nats == pytest.approx(math.log(512), abs=0.5)
    metrics = small["metrics"]
    assert metrics["generated_tokens"] == sum(point.generated_tokens for point in small["policy"])
    assert metrics["generating_seconds"] < metrics["train_seconds"]
    assert metrics["train_epochs"] == pytest.approx(3 * 2 / 8)
    assert small["memory_breakdown"]["reference"] == small["memory_breakdown"]["adapter"]
    assert {"train_reward", "policy_kl_nats", "policy_entropy_nats"} <= metrics.keys() <= METRICS.keys()


def test_two_updates_with_the_same_answers(tiny_cell, work_in_process):
    cell = tiny_cell(
        *SMALL, "training.updates_per_sample=2", "training.steps=4", "peft=full", "training.learning_rate=1e-2"
    )
    points = work_in_process(cell)["policy"]
    assert [point.generated_tokens > 0 for point in points] == [True, False, True, False]
    assert points[0].reward == points[1].reward and points[0].answer_length == points[1].answer_length


@pytest.fixture(scope="module")
def parts(tiny_cell, load_tiny):
    cell = tiny_cell(*SMALL, "peft=lora", "eval.max_new_tokens=6")
    base, tokenizer = load_tiny(cell)
    return cell, attach_adapter(base, cell, tokenizer=tokenizer, rows=[]), tokenizer


def rollouts(cell, model, tokenizer, *, reward):
    return Rollouts(
        *(cell, model),
        sample=lambda rows: sampling.sampled_answers(model, tokenizer, rows, cell, device="cpu"),
        reward=reward,
        device=open_device("cpu"),
        pad_id=0,
    )


def test_advantages_are_rewards_normalized_in_their_group(parts, addition_rows):
    _, model, _ = parts
    rewards = [0.0, 1.0, 1.0, 0.0, 5.0, 5.0, 5.0, 5.0]
    made = rollouts(*parts, reward=lambda rows: rewards).of_step(addition_rows[:2], AnswerLoss(model))
    assert [row.prompt for row in made] == [row.prompt for row in addition_rows[:2] for _ in range(4)]
    half = 0.5 / (torch.tensor(rewards[:4]).std().item() + 1e-4)
    assert [row.advantage for row in made] == pytest.approx([-half, half, half, -half, 0, 0, 0, 0])
    assert model.training
    assert all(1 <= len(row.answer_ids) <= 6 for row in made)
    assert all(len(row.reference_logps) == len(row.answer_ids) for row in made)


def test_the_reference_of_a_new_adapter_is_the_adapter_switched_off(parts, addition_rows):
    _, model, _ = parts
    frozen, loss, batch = FrozenCopy(model), AnswerLoss(model), collate(addition_rows, pad_id=0)
    with torch.no_grad():
        before = loss.of_tokens(batch)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
        changed = loss.of_tokens(batch)
        with frozen.in_place():
            reference = loss.of_tokens(batch)
        with model.disable_adapter():
            switched_off = loss.of_tokens(batch)
        assert torch.equal(loss.of_tokens(batch), changed)
        for parameter, copy in zip(
            [parameter for parameter in model.parameters() if parameter.requires_grad], frozen.tensors, strict=True
        ):
            parameter.copy_(copy)
    assert not torch.allclose(changed, before, atol=1e-3)
    torch.testing.assert_close(reference, before)
    torch.testing.assert_close(reference, switched_off)


def test_sampling_draws_from_the_models_own_probabilities(parts, addition_rows):
    """The mean log-probability of what is drawn is the model's entropy, which a cut-off draw would fall short of."""
    cell, model, tokenizer = parts
    model.eval()
    torch.manual_seed(0)
    rows = addition_rows * 32
    with torch.no_grad():
        answers = sampling.sampled_answers(model, tokenizer, rows, cell, device="cpu")
        given = [dataclasses.replace(row, answer_ids=ids) for row, ids in zip(rows, answers, strict=True)]
        entropies: list[torch.Tensor] = []
        losses: list[torch.Tensor] = []
        AnswerLoss(model).of_each_token(
            collate(given, pad_id=0), lambda nll: losses.append(nll.detach()) or nll.sum(), entropies=entropies
        )
    assert torch.cat(losses).mean().item() == pytest.approx(torch.cat(entropies).mean().item(), abs=0.05)
    model.train()


def test_answers_that_are_all_worth_the_same_do_not_fail_the_first_step(tiny_cell, work_in_process, scorer_file):
    cell = tiny_cell(*SMALL, "peft=lora", f"training.reward={scorer_file}:many_a", "eval.max_new_tokens=1")
    point = work_in_process(cell)["policy"][0]
    assert point.equal_groups == 1.0 or point.reward > 0


def test_a_reward_of_several_numbers_ends_the_cell(tiny_cell, work_in_process, scorer_file):
    with pytest.raises(scorer.ScorerFailed, match="one finite number"):
        work_in_process(tiny_cell(*SMALL, f"training.reward={scorer_file}:two"))


def test_a_scorer_is_known_by_its_content_and_refused_by_the_key_that_names_it(tiny_cell, scorer_file, tmp_path):
    same = tmp_path / "again.py"
    same.write_text(SCORER)
    other = tmp_path / "other.py"
    other.write_text(SCORER + "\n# changed\n")
    one, moved, changed = (tiny_cell(*SMALL, f"training.reward={path}:many_a") for path in (scorer_file, same, other))
    assert one.id == moved.id != changed.id
    with pytest.raises(UserError, match=r"^training.reward=.*has no function 'many_b'"):
        tiny_cell(*SMALL, f"training.reward={scorer_file}:many_b")


def test_the_verifier_is_reasoning_gyms_own(tiny_cell):
    cell = tiny_cell(*SMALL)
    verify = sampling.verifier(cell.data)
    [row, *_] = load_rows(cell.data)[0]
    record = {"question": row.prompt, "answer": row.answer, "metadata": None}
    assert verify(row.answer, record) == 1
    assert verify(f"+{row.answer}.0", record) == 1  # what it tolerates is its own affair
    assert verify("no number", record) < 0.1


def test_held_out_answers_are_verified_beside_the_base_models(tiny_cell):
    cell = tiny_cell(*SMALL, "data.test_rows=3")
    rows = load_rows(cell.data)[1]
    right = [row.answer for row in rows]
    score, of_rows = sampling.verifier_scores(cell, rows, right, ["x", *right[1:]])
    assert (score.metric, score.value, score.n, of_rows) == ("verifier_score", 1.0, 3, [1.0] * 3)
    assert score.base_value == pytest.approx(2 / 3, abs=0.01)


def test_a_reward_cell_says_what_answers_are_worth(tiny_cell, work_in_process, finished):
    pairs = ("training=reward", "data=chain_sum_pairs", "peft=lora", "training.learning_rate=1e-2")
    judge = tiny_cell(*pairs)
    run_dir, _ = finished(judge)
    cell = tiny_cell(*SMALL, "peft=lora", f"training.reward_model={run_dir}")
    assert why_unsupported(cell) is None
    result = work_in_process(cell)
    assert [link["cell"] for link in result["provenance"]["rewarded_by"]] == [judge.id]
    assert "load_reward_model" in [phase.name for phase in result["phases"]]
    assert any(point.equal_groups < 1 for point in result["policy"])
    with pytest.raises(UserError, match="reads other tokens"):
        tiny_cell(*SMALL, "model=tiny_neox", f"training.reward_model={run_dir}")
    sft_dir, _ = finished(tiny_cell("peft=lora"))
    with pytest.raises(UserError, match="objective is sft"):
        tiny_cell(*SMALL, f"training.reward_model={sft_dir}")


def test_a_reward_models_rewards_are_its_outputs(tiny_cell, finished, addition_rows):
    from left_bench.model import load
    from left_bench.spec.run_files import ADAPTER_NAME

    cell = tiny_cell("training=reward", "data=chain_sum_pairs", "peft=lora", "training.learning_rate=1e-2")
    run_dir, _ = finished(cell)
    folder, _ = load.open_pretrained(cell)
    reward = sampling.load_reward_model(cell, run_dir / ADAPTER_NAME, folder=folder, device="cpu", batch_size=3)
    one_by_one = [reward([row])[0] for row in addition_rows]
    assert reward(addition_rows) == pytest.approx(one_by_one, abs=1e-5)
    assert len(set(one_by_one)) > 1


def test_a_checkpoint_brings_back_what_steps_told(tiny_cell, small):
    from left_bench.measure.meter import Step, step_of_event

    lines = map(json.loads, (small["run_dir"] / EVENTS_NAME).read_text().splitlines())
    steps = [step_of_event(line) for line in lines if line["event"] == "step"]
    assert all(isinstance(step, Step) for step in steps)
    assert [step.policy["reward"] for step in steps] == [point.reward for point in small["policy"]]


def test_the_ratio_is_clipped(parts, addition_rows):
    """Tokens that have become twice as likely as when they were sampled are followed no further, and give no slope."""
    _, model, _ = parts
    model.eval()
    loss = AnswerLoss(model)
    plain = rollouts(*parts, reward=lambda rows: [0.0, 1.0] * 4).of_step(addition_rows[:2], loss)
    with torch.no_grad():
        logps = [(-loss.of_tokens(collate([row], pad_id=0))).tolist() for row in plain]
    rows = [
        dataclasses.replace(row, advantage=1.0, reference_logps=None, old_logps=[logp - math.log(2) for logp in of_row])
        for row, of_row in zip(plain, logps, strict=True)
    ]
    seen: dict[str, torch.Tensor] = {}

    class Told:
        def saw(self, **sums):
            seen.update({name: value.detach() for name, value in sums.items()})

    objective = GRPO(loss=loss, rollouts=Told(), kl_weight=0.0, clip=0.2, pad_id=0)
    model.zero_grad()
    result = objective.summed(objective.batch(rows), gain=1 / len(rows))
    result.backward()
    assert result.item() == pytest.approx(-1.2, rel=1e-4)
    assert not any(parameter.grad.abs().sum() for parameter in model.parameters() if parameter.grad is not None)
    assert seen["clipped"] == seen["tokens"]
    model.train()

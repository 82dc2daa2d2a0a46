from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from left_bench.core.errors import NotInForce
from left_bench.data import Example, collate
from left_bench.evaluation import evaluate
from left_bench.evaluation.evaluate import (
    Evaluation,
    batches_by_length,
    check_answers,
    evaluate_model,
    general_passages,
    general_texts,
    generation_speed,
    greedy_answers,
    row_losses,
    samples,
    scores,
    token_loss,
)
from left_bench.grid.rules import why_unsupported
from left_bench.measure.device import CpuDevice
from left_bench.methods.attach import attach_adapter, trainable_parameters
from left_bench.model.load import _feed_head_contiguous


def measured(nll: list[float], tokens: list[int], **rest: Any) -> Evaluation:
    return Evaluation(nll=nll, answer_tokens=tokens, **rest)


def row(prompt: str = "q", reference: str = "a", ids: tuple[int, ...] = (5, 6)) -> Example:
    return Example(prompt_ids=list(ids), answer_ids=[7, 1], prompt=prompt, reference=reference)


# --- the loss and its error ---


def test_the_loss_is_per_token_not_per_row():
    mean, _ = token_loss(measured([2.0, 12.0], [1, 9]))
    assert mean == pytest.approx(14 / 10)


def test_the_error_of_equal_rows_is_the_means():
    """With one token in every row the ratio estimator is the ordinary standard error."""
    values = [1.0, 2.0, 4.0, 9.0]
    _, stderr = token_loss(measured(values, [1, 1, 1, 1]))
    assert stderr == pytest.approx(np.std(values, ddof=1) / math.sqrt(4))


def test_the_error_is_the_bootstraps():
    draw = np.random.default_rng(0)
    tokens = draw.integers(1, 30, size=400)
    nll = tokens * draw.gamma(2.0, 0.5, size=400)
    _, stderr = token_loss(measured(nll.tolist(), tokens.tolist()))
    drawn = draw.integers(0, 400, size=(2000, 400))
    means = nll[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)
    assert stderr == pytest.approx(means.std(), rel=0.1)


def test_rows_of_one_loss_have_no_error():
    assert token_loss(measured([1.0, 2.0], [1, 2]))[1] == pytest.approx(0)
    assert token_loss(measured([1.0], [2])) == (0.5, 0.0)


def test_row_losses_are_in_the_rows_order(tiny_cell, load_tiny, addition_rows):
    cell = tiny_cell("eval.batch_size=3")
    model, _ = load_tiny(cell)
    with torch.no_grad():
        result = row_losses(model, addition_rows, cell, pad_id=0, device="cpu")
        alone = [row_losses(model, [item], cell, pad_id=0, device="cpu").nll[0] for item in addition_rows]
    assert result.nll == pytest.approx(alone, abs=1e-4)
    assert result.answer_tokens == [len(item.answer_ids) for item in addition_rows]
    assert result.tokens == sum(item.length for item in addition_rows)


# --- batches ---


@given(st.lists(st.integers(0, 100), max_size=40), st.integers(1, 10))
def test_batches_hold_every_row_once_longest_first(lengths, size):
    batches = batches_by_length(lengths, size)
    flat = [index for batch in batches for index in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[index] for index in flat] == sorted(lengths, reverse=True)
    assert all(len(batch) == size for batch in batches[:-1])
    assert all(0 < len(batch) <= size for batch in batches)


# --- generation ---


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_neox"])
def test_a_batch_answers_as_its_rows_alone(name, tiny_cell, load_tiny, addition_rows):
    cell = tiny_cell(f"model={name}", "eval.max_new_tokens=8", "eval.batch_size=8")
    model, tokenizer = load_tiny(cell)
    model.eval()
    with torch.no_grad():
        together = greedy_answers(model, tokenizer, addition_rows, cell, device="cpu")
        apart = [greedy_answers(model, tokenizer, [item], cell, device="cpu")[0] for item in addition_rows]
    assert together == apart
    assert len(set(map(tuple, together))) > 1


def token_by_token(model, tokenizer, rows, *, tokens: int) -> list[list[int]]:
    """Greedy answers with no cache, no padding, no sampling: one forward pass for every token."""
    answers = []
    for item in rows:
        ids = list(item.prompt_ids)
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        answers.append(ids[len(item.prompt_ids) :])
    return answers


def test_generation_is_the_argmax_of_the_full_forward_pass(tiny_cell, load_tiny, addition_rows):
    cell = tiny_cell("eval.max_new_tokens=5")
    model, tokenizer = load_tiny(cell)
    model.eval()
    with torch.no_grad():
        answers = greedy_answers(model, tokenizer, addition_rows, cell, device="cpu")
        assert answers == token_by_token(model, tokenizer, addition_rows, tokens=5)


PROMPTS = ["prefix_tuning", "prompt_tuning", "multitask_prompt_tuning", "p_tuning", "cartridge", "cpt", "shadow"]


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_neox"])
@pytest.mark.parametrize("peft", PROMPTS)
def test_virtual_tokens_are_there_while_generating(peft, name, tiny_cell, load_tiny, addition_rows):
    """What the adapter changed is what answers; an answer that the adapter was left out of is found out.

    Where the installed versions lose the virtual tokens, the rule says so, and it is true.
    """
    cell = tiny_cell(f"model={name}", f"peft={peft}", "eval.max_new_tokens=5")
    base, tokenizer = load_tiny(cell)
    with torch.no_grad():
        base.get_output_embeddings().weight *= 50  # random weights hardly prefer one token to another
        rows = addition_rows[:4]
        before = greedy_answers(base, tokenizer, rows, cell, device="cpu")
        model = attach_adapter(base, cell, tokenizer=tokenizer, rows=rows)
        for parameter in trainable_parameters(model):
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        model.eval()
        answers = greedy_answers(model, tokenizer, rows, cell, device="cpu")
        if why_unsupported(cell) is not None:
            assert answers != token_by_token(model, tokenizer, rows, tokens=5)
            return
        assert answers != before
        check_answers(model, rows, answers, cell, pad_id=0, device="cpu")
        with pytest.raises(NotInForce, match=f"cannot generate with peft={peft}"):
            check_answers(model, rows, before, cell, pad_id=0, device="cpu")


def test_an_answer_ends_at_the_end_token(tiny_cell, load_tiny, addition_rows):
    cell = tiny_cell("eval.max_new_tokens=6")
    _, tokenizer = load_tiny(cell)
    letters = [2 + byte for byte in b"ab"]

    class Scripted:
        """Answers 'ab', ends, and would go on."""

        def generate(self, *, input_ids, max_new_tokens, **_):
            answer = torch.tensor([*letters, tokenizer.eos_token_id, *letters][:max_new_tokens])
            return torch.cat([input_ids, answer.expand(len(input_ids), -1)], dim=1)

    expected = [*letters, tokenizer.eos_token_id]
    assert greedy_answers(Scripted(), tokenizer, addition_rows, cell, device="cpu") == [expected] * len(addition_rows)


def test_sampling_settings_of_a_checkpoint_are_not_taken(tiny_cell, load_tiny):
    model, _ = load_tiny(tiny_cell())
    settings = model.generation_config
    assert settings.do_sample is False
    assert (settings.temperature, settings.top_p, settings.top_k) == (None, None, None)


def test_generation_speed_is_over_a_fixed_number_of_tokens(tiny_cell, load_tiny, addition_rows):
    cell = tiny_cell()
    _, tokenizer = load_tiny(cell)
    calls = []

    class Timed(torch.nn.Module):
        def generate(self, *, input_ids, min_new_tokens, max_new_tokens, **_):
            import time

            time.sleep(0.2)
            calls.append((len(input_ids), min_new_tokens, max_new_tokens))
            return input_ids

    speed = generation_speed(Timed(), tokenizer, addition_rows, cell, device=CpuDevice())
    rows, least, most = calls[-1]
    assert least == most == evaluate._SPEED_TOKENS
    assert rows == len(addition_rows)
    assert speed == pytest.approx(rows * most / 0.2, rel=0.2)


def test_the_head_hook_changes_no_logit(tiny_cell, load_tiny, addition_rows):
    cell = tiny_cell()
    hooked, _ = load_tiny(cell)
    head = hooked.get_output_embeddings()
    inputs = collate(addition_rows, pad_id=0).input_ids
    with torch.no_grad():
        with_hook = hooked(inputs).logits
        strided = torch.randn(4, 6, 64)[:, -1:]
        through_hook = head(strided)
        head._forward_pre_hooks.clear()
        assert torch.equal(hooked(inputs).logits, with_hook)
        torch.testing.assert_close(head(strided), through_hook)
        seen = []
        _feed_head_contiguous(hooked)
        head.register_forward_pre_hook(lambda _module, given: seen.append(given[0].is_contiguous()))
        head(strided)
    assert not strided.is_contiguous()
    assert seen == [True]


# --- general text ---


def test_the_general_text_is_prose_in_passages(tiny_cell, load_tiny):
    texts = general_texts()
    assert len(texts) >= 8
    assert all(len(text) > 200 for text in texts)
    assert len(set(texts)) == len(texts)
    _, tokenizer = load_tiny(tiny_cell())
    passages = general_passages(tokenizer)
    assert [len(passage.prompt_ids) for passage in passages] == [1] * len(texts)
    assert [tokenizer.decode(passage.prompt_ids + passage.answer_ids) for passage in passages] == texts


def test_general_loss_is_over_all_tokens(tiny_cell, load_tiny, addition_rows, monkeypatch):
    monkeypatch.setattr(evaluate, "general_texts", lambda: ["Short one.", "A somewhat longer passage of text."])
    cell = tiny_cell("eval.forgetting=true", "eval.generate=false")
    model, tokenizer = load_tiny(cell)
    result = evaluate_model(model, tokenizer, addition_rows, cell, device="cpu")
    assert result.predictions is None
    total, tokens = 0.0, 0
    with torch.no_grad():
        for text in evaluate.general_texts():
            ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
            total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    assert result.general_loss == pytest.approx(total / tokens, abs=1e-4)


# --- scores ---


def test_scores_stand_beside_the_base_models(tiny_cell):
    cell = tiny_cell("eval.metrics=[exact_match,bleu]")
    rows = [row(reference="a"), row(reference="b"), row(reference="c"), row(reference="d")]
    base = measured([4.0] * 4, [2] * 4, predictions=["a", "x", "x", "x"], general_loss=3.0)
    after = measured([1.0] * 4, [2] * 4, predictions=["a", "b", "c", "x"], general_loss=3.25)
    results = {score.metric: score for score in scores(after, base, rows, cell)}
    assert set(results) == {"eval_loss", "eval_perplexity", "exact_match", "bleu", "forgetting_nats"}
    assert (results["eval_loss"].value, results["eval_loss"].base_value) == (0.5, 2.0)
    assert results["eval_perplexity"].value == pytest.approx(math.exp(0.5))
    assert results["eval_perplexity"].base_value == pytest.approx(math.exp(2))
    assert (results["exact_match"].value, results["exact_match"].base_value) == (0.75, 0.25)
    assert results["exact_match"].stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert results["bleu"].stderr is None
    assert results["forgetting_nats"].value == pytest.approx(0.25)
    assert results["forgetting_nats"].base_value is None
    assert {score.task for score in results.values()} == {"chain_sum", "general_text"}
    assert results["exact_match"].n == 4


def test_perplexitys_error_is_the_delta_methods(tiny_cell):
    after = measured([1.0, 3.0], [1, 1])
    results = {score.metric: score for score in scores(after, None, [row(), row()], tiny_cell())}
    assert results["eval_perplexity"].stderr == pytest.approx(math.exp(2) * results["eval_loss"].stderr)
    assert results["eval_loss"].base_value is None


def test_a_hopeless_loss_has_no_infinite_perplexity(tiny_cell):
    results = {score.metric: score.value for score in scores(measured([9000.0], [1]), None, [row()], tiny_cell())}
    assert results["eval_loss"] == 9000
    assert math.isfinite(results.get("eval_perplexity", 0.0))


def test_without_generation_there_are_no_text_scores(tiny_cell):
    result = scores(measured([1.0], [1]), measured([2.0], [1]), [row()], tiny_cell("eval.generate=false"))
    assert {score.metric for score in result} == {"eval_loss", "eval_perplexity"}


def test_samples_are_the_first_rows(tiny_cell):
    rows = [row(prompt=f"q{i}", reference=str(i)) for i in range(6)]
    after = measured([1.0] * 6, [1] * 6, predictions=[f"p{i}" for i in range(6)])
    base = measured([1.0] * 6, [1] * 6, predictions=[f"b{i}" for i in range(6)])
    kept = samples(after, base, rows, tiny_cell("eval.samples=2"))
    assert [(item.prompt, item.reference, item.prediction, item.base_prediction) for item in kept] == [
        ("q0", "0", "p0", "b0"),
        ("q1", "1", "p1", "b1"),
    ]
    assert samples(measured([1.0], [1]), None, rows[:1], tiny_cell()) == []
    assert samples(after, None, rows, tiny_cell("eval.samples=1"))[0].base_prediction is None


def test_random_weights_have_no_scores(tiny_cell, work_in_process):
    result = work_in_process(tiny_cell("training.steps=1", "eval.forgetting=true"))
    assert "scores" not in result
    assert "samples" not in result
    quality = {"eval_loss", "eval_perplexity", "exact_match", "forgetting_nats", "base_eval_loss"}
    assert quality.isdisjoint(result["metrics"])
    assert result["metrics"]["train_steps"] == 1


def test_greedy_is_greedy_whatever_the_checkpoint_says(tiny_cell, tmp_path, load_tiny):
    """Penalties, bans and beams of a `generation_config.json` stay in force without sampling, too."""
    from left_bench.model import load as models

    cell = tiny_cell()
    model, tokenizer = load_tiny(cell)
    model.generation_config.repetition_penalty = 3.0
    model.generation_config.no_repeat_ngram_size = 1
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert "repetition_penalty" in (tmp_path / "model" / "generation_config.json").read_text()
    loaded, _ = models.load_model(cell, folder=str(tmp_path / "model"), device="cpu")
    ids = torch.tensor([[5, 6, 7]])
    result = loaded.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)[0]
    for _ in range(6):
        ids = torch.cat([ids, loaded(ids).logits[:, -1:].argmax(-1)], 1)
    assert result.tolist() == ids[0].tolist()

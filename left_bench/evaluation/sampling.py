"""Answers that a model samples, and what they are worth: by the data's verifier, a scorer, or a reward model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from left_bench.data import Example
from left_bench.data.answer_pairs import REWARD, padded
from left_bench.data.rows import split_rows
from left_bench.evaluation import scorer
from left_bench.evaluation.evaluate import answer_text, batches_by_length, cut_at_end, end_tokens, pad_of, prompt_inputs
from left_bench.evaluation.shared_prompt import read_shared_prompt
from left_bench.model.load import autocast
from left_bench.spec.cell import Cell, Data
from left_bench.spec.record import Score


def sampled_answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    cell: Cell,
    *,
    device: str,
) -> list[list[int]]:
    """An answer to each row, drawn token by token from the model's own probabilities, its end token included.

    Nothing is left out of the draw (no top-k, no nucleus, temperature 1), so that the tokens' probabilities in training
    are those that they were drawn by. Batched as greedy answers are; call without gradients.
    """
    decode: Any = model.generate
    answers: list[list[int]] = [[]] * len(rows)
    pad_id, ends = pad_of(tokenizer), end_tokens(model, tokenizer)
    shared = read_shared_prompt(model, rows, cell, pad_id=pad_id, device=device)
    for indices in batches_by_length([len(row.prompt_ids) for row in rows], cell.eval.batch_size):
        asked = [shared.rest(rows[index]) for index in indices]
        inputs, before = prompt_inputs(asked, pad_id, device=device, begin=shared.ids)
        outputs = decode(
            **inputs,
            **shared.arguments(len(asked)),
            max_new_tokens=cell.eval.max_new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            use_cache=True,
            eos_token_id=sorted(ends),
            pad_token_id=pad_id,
        )
        for index, output in zip(indices, outputs[:, before:].tolist(), strict=True):
            answers[index] = cut_at_end(output, ends)
    return answers


def verifier(section: Data) -> Callable[[str, Mapping[str, Any]], float]:
    """What reasoning_gym makes of an answer to one of its questions, (answer, record) -> 0 to 1."""
    import reasoning_gym

    score = reasoning_gym.create_dataset(str(section.task), size=1, seed=0, **section.config).score_answer

    def verify(answer: str, record: Mapping[str, Any]) -> float:
        return float(score(answer, dict(record)))

    return verify


def reward_of_answers(
    cell: Cell, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, *, judge: Any = None
) -> Callable[[Sequence[Example]], list[float]]:
    """Rewards of rows' answers (`answer_ids`), by what the cell's training names.

    Args:
        model: the policy, which says what ends an answer.
        judge: the reward model (`load_reward_model`), where there is one.
    """
    if judge is not None:
        return judge
    ends = end_tokens(model, tokenizer)
    records = {row.prompt: row.record or {} for row in split_rows(cell.data, keep_records=True).train}
    if cell.training.reward is None:
        verify = verifier(cell.data)
        return lambda rows: [verify(answer_text(row.answer_ids, ends, tokenizer), records[row.prompt]) for row in rows]
    score = scorer.load(cell.training.reward, cell.training.reward_content)

    def by_scorer(rows: Sequence[Example]) -> list[float]:
        return [
            _number(score(answer_text(row.answer_ids, ends, tokenizer), row.reference, dict(records[row.prompt])))
            for row in rows
        ]

    return by_scorer


def _number(value: Any) -> float:
    if not isinstance(value, Real) or not math.isfinite(value):
        raise scorer.ScorerFailed(f"training.reward: it returned {value!r}; a reward is one finite number")
    return float(value)


def load_reward_model(
    earlier: Cell, adapter: Path, *, folder: str, device: str, batch_size: int
) -> Callable[[Sequence[Example]], list[float]]:
    """An earlier cell's reward model, asked about rows' answers; it reads the tokens that the policy reads.

    Args:
        folder: of the base model's files.
    """
    from left_bench.methods.attach import load_trained
    from left_bench.model.load import DTYPES, load_model

    base, _ = load_model(earlier, folder=folder, device=device, classes=[REWARD])
    dtype = DTYPES[earlier.precision.adapter_dtype]
    model: Any = load_trained(base, adapter, adapter_dtype=dtype).eval().requires_grad_(False)
    pad_id = base.config.pad_token_id

    def reward(rows: Sequence[Example]) -> list[float]:
        results: list[float] = []
        with torch.no_grad(), autocast(earlier, device=device):
            for start in range(0, len(rows), batch_size):
                part = [row.prompt_ids + row.answer_ids for row in rows[start : start + batch_size]]
                inputs = {name: tensor.to(device) for name, tensor in padded(part, pad_id=pad_id).items()}
                results += model(**inputs).logits[:, 0].float().tolist()
        return results

    return reward


def verifier_scores(
    cell: Cell, rows: Sequence[Any], answers: Sequence[str], base_answers: Sequence[str] | None
) -> tuple[Score, list[float]]:
    """What the data's verifier makes of answers to the test rows, beside those of the base model; and of each row."""
    kept = split_rows(cell.data, keep_records=True).test[: len(rows)]
    verify = verifier(cell.data)

    def of_rows(said: Sequence[str]) -> list[float]:
        return [verify(answer, row.record or {}) for answer, row in zip(said, kept, strict=True)]

    after, before = of_rows(answers), None if base_answers is None else of_rows(base_answers)
    score = Score(
        task=cell.data.name,
        metric="verifier_score",
        value=statistics.fmean(after),
        stderr=statistics.pstdev(after) / math.sqrt(len(after)),
        n=len(after),
        base_value=None if before is None else statistics.fmean(before),
    )
    return score, after

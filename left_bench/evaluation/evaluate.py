"""Evaluate a model on held-out rows: loss, greedy answers and their scores, loss on general text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from left_bench.core.errors import NotInForce
from left_bench.core.extensions import named
from left_bench.data import Example, collate, start_ids, turn_end
from left_bench.evaluation.shared_prompt import SharedPrompt, read_shared_prompt
from left_bench.evaluation.text_metrics import row_parts, score_text
from left_bench.measure.device import Device
from left_bench.model.load import autocast
from left_bench.model.positions import virtual_tokens
from left_bench.spec.cell import Cell
from left_bench.spec.events import Tell
from left_bench.spec.record import Sample, Score
from left_bench.spec.row_scores import ANSWER_METRICS, SCORES_OF_A_PAIR
from left_bench.training.loss import AnswerLoss
from left_bench.training.preferences import with_worse_answer

_SPEED_ROWS, _SPEED_TOKENS = 16, 16
_CHECKED_ROWS = 4
_LARGEST_SHORTFALL = 0.25  # nats, mean over an answer's tokens; rounding alone causes hundredths
_LARGEST_LOSS = 600.0  # nats; beyond it the perplexity or its error overflows a float


class Evaluation(BaseModel):
    """A model's results on the held-out rows, in the rows' order."""

    nll: list[float]
    """Summed negative log-likelihood of each row's answer, nats."""
    answer_tokens: list[int]
    rejected_nll: list[float] | None = None
    """The same for each row's worse answer; None if rows have none."""
    predictions: list[str] | None = None
    """Greedy answers; None if nothing was generated."""
    general_loss: float | None = None
    """Mean token loss on the general text, nats."""
    tokens: int = 0
    """Non-padding tokens in the loss passes."""
    tasks: list[Score] | None = None
    """Scores on `eval.tasks`; None: there are none, or they failed."""


def _silent(*_: object) -> None:
    """Report no progress."""


def evaluate_model(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    cell: Cell,
    *,
    device: str,
    tell: Tell = _silent,
) -> Evaluation:
    """Loss and greedy answers on `rows`, and the loss on general text if `eval.forgetting` is set."""
    model.eval()
    losses: dict[str, Any] = {"pad_id": pad_of(tokenizer), "device": device}
    with torch.no_grad(), autocast(cell, device=device):
        shared = read_shared_prompt(model, rows, cell, **losses)
        result = row_losses(model, rows, cell, shared=shared, tell=partial(tell, "loss"), **losses)
        if cell.data.pairs:
            worse = [with_worse_answer(row) for row in rows]
            result.rejected_nll = row_losses(
                model, worse, cell, shared=shared, tell=partial(tell, "loss of worse answers"), **losses
            ).nll
        result.predictions = named(cell.task.predict)(
            model, tokenizer, rows, cell, device=device, shared=shared, tell=tell
        )
        if cell.eval.forgetting and cell.task.is_decoder:  # other tasks do not continue a text
            passages = general_passages(tokenizer, room=room_of(model, cell))
            general = row_losses(model, passages, cell, tell=partial(tell, "general text"), **losses)
            result.general_loss = sum(general.nll) / sum(general.answer_tokens)
    return result


def written_answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    cell: Cell,
    *,
    device: str,
    shared: SharedPrompt | None = None,
    tell: Tell = _silent,
) -> list[str] | None:
    """Each row's greedy answer as text; None if the cell generates none."""
    if not cell.generates:
        return None
    answers = greedy_answers(model, tokenizer, rows, cell, device=device, shared=shared, tell=partial(tell, "answers"))
    check_answers(model, rows[:_CHECKED_ROWS], answers, cell, pad_id=pad_of(tokenizer), device=device)
    ends = end_tokens(model, tokenizer)
    return [answer_text(ids, ends, tokenizer) for ids in answers]


def row_losses(
    model: torch.nn.Module,
    rows: Sequence[Example],
    cell: Cell,
    *,
    pad_id: int,
    device: str,
    shared: SharedPrompt | None = None,
    tell: Callable[[int, int], None] = _silent,
) -> Evaluation:
    """Summed loss of each row, batched by length; `shared` is the prompts' common prefix, if it was processed."""
    loss = AnswerLoss(model, everywhere=cell.training.output_head == "all")
    shared = shared or SharedPrompt(model)
    loss = shared.after(loss)
    nll = [0.0] * len(rows)
    tokens = [0] * len(rows)
    seen = len(shared.ids)
    done = Counted(len(rows), tell)
    for indices in batches_by_length([row.length for row in rows], cell.eval.batch_size):
        batch = collate([shared.rest(rows[index]) for index in indices], pad_id=pad_id).to(device)
        losses = loss.of_tokens(batch).split(batch.answer_lengths)
        for index, of_row, length in zip(indices, losses, batch.answer_lengths, strict=True):
            nll[index] = of_row.sum().item()
            tokens[index] = length
        seen += batch.tokens
        done.add(len(indices))
    return Evaluation(nll=nll, answer_tokens=tokens, tokens=seen)


def mean_token_loss(
    model: torch.nn.Module, rows: Sequence[Example], cell: Cell, *, pad_id: int, device: str, tell: Tell = _silent
) -> float:
    """Nats per answer token of `rows`; every token has the same weight."""
    model.eval()
    with torch.no_grad(), autocast(cell, device=device):
        shared = read_shared_prompt(model, rows, cell, pad_id=pad_id, device=device)
        result = row_losses(
            model, rows, cell, pad_id=pad_id, device=device, shared=shared, tell=partial(tell, "validation loss")
        )
    return sum(result.nll) / sum(result.answer_tokens)


def answer_scores(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Any], cell: Cell, *, device: str
) -> dict[str, float]:
    """The score of the model's current answers to `rows`, by the first of the cell's metrics."""
    model.eval()
    with torch.no_grad(), autocast(cell, device=device):
        shared = read_shared_prompt(model, rows, cell, pad_id=pad_of(tokenizer), device=device)
        predictions = named(cell.task.predict)(model, tokenizer, rows, cell, device=device, shared=shared, tell=_silent)
    names, references = (cell.eval.metrics or [])[:1], [row.reference for row in rows]
    return {
        name: score_text(name, predictions=predictions, references=references, extractor=cell.eval.extractor)[0]
        for name in names
    }


def answer_text(ids: list[int], ends: set[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """An answer's text without its end token, which need not be a "special" token."""
    kept = ids[:-1] if ids and ids[-1] in ends else ids
    return str(tokenizer.decode(kept, skip_special_tokens=True)).strip()


def greedy_answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    cell: Cell,
    *,
    device: str,
    shared: SharedPrompt | None = None,
    tell: Callable[[int, int], None] = _silent,
) -> list[list[int]]:
    """Each row's greedy answer, including its end token; batched by prompt length with a key-value cache.

    `shared` is the prompts' common prefix, if it was processed. A batch ends when all its rows have ended.
    """
    decode: Any = model.generate
    answers: list[list[int]] = [[]] * len(rows)
    done, most, ends = Counted(len(rows), tell), cell.eval.max_new_tokens, end_tokens(model, tokenizer)
    assert most is not None  # null was replaced by the data's own
    shared = shared or SharedPrompt(model)
    for indices in batches_by_length([len(row.prompt_ids) for row in rows], cell.eval.batch_size):
        batch = [shared.rest(rows[index]) for index in indices]
        inputs, before = prompt_inputs(batch, pad_of(tokenizer), device=device, begin=shared.ids)
        outputs = decode(
            **inputs,
            **shared.arguments(len(batch)),
            max_new_tokens=most,
            do_sample=False,
            use_cache=True,
            eos_token_id=sorted(ends),
            pad_token_id=pad_of(tokenizer),
            stopping_criteria=StoppingCriteriaList([_Watched(done, rows=len(indices), most=most)]),
        )
        done.add(len(indices))
        for index, output in zip(indices, outputs[:, before:].tolist(), strict=True):
            answers[index] = cut_at_end(output, ends)
    return answers


def end_tokens(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """All tokens that end an answer: the tokenizer's, the checkpoint's, and the one that ends a turn of the
    template."""
    config: Any = getattr(model, "generation_config", None)
    of_checkpoint = getattr(config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, turn_end(tokenizer)[-1]}
    ends |= set(of_checkpoint) if isinstance(of_checkpoint, list) else {of_checkpoint}
    return {end for end in ends if isinstance(end, int)}


def check_answers(
    model: torch.nn.Module,
    rows: Sequence[Example],
    answers: Sequence[list[int]],
    cell: Cell,
    *,
    pad_id: int,
    device: str,
) -> None:
    """Check that the answers are this model's: a pass over prompt and answer together must choose the same tokens.

    Generation uses other code than training, and may silently ignore the adapter: since transformers 5.24 renamed the
    cache argument, prefix tuning, prompt tuning and p-tuning of peft 0.21 answer like the base model. Rounding may
    decide between two almost equally likely tokens, but it does not make an answer unlikely.

    Raises:
        NotInForce: the tokens' logits are too far below the highest.
    """
    loss = AnswerLoss(model, everywhere=cell.training.output_head == "all")
    answered = [replace(row, answer_ids=ids) for row, ids in zip(rows, answers, strict=False)]
    short = loss.shortfalls(collate(answered, pad_id=pad_id).to(device)).mean().item()
    if short > _LARGEST_SHORTFALL:
        raise NotInForce(
            f"the generated answers are not this model's: in a pass over them their tokens are {short:.1f} nats "
            f"below the likeliest; the installed transformers and peft cannot generate with peft={cell.peft.name}"
        )


class Counted:
    """Counts finished rows and reports progress."""

    def __init__(self, total: int, tell: Callable[[int, int], None]) -> None:
        self._done, self._total, self._tell = 0, total, tell
        self.add(0)

    def add(self, rows: int) -> None:
        self._done += rows
        self.within(0)

    def within(self, rows: int) -> None:
        """Report progress within the running batch, in rows."""
        self._tell(self._done + rows, self._total)


class _Watched(StoppingCriteria):
    """Never stops a row; it reports progress per token, because a batch can take minutes. Answers may end early."""

    def __init__(self, done: Counted, *, rows: int, most: int) -> None:
        self._done, self._rows, self._most, self._tokens = done, rows, most, 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        self._tokens += 1
        self._done.within(self._rows * self._tokens // (self._most + 1))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]


def classify(
    model: torch.nn.Module,
    reader: Any,
    rows: Sequence[Any],
    cell: Cell,
    *,
    device: str,
    shared: SharedPrompt | None = None,
    tell: Tell = _silent,
) -> list[str]:
    """The likeliest class of each row, by name; `shared` is not used."""
    forward: Any = model
    names, result = forward.config.id2label, []
    done = Counted(len(rows), partial(tell, "classes"))
    for start in range(0, len(rows), cell.eval.batch_size):
        some = rows[start : start + cell.eval.batch_size]
        batch = collate(some, pad_id=pad_of(reader)).to(device)
        result += forward(**batch.inputs()).logits.argmax(-1).tolist()
        done.add(len(some))
    return [str(names[index]) for index in result]


def no_answers(*_: Any, **__: Any) -> None:
    """A reward model says nothing but how good an answer is."""


def generation_speed(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], cell: Cell, *, device: Device
) -> float:
    """New tokens per second of greedy decoding: one batch, with the same number of tokens for every row.

    The length is fixed because otherwise a method that learned to answer briefly would be timed on fewer, costlier
    steps. The first, short call is not timed: it selects kernels and fills caches.
    """
    decode: Any = model.generate
    timed = rows[:_SPEED_ROWS]
    inputs, _ = prompt_inputs(timed, pad_of(tokenizer), device=device.kind)
    model.eval()
    with torch.no_grad(), autocast(cell, device=device.kind):
        for tokens in (2, _SPEED_TOKENS):
            device.synchronize()
            start = time.perf_counter()
            decode(
                **inputs,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=pad_of(tokenizer),
            )
            device.synchronize()
    return len(timed) * _SPEED_TOKENS / (time.perf_counter() - start)


def scores(
    evaluation: Evaluation,
    base: Evaluation | None,
    rows: Sequence[Example],
    cell: Cell,
    *,
    by_row: Mapping[str, Sequence[float]] | None = None,
) -> list[Score]:
    """The scores of an evaluation, each with the base model's.

    Args:
        by_row: the result of `row_scores`, for standard errors.
    """
    task = cell.data.name
    loss, stderr = token_loss(evaluation)
    base_loss = token_loss(base)[0] if base else None
    made = [
        Score(task=task, metric="eval_loss", value=loss, stderr=stderr, n=len(rows), base_value=base_loss),
    ]
    if cell.task.likelihood and loss < _LARGEST_LOSS:
        made.append(
            Score(
                task=task,
                metric="eval_perplexity",
                value=math.exp(loss),
                stderr=math.exp(loss) * stderr,  # delta method
                n=len(rows),
                base_value=None if base_loss is None or base_loss >= _LARGEST_LOSS else math.exp(base_loss),
            )
        )
    if evaluation.rejected_nll is not None:
        pairs_before = (base.nll, base.rejected_nll) if base and base.rejected_nll else None
        made += _preference_scores((evaluation.nll, evaluation.rejected_nll), pairs_before, task=task)
    references = [row.reference for row in rows]
    if evaluation.predictions is not None:
        for name in cell.eval.metrics or []:
            score = partial(score_text, name, references=references, extractor=cell.eval.extractor)
            value, per_row = score(predictions=evaluation.predictions)
            of_rows = per_row if per_row is not None else (by_row or {}).get(name)
            before = score(predictions=base.predictions)[0] if base and base.predictions else None
            made.append(
                Score(
                    task=task,
                    metric=name,
                    value=value,
                    stderr=None if of_rows is None else float(np.std(of_rows) / math.sqrt(len(of_rows))),
                    n=len(rows),
                    base_value=before,
                )
            )
    of_base = {score.metric: score.value for score in (base.tasks if base else None) or []}
    made += [score.model_copy(update={"base_value": of_base.get(score.metric)}) for score in evaluation.tasks or []]
    if evaluation.general_loss is not None and base and base.general_loss is not None:
        passages = len(general_texts())
        rise = evaluation.general_loss - base.general_loss
        made.append(Score(task="general_text", metric="forgetting_nats", value=rise, n=passages))
    return made


def row_scores(evaluation: Evaluation, rows: Sequence[Example], cell: Cell) -> dict[str, list[float]]:
    """Metric -> the score of each row, or its part in an overall score, for metrics that need more than answer and
    reference."""
    answers, extractor = evaluation.predictions, cell.eval.extractor
    if answers is None:
        return {}
    references, result = [row.reference for row in rows], {}
    for name, metric in ((name, ANSWER_METRICS[name]) for name in cell.eval.metrics or []):
        if metric.by_leaving_out:
            result[name] = row_parts(metric, answers, references)
        elif metric.extracts and metric.of_answer is not None and extractor is not None:
            pairs = zip(answers, references, strict=True)
            result[name] = [metric.of_answer(*pair, extractor=extractor) for pair in pairs]
    return result


def _preference_scores(
    losses: tuple[list[float], list[float]], base: tuple[list[float], list[float]] | None, *, task: str
) -> list[Score]:
    """Scores of pairs from the losses of their right and worse answers, nats."""

    def margins(right: list[float], worse: list[float]) -> list[float]:
        return [q - p for p, q in zip(right, worse, strict=True)]

    result, before = margins(*losses), margins(*base) if base else None
    made = []
    for metric, of_pair in SCORES_OF_A_PAIR.items():
        of_rows = np.array([of_pair(margin) for margin in result])
        made.append(
            Score(
                task=task,
                metric=metric,
                value=float(of_rows.mean()),
                stderr=float(of_rows.std() / math.sqrt(len(of_rows))),
                n=len(of_rows),
                base_value=None if before is None else float(np.mean([of_pair(margin) for margin in before])),
            )
        )
    return made


def token_loss(evaluation: Evaluation) -> tuple[float, float]:
    """Mean loss per answer token and its standard error, with rows as independent draws (ratio estimator)."""
    nll, tokens = np.array(evaluation.nll), np.array(evaluation.answer_tokens)
    mean = nll.sum() / tokens.sum()
    n = len(nll)
    spread = math.sqrt(((nll - mean * tokens) ** 2).sum() * n / max(1, n - 1))
    return float(mean), float(spread / tokens.sum())


def samples(evaluation: Evaluation, base: Evaluation | None, rows: Sequence[Example], cell: Cell) -> list[Sample]:
    """The first rows with their answers."""
    if evaluation.predictions is None:
        return []
    before = base.predictions if base and base.predictions else [None] * len(rows)
    return [
        Sample(prompt=row.prompt, reference=row.reference, prediction=prediction, base_prediction=old)
        for row, prediction, old in list(zip(rows, evaluation.predictions, before, strict=True))[: cell.eval.samples]
    ]


def general_texts() -> list[str]:
    """Passages of general prose shipped with the package, which the model should not unlearn."""
    text = files("left_bench").joinpath("general_text.txt").read_text(encoding="utf-8")
    return [" ".join(passage.split()) for passage in text.split("\n\n") if passage.strip()]


def general_passages(tokenizer: PreTrainedTokenizerBase, *, room: int | None = None) -> list[Example]:
    """The passages as rows in which every token except the first carries loss, truncated to `room` tokens.

    The first is the start token if the tokenizer would add one, because models trained with it rely on it.
    """
    start = start_ids(tokenizer)
    encoded = [(start + tokenizer(text, add_special_tokens=False)["input_ids"])[:room] for text in general_texts()]
    return [Example(prompt_ids=ids[:1], answer_ids=ids[1:], prompt="", reference="") for ids in encoded]


def room_of(model: torch.nn.Module, cell: Cell) -> int | None:
    """Number of tokens of a text for which the model has positions; None if its configuration gives no limit."""
    config: Any = model.config
    of_text = config.get_text_config()
    result = getattr(of_text, "max_position_embeddings", None) or getattr(of_text, "n_positions", None)
    return result - virtual_tokens(cell) if isinstance(result, int) and result > virtual_tokens(cell) + 1 else None


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row indices in batches of similar length, longest first so that running out of memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def pad_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding id, which `pretrained.load_tokenizer` ensures. Images are not padded: 0."""
    pad = getattr(tokenizer, "pad_token_id", 0)
    assert isinstance(pad, int)
    return pad


def prompt_inputs(
    rows: Sequence[Example], pad_id: int, *, device: str, begin: Sequence[int] = ()
) -> tuple[dict[str, torch.Tensor], int]:
    """Arguments of `generate` for the rows' prompts, and how many tokens precede the new ones in its output.

    A decoder continues its prompt, so padding is at the left; an encoder's prompt is padded as in training. `begin`
    comes before all of it: tokens removed from the rows' prompts because a cache holds them.
    """
    longest = max(len(row.prompt_ids) for row in rows)
    of_decoder = rows[0].decoder_start is None
    ids, mask = [], []
    for row in rows:
        padding, ones = [pad_id] * (longest - len(row.prompt_ids)), [1] * len(row.prompt_ids)
        ids.append([*begin, *padding, *row.prompt_ids] if of_decoder else row.prompt_ids + padding)
        mask.append([1] * len(begin) + [0] * len(padding) + ones if of_decoder else ones + [0] * len(padding))
    inputs = {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}
    return inputs, len(begin) + longest if of_decoder else 1


def cut_at_end(output: list[int], ends: set[int]) -> list[int]:
    """The tokens up to the first that ends an answer."""
    for position, token in enumerate(output):
        if token in ends:
            return output[: position + 1]
    return output

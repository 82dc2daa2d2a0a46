"""Losses of better and worse answers: DPO, KTO and ORPO, and the reference that the first two are held to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from left_bench.data import Batch, Example, collate, split_passes, step_rows
from left_bench.data.batches import moved_to
from left_bench.data.lazy import LazyRows
from left_bench.model.load import autocast
from left_bench.spec.cell import Cell
from left_bench.training.loss import AnswerLoss
from left_bench.training.objective import Objective, OfGivenRows, RightAnswers
from left_bench.training.rewards import RankedRewards


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """One pass over answers, right ones first where rows have two, with what its loss knows of each beforehand."""

    batch: Batch
    known: Mapping[str, torch.Tensor]
    """Name -> float32, one entry for each answer of the pass or for each row."""
    unrelated: Batch | None = None
    """KTO: the same prompts with another row's answers."""

    def inputs(self) -> dict[str, Any]:
        """The arguments of the model's forward pass over the answers, by their names in transformers."""
        return self.batch.inputs()

    def to(self, device: torch.device | str) -> Compared:
        return Compared(
            batch=self.batch.to(device),
            known={name: moved_to(tensor, device) for name, tensor in self.known.items()},
            unrelated=None if self.unrelated is None else self.unrelated.to(device),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Preferences(OfGivenRows):
    """What the three losses share."""

    loss: AnswerLoss
    beta: float
    pad_id: int
    packed: bool = False

    def sequences(self, rows: Sequence[Example]) -> list[Example]:
        return [*rows, *map(with_worse_answer, rows)]

    def under_reference(self, rows: Sequence[Example]) -> list[Example]:
        """What the reference is asked about: as many for each row, the first of every row before the second."""
        return self.sequences(rows)

    def count(self, rows: Sequence[Example]) -> int:
        return len(rows)

    def through(self, wrapped: torch.nn.Module) -> Any:
        return dataclasses.replace(self, loss=self.loss.through(wrapped))

    def collate(self, rows: Sequence[Example]) -> Batch:
        return collate(rows, pad_id=self.pad_id, packed=self.packed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPO(_Preferences):
    """Direct preference optimization (Rafailov et al. 2023, eq. 7): -log sigmoid(beta x (margin - reference margin)).

    A margin is the log-probability of the right answer less that of the worse one, each summed over its tokens.
    """

    def batch(self, rows: Sequence[Example], *, step: Sequence[Example] = ()) -> Compared:
        right, worse = _reference_of(rows, 2)
        return Compared(batch=self.collate(self.sequences(rows)), known={"margins": right - worse})

    def summed(self, batch: Compared, *, gain: float) -> torch.Tensor:
        def loss(nll: torch.Tensor) -> torch.Tensor:
            right, worse = nll.chunk(2)
            return -gain * logsigmoid(self.beta * (worse - right - batch.known["margins"])).sum()

        return self.loss.of_rows(batch.batch, loss)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KTO(_Preferences):
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, eq. 7 and 8): answers that are good or bad each by itself.

    The reward of an answer is the log-ratio of policy and reference. A good one costs 1 - sigmoid(beta x (reward - z)),
    a bad one 1 - sigmoid(beta x (z - reward)). z estimates their divergence, without a gradient: the mean reward of
    the pass's prompts, of all ranks, with the answers of the rows before them, and at least 0. A pair is a good answer
    and a bad one.
    """

    good_weight: float = 1.0
    bad_weight: float = 1.0

    def sequences(self, rows: Sequence[Example]) -> list[Example]:
        return super().sequences(rows) if rows[0].desirable is None else list(rows)

    def under_reference(self, rows: Sequence[Example]) -> list[Example]:
        return [*self.sequences(rows), *_with_unrelated_answers(rows)]

    def count(self, rows: Sequence[Example]) -> int:
        return len(self.sequences(rows))

    def batch(self, rows: Sequence[Example], *, step: Sequence[Example] = ()) -> Compared:
        answers, unrelated = self.sequences(rows), _with_unrelated_answers(rows)
        reference = torch.cat(_reference_of(rows, len(answers) // len(rows) * 2))
        good = [row.desirable is not False for row in rows] + [False] * (len(answers) - len(rows))
        return Compared(
            batch=self.collate(answers),
            known={
                "good": torch.tensor(good),
                "reference": reference[: len(answers)],
                "of_unrelated": reference[len(answers) :],
            },
            unrelated=self.collate(unrelated),
        )

    def summed(self, batch: Compared, *, gain: float) -> torch.Tensor:
        assert batch.unrelated is not None
        with torch.no_grad():
            rewards = -self.loss.row_sums(batch.unrelated) - batch.known["of_unrelated"]
            divergence = _mean_of_all_ranks(rewards).clamp(min=0)
        good = batch.known["good"]

        def loss(nll: torch.Tensor) -> torch.Tensor:
            above = -nll - batch.known["reference"] - divergence
            losses = 1 - torch.sigmoid(self.beta * torch.where(good, above, -above))
            return gain * (torch.where(good, self.good_weight, self.bad_weight) * losses).sum()

        return self.loss.of_rows(batch.batch, loss)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ORPO(_Preferences):
    """Odds-ratio preference optimization (Hong et al. 2024, eq. 6 and 7), which needs no reference.

    The negative log-likelihood of a right answer's token, less beta x log sigmoid(log odds ratio), mean over pairs. The
    odds are p / (1 - p), with p the geometric mean of an answer's token probabilities.
    """

    def count(self, rows: Sequence[Example]) -> int:
        return sum(row.labels for row in rows)

    def batch(self, rows: Sequence[Example], *, step: Sequence[Example] = ()) -> Compared:
        batch = self.collate(self.sequences(rows))
        whole = step or rows
        return Compared(
            batch=batch,
            known={
                "lengths": torch.tensor(batch.answer_lengths, dtype=torch.float32),
                # of the whole step, so that a pair weighs the same in whichever pass it comes
                "tokens_per_pair": torch.tensor(self.count(whole) / len(whole)),
            },
        )

    def summed(self, batch: Compared, *, gain: float) -> torch.Tensor:
        lengths, weight = batch.known["lengths"], batch.known["tokens_per_pair"] * self.beta

        def loss(nll: torch.Tensor) -> torch.Tensor:
            # a mean of exactly 0 would have infinite odds
            right, worse = (-nll / lengths).clamp(max=-1e-7).chunk(2)
            ratio = (right - worse) - (_log_of_rest(right) - _log_of_rest(worse))
            return gain * (nll.chunk(2)[0].sum() - weight * logsigmoid(ratio).sum())

        return self.loss.of_rows(batch.batch, loss)


def _mean_of_all_ranks(values: torch.Tensor) -> torch.Tensor:
    """The mean of as many values on each rank, which take a pass together."""
    mean = values.mean()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(mean)
        mean /= torch.distributed.get_world_size()
    return mean


def _log_of_rest(log_probability: torch.Tensor) -> torch.Tensor:
    """log(1 - p), without cancellation on either side of p = 1/2."""
    near_one = torch.log(-torch.expm1(log_probability))
    return torch.where(log_probability < -0.6931, torch.log1p(-torch.exp(log_probability)), near_one)


def make_objective(cell: Cell, loss: AnswerLoss, *, pad_id: int, packed: bool) -> Objective:
    """The loss that the cell's training asks for."""
    settings = cell.training
    if settings.objective == "sft":
        return RightAnswers(loss=loss, pad_id=pad_id, packed=packed)
    if settings.objective == "reward":
        return RankedRewards(loss=loss, pad_id=pad_id, center=settings.center_rewards)
    return _of_answers(cell, loss, pad_id=pad_id, packed=packed)


def _of_answers(cell: Cell, loss: AnswerLoss, *, pad_id: int, packed: bool) -> DPO | KTO | ORPO:
    settings = cell.training
    common: dict[str, Any] = {"loss": loss, "beta": settings.beta, "pad_id": pad_id, "packed": packed}
    if settings.objective == "kto":
        return KTO(**common, good_weight=settings.good_weight, bad_weight=settings.bad_weight)
    return ORPO(**common) if settings.objective == "orpo" else DPO(**common)


def with_worse_answer(row: Example) -> Example:
    """The row with its two answers in each other's place."""
    assert row.rejected_ids is not None
    return dataclasses.replace(row, answer_ids=row.rejected_ids, rejected_ids=row.answer_ids)


# --- the reference ---


def with_reference(
    rows: Sequence[Example], cell: Cell, *, loss: AnswerLoss, pad_id: int, packed: bool, device: str
) -> Sequence[Example]:
    """The training rows with their answers' log-probabilities under the model as it is now; of those that the cell's
    steps will see.

    The model before preference tuning is the reference of DPO and KTO. It does not change, so it is asked once, and no
    second model is held beside the one that is trained.
    """
    settings = cell.training
    if settings.objective == "kto":
        rows = _WithUnrelated(rows, max_length=settings.max_length)
    order = step_rows(len(rows), rows_per_step=settings.rows_per_step, steps=settings.steps, seed=cell.seed)
    seen = sorted({index for indices in order for index in indices})
    objective = _of_answers(cell, loss, pad_id=pad_id, packed=packed)
    was_training = loss.model.training
    loss.model.eval()  # the reference has no dropout
    known = dict(zip(seen, _asked([rows[index] for index in seen], objective, cell, device=device), strict=True))
    loss.model.train(was_training)
    return _WithReference(rows, known)


class _WithReference(LazyRows[Example]):
    """Rows that know their reference; those that no step will see have none, for passes that only try something."""

    def __init__(self, rows: Sequence[Example], known: Mapping[int, list[float]]) -> None:
        self._rows, self._known = rows, known

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Example:
        return dataclasses.replace(self._rows[index], reference_logps=self._known.get(index))


class _WithUnrelated(LazyRows[Example]):
    """Rows with the answers of the row before, cut where prompt and answer together would be too long."""

    def __init__(self, rows: Sequence[Example], *, max_length: int) -> None:
        self._rows, self._max_length = rows, max_length

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Example:
        row, before = self._rows[index], self._rows[index - 1]
        room = max(1, self._max_length - len(row.prompt_ids))
        answers = [before.answer_ids, *([] if before.rejected_ids is None else [before.rejected_ids])]
        return dataclasses.replace(row, unrelated_ids=[answer[:room] for answer in answers])


def _with_unrelated_answers(rows: Sequence[Example]) -> list[Example]:
    """The rows with each of their unrelated answers, the first of every row before the second."""

    def with_one(row: Example, place: int) -> Example:
        assert row.unrelated_ids is not None
        return dataclasses.replace(row, answer_ids=row.unrelated_ids[place], unlabelled=None)

    return [with_one(row, place) for place in range(len(rows[0].unrelated_ids or ())) for row in rows]


def _reference_of(rows: Sequence[Example], answers: int) -> list[torch.Tensor]:
    """Of each answer of a row the reference's log-probabilities, float32 [rows]."""
    known = torch.tensor([row.reference_logps or [0.0] * answers for row in rows], dtype=torch.float32)
    return list(known.T)


def _asked(rows: Sequence[Example], objective: Any, cell: Cell, *, device: str) -> Iterator[list[float]]:
    with torch.no_grad(), autocast(cell, device=device):
        for part in split_passes(rows, batch_size=cell.training.batch_size, batching="padded"):
            sums: Callable[[Batch], torch.Tensor] = objective.loss.row_sums
            of_answers = -sums(objective.collate(objective.under_reference(part)).to(device))
            yield from of_answers.view(-1, len(part)).T.tolist()

"""Group relative policy optimization: answers that the model samples itself, weighed by their rewards."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from left_bench.compat.torch import run_eagerly
from left_bench.data import Example, collate, split_passes
from left_bench.measure.device import Device
from left_bench.methods.attach import trainable_parameters
from left_bench.model.load import autocast, layers_of
from left_bench.spec.cell import Cell
from left_bench.training.loss import AnswerLoss
from left_bench.training.preferences import Compared

Sampler = Callable[[Sequence[Example]], list[list[int]]]
"""One sampled answer to each row, as tokens, with what ends it."""
Reward = Callable[[Sequence[Example]], list[float]]
"""How good the rows' answers (`answer_ids`) are."""
_LEAST_SPREAD = 1e-4
"""Added to a group's standard deviation, as TRL does."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledAnswer(Example):
    """A question with an answer that the model gave. `reference_logps` are those of the answer's tokens."""

    advantage: float
    """Its reward, less the mean of its group's, over their standard deviation."""
    old_logps: list[float] | None = None
    """Log-probabilities of the answer's tokens under the model that sampled it, nats; None: that is the model still."""


class FrozenCopy:
    """The trainable weights as they are now, to be put in place of later ones for a while.

    Without supervised steps before, that is what an adapter switched off comes to; with them, it is the model that the
    policy starts from, which no switch brings back.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._pairs = [(parameter, parameter.detach().clone()) for parameter in trainable_parameters(model)]

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [copy for _, copy in self._pairs]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model is what it was; nothing is copied."""
        now = [parameter.data for parameter, _ in self._pairs]
        try:
            for parameter, copy in self._pairs:
                parameter.data = copy
            yield
        finally:
            for (parameter, _), data in zip(self._pairs, now, strict=True):
                parameter.data = data


class Rollouts:
    """Samples and rewards the answers of each step, and keeps count of what is told of it."""

    def __init__(
        self, cell: Cell, model: torch.nn.Module, *, sample: Sampler, reward: Reward, device: Device, pad_id: int
    ) -> None:
        self._cell, self._model, self._device, self._pad_id = cell, model, device, pad_id
        self._sample, self._reward = sample, reward
        settings = cell.training
        self.reference = FrozenCopy(model) if settings.kl_weight else None
        self._held: list[SampledAnswer] = []
        self._uses = 0
        self._told: dict[str, float] = {}
        self._sums: dict[str, torch.Tensor] = {}

    def of_step(self, rows: Sequence[Example], loss: AnswerLoss) -> list[SampledAnswer]:
        """Answers to the rows, a group to each, one group behind the other; those of the last step, while it is their
        turn (`training.updates_per_sample`)."""
        self._sums = {}
        if self._held and self._uses < self._cell.training.updates_per_sample:
            self._uses += 1
            self._told |= {"generated_tokens": 0, "generating_seconds": 0.0, "rewarding_seconds": 0.0}
            return self._held
        self._uses = 1
        model, kind = self._model, self._device.kind
        model.eval()  # what is sampled, and the reference, have no dropout
        with torch.no_grad(), autocast(self._cell, device=kind), run_eagerly(layers_of(model)):
            self._held = self._sampled(rows, loss)
        model.train()
        return self._held

    def _sampled(self, rows: Sequence[Example], loss: AnswerLoss) -> list[SampledAnswer]:
        settings = self._cell.training
        asked = [row for row in rows for _ in range(settings.group_size)]
        start = time.perf_counter()
        answers = self._sample(asked)
        self._device.synchronize()
        sampled = time.perf_counter()
        given = [_answered(row, answer) for row, answer in zip(asked, answers, strict=True)]
        rewards = torch.tensor(self._reward(given), dtype=torch.float64).view(-1, settings.group_size)
        self._device.synchronize()
        rewarded = time.perf_counter()
        spread = rewards.std(dim=1, keepdim=True)
        advantages = ((rewards - rewards.mean(dim=1, keepdim=True)) / (spread + _LEAST_SPREAD)).flatten().tolist()
        lengths = [len(answer) for answer in answers]
        self._told = {
            "reward": rewards.mean().item(),
            "reward_spread": rewards.std().item(),
            "equal_groups": (spread == 0).double().mean().item(),
            "answer_length": sum(lengths) / len(lengths),
            "cut_answers": sum(length >= (self._cell.eval.max_new_tokens or 0) for length in lengths) / len(lengths),
            "generated_tokens": sum(lengths),
            "generating_seconds": sampled - start,
            "rewarding_seconds": rewarded - sampled,
        }
        old = self._logps(given, loss) if settings.updates_per_sample > 1 else [None] * len(given)
        reference: Sequence[list[float] | None] = [None] * len(given)
        if self.reference is not None:
            with self.reference.in_place():
                reference = self._logps(given, loss)
        return [
            dataclasses.replace(row, advantage=advantage, old_logps=before, reference_logps=of_reference)
            for row, advantage, before, of_reference in zip(given, advantages, old, reference, strict=True)
        ]

    def _logps(self, rows: Sequence[SampledAnswer], loss: AnswerLoss) -> list[list[float]]:
        """Of each answer token under the model as it stands."""
        results: list[list[float]] = []
        for part in split_passes(rows, batch_size=self._cell.training.batch_size, batching="padded"):
            batch = collate(part, pad_id=self._pad_id).to(self._device.kind)
            results += [(-losses).tolist() for losses in loss.of_tokens(batch).split(batch.answer_lengths)]
        return results

    def saw(self, **sums: torch.Tensor) -> None:
        """Add to what is counted over the tokens of a step."""
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=value.device)) + value.detach()

    def told(self) -> dict[str, float]:
        """What a step has to tell of itself, by the names of `spec.record.PolicyPoint`."""
        sums = {name: value.item() for name, value in self._sums.items()}
        tokens = sums.pop("tokens", 0.0)
        return self._told | {name: value / tokens for name, value in sums.items()} if tokens else dict(self._told)


def _answered(row: Example, answer: list[int]) -> SampledAnswer:
    return SampledAnswer(
        prompt_ids=row.prompt_ids,
        answer_ids=answer,
        prompt=row.prompt,
        reference=row.reference,
        decoder_start=row.decoder_start,
        advantage=0.0,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPO:
    """Shao et al. 2024 (DeepSeekMath), eq. 3: the clipped ratio of each token's probability to the one that it was
    sampled by, times the answer's advantage, less `kl_weight` times the estimate of its divergence from the reference
    (eq. 4, times that ratio as in DeepSeek-V3.2, arXiv 2512.02556); mean over an answer's tokens, then over answers."""

    loss: AnswerLoss
    rollouts: Rollouts
    kl_weight: float
    clip: float
    pad_id: int
    packed: bool = False

    def prepare(self, rows: Sequence[Example]) -> Sequence[Example]:
        return self.rollouts.of_step(rows, self.loss)

    def told(self) -> dict[str, float]:
        return self.rollouts.told()

    def sequences(self, rows: Sequence[Example]) -> list[Example]:
        return list(rows)

    def count(self, rows: Sequence[Example]) -> int:
        return len(rows)

    def batch(self, rows: Sequence[Any], *, step: Sequence[Example] = ()) -> Compared:
        batch = collate(rows, pad_id=self.pad_id)
        places = torch.tensor(batch.answer_lengths)

        def of_tokens(values: Sequence[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32).repeat_interleave(places)

        known = {"advantages": of_tokens([row.advantage for row in rows])}
        known["lengths"] = of_tokens([float(length) for length in batch.answer_lengths])
        if rows[0].old_logps is not None:
            known["old"] = torch.tensor([logp for row in rows for logp in row.old_logps])
        if rows[0].reference_logps is not None:
            known["reference"] = torch.tensor([logp for row in rows for logp in row.reference_logps])
        return Compared(batch=batch, known=known)

    def summed(self, batch: Compared, *, gain: float) -> torch.Tensor:
        known, entropies = batch.known, list[torch.Tensor]()

        def loss(nll: torch.Tensor) -> torch.Tensor:
            logps, advantages = -nll, known["advantages"]
            ratio = torch.exp(logps - known.get("old", logps.detach()))
            clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
            of_tokens = -torch.min(ratio * advantages, clipped * advantages)
            seen = {"tokens": torch.ones_like(nll).sum()}
            seen["clipped"] = (clipped * advantages < ratio * advantages).float().sum()
            if "reference" in known:
                above = known["reference"] - logps
                divergence = torch.exp(above) - above - 1
                of_tokens = of_tokens + self.kl_weight * ratio * divergence  # else its slope is not the divergence's
                seen["kl_nats"] = divergence.sum()
            self.rollouts.saw(**seen)
            return gain * (of_tokens / known["lengths"]).sum()

        result = self.loss.of_each_token(batch.batch, loss, entropies=entropies)
        self.rollouts.saw(entropy_nats=torch.cat(entropies).sum())
        return result

    def through(self, wrapped: torch.nn.Module) -> GRPO:
        return dataclasses.replace(self, loss=self.loss.through(wrapped))

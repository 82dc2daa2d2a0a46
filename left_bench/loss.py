"""The loss of answer tokens: the output head runs at labelled positions alone, and in chunks.

With a vocabulary of 50,000 to 260,000 the logits are the largest tensor of a step by far, and most of them, at prompt
and padding, are thrown away.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from left_bench.adapter import virtual_positions
from left_bench.data import Batch
from left_bench.task import probe_inputs

# Logits of a chunk. On a CPU 32 MiB of float32: large enough for the product to run at full speed, small beside a
# model. A GPU would spend its time on launches: with a vocabulary of 128k, 2048 tokens of width 2048 took an H100 21 ms
# in chunks of 2^23 (65 tokens), 8.5 in chunks of 2^25 and 7.8 in chunks of 2^27. Those would be 512 MiB of float32, and
# as much again for the logits and their slopes in 16 bits: four times the memory for a tenth of the head's time.
_CHUNK_LOGITS = {"cpu": 2**23}
_CHUNK_LOGITS_ON_ACCELERATOR = 2**25
Suffix = Callable[[torch.Tensor], torch.Tensor]


class AnswerLoss:
    """Negative log-likelihood of a batch's answer tokens under a model, in nats, worked out in float32.

    Attributes:
        output_head: what is in force: `labelled positions, in chunks`; `labelled positions` where the model does
            something to its logits that is not known here, and has to do it itself; or `all positions`.
    """

    def __init__(self, model: torch.nn.Module, *, everywhere: bool = False, in_chunks: bool = True) -> None:
        """Look at what the model does with its output head, by a pass over two tokens.

        Args:
            everywhere: compute all logits, as a model does that is given labels.
            in_chunks: run the head outside the model's own pass where that can be: not where its weights are sharded.
        """
        self.model: Any = model
        self.forward: Any = model
        self.head: Any = None
        self.suffix: Suffix | None = None
        self.output_head = "all positions"
        self._device = next(model.parameters()).device.type
        # pictures have a class each: there is nothing to leave out
        get_head = getattr(model, "get_output_embeddings", lambda: None)
        if not everywhere and get_head() is not None:
            self._probe(get_head(), in_chunks=in_chunks)

    @classmethod
    def assumed(cls, model: torch.nn.Module, *, device: str) -> AnswerLoss:
        """That of a model which does nothing to its logits, without a pass to see so: for shapes without numbers.

        `device`: the kind that the model is thought to be on.
        """
        found = cls(model, everywhere=True)
        found._device = device
        head = found.model.get_output_embeddings()
        if head is not None:
            found.head, found.suffix, found._vocabulary = head, lambda logits: logits, head.weight.shape[0]
            found.output_head = "labelled positions, in chunks"
        return found

    def through(self, wrapped: torch.nn.Module) -> AnswerLoss:
        """The same loss with its forward pass taken through a wrapper around the model, whose hooks then run (DDP)."""
        found = copy.copy(self)
        found.forward = wrapped
        return found

    def of_tokens(self, batch: Batch) -> torch.Tensor:
        """The loss of every labelled token, float32 [answer tokens], in the batch's order of labels; for evaluating."""
        hidden = self._states(batch)
        if self.suffix is None:
            return _token_losses(hidden, batch.targets)
        return self._token_losses_in_chunks(hidden, batch.targets)

    def logits_of_tokens(self, batch: Batch) -> torch.Tensor:
        """The logits that predict each labelled token, float32 [answer tokens, vocabulary], whole: for few tokens."""
        states = self._states(batch)
        return (states if self.suffix is None else self.logits(states)).float()

    def shortfalls(self, batch: Batch) -> torch.Tensor:
        """How far each labelled token's logit is below the greatest, float32 [answer tokens]; 0: the greedy choice."""

        def of_logits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return logits.float().amax(-1) - logits.float().gather(1, targets[:, None])[:, 0]

        hidden = self._states(batch)
        if self.suffix is None:
            return of_logits(hidden, batch.targets)
        chunks = zip(*(part.split(self._chunk) for part in (hidden, batch.targets)), strict=True)
        return torch.cat([of_logits(self.logits(part), wanted) for part, wanted in chunks])

    def summed(self, batch: Batch, *, gain: float = 1.0) -> torch.Tensor:
        """`gain` times the summed loss of the labelled tokens; differentiable.

        The gradient of each chunk is worked out together with its loss, so that no chunk's logits outlive it. `gain`
        goes in here, not on the result: in float16 a gradient that was not scaled up is gone before a later factor.
        """
        states = self._states(batch)
        if self.suffix is None:
            return gain * _token_losses(states, batch.targets).sum()
        return self._weighted(states, batch.targets, torch.full_like(batch.targets, gain, dtype=torch.float32))

    def of_rows(self, batch: Batch, combine: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """`combine` of the rows' summed losses, float32 [rows] -> scalar; differentiable.

        Its slopes are worked out first, from losses without a gradient; they are the weights with which the chunks'
        gradients are then taken. The head runs twice, and no chunk's logits outlive it here either.
        """
        states = self._states(batch)
        if self.suffix is None:
            return combine(_row_sums(_token_losses(states, batch.targets), batch))
        with torch.no_grad():
            sums = _row_sums(self._token_losses_in_chunks(states, batch.targets), batch)
        with torch.enable_grad():
            found = combine(sums.requires_grad_())
            (slopes,) = torch.autograd.grad(found, sums)
        lengths = torch.tensor(batch.answer_lengths, device=slopes.device)
        weights = slopes.repeat_interleave(lengths, output_size=len(batch.targets))  # else the device is asked for it
        weighted = self._weighted(states, batch.targets, weights)
        return found.detach() + (weighted - weighted.detach())

    def _weighted(self, states: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        parameters = [parameter for parameter in self.head.parameters() if parameter.requires_grad]
        total: torch.Tensor = _Chunked.apply(states, targets, self, weights, *parameters)
        return total

    def _token_losses_in_chunks(self, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        assert self.suffix is not None
        chunks = zip(*(part.split(self._chunk) for part in (states, targets)), strict=True)
        return torch.cat([_token_losses(self.logits(part), wanted) for part, wanted in chunks])

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """The model's logits for hidden states of shape [n, width]."""
        assert self.suffix is not None
        return self.suffix(self.head(states))

    @property
    def _chunk(self) -> int:
        return max(1, _CHUNK_LOGITS.get(self._device, _CHUNK_LOGITS_ON_ACCELERATOR) // self._vocabulary)

    def _states(self, batch: Batch) -> torch.Tensor:
        """Hidden states at the labelled positions [n, width]; logits there [n, vocabulary] where there is no suffix."""
        after, inputs = virtual_positions(self.model), batch.inputs()
        if self.head is None:
            return batch.labelled(self.forward(**inputs).logits, after=after)
        kept: list[torch.Tensor] = []

        def take(_module: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            states = batch.labelled(arguments[0], after=after)
            kept.append(states)
            # with a known suffix the head is fed nothing here, and the states later, chunk by chunk
            return (states[None, :0] if self.suffix else states[None], *arguments[1:])

        with self.head.register_forward_pre_hook(take):
            logits = self.forward(**inputs).logits
        return kept[0] if self.suffix else logits[0]

    def _probe(self, head: Any, *, in_chunks: bool) -> None:
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        with (
            torch.no_grad(),
            head.register_forward_hook(lambda _module, inputs, output: seen.append((inputs[0], output))),
        ):
            logits = self.model(**probe_inputs(self.model)).logits
        if len(seen) != 1 or seen[0][0].shape[:-1] != logits.shape[:-1]:
            return  # the head is not run as a module, or not once over all positions
        self.head = head
        self._vocabulary = logits.shape[-1]
        raw = seen[0][1]
        if in_chunks:
            self.suffix = next((one for one in _suffixes(self.model.config) if torch.equal(one(raw), logits)), None)
        self.output_head = "labelled positions, in chunks" if self.suffix else "labelled positions"


def _suffixes(config: Any) -> list[Suffix]:
    """What models do to their logits after the head: nothing, soft-capping (Gemma 2), a factor (Granite, Cohere)."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found: list[Suffix] = [lambda logits: logits]
    if cap := getattr(config, "final_logit_softcapping", None):
        found.append(lambda logits: torch.tanh(logits / cap) * cap)
    if divisor := getattr(config, "logits_scaling", None):
        found.append(lambda logits: logits / divisor)
    if factor := getattr(config, "logit_scale", None):
        found.append(lambda logits: logits * factor)
    return found


def _row_sums(losses: torch.Tensor, batch: Batch) -> torch.Tensor:
    return torch.stack([of_row.sum() for of_row in losses.split(batch.answer_lengths)])


def _token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits.float(), targets, reduction="none")


class _Chunked(torch.autograd.Function):
    """Weighted sum of cross-entropies whose gradient is taken in the forward pass, chunk by chunk (as Liger-Kernel's
    FusedLinearCrossEntropy does, Hsu et al. 2024, arXiv 2410.10989)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        loss: AnswerLoss,
        weights: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        wants_states = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wants_states else None
        # summed over chunks in float32: adding bfloat16 parts would round at every chunk
        sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        start = 0
        chunks = zip(*(whole.split(loss._chunk) for whole in (hidden, targets, weights)), strict=True)
        for part, wanted, weight in chunks:
            with torch.enable_grad():
                states = part.detach().requires_grad_(wants_states)
                logits = loss.logits(states)
            log_probability = torch.log_softmax(logits.detach(), dim=-1, dtype=torch.float32)
            # no product of vectors: autocast would round it
            total -= (weight * log_probability.gather(1, wanted[:, None])[:, 0]).sum()
            if not wants_states and not parameters:
                continue
            # d loss / d logits = probabilities - one at the target
            slope = log_probability.exp_()
            slope.scatter_add_(1, wanted[:, None], -torch.ones_like(slope[:, :1])).mul_(weight[:, None])
            found = torch.autograd.grad(
                logits, [*([states] if wants_states else []), *parameters], slope.to(logits.dtype)
            )
            if gradient is not None:
                gradient[start : start + len(part)] = found[0]
            for one, more in zip(sums, found[len(found) - len(sums) :], strict=True):
                one += more
            start += len(part)
        ctx.gradients = (gradient, *(one.to(parameter.dtype) for one, parameter in zip(sums, parameters, strict=True)))
        return total

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:
        # in place: they belong to this function alone, and a tied embedding's is as large as the model's largest weight
        states, *others = (None if one is None else one.mul_(outer[0].to(one.dtype)) for one in ctx.gradients)
        ctx.gradients = None
        return states, None, None, None, *others

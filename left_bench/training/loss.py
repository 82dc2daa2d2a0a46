"""The loss of answer tokens: the output head runs at labelled positions alone, and in chunks.

With a vocabulary of 50,000 to 260,000 the logits are the largest tensor of a step by far, and most of them, at prompt
and padding, are thrown away.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from left_bench.data import Batch
from left_bench.methods.attach import virtual_positions
from left_bench.model import liger
from left_bench.spec.task import probe_inputs


class Suffix(NamedTuple):
    """What a model does to its logits after the head."""

    of: Callable[[torch.Tensor], torch.Tensor]
    softcap: float | None = None
    is_ligers: bool = False
    """Whether Liger's loss can do the same."""


_NOTHING = Suffix(lambda logits: logits, is_ligers=True)
LIGER = "liger"
"""`AnswerLoss.output_head` where the loss of training is Liger's."""


def chunk_logits(kind: str) -> int:
    """Logits that the head computes at a time on a kind of device.

    On a CPU 2^23, 32 MiB of float32: the product runs at full speed, and it is small beside a model. On an accelerator
    2^25: 2048 tokens of width 2048 and a vocabulary of 128k took an H100 21 ms in chunks of 2^23 (65 tokens, which wait
    for launches and for the head's weight), 8.5 in chunks of 2^25 and 7.8 in chunks of 2^27. Those would hold a
    gibibyte (logits and slopes in bfloat16, log-probabilities in float32): four times as much for a tenth of the time.
    """
    return 2**23 if kind == "cpu" else 2**25


class AnswerLoss:
    """Negative log-likelihood of a batch's answer tokens under a model, in nats, worked out in float32.

    Attributes:
        output_head: what is in force: `labelled positions, in chunks`; `labelled positions` where the model does
            something to its logits that is not known here, and has to do it itself; `all positions`; or `liger`.
        output_head_fallback: why it is not `liger` although that was asked for.
    """

    output_head_fallback: str | None = None

    def __init__(
        self, model: torch.nn.Module, *, everywhere: bool = False, in_chunks: bool = True, by_liger: bool = False
    ) -> None:
        """Look at what the model does with its output head, by a pass over two tokens.

        Args:
            everywhere: compute all logits, as a model does that is given labels.
            in_chunks: run the head outside the model's own pass where that can be: not where its weights are sharded.
            by_liger: take Liger's kernel for `summed`, where the head is one that it can run.
        """
        self.model: Any = model
        self.forward: Any = model
        self.head: Any = None
        self.suffix: Suffix | None = None
        self._chunk = 1
        self.output_head = "all positions"
        # pictures have a class each: there is nothing to leave out
        get_head = getattr(model, "get_output_embeddings", lambda: None)
        if not everywhere and get_head() is not None:
            self._probe(get_head(), in_chunks=in_chunks)
        if by_liger:
            self.output_head_fallback = self._why_not_liger()
            if self.output_head_fallback is None:
                self.output_head = LIGER

    @classmethod
    def assumed(cls, model: torch.nn.Module, *, kind: str, in_chunks: bool = True) -> AnswerLoss:
        """That of a model which does nothing to its logits, without a pass to see so: for shapes without numbers.

        Args:
            kind: of the device whose chunks it is to have, wherever the shapes are.
            in_chunks: as `__init__` has it.
        """
        result = cls(model, everywhere=True)
        head = result.model.get_output_embeddings()
        if head is not None:
            result.head, result.suffix = head, _NOTHING if in_chunks else None
            result._chunk = _rows_of_logits(head.weight.shape[0], kind=kind)
            result.output_head = "labelled positions, in chunks" if in_chunks else "labelled positions"
        return result

    def through(self, wrapped: Callable[..., Any]) -> AnswerLoss:
        """The same loss with its forward pass taken through a wrapper around the model: DDP's, whose hooks then run."""
        result = copy.copy(self)
        result.forward = wrapped
        return result

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
        if self.output_head == LIGER:
            return gain * liger.summed_loss(states, batch.targets, self.head, softcap=self.suffix.softcap)
        return self._weighted(states, batch.targets, torch.full_like(batch.targets, gain, dtype=torch.float32))

    def of_rows(self, batch: Batch, combine: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """`combine` of the rows' summed losses, float32 [rows] -> scalar; differentiable.

        Its slopes are worked out first, from losses without a gradient; they are the weights with which the chunks'
        gradients are then taken. The head runs twice, and no chunk's logits outlive it here either.
        """
        return self.of_each_token(batch, lambda losses: combine(_row_sums(losses, batch)))

    def of_each_token(
        self,
        batch: Batch,
        combine: Callable[[torch.Tensor], torch.Tensor],
        *,
        entropies: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The same of the tokens' losses, float32 [answer tokens] -> scalar.

        Args:
            entropies: takes what each token's distribution has of it, nats, float32 [answer tokens], in parts.
        """
        states = self._states(batch)
        if self.suffix is None:
            if entropies is not None:
                entropies.append(_entropies(states.detach()))
            return combine(_token_losses(states, batch.targets))
        with torch.no_grad():
            losses = self._token_losses_in_chunks(states, batch.targets, entropies=entropies)
        with torch.enable_grad():
            result = combine(losses.requires_grad_())
            (slopes,) = torch.autograd.grad(result, losses)
        weighted = self._weighted(states, batch.targets, slopes)
        return result.detach() + (weighted - weighted.detach())

    def row_sums(self, batch: Batch) -> torch.Tensor:
        """The summed loss of each row, float32 [rows]; for evaluating."""
        return _row_sums(self.of_tokens(batch), batch)

    def _weighted(self, states: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        parameters = [parameter for parameter in self.head.parameters() if parameter.requires_grad]
        total: torch.Tensor = _Chunked.apply(states, targets, self, weights, *parameters)
        return total

    def _token_losses_in_chunks(
        self, states: torch.Tensor, targets: torch.Tensor, *, entropies: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        assert self.suffix is not None
        results = []
        for part, wanted in zip(*(part.split(self._chunk) for part in (states, targets)), strict=True):
            logits = self.logits(part)
            results.append(_token_losses(logits, wanted))
            if entropies is not None:
                entropies.append(_entropies(logits))
        return torch.cat(results)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """The model's logits for hidden states of shape [n, width]."""
        assert self.suffix is not None
        return self.suffix.of(self.head(states))

    def _states(self, batch: Batch) -> torch.Tensor:
        """Hidden states at the labelled positions [n, width]; logits there [n, vocabulary] where there is no suffix."""
        after, inputs = virtual_positions(self.model), batch.inputs()
        if self.head is None:
            outputs = self.forward(**inputs)
            logits = getattr(outputs, "logits", None)  # a model without an output layer has its last states alone
            return batch.labelled(outputs.last_hidden_state if logits is None else logits, after=after)
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
        self._chunk = _rows_of_logits(logits.shape[-1], kind=logits.device.type)
        raw = seen[0][1]
        if in_chunks:
            self.suffix = next(
                (suffix for suffix in _suffixes(self.model.config) if torch.equal(suffix.of(raw), logits)), None
            )
        self.output_head = "labelled positions, in chunks" if self.suffix else "labelled positions"

    def _why_not_liger(self) -> str | None:
        if self.suffix is None:
            return "the head is not run apart from the model, for what is done to its logits is not known"
        if not self.suffix.is_ligers:
            return "the model multiplies its logits by a factor, which Liger's loss does not"
        if type(self.head) is not torch.nn.Linear:  # with an adapter, or weights stored in another way
            return f"the head is no plain matrix but {type(self.head).__module__}.{type(self.head).__name__}"
        return None


def _rows_of_logits(vocabulary: int, *, kind: str) -> int:
    return max(1, chunk_logits(kind) // vocabulary)


def _suffixes(config: Any) -> list[Suffix]:
    """What models do to their logits after the head: nothing, soft-capping (Gemma 2), a factor (Granite, Cohere)."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    results = [_NOTHING]
    if cap := getattr(config, "final_logit_softcapping", None):
        results.append(Suffix(lambda logits: torch.tanh(logits / cap) * cap, softcap=cap, is_ligers=True))
    if divisor := getattr(config, "logits_scaling", None):
        results.append(Suffix(lambda logits: logits / divisor))
    if factor := getattr(config, "logit_scale", None):
        results.append(Suffix(lambda logits: logits * factor))
    return results


def _row_sums(losses: torch.Tensor, batch: Batch) -> torch.Tensor:
    return torch.stack([of_row.sum() for of_row in losses.split(batch.answer_lengths)])


def _token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of each label: the squared error where it is a number, else the negative log-likelihood of the right index."""
    if targets.is_floating_point():
        return (logits.float()[:, 0] - targets) ** 2
    return cross_entropy(logits.float(), targets, reduction="none")


def _entropies(logits: torch.Tensor) -> torch.Tensor:
    log_probabilities = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


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
            nats, result = _loss_and_slopes(
                loss, part, wanted, weight, wants_states=wants_states, parameters=parameters
            )
            total += nats
            if gradient is not None:
                gradient[start : start + len(part)] = result[0]
            for item, more in zip(sums, result[len(result) - len(sums) :], strict=True):
                item += more
            start += len(part)
        ctx.gradients = (
            gradient,
            *(item.to(parameter.dtype) for item, parameter in zip(sums, parameters, strict=True)),
        )
        return total

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:
        # in place: they belong to this function alone, and a tied embedding's is as large as the model's largest weight
        states, *others = (None if one is None else one.mul_(outer[0].to(one.dtype)) for one in ctx.gradients)
        ctx.gradients = None
        return states, None, None, None, *others


def _loss_and_slopes(
    loss: AnswerLoss,
    part: torch.Tensor,
    wanted: torch.Tensor,
    weight: torch.Tensor,
    *,
    wants_states: bool,
    parameters: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """A chunk's weighted loss, and its gradients of the states (where wanted) and of the parameters.

    A function of its own, so that a chunk's logits are gone before the next one's are made.
    """
    with torch.enable_grad():
        states = part.detach().requires_grad_(wants_states)
        logits = loss.logits(states)
    log_probability = torch.log_softmax(logits.detach(), dim=-1, dtype=torch.float32)
    # no product of vectors: autocast would round it
    nats = -(weight * log_probability.gather(1, wanted[:, None])[:, 0]).sum()
    asked = [*([states] if wants_states else []), *parameters]
    if not asked:
        return nats, ()
    # d loss / d logits = probabilities - one at the target
    slope = log_probability.exp_()
    slope.scatter_add_(1, wanted[:, None], -torch.ones_like(slope[:, :1])).mul_(weight[:, None])
    return nats, torch.autograd.grad(logits, asked, slope.to(logits.dtype))

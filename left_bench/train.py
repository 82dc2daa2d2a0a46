"""The training loop, and the loss that it and the evaluation share."""

from __future__ import annotations

import contextlib
import inspect
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from transformers import get_scheduler

from left_bench.adapter import after_optimizer_step, regularization, trainable_parameters, virtual_positions
from left_bench.cell import Cell, Training
from left_bench.data import Batch, Example, collate, split_passes, step_rows
from left_bench.measure import Meter, PhaseCounts, Step, stored_bytes
from left_bench.model import DTYPES


class Diverged(RuntimeError):
    """The loss or the gradient stopped being a finite number."""


def answer_losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Negative log-likelihood of every labelled token.

    The output head runs only where some row of the batch has a label: with a vocabulary of 50,000 and short answers
    most of the logits would be computed and thrown away.

    Returns:
        float32, shape (rows, positions), zero where there is no label; summing it over a row gives the row's loss.
    """
    # the logits at position t predict the token at t + 1
    targets = batch.labels[:, 1:]
    positions = (targets != -100).any(dim=0).nonzero().squeeze(1)
    offset = virtual_positions(model)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if takes_logits_to_keep(model):
        logits = model(**inputs, logits_to_keep=positions + offset).logits
    else:
        logits = model(**inputs).logits[:, positions + offset]
    targets = targets[:, positions]
    losses = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="none")
    return losses.view_as(targets)


def takes_logits_to_keep(model: torch.nn.Module) -> bool:
    """Whether the base model can run its output head at chosen positions alone."""
    get_base: Any = getattr(model, "get_base_model", lambda: model)
    return "logits_to_keep" in inspect.signature(get_base().forward).parameters


def autocast(cell: Cell, *, device: str) -> contextlib.AbstractContextManager[Any]:
    """Matrix products in the compute dtype, where it is not the weights' own."""
    if not needs_autocast(cell):
        return contextlib.nullcontext()
    return torch.autocast(device_type=device, dtype=DTYPES[cell.precision.compute_dtype])


def needs_autocast(cell: Cell) -> bool:
    """Whether the matrix products' dtype is not the weights' own."""
    return cell.precision.compute_dtype != cell.precision.weights_dtype


def train(
    model: torch.nn.Module, rows: Sequence[Example], cell: Cell, *, meter: Meter, counts: PhaseCounts, pad_id: int
) -> None:
    """Take `training.steps` optimizer steps; measurements go into `meter`.

    Every answer token of a step weighs the same, in whichever pass it comes: the passes' summed losses are divided by
    the step's answer tokens.

    Raises:
        Diverged: a loss or gradient that is not finite, with the step.
    """
    settings, device = cell.training, meter.device.kind
    accelerator = Accelerator(cpu=device == "cpu")
    parameters = trainable_parameters(model)
    optimizer = make_optimizer(parameters, settings)
    schedule = get_scheduler(
        settings.schedule, optimizer, math.ceil(settings.steps * settings.warmup_ratio), settings.steps
    )
    scaler = torch.amp.GradScaler(device, enabled=cell.precision.loss_scaling)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()

    order = step_rows(
        len(rows),
        rows_per_step=settings.batch_size * settings.gradient_accumulation,
        steps=settings.steps,
        seed=cell.seed,
    )
    counts.steps = counts.tokens = 0
    for step, indices in enumerate(order, start=1):
        start = time.perf_counter()
        passes = split_passes(
            [rows[index] for index in indices], batch_size=settings.batch_size, batching=settings.batching
        )
        batches = [collate(examples, pad_id=pad_id).to(accelerator.device) for examples in passes]
        answer_tokens = sum(batch.answer_tokens for batch in batches)

        total = torch.zeros((), device=accelerator.device)
        for batch in batches:
            with autocast(cell, device=device):
                loss = answer_losses(model, batch).sum() / answer_tokens
            total += loss.detach()
            penalty = regularization(model)
            accelerator.backward(scaler.scale(loss if penalty is None else loss + penalty / len(batches)))

        scaler.unscale_(optimizer) if scaler.is_enabled() else None
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm or math.inf)
        if step == 1:
            meter.memory_breakdown["gradients"] = stored_bytes(p.grad for p in parameters if p.grad is not None)
        learning_rate = schedule.get_last_lr()[0]
        scaler.step(optimizer) if scaler.is_enabled() else optimizer.step()
        scaler.update() if scaler.is_enabled() else None
        schedule.step()
        after_optimizer_step(model, step - 1)
        optimizer.zero_grad(set_to_none=True)

        meter.device.synchronize()
        measured = Step(
            seconds=time.perf_counter() - start,
            tokens=sum(batch.tokens for batch in batches),
            answer_tokens=answer_tokens,
            rows=len(indices),
            loss=total.item(),
        )
        counts.steps += 1
        counts.tokens += measured.tokens
        meter.step(measured, learning_rate=learning_rate, gradient_norm=norm.item())
        # under loss scaling an overflowing gradient is expected: the scaler skips the step and lowers the scale
        if not math.isfinite(measured.loss) or not (math.isfinite(norm.item()) or scaler.is_enabled()):
            raise Diverged(f"loss {measured.loss:g}, gradient norm {norm.item():g} at step {step} of {settings.steps}")
    meter.memory_breakdown["optimizer"] = stored_bytes(_state_tensors(optimizer))


def make_optimizer(parameters: list[torch.nn.Parameter], settings: Training) -> torch.optim.Optimizer:
    """The optimizer named by `training.optimizer`, at the learning rate in force."""
    assert settings.learning_rate is not None
    common: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    match settings.optimizer:
        case "adamw":
            return torch.optim.AdamW(parameters, fused=True, **common)
        case "sgd":
            return torch.optim.SGD(parameters, **common)
        case "adafactor":
            return torch.optim.Adafactor(parameters, **common)


def _state_tensors(optimizer: Any) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]

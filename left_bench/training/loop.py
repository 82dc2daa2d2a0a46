"""The training loop: optimizer steps over passes, measured one by one."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch

from left_bench.compat.torch import uncompile as undo_compile
from left_bench.core.errors import NotInForce, UserError
from left_bench.data import Example, split_passes, step_rows
from left_bench.measure.activations import Activations
from left_bench.measure.compile_timer import Compiling
from left_bench.measure.meter import Meter, PhaseCounts, Step, stored_bytes, warm_up
from left_bench.measure.method_buffers import Modules, frozen_part
from left_bench.methods.attach import after_optimizer_step, regularization, trainable_parameters
from left_bench.methods.verify import check_gradient
from left_bench.model.load import autocast, layers_of
from left_bench.processes.ranks import ALONE, Team
from left_bench.spec.cell import Cell
from left_bench.spec.instantiate import instantiate
from left_bench.training.checkpoint import Checkpoint
from left_bench.training.curve import Curve
from left_bench.training.objective import Objective
from left_bench.training.schedule import Schedule
from left_bench.training.sharding import (
    clip_gradient,
    fingerprint_of,
    gradients_kept_apart,
    make_accelerator,
    wrap,
)

EXPLODED = 100.0
"""Loss, nats per label, above which training counts as diverged: a uniform guess over 50,000 tokens costs 11."""


class Trained(NamedTuple):
    """How a training ended."""

    optimizer_state_dtypes: str
    ended: Literal["steps", "max_seconds", "stop_patience"]
    """The setting that ended it."""


class Diverged(RuntimeError):
    """The loss or the gradient stopped being a finite number, or the loss exploded."""


def train(
    model: torch.nn.Module,
    rows: Sequence[Example],
    cell: Cell,
    *,
    objective: Objective,
    meter: Meter,
    counts: PhaseCounts,
    compiling: Compiling | None = None,
    team: Team = ALONE,
    earlier: bool = False,
    base: Modules | None = None,
    curve: Curve | None = None,
) -> Trained:
    """Take `training.steps` optimizer steps, or as many as `max_seconds` and `stop_patience` allow, measured by
    `meter`.

    Every answer token of a step (every pair, in preference tuning) has the same weight, whichever pass it is in: the
    passes' summed losses are divided by the count of the whole step over all ranks.

    Args:
        objective: the objective of `model`.
        compiling: the result of `compile_model`; recompilation for a new shape is excluded from a step's time.
        earlier: another training of the same model follows.
        base: the base model's modules, to measure the frozen tensors that a method adds.
        team: the processes that train together; their measurements are equal, except for memory.
        curve: measures the validation loss during training.

    Raises:
        Diverged: a loss or gradient that is not finite, or a loss that exploded, with the step.
        RankLost: the ranks do not hold the same gradient or weights.
    """
    settings, device = cell.training, meter.device.kind
    compiling = compiling or Compiling()
    accelerator = make_accelerator(
        model,
        cell,
        team=team,
        unused=lambda: some_get_no_gradient(model, rows, cell, objective=objective, device=device),
    )
    optimizer = make_optimizer(model, cell, device=device)
    schedule = Schedule(optimizer, settings)
    scaler = torch.amp.GradScaler(device, enabled=cell.precision.loss_scaling)
    network, optimizer = wrap(accelerator, model, optimizer)
    objective = objective.through(network)
    parameters = trainable_parameters(model)  # sharding has replaced them
    if cell.hardware.sharding is not None:
        meter.memory_breakdown |= held_weights(model, attached=cell.peft.target is not None)
    network.train()
    torch.manual_seed(cell.seed)  # so that dropout and noise depend only on the seed

    drawn = step_rows(
        len(rows),
        rows_per_step=settings.rows_per_step,
        steps=-(-settings.steps // settings.updates_per_sample),
        seed=cell.seed,
    )
    order = islice((indices for indices in drawn for _ in range(settings.updates_per_sample)), settings.steps)
    curve = curve or Curve(cell, (), meter=meter)
    checkpoint = Checkpoint(
        cell, model=model, optimizer=optimizer, schedule=schedule, scaler=scaler, meter=meter, curve=curve
    )
    done = checkpoint.resume()
    team.check_alike("the step to resume from", [float(step) for (step,) in team.gather(done)])
    # hooks on what is saved make compiled code compile anew; shards are gathered for a pass, and are weights
    unwatched = earlier or cell.training.compile or cell.hardware.sharding is not None
    activations = None if unwatched else Activations(model)
    counts.steps = counts.tokens = 0
    spent = sum(step.seconds for step in meter.steps)
    ended: Literal["steps", "max_seconds", "stop_patience"] = "steps"
    meter.energy.start_training()
    first_measured = 1 + done + warm_up(settings.steps - done, measure_after=settings.measure_after)
    for step, indices in enumerate(islice(order, done, None), start=done + 1):
        if step == first_measured:
            meter.begin_measured()
        start = time.perf_counter()
        prepared = objective.prepare([rows[index] for index in indices])
        passes = split_passes(prepared, batch_size=settings.batch_size, batching=settings.batching)
        taken = [example for examples in passes for example in examples]  # of all ranks
        batches = [objective.batch(team.share(examples), step=taken).to(accelerator.device) for examples in passes]
        read = objective.sequences(taken)
        # only read if it is enabled, because reading it waits for the device
        scale = float(scaler.scale(torch.ones((), device=accelerator.device))) if scaler.is_enabled() else 1.0
        gain = scale * team.size / objective.count(taken)  # gradients are averaged over the ranks

        total = torch.zeros((), device=accelerator.device)
        with team.own_draws(device, seed=cell.seed, step=step):
            for batch in batches:
                # gradients are synchronized once per step
                last = batch is batches[-1]
                with contextlib.nullcontext() if last else gradients_kept_apart(accelerator, network):
                    with (
                        activations.of_pass(batch.inputs()) if activations else contextlib.nullcontext(),
                        autocast(cell, device=device),
                    ):
                        part = objective.summed(batch, gain=gain)
                    total += part.detach() / (scale * team.size)
                    penalty = regularization(model)
                    accelerator.backward(part if penalty is None else part + scale * penalty / len(batches))

        scaler.unscale_(optimizer) if scaler.is_enabled() else None
        norm = clip_gradient(accelerator, parameters, settings.max_grad_norm or math.inf)
        told = objective.told()
        if step == 1:
            if told.get("equal_groups") != 1.0:  # answers that are all worth the same teach nothing
                check_gradient(norm.item())
            meter.memory_breakdown["gradients"] = stored_bytes(p.grad for p in parameters if p.grad is not None)
        if activations is not None and activations.bytes is not None:  # an earlier attempt's may have been more
            meter.memory_breakdown["activations"] = max(meter.memory_breakdown.get("activations", 0), activations.bytes)
        learning_rate = schedule.learning_rate
        scaler.step(optimizer) if scaler.is_enabled() else optimizer.step()
        scaler.update() if scaler.is_enabled() else None
        if scaler.is_enabled() and not math.isfinite(norm.item()):  # skipped: AdaLoRA must not use its gradients
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.zero_()
        # AdaLoRA's rank budget belongs to the last training only: step 0 leaves it unchanged
        after_optimizer_step(model, 0 if earlier else step - 1)
        optimizer.zero_grad(set_to_none=True)

        parts = team.gather(total.item(), norm.item())
        meter.device.synchronize()
        measured = Step(
            seconds=time.perf_counter() - start - compiling.take(),
            tokens=sum(example.length for example in read),
            answer_tokens=sum(example.labels for example in read),
            rows=len(indices),
            loss=sum(part for part, _ in parts),
            pairs=sum(example.length**2 for example in read),
            policy=told,
        )
        team.check_alike(f"the gradient's norm at step {step}", [norm for _, norm in parts])
        if step == done + 1 and base is not None:  # the first step creates some of it; AdaLoRA's last steps drop theirs
            meter.memory_breakdown |= frozen_part(model, base=base)
        counts.steps += 1
        counts.tokens += measured.tokens
        meter.step(measured, learning_rate=learning_rate, gradient_norm=norm.item())
        # under loss scaling an overflowing gradient is expected: the scaler skips the step and lowers the scale
        finite = math.isfinite(measured.loss) and (math.isfinite(norm.item()) or scaler.is_enabled())
        if not finite or (cell.task.likelihood and measured.loss > EXPLODED):  # an error may be of any size
            raise Diverged(f"loss {measured.loss:g}, gradient norm {norm.item():g} at step {step} of {settings.steps}")
        if settings.max_seconds is not None:  # the ranks' clocks differ, and all must stop at the same step
            spent += max(seconds for (seconds,) in team.gather(measured.seconds))
        schedule.step(seconds=spent)
        if settings.max_seconds is not None and spent >= settings.max_seconds and step < settings.steps:
            ended = "max_seconds"
        last = step == settings.steps or ended == "max_seconds"
        if last:
            meter.end_measured()
        stop = curve.after(step, spent=spent, model=model, network=network, objective=objective, last=last)
        if team.first:  # all ranks have the same state
            checkpoint.save(step)
        if stop and not last:
            ended = "stop_patience"
            meter.end_measured()
        if last or stop:
            break
    if team.size > 1 and cell.hardware.sharding is None:
        team.check_alike("the trained weights' sum", [item for (item,) in team.gather(fingerprint_of(parameters))])
    states = state_tensors(optimizer)
    meter.memory_breakdown["optimizer"] = stored_bytes(state for state in states if not is_paged(state))
    if paged := stored_bytes(state for state in states if is_paged(state)):
        meter.metrics["paged_optimizer_bytes"] = paged
    return Trained(optimizer_state_dtypes(optimizer), ended)


def some_get_no_gradient(
    model: torch.nn.Module,
    rows: Sequence[Example],
    cell: Cell,
    *,
    objective: Objective,
    device: str,
) -> bool:
    """Whether a pass over one row leaves a trainable parameter without a gradient; DDP must then search for unused
    ones."""
    model.train()
    with autocast(cell, device=device):
        objective.summed(objective.batch(rows[:1]).to(device), gain=1.0).backward()
    result = any(parameter.grad is None for parameter in trainable_parameters(model))
    model.zero_grad(set_to_none=True)
    return result


def held_weights(model: torch.nn.Module, *, attached: bool) -> dict[str, int]:
    """The parts `weights` and `adapter` of the memory breakdown, for this rank."""
    trained = trainable_parameters(model) if attached else []
    ids = {id(parameter) for parameter in trained}
    others = [tensor for tensor in [*model.parameters(), *model.buffers()] if id(tensor) not in ids]
    return {"weights": stored_bytes(others)} | ({"adapter": stored_bytes(trained)} if attached else {})


def compile_model(
    model: torch.nn.Module,
    rows: Sequence[Example],
    cell: Cell,
    *,
    objective: Objective,
    device: str,
) -> Compiling:
    """Compile the model's layers in place with dynamic shapes, and run them forward and backward so that training need
    not.

    It works layer by layer: layers are alike, so one compilation serves all, in a fraction of the whole model's time.
    """
    compiling = Compiling()
    compiling.watch()
    for layer in layers_of(model):
        layer.compile(dynamic=True)
    model.train()
    count = cell.training.batch_size // cell.hardware.processes
    with torch.random.fork_rng():  # leave training's random numbers unchanged
        for start in (0, count):  # a second length makes sizes dynamic that were taken as constants
            batch = objective.batch([rows[index % len(rows)] for index in range(start, start + count)])
            with autocast(cell, device=device):
                objective.summed(batch.to(device), gain=1.0).backward()
    model.zero_grad(set_to_none=True)
    compiling.take()
    return compiling


def uncompile(model: torch.nn.Module) -> None:
    """Return to eager mode: generation would recompile for every length."""
    for layer in layers_of(model):
        undo_compile(layer)


@contextlib.contextmanager
def embedding_noise(model: torch.nn.Module, alpha: float | None) -> Iterator[None]:
    """NEFTune (Jain et al. 2023): uniform noise in +-alpha / sqrt(length x width) on the input embeddings.

    The length is that of the padded rows of the pass; packed rows each have their own.
    """
    if alpha is None:
        yield
        return
    embedding: Any = model
    embedding = embedding.get_input_embeddings()
    boundaries: list[torch.Tensor | None] = [None]

    def look(_module: torch.nn.Module, _inputs: Any, named: dict[str, Any]) -> None:
        boundaries[0] = named.get("cu_seq_lens_q")

    def disturb(module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training:  # no noise in the validation loss
            return output
        if boundaries[0] is None:
            size = alpha / math.sqrt(output.shape[1] * output.shape[2])
            return output + torch.empty_like(output).uniform_(-size, size)
        lengths = boundaries[0].diff()
        sizes = (alpha / (lengths * output.shape[2]).sqrt()).repeat_interleave(lengths).to(output.dtype)
        return output + torch.empty_like(output).uniform_(-1, 1) * sizes[None, :, None]

    handles = [model.register_forward_pre_hook(look, with_kwargs=True), embedding.register_forward_hook(disturb)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def optimizer_state_dtypes(optimizer: Any) -> str:
    """The dtypes of the optimizer's states, except step counters: `float32`, `uint8+float32`."""
    dtypes = {tensor.dtype for tensor in state_tensors(optimizer) if tensor.dim() > 0}
    return "+".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)) or "none"


def make_optimizer(model: torch.nn.Module, cell: Cell, *, device: str) -> torch.optim.Optimizer:
    """The cell's optimizer with the effective learning rate.

    Raises:
        UserError: the class is not allowed, its package is not installed, or it has no such argument.
        NotInForce: paged states were requested where there is no paging (bitsandbytes would silently not page).
    """
    settings = cell.optimizer
    if ".Paged" in settings.target and device != "cuda":
        raise NotInForce(f"optimizer={settings.name}: states can only be paged on CUDA, not on {device}")
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [parameter for _, parameter in named]}]
    if settings.b_ratio is not None:
        faster = [parameter for name, parameter in named if "lora_B" in name or "lora_embedding_B" in name]
        if not faster:
            raise UserError(f"optimizer={settings.name}: LoRA+ needs LoRA's matrices, peft={cell.peft.name} has none")
        groups = [_without(groups[0], faster), {"params": faster, "lr": cell.learning_rate * settings.b_ratio}]
    if settings.matrices:
        matrices = [parameter for _, parameter in named if parameter.dim() == 2]
        groups = [_without(groups[0], matrices), {"params": matrices, **settings.matrices}]
    arguments = {"params": groups, "lr": cell.learning_rate, **settings.config}
    optimizer: torch.optim.Optimizer = instantiate(settings.target, arguments, key="optimizer")
    return optimizer


def _without(group: dict[str, Any], taken: list[torch.nn.Parameter]) -> dict[str, Any]:
    ids = {id(parameter) for parameter in taken}
    return {"params": [parameter for parameter in group["params"] if id(parameter) not in ids]}


def is_paged(state: torch.Tensor) -> bool:
    """Whether bitsandbytes keeps it in CUDA's managed memory, which torch's allocators do not count."""
    return bool(getattr(state, "is_paged", False))


def state_tensors(optimizer: Any) -> list[torch.Tensor]:
    """All tensors of the optimizer's states."""
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]

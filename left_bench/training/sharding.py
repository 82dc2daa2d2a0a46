"""One model on several ranks, wrapped by accelerate: whole on every rank (DDP), or sharded (FSDP2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
)
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from left_bench.core.errors import UserError, nearest
from left_bench.model.load import layers_of
from left_bench.processes.ranks import Team
from left_bench.spec.cell import Cell


def make_accelerator(model: torch.nn.Module, cell: Cell, *, team: Team, unused: Callable[[], bool]) -> Accelerator:
    """accelerate as the cell's `hardware` section wants it; to be given model and optimizer together.

    Args:
        unused: whether some trainable parameter gets no gradient in a pass; asked under DDP alone.

    Raises:
        UserError: an argument in `hardware.sharding_config` that the plugin does not have.
    """
    cpu, hardware = cell.device_type == "cpu", cell.hardware
    if hardware.processes != team.size:
        raise UserError(f"hardware.processes={hardware.processes}: this run has {team.size}; start it by its worker")
    if team.size == 1 and hardware.sharding is not None:
        raise UserError(f"hardware.sharding={hardware.sharding}: one process has nothing to shard over; set processes")
    if team.size == 1:
        return Accelerator(cpu=cpu)
    if hardware.sharding == "fsdp2":
        layers = sorted({type(layer).__name__ for layer in layers_of(model)})
        defaults = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": layers}
        plugin = _plugin(FullyShardedDataParallelPlugin, defaults | hardware.sharding_config, fsdp_version=2)
        accelerator = Accelerator(cpu=cpu, fsdp_plugin=plugin)
        if cpu:  # accelerate knows this on accelerators alone and would run DDP; torch shards on the CPU too
            accelerator.state.distributed_type = DistributedType.FSDP
            accelerator.state.fsdp_plugin = plugin
        return accelerator
    _leave_alone_what_is_frozen(model)
    handler = DistributedDataParallelKwargs(
        broadcast_buffers=False,  # every rank has loaded the same
        gradient_as_bucket_view=True,  # else each gradient is held twice
        find_unused_parameters=unused(),
    )
    return Accelerator(cpu=cpu, kwargs_handlers=[handler])


def wrap(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The module to call in `model`'s place, and the optimizer of what it trains."""
    network, optimizer = accelerator.prepare(model, optimizer)
    if accelerator.device.type == "cpu":
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no average
    return network, optimizer


def clip_gradient(accelerator: Accelerator, parameters: Sequence[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Clip the gradient's 2-norm, over all shards; returns what it was before."""
    norm: Any
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    whole: torch.Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole


def whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters, gathered from their shards; every rank must ask, and rank 0 is the one to use them."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part: Any = parameter.detach()
            found[name] = part.full_tensor() if hasattr(part, "full_tensor") else part
    return found


def put_whole_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Give a model that was never sharded what `whole_weights` gathered."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)


def fingerprint_of(parameters: Sequence[torch.nn.Parameter]) -> float:
    """One number that is the same where all parameters are."""
    return sum(float(parameter.detach().double().sum()) for parameter in parameters)


def _leave_alone_what_is_frozen(model: torch.nn.Module) -> None:
    """Keep DDP from sending what every rank has loaded itself; quantized storage it could not even send."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    frozen += [name for name, _ in model.named_buffers()]
    ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(model, frozen)


def _plugin(kind: Any, config: dict[str, Any], **fixed: Any) -> Any:
    known = [field.name for field in dataclasses.fields(kind) if field.name not in fixed]
    for key in config:
        if key not in known:
            raise UserError(
                f"hardware.sharding_config.{key}: {kind.__name__} has no such argument{nearest(key, known)}"
            )
    return kind(**config, **fixed)

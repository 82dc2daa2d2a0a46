"""One model on several ranks: a full copy on every rank (DDP), or sharded (torch's FSDP2).

accelerate wraps a model for DDP. It supports FSDP2 only on accelerators, while torch can also shard on a CPU, so
torch's `fully_shard` is called directly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from left_bench.compat.bitsandbytes import not_to_shard
from left_bench.compat.torch import leave_out_of_ddp
from left_bench.core.errors import UserError, nearest
from left_bench.model.load import layers_of
from left_bench.processes.ranks import Team
from left_bench.spec.cell import Cell

_SHARDING_ARGUMENTS = ("reshard_after_forward",)
"""Arguments of `fully_shard` that a configuration can contain."""


def make_accelerator(model: torch.nn.Module, cell: Cell, *, team: Team, unused: Callable[[], bool]) -> Accelerator:
    """The Accelerator for the cell's `hardware` section; `wrap` passes it model and optimizer together.

    A model that FSDP2 shards is changed here, in place; its optimizer is created afterwards, from the shards.

    Args:
        unused: returns whether some trainable parameter gets no gradient in a pass; only called for DDP.

    Raises:
        UserError: an unknown argument in `hardware.sharding_config`.
    """
    cpu, hardware = cell.device_type == "cpu", cell.hardware
    if hardware.processes != team.size:
        raise UserError(f"hardware.processes={hardware.processes}: this run has {team.size}; start it by its worker")
    if team.size == 1 and hardware.sharding is not None:
        raise UserError(f"hardware.sharding={hardware.sharding}: a single process cannot shard; set hardware.processes")
    if team.size == 1:
        return Accelerator(cpu=cpu)
    if hardware.sharding == "fsdp2":
        _check_names(hardware.sharding_config, _SHARDING_ARGUMENTS, whose="torch's fully_shard")
        accelerator = Accelerator(cpu=cpu)
        if not isinstance(model, FSDPModule):  # an earlier training of the cell may have sharded it
            mesh = init_device_mesh(accelerator.device.type, (team.size,))
            shard(model, mesh, left_whole=not_to_shard(model), **hardware.sharding_config)
        return accelerator
    _exclude_frozen(model)
    handler = DistributedDataParallelKwargs(
        broadcast_buffers=False,  # every rank has loaded the same buffers
        gradient_as_bucket_view=True,  # otherwise each gradient is stored twice
        find_unused_parameters=unused(),
    )
    return Accelerator(cpu=cpu, kwargs_handlers=[handler])


def wrap(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The module to call instead of `model`, and the optimizer for its parameters."""
    if isinstance(model, FSDPModule):
        return model, optimizer
    network, optimizer = accelerator.prepare(model, optimizer)
    return network, optimizer


@contextlib.contextmanager
def gradients_kept_apart(accelerator: Accelerator, network: torch.nn.Module) -> Iterator[None]:
    """Inside the context, a backward pass only adds to this rank's gradients, without synchronizing them."""
    if not isinstance(network, FSDPModule):
        with accelerator.no_sync(network):
            yield
        return
    network.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        network.set_requires_gradient_sync(True)


def clip_gradient(accelerator: Accelerator, parameters: Sequence[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Clip the gradient's 2-norm over all shards; returns the norm before clipping."""
    norm: Any
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    whole: torch.Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole


def whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters, gathered from their shards; every rank must call it, and rank 0 uses the result."""
    results = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part: Any = parameter.detach()
            results[name] = part.full_tensor() if hasattr(part, "full_tensor") else part
    return results


def put_whole_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Load the result of `whole_weights` into an unsharded model."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)


def fingerprint_of(parameters: Sequence[torch.nn.Parameter]) -> float:
    """One number that is equal if all parameters are equal."""
    return sum(float(parameter.detach().double().sum()) for parameter in parameters)


def _exclude_frozen(model: torch.nn.Module) -> None:
    """Make DDP ignore frozen tensors, which every rank has loaded itself; quantized storage could not even be sent."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    frozen += [name for name, _ in model.named_buffers()]
    leave_out_of_ddp(model, frozen)


def shard(model: Any, mesh: DeviceMesh, *, left_whole: Collection[torch.Tensor] = (), **arguments: Any) -> None:
    """Shard each layer's parameters over the mesh's ranks, and everything outside the layers as one more group.

    An embedding that is not tied to the output head is a separate group, because it is only used at the beginning.

    Args:
        left_whole: parameters that every rank keeps whole.
        arguments: of `fully_shard`.
    """
    shared: dict[str, Any] = {"mesh": mesh, **arguments}
    if left_whole:
        shared["ignored_params"] = set(left_whole)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = getattr(head, "weight", None) is getattr(embedding, "weight", None)
    groups = [*layers_of(model), *([] if tied or embedding is None else [embedding])]
    for group in groups:
        if group is not model:
            fully_shard(group, **shared)
    shared.pop("reshard_after_forward", None)  # the outermost group is needed again at once
    fully_shard(model, **shared)
    if mesh.device_type == "cpu":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo has no average reduction


def _check_names(config: dict[str, Any], known: Sequence[str], *, whose: str) -> None:
    for key in config:
        if key not in known:
            raise UserError(f"hardware.sharding_config.{key}: {whose} has no such argument{nearest(key, known)}")

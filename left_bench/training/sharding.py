"""One model on several ranks: whole on every rank (DDP), or sharded (torch's FSDP2).

accelerate wraps a model for DDP. It knows FSDP2 too, but on accelerators alone, and torch shards on a CPU as well: so
its `fully_shard` is called here.
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
"""Those of `fully_shard` that a configuration can hold."""


def make_accelerator(model: torch.nn.Module, cell: Cell, *, team: Team, unused: Callable[[], bool]) -> Accelerator:
    """accelerate as the cell's `hardware` section wants it; it is given model and optimizer together (`wrap`).

    A model that FSDP2 shards is changed here, in place: its optimizer is made afterwards, of the shards.

    Args:
        unused: whether some trainable parameter gets no gradient in a pass; asked under DDP alone.

    Raises:
        UserError: an argument in `hardware.sharding_config` that there is not.
    """
    cpu, hardware = cell.device_type == "cpu", cell.hardware
    if hardware.processes != team.size:
        raise UserError(f"hardware.processes={hardware.processes}: this run has {team.size}; start it by its worker")
    if team.size == 1 and hardware.sharding is not None:
        raise UserError(f"hardware.sharding={hardware.sharding}: one process has nothing to shard over; set processes")
    if team.size == 1:
        return Accelerator(cpu=cpu)
    if hardware.sharding == "fsdp2":
        _check_names(hardware.sharding_config, _SHARDING_ARGUMENTS, whose="torch's fully_shard")
        accelerator = Accelerator(cpu=cpu)
        if not isinstance(model, FSDPModule):  # else an earlier training of the cell has sharded it
            mesh = init_device_mesh(accelerator.device.type, (team.size,))
            shard(model, mesh, left_whole=not_to_shard(model), **hardware.sharding_config)
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
    if isinstance(model, FSDPModule):
        return model, optimizer
    network, optimizer = accelerator.prepare(model, optimizer)
    return network, optimizer


@contextlib.contextmanager
def gradients_kept_apart(accelerator: Accelerator, network: torch.nn.Module) -> Iterator[None]:
    """Inside, a backward pass adds to this rank's own gradients and sends none of them round."""
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
    """Clip the gradient's 2-norm, over all shards; returns what it was before."""
    norm: Any
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    whole: torch.Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole


def whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters, gathered from their shards; every rank must ask, and rank 0 is the one to use them."""
    results = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part: Any = parameter.detach()
            results[name] = part.full_tensor() if hasattr(part, "full_tensor") else part
    return results


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
    leave_out_of_ddp(model, frozen)


def shard(model: Any, mesh: DeviceMesh, *, left_whole: Collection[torch.Tensor] = (), **arguments: Any) -> None:
    """Divide each layer's parameters over the mesh's ranks, and what is in no layer as one more group.

    An embedding that is not the output head too is a group of its own: it is used at the beginning alone.

    Args:
        left_whole: parameters of which every rank keeps all.
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
    shared.pop("reshard_after_forward", None)  # by default not the outermost one's, which is wanted again at once
    fully_shard(model, **shared)
    if mesh.device_type == "cpu":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no average


def _check_names(config: dict[str, Any], known: Sequence[str], *, whose: str) -> None:
    for key in config:
        if key not in known:
            raise UserError(f"hardware.sharding_config.{key}: {whose} has no such argument{nearest(key, known)}")

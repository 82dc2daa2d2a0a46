"""Frozen tensors that a method keeps in memory: random projections, factors, masks, importance scores."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from left_bench.compat.torch import storage_key
from left_bench.measure.meter import plain_parts, stored_bytes

Modules = weakref.WeakSet[torch.nn.Module]


def modules_of(model: torch.nn.Module) -> Modules:
    """The modules of a base model, as weak references, to distinguish them from modules that a method adds."""
    return weakref.WeakSet(model.modules())


def frozen_tensors(model: torch.nn.Module, *, base: Modules) -> list[torch.Tensor]:
    """The tensors that a method has added to the modules in `base` and does not train.

    Methods keep them as parameters, as buffers and as plain attributes (SHiRA's indices, AdaLoRA's importance scores);
    views of the base model's or of trained tensors do not count. For a model on an accelerator, tensors on the host
    (BOFT's permutations) are not part of its memory.
    """
    others = list(_others(model, base))
    known = {storage_key(part.untyped_storage()) for tensor in others for part in plain_parts(tensor)}
    places = {tensor.device.type for tensor in others} | {"meta"}  # a plan leaves plain attributes there
    results = {
        id(tensor): tensor
        for module in model.modules()
        if module not in base
        for tensor in _tensors_in([vars(module)], set())
        if not tensor.requires_grad  # not an activation that a layer keeps for its next pass
        and tensor.layout == torch.strided
        and tensor.device.type in places
        and storage_key(tensor.untyped_storage()) not in known
    }
    return list(results.values())


def frozen_part(model: torch.nn.Module, *, base: Modules) -> dict[str, int]:
    """The part `adapter_frozen` of a memory breakdown; empty if the method holds nothing frozen."""
    held = stored_bytes(frozen_tensors(model, base=base))
    return {"adapter_frozen": held} if held else {}


def _others(model: torch.nn.Module, base: Modules) -> Iterator[torch.Tensor]:
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        yield from (item for item in own if module in base or item.requires_grad)


def _tensors_in(values: Iterable[Any], seen: set[int]) -> Iterator[torch.Tensor]:
    """Tensors in containers and in peft's own objects; the caller iterates over modules."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif id(value) in seen or isinstance(value, torch.nn.Module):
            continue
        elif isinstance(value, dict):
            seen.add(id(value))
            yield from _tensors_in([*value.values()], seen)
        elif isinstance(value, (list, tuple, set)):
            seen.add(id(value))
            yield from _tensors_in([*value], seen)
        elif type(value).__module__.startswith("peft.") and hasattr(value, "__dict__"):
            seen.add(id(value))
            yield from _tensors_in([*vars(value).values()], seen)

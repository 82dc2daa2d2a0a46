"""Layers that repeat: two short models are followed in place of a long one, and the rest lies on a straight line.

A layer more adds the same bytes wherever in a step one looks: its weights, its states, what it keeps for the backward
pass. So the bytes at each place of a step (`follow.Place`) are linear in the number of layers once there is a first,
a last and one between them; the peak is the largest of these lines, and not a line itself.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from left_bench.core.errors import UserError
from left_bench.methods.partial import decoder_layers
from left_bench.plan.follow import Place, Storages
from left_bench.spec.cell import Cell

_FEWEST_LAYERS = 8
_LAYER_BY_LAYER = {
    *("peft.LoraConfig", "peft.AdaLoraConfig", "peft.IA3Config", "peft.LNTuningConfig", "peft.VeraConfig"),
    *("peft.LoHaConfig", "peft.LoKrConfig", "peft.OFTConfig", "peft.MissConfig", "peft.RandLoraConfig"),
    *("peft.FourierFTConfig", "peft.RoadConfig", "peft.C3AConfig", "peft.HRAConfig", "peft.HiraConfig"),
    *("peft.PromptTuningConfig", "peft.PromptEncoderConfig", "peft.PrefixTuningConfig", "peft.CartridgeConfig"),
    *("peft.AdaptionPromptConfig", "peft.TrainableTokensConfig", "peft.DeloraConfig"),
    *("peft.GloraConfig", "peft.MultitaskPromptTuningConfig", "peft.PeanutConfig", "peft.PveraConfig"),
    *("peft.DeftConfig", "peft.OSFConfig", "peft.PsoftConfig", "peft.SupertuningConfig"),
    *("left_bench.methods.BottleneckConfig", "left_bench.methods.BitFitConfig"),
}
"""Methods that do to every layer what they do to the others, whatever there is of them; a test holds each to that."""
_NAMES_LAYERS = re.compile(r"(^|\.)\d+(\.|$)|[\\\[\](){}*+?^$|]")
"""A layer's number in the name of a module, or a pattern that may stand for some layers and not for others."""


@dataclass(frozen=True)
class Repeats:
    """A model of `kept` layers with `times` more periods of `period` layers."""

    period: int
    kept: int
    times: int


@dataclass
class Walk:
    """What was counted along one step of a model, every number of it linear in the model's layers."""

    amounts: dict[str, int] = field(default_factory=dict)
    peaks: dict[Place, int] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def repeats_of(model: Any, cell: Cell) -> Repeats | None:
    """How the model's layers repeat; None where they or what the method does to them differ, or there are few."""
    target = cell.peft.target
    if target is not None and (target not in _LAYER_BY_LAYER or _tells_layers_apart(cell.peft.config)):
        return None
    try:
        layers = decoder_layers(model)
    except (AttributeError, UserError):
        return None
    seen = [_looks(layer) for layer in layers]
    for period in range(1, len(layers) // 2 + 1):
        if all(one == other for one, other in zip(seen, seen[period:], strict=False)):
            kept = 2 * period + len(layers) % period
            times = (len(layers) - kept) // period
            return Repeats(period, kept, times) if len(layers) >= _FEWEST_LAYERS and times > 1 else None
    return None


def _tells_layers_apart(config: Mapping[str, Any]) -> bool:
    for key, value in config.items():
        if value is not None and "layer" in key and key != "layer_norm":
            return True
        for text in _texts(value):
            if _NAMES_LAYERS.search(text.removeprefix(".*")):
                return True
    return False


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from (*_texts(key), *_texts(part))
    elif isinstance(value, Sequence):
        for part in value:
            yield from _texts(part)


def _looks(layer: torch.nn.Module) -> list[Any]:
    """All of a layer that could make its memory another's: classes, plain settings, shapes."""
    result: list[Any] = []
    for name, module in layer.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, (bool, int, float, str, type(None))) and key != "layer_idx"
        }
        tensors = [
            (key, tuple(item.shape), item.dtype, item.requires_grad)
            for owned in (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
            for key, item in owned
        ]
        result.append((name, type(module), plain, tensors))
    return result


def are_alike(layers: Sequence[torch.nn.Module], *, period: int) -> bool:
    """Whether layers still repeat, with a method attached."""
    seen = [_looks(layer) for layer in layers]
    return all(one == other for one, other in zip(seen, seen[period:], strict=False))


def shortened(model: Any, layers: int) -> Any:
    """A copy of a model on the meta device with its first layers alone."""
    full = _list_of_layers(model)
    every = list(full)
    del full[layers:]
    before = model.config.num_hidden_layers
    kinds = getattr(model.config, "layer_types", None)
    try:
        short = copy.deepcopy(model)
    finally:
        full.extend(every[layers:])
    if kinds is not None:
        object.__setattr__(short.config, "layer_types", list(kinds)[:layers])
    object.__setattr__(short.config, "num_hidden_layers", layers)
    assert model.config.num_hidden_layers == before
    return short


def _list_of_layers(model: Any) -> torch.nn.ModuleList:
    first = decoder_layers(model)[0]
    return next(
        module
        for module in model.modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) and module[0] is first
    )


def tell_layers(layers: Sequence[torch.nn.Module], storages: Storages) -> None:
    """Have `storages` told which layer a step is in; one that runs in the backward pass runs again."""
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(_entering(storages, number))
        layer.register_forward_hook(_leaving(storages, number))


def _entering(storages: Storages, number: int) -> Any:
    return lambda _module, _arguments: storages.at("layer", number)


def _leaving(storages: Storages, number: int) -> Any:
    def leave(_module: Any, _arguments: Any, output: Any) -> None:
        states = output if isinstance(output, torch.Tensor) else output[0]
        if storages.stage.startswith("backward"):
            storages.at("behind layer", number)
            return
        storages.at("behind layers")
        if states.requires_grad:
            # the stage is asked for when the gradient comes
            states.register_hook(lambda _gradient: storages.at("gradient of layer", number))

    return leave


def extrapolated(short: Walk, longer: Walk, repeats: Repeats) -> Walk:
    """What the walk of the whole model is, of one of `kept` layers and one with a period more.

    Raises:
        ValueError: the two did not go the same way.
    """
    if short.amounts.keys() != longer.amounts.keys() or short.unknown != longer.unknown:
        raise ValueError("a model with more layers is planned another way")
    times, period, kept = repeats.times, repeats.period, repeats.kept

    def line(here: int, there: int) -> int:
        return here + times * (there - here)

    result = Walk({key: line(short.amounts[key], longer.amounts[key]) for key in short.amounts}, unknown=short.unknown)
    for place, there in longer.peaks.items():
        name, layer = place
        if layer < 0:
            result.peaks[place] = line(short.peaks[place], there)
            continue
        # the same layer counted from the first one, and from the last one
        first, last = layer % period, kept - period + (layer - kept) % period
        grows_above = longer.peaks[name, first] - short.peaks[name, first]
        grows_below = longer.peaks[name, last + period] - short.peaks[name, last]
        between = max(grows_above, grows_below)
        grows = grows_above if layer < period else grows_below if layer >= kept else between
        result.peaks[place] = there + (times - 1) * grows
    return result

"""peft, seen with 0.21.0 to 0.21.2.

- `method_loss`: KaSA's and MonteCLoRA's loss terms are private methods that peft's documentation tells its users to
  call (LoraConfig's docstring on `kasa_config`; huggingface/peft#3446).
- `freeze_ranks`: AdaLoRA creates its numbers of ranks with `requires_grad=False`; over half-precision weights they are
  created again, in that dtype, and then require a gradient (tuners/tuners_utils.py,
  `_move_adapter_to_device_of_base_layer`). Their learned values are not saved.
- `load_unrounded`: loading an AdaLoRA adapter truncates it to its ranks by creating new matrices in the dtype of the
  weights, so that values trained in float32 over bfloat16 weights are rounded (tuners/adalora/model.py,
  `resize_modules_by_rank_pattern`).
- `allocator_state`, `restore_allocator`: `RankAllocator` has no `state_dict` (tuners/adalora/layer.py).
- `put_corda_start`: `preprocess_corda` passes CorDA's initialization to the layers through an attribute, and peft's own
  cache file for it is a pickle (tuners/lora/corda.py).
- `AskedToDequantize`: peft only dequantizes the layers of bitsandbytes, HQQ and torchao (utils/integrations.py,
  `dequantize_module_weight`); huggingface/peft#3117 made quantization pluggable, but only for BOFT, MiSS and VeRA.
- `dropped_variants`: layers over quantized weights silently drop the variants of LoRA that they do not support
  (tuners/lora/layer.py, `resolve_lora_variant`), which no public attribute shows.
- `names_no_layer`: a wrong `target_modules` is a ValueError like any other refusal, and only its text identifies it
  (tuners/tuners_utils.py, `inject_adapter`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

if TYPE_CHECKING:  # imported where it is used: the five-bit layers need no peft, which opens a CUDA context
    from peft.tuners.lora import LoraLayer, LoraModel

_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def method_loss(tuner: LoraModel) -> torch.Tensor | None:
    """The term that KaSA or MonteCLoRA adds to a step's loss, weighted by its configuration; None for other methods."""
    config: Any = tuner.peft_config[tuner.active_adapters[0]]
    if config.kasa_config is not None:
        return tuner._get_kasa_loss()  # type: ignore[return-value]
    return None if config.monteclora_config is None else tuner._get_monteclora_loss()  # type: ignore[return-value]


def freeze_ranks(model: torch.nn.Module) -> None:
    """Exclude AdaLoRA's numbers of ranks, by which its layers divide, from training."""
    for layer in model.modules():
        for ranks in getattr(layer, "ranknum", {}).values():
            ranks.requires_grad_(False)


def load_unrounded(model: torch.nn.Module, folder: Path) -> None:
    """Restore the saved values of the matrices of an AdaLoRA adapter loaded from `folder`."""
    for name, saved in load_file(folder / "adapter_model.safetensors").items():
        layer, _, kind = name.rpartition(".")
        if not kind.startswith("lora_"):  # an output layer that is trained whole
            continue
        tuned: Any = model.get_submodule(layer)
        parameter = getattr(tuned, kind)["default"]
        parameter.data = saved.to(parameter.device)
        ranks = tuned.ranknum["default"]
        ranks.data = ranks.data.to(saved.dtype)


def allocator_state(model: Any) -> dict[str, Any] | None:
    """The importance scores by which AdaLoRA allocates its budget, and the rank pattern it chose last."""
    from peft.tuners.adalora import AdaLoraModel

    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, AdaLoraModel):
        return None
    allocator: Any = tuner.rankallocator
    return {name: getattr(allocator, name) for name in _SCORES} | {
        "rank_pattern": allocator.peft_config.rank_pattern,
    }


def restore_allocator(model: Any, state: Mapping[str, Any] | None) -> None:
    """Restore the state that `allocator_state` returned."""
    if state is not None:
        allocator = model.base_model.rankallocator
        allocator.peft_config.rank_pattern = state["rank_pattern"]
        for name in _SCORES:
            setattr(allocator, name, state[name])


def put_corda_start(layer: Any, parts: Mapping[str, torch.Tensor]) -> None:
    """Give a layer the matrices that `preprocess_corda` would: `S_WC`, `U_WC` and `V_WC`."""
    from peft.tuners.lora.corda import CordaEigens

    layer.eigens = CordaEigens(**parts)


class AskedToDequantize:
    """A quantized layer with a packed `weight`, for which peft should call `dequantize()` instead."""

    weight: torch.Tensor

    @property
    def W_q(self) -> torch.Tensor:
        """The packed weight under the name of HQQ's layers, which peft recognizes."""
        return self.weight


def dropped_variants(model: Any) -> Iterator[tuple[str, LoraLayer, str]]:
    """Every layer that should be a variant (DoRA, KaSA, ...) and is not: its name, the layer, the variant's name."""
    from peft.tuners.lora import LoraLayer

    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for adapter in layer.lora_A.keys() - layer.lora_variant.keys():
            config = model.peft_config[adapter]
            for field in dataclasses.fields(config):
                if field.metadata.get("is_lora_variant") and getattr(config, field.name):
                    yield name, layer, field.name


def names_no_layer(refusal: ValueError) -> bool:
    """Whether peft refused because `target_modules` matches no layer of the model."""
    return " ".join(str(refusal).split()).startswith("Target modules")

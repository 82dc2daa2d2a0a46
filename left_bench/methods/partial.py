"""Methods that add nothing and train some of the base model's own parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from left_bench.core.errors import UserError
from left_bench.methods.attached import Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitFitConfig(Method):
    """Only bias terms are trained, including those of normalizations (Ben Zaken et al. 2022)."""

    def prepare(self, model: PreTrainedModel, *, adapter_dtype: torch.dtype) -> None:
        biases = [parameter for name, parameter in model.named_parameters() if name.rpartition(".")[2] == "bias"]
        if not biases:
            raise UserError(
                f"peft=bitfit trains bias terms, and this model of type '{model.config.model_type}' has none; "
                "choose another method, or a model with biases (OPT, GPT-NeoX)"
            )
        for bias in biases:
            bias.requires_grad_(True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerFreezeConfig(Method):
    """The last layers are trained in full; everything else is frozen, including embeddings, final normalization and
    head."""

    last_layers: int = 2

    def __post_init__(self) -> None:
        if self.last_layers < 1:
            raise UserError(f"peft.config.last_layers={self.last_layers}: give a number of at least 1")

    def prepare(self, model: PreTrainedModel, *, adapter_dtype: torch.dtype) -> None:
        layers = decoder_layers(model)
        if self.last_layers > len(layers):
            raise UserError(f"peft.config.last_layers={self.last_layers}: this model has {len(layers)} layers")
        for layer in layers[-self.last_layers :]:
            for name, parameter in layer.named_parameters():
                if not parameter.is_floating_point():
                    raise UserError(
                        f"peft=layer_freeze trains base weights, and '{name}' is quantized: integer storage takes no "
                        "gradient; choose quantization=none"
                    )
                parameter.requires_grad_(True)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer's layers, in order: the module list whose length is the number of layers in the configuration.

    For an encoder-decoder they are the decoder's layers.
    """
    config: Any = model.config
    root: Any = model
    expected = config.num_hidden_layers
    if config.is_encoder_decoder:
        root = model.get_decoder()
        expected = getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", expected)
    lists = [module for module in root.modules() if isinstance(module, nn.ModuleList) and len(module) == expected]
    if not lists:
        raise UserError(f"peft: no list of {expected} layers found in this model of type '{model.config.model_type}'")
    return list(lists[0])  # outer modules come first, so a list inside a layer would come later

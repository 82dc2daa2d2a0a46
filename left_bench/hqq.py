"""HQQ (Badri & Shaji 2023) through its own library's call, for transformers 5 refuses its own `HqqConfig` ("not
available yet", seen with 5.23.0): the model is loaded dense, then its linear layers are quantized in place.

Importing this module makes the quantization known to transformers; the package `hqq` is needed when a model is loaded.
"""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

QUANT_METHOD = "left_hqq"


@register_quantization_config(QUANT_METHOD)
class HqqConfig(QuantizationConfigMixin):
    """`hqq.core.quantize.BaseQuantizeConfig`'s arguments, and the dtype of the products by name."""

    def __init__(self, nbits: int = 4, group_size: int = 64, compute_dtype: str = "float32") -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.nbits, self.group_size, self.compute_dtype = nbits, group_size, compute_dtype


@register_quantizer(QUANT_METHOD)
class HqqHfQuantizer(HfQuantizer):
    """Quantizes what was loaded dense; loading peaks as the dense model does."""

    quantization_config: HqqConfig

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
        from hqq.models.hf.base import AutoHQQHFModel

        class Linear(HQQLinear, nn.Linear):
            """HQQ's layer, which peft's `all-linear` knows for a linear layer."""

            weight = property(lambda self: self.W_q)  # the packed one; `in_force` watches who reads it

        config = self.quantization_config
        AutoHQQHFModel.quantize_model(
            model,
            quant_config=BaseQuantizeConfig(nbits=config.nbits, group_size=config.group_size),
            compute_dtype=getattr(torch, config.compute_dtype),
            device=str(model.device),
        )
        for layer in model.modules():
            if isinstance(layer, HQQLinear):
                layer.__class__ = Linear
                layer.W_q.requires_grad_(False)
                _tell_constants(layer)
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


def _tell_constants(layer: Any) -> None:
    """Put the constants and the dense weight within reach of the packed weight, by bitsandbytes' names."""
    own: Any = weakref.ref(layer)
    layer.W_q.quant_state = SimpleNamespace(
        shape=torch.Size(layer.meta["shape"]), absmax=layer.meta["scale"], offset=layer.meta["zero"]
    )
    layer.W_q.left_dequantize = lambda: own().dequantize().detach()

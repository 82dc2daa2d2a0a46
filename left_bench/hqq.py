"""HQQ (Badri & Shaji 2023) with its own library's layer: the model is loaded dense, then quantized in place.

transformers 5 refuses its own `HqqConfig` ("not available yet", seen with 5.23.0; tests/test_compat.py checks whether
it still does). Importing this module registers the quantization with transformers; the package `hqq` is needed when a
model is loaded. `left_bench.quantization.hqq` is its backend.
"""

from __future__ import annotations

import functools
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
    """Arguments of `hqq.core.quantize.BaseQuantizeConfig`, and the name of the products' dtype."""

    def __init__(self, nbits: int = 4, group_size: int = 64, compute_dtype: str = "float32") -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.nbits, self.group_size, self.compute_dtype = nbits, group_size, compute_dtype


@register_quantizer(QUANT_METHOD)
class HqqHfQuantizer(HfQuantizer):
    """Quantizes a dense model after loading, so the memory peak of loading is the dense model's."""

    quantization_config: HqqConfig

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from hqq.core.quantize import BaseQuantizeConfig

        config, kind = self.quantization_config, layer_class()
        dtype, device = getattr(torch, config.compute_dtype), str(model.device)
        model.eval().requires_grad_(False)
        for name, module in list(model.named_modules()):
            # the choice of layers, and the dtype of the others, follow `AutoHQQHFModel.quantize_model`
            if type(module) is nn.Linear and name.rpartition(".")[2] != "lm_head":
                settings = BaseQuantizeConfig(nbits=config.nbits, group_size=config.group_size)
                layer = kind(module, settings, compute_dtype=dtype, device=device)
                model.set_submodule(name, layer)
                _annotate_constants(layer)
            elif not any(True for _ in module.children()):
                module.to(dtype)
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


@functools.cache
def layer_class() -> Any:
    """HQQ's layer as a subclass of `nn.Linear`, which peft's `all-linear` looks for."""
    from hqq.core.quantize import HQQLinear

    class LinearWithoutWeight(nn.Linear):
        def __init__(self) -> None:  # HQQ's layer calls the next base without arguments
            nn.Module.__init__(self)

    class Linear(HQQLinear, LinearWithoutWeight):
        weight = property(lambda self: self.W_q)  # the packed weight; `methods.verify` checks who reads it

    return Linear


def _annotate_constants(layer: Any) -> None:
    """Make the constants and the dense weight available from the packed weight, under bitsandbytes' names."""
    own: Any = weakref.ref(layer)
    layer.W_q.quant_state = SimpleNamespace(
        shape=torch.Size(layer.meta["shape"]), absmax=layer.meta["scale"], offset=layer.meta["zero"]
    )
    layer.W_q.left_dequantize = lambda: own().dequantize().detach()

"""Support for 5-bit layers in `from_pretrained` and `save_pretrained`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from left_bench.compat.transformers import kept_in_float32
from left_bench.core.errors import UserError
from left_bench.fivebit import native
from left_bench.fivebit.linear import Linear5bit

QUANT_METHOD = "left_fivebit"


@register_quantization_config(QUANT_METHOD)
class FiveBitConfig(QuantizationConfigMixin):
    """Settings of the 5-bit layers; stored in a saved model's config.json.

    Args:
        scheme: `nf5`, the NormalFloat levels of QLoRA at 5 bits; `int5`, even steps between a block's extremes.
        block_size: consecutive weights that share constants.
        double_quant: quantize the constants themselves (only `nf5`).
        compute_dtype: dtype of the products, by name.
        modules_to_not_convert: names of layers to leave unquantized; None: the output head and layers tied to it.

    Raises:
        UserError: an invalid value.
    """

    def __init__(
        self,
        scheme: str = "nf5",
        block_size: int = 64,
        double_quant: bool = False,
        compute_dtype: str = "float32",
        modules_to_not_convert: list[str] | None = None,
    ) -> None:
        key = "quantization.config"
        if scheme not in ("nf5", "int5"):
            raise UserError(f"{key}.scheme={scheme!r}: there is no such 5-bit scheme; choose nf5 or int5")
        if block_size < 16 or block_size % 16:
            raise UserError(f"{key}.block_size={block_size}: 16 codes are packed together; choose a multiple of 16")
        if double_quant and scheme != "nf5":
            raise UserError(f"{key}.double_quant=true: {scheme} has zero points too; choose scheme=nf5")
        kind = getattr(torch, str(compute_dtype).removeprefix("torch."), None)
        if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
            raise UserError(f"{key}.compute_dtype={compute_dtype!r}: not a floating-point dtype; choose e.g. bfloat16")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.scheme = scheme
        self.block_size = block_size
        self.double_quant = double_quant
        self.compute_dtype = str(kind).removeprefix("torch.")
        self.modules_to_not_convert = modules_to_not_convert

    def prepare(self, device: str) -> None:
        """Compile the decoders now instead of at first use."""
        if device != "cpu":
            # sizes are multiples of 16, as in real models, because Triton compiles separately for those
            layer = Linear5bit(
                *(512, 512, False),
                scheme=self.scheme,
                block_size=self.block_size,
                double_quant=self.double_quant,
                device=device,
            )
            for dtype in {getattr(torch, self.compute_dtype), torch.float32}:
                layer.dequantize(dtype)
            return
        native.prepare(
            scheme=self.scheme,
            double_quant=self.double_quant,
            block_size=self.block_size,
            compute_dtype=getattr(torch, self.compute_dtype),
        )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        own = {name: value for name, value in config_dict.items() if name != "quant_method"}
        return super().from_dict(own, return_unused_kwargs=return_unused_kwargs, **kwargs)


@register_quantizer(QUANT_METHOD)
class FiveBitHfQuantizer(HfQuantizer):
    """Replaces linear layers by `Linear5bit`, and quantizes each dense weight as it is read."""

    quantization_config: FiveBitConfig

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, Linear5bit) and name == "weight"

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        keep = self.get_modules_to_not_convert(model, config.modules_to_not_convert, kept_in_float32(model))
        replaced = 0
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and should_convert_module(name, keep):
                layer = _empty_like(module, config)
                if not self.pre_quantized:
                    # transformers up to 5.17 first casts a weight to the dtype of this parameter and then quantizes it;
                    # cast to the packed weight's integers, it would be zeros
                    layer.weight = nn.Parameter(module.weight, requires_grad=False)
                model.set_submodule(name, layer)
                replaced += 1
        if not replaced:
            raise ValueError(f"{type(model).__name__} has no linear layer to store in 5 bits")

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize()

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, module in list(model.named_modules()):
            if isinstance(module, Linear5bit):
                dense = nn.Linear(1, 1, bias=False, device="meta")
                dense.in_features, dense.out_features = module.in_features, module.out_features
                dense.weight = nn.Parameter(module.dequantize(dtype), requires_grad=False)
                dense.bias = module.bias
                model.set_submodule(name, dense)
        return model


class _Quantize(ConversionOps):
    """Converts one dense weight into codes and constants; transformers reads the next weight only afterwards."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in input_dict.items():
            layer, _ = get_module_from_name(kwargs["model"], name)
            dense = value[0] if isinstance(value, list) else value
            path = name.removesuffix("weight")
            result |= {path + key: tensor for key, tensor in layer.encode(dense).items()}
        return result


def _empty_like(module: nn.Linear, config: FiveBitConfig) -> Linear5bit:
    layer = Linear5bit(
        module.in_features,
        module.out_features,
        module.bias is not None,
        scheme=config.scheme,
        block_size=config.block_size,
        double_quant=config.double_quant,
        compute_dtype=getattr(torch, config.compute_dtype),
        device="meta",
        dtype=module.weight.dtype,
    )
    return layer.requires_grad_(False)

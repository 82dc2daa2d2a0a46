"""transformers, seen with 5.4 to 5.23.

- `attention_kernel`: a model has `set_attn_implementation`, but only the private property
  `PreTrainedConfig._attn_implementation` (configuration_utils.py) shows what is set. For expert layers there is a
  getter (`get_experts_implementation`).
- `repeated_blocks`: only `PreTrainedModel._no_split_modules` names a model's blocks (modeling_utils.py); accelerate
  reads it too.
- `kept_in_float32`: `HfQuantizer.get_modules_to_not_convert` expects `PreTrainedModel._keep_in_fp32_modules` as an
  argument, as transformers' own quantizers pass it (quantizers/quantizer_bnb_4bit.py).
"""

from __future__ import annotations

from typing import Any

import torch


def attention_kernel(model: Any) -> str:
    """The name of the active attention kernel, as `set_attn_implementation` takes it."""
    name: str = model.config._attn_implementation
    return name


def repeated_blocks(model: Any) -> list[torch.nn.Module]:
    """The model's repeated modules, its layers; empty if its class names none."""
    names = set(getattr(model, "_no_split_modules", None) or [])
    return [module for module in model.modules() if type(module).__name__ in names]


def kept_in_float32(model: Any) -> Any:
    """The modules that the model's class keeps in float32, in the form that `get_modules_to_not_convert` takes."""
    return model._keep_in_fp32_modules

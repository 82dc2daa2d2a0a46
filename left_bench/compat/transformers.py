"""transformers, seen with 5.0 to 5.23.

- `attention_kernel`: a model has `set_attn_implementation`, and nothing that tells what is set but the private property
  `PreTrainedConfig._attn_implementation` (configuration_utils.py). For expert layers there is such a method
  (`get_experts_implementation`).
- `repeated_blocks`: which modules are a model's blocks is said in `PreTrainedModel._no_split_modules` alone
  (modeling_utils.py), which accelerate reads too.
- `kept_in_float32`: `HfQuantizer.get_modules_to_not_convert` asks every quantizer to hand over
  `PreTrainedModel._keep_in_fp32_modules`, as transformers' own quantizers do (quantizers/quantizer_bnb_4bit.py).
"""

from __future__ import annotations

from typing import Any

import torch


def attention_kernel(model: Any) -> str:
    """The name of the attention kernel in force, as `set_attn_implementation` takes it."""
    name: str = model.config._attn_implementation
    return name


def repeated_blocks(model: Any) -> list[torch.nn.Module]:
    """The modules that a model repeats, its layers; empty where its class names none."""
    names = set(getattr(model, "_no_split_modules", None) or [])
    return [module for module in model.modules() if type(module).__name__ in names]


def kept_in_float32(model: Any) -> Any:
    """What the model's class keeps in float32, in the form that `get_modules_to_not_convert` takes."""
    return model._keep_in_fp32_modules

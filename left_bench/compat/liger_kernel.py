"""liger-kernel, seen with 0.8.

- `replace_layers`: the function that changes a single model, instead of a class for all later models, is private
  (liger_kernel/transformers/monkey_patch.py); transformers uses it too (integrations/liger.py).
- `name_of`: the modules keep their classes; only `nn.Module._get_name`, which Liger replaces, shows what they run as.
"""

from __future__ import annotations

from typing import Any

import torch


def replace_layers(model: Any, **switches: bool) -> None:
    """Replace the forward passes of a loaded model's modules by Liger's; an unknown architecture is silently
    skipped."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model, **switches)


def name_of(module: torch.nn.Module) -> str:
    """The name a module reports: `LigerRMSNorm` for a replaced LlamaRMSNorm."""
    return module._get_name()

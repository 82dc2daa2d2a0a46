"""liger-kernel, seen with 0.8.

- `replace_layers`: what changes one model, and not a class for all models to come, has an underscore
  (liger_kernel/transformers/monkey_patch.py); transformers calls it by that name too (integrations/liger.py).
- `name_of`: the modules stay of their own classes, and tell what they run as by `nn.Module._get_name` alone, which
  Liger replaces.
"""

from __future__ import annotations

from typing import Any

import torch


def replace_layers(model: Any, **switches: bool) -> None:
    """Give a loaded model's modules Liger's forward passes; an architecture that it does not know is passed by."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model, **switches)


def name_of(module: torch.nn.Module) -> str:
    """What a module runs as, by its own word: `LigerRMSNorm` for a replaced LlamaRMSNorm."""
    return module._get_name()

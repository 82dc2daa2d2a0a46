"""bitsandbytes, seen with 0.50.0 to 0.50.2.

- `keep_trainable`: on CPUs with AVX512-BF16 a 4-bit layer's first forward pass in eval mode permanently repacks its
  weight for inference (nn/modules.py, `Linear4bit.forward`; introduced by bitsandbytes-foundation/bitsandbytes#1804;
  #2078 reports other breakage). Afterwards no gradient flows through the layer, and its weight can no longer be
  dequantized: a model that was evaluated before training silently learns almost nothing (gradient norm 0.28 instead of
  1.67 for LoRA over NF4 with 0.50.2). The only switch is the attribute for the CPU's support.
- `not_to_shard`: a 4-bit weight that is stored as integers loses its class and its constants when FSDP2 turns it into a
  DTensor. accelerate excludes such weights for the same reason (utils/fsdp_utils.py).
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from left_bench.core.errors import NotInForce
from left_bench.core.paths import versions_of

REPACKS = "support_avx512bf16_for_cpu"


def keep_trainable(model: torch.nn.Module, *, switch: str = REPACKS) -> None:
    """Keep 4-bit layers from repacking their weights when they are evaluated on a CPU.

    Raises:
        NotInForce: this version of bitsandbytes has no such switch.
    """
    bitsandbytes = _imported()
    if bitsandbytes is None:
        return
    for module in model.modules():
        if not isinstance(module, bitsandbytes.nn.Linear4bit):
            continue
        if not hasattr(module, switch):
            version = versions_of(["bitsandbytes"]).get("bitsandbytes")
            raise NotInForce(
                f"bitsandbytes {version}: its 4-bit layers no longer have {switch}, the switch that prevents an "
                "evaluation from repacking them so that they cannot be trained; pip install bitsandbytes==0.50.2"
            )
        setattr(module, switch, False)


def not_to_shard(model: torch.nn.Module) -> set[torch.nn.Parameter]:
    """The frozen 4-bit weights that are stored as integers."""
    bitsandbytes = _imported()
    if bitsandbytes is None:
        return set()
    return {
        parameter
        for parameter in model.parameters()
        if isinstance(parameter, bitsandbytes.nn.Params4bit)
        and not parameter.requires_grad
        and not parameter.is_floating_point()
    }


def _imported() -> Any:
    """The package, if it has been imported; otherwise no layer can be its own, and importing it opens a CUDA
    context."""
    return sys.modules.get("bitsandbytes")

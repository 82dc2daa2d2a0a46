"""Liger's Triton kernels (Hsu et al. 2024, arXiv 2410.10989) in place of a model's own layers, and its loss.

Both are options; the package is only imported if one of them is used.
"""

from __future__ import annotations

import inspect
import os
from collections import Counter
from typing import Any

import torch

from left_bench.compat import liger_kernel
from left_bench.core.errors import NotInForce, UserError
from left_bench.core.paths import is_installed
from left_bench.spec.cell import Cell
from left_bench.spec.device import DEVICES


def check(cell: Cell, *, device: str) -> None:
    """Refuse what the rules refuse, for cells that were forced past them.

    Raises:
        NotInForce: the device has no Triton.
        UserError: the package is not installed.
    """
    options = [f"training.{key}=liger" for key in ("kernels", "output_head") if getattr(cell.training, key) == "liger"]
    if not options:
        return
    if not is_installed("liger_kernel"):
        raise UserError(f"{options[0]} needs the package liger-kernel: pip install 'left-bench[liger]'")
    if (
        not any(kind.type == device and kind.has_triton for kind in DEVICES.values())
        and os.environ.get("TRITON_INTERPRET") != "1"
    ):
        raise NotInForce(f"{options[0]}: Liger's kernels need Triton and do not run on {device}")


def replace_layers(model: Any) -> str:
    """Give a loaded model Liger's RMSNorm, rotary positions and SwiGLU (GeGLU, LayerNorm where the model has those).

    The modules keep their classes, weights and names; only their forward passes are replaced. Liger's losses are not
    installed: the loss is ours, or `summed_loss`.

    Returns:
        A count of what was replaced: `liger: 33 LigerRMSNorm, 16 LigerSwiGLUMLP, rotary positions`.

    Raises:
        NotInForce: Liger does not know the architecture.
    """
    liger_kernel.replace_layers(model, cross_entropy=False, fused_linear_cross_entropy=False)
    # Liger silently skips an unknown architecture (its log message is disabled)
    result = Counter(
        liger_kernel.name_of(module) for module in model.modules() if _is_ligers(vars(module).get("forward"))
    )
    replaced = [f"{count} {name}" for name, count in sorted(result.items())]
    if _is_ligers(getattr(inspect.getmodule(type(model)), "apply_rotary_pos_emb", None)):
        replaced.append("rotary positions")
    if not replaced:
        raise NotInForce(f"training.kernels=liger: Liger knows no {model.config.model_type} models")
    return f"liger: {', '.join(replaced)}"


def _is_ligers(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith("liger_kernel.")


def summed_loss(
    states: torch.Tensor, targets: torch.Tensor, head: torch.nn.Linear, *, softcap: float | None
) -> torch.Tensor:
    """The summed cross-entropy, nats, of `head` on states [n, width], computed in chunks of logits; differentiable.

    Liger splits the tokens so that a chunk's logits take about as much memory as the states. It synchronizes with the
    device twice: to count the targets, and to check whether the loss is scaled.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    if torch.is_grad_enabled() and not states.requires_grad:
        # otherwise Liger would compute no gradient for the head either
        states = states.detach().requires_grad_()
    loss: torch.Tensor = liger_fused_linear_cross_entropy(
        states,
        head.weight,
        targets,
        bias=head.bias,
        reduction="sum",
        softcap=softcap,
        accum_dtype=torch.float32,  # of the head's gradient: bfloat16 sums would be rounded at every chunk
    )
    return loss

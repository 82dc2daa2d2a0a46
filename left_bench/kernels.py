"""Other packages' kernels in place of a model's own: Liger's layers, and products in float8."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from left_bench.model import NotInForce

_MULTIPLE = 16
"""Rows and columns of a float8 product on the tensor cores come in this many."""
FLOAT8_CAPABILITY = (8, 9)
"""The first NVIDIA cards that multiply in float8: Ada and Hopper."""


def use_liger(model: Any) -> str:
    """Put Liger-Kernel's norms, rotary positions and gated MLPs into a model (Hsu et al. 2024, arXiv 2410.10989).

    By the function that transformers' own `use_liger_kernel` calls. The loss is left alone: ours does not hold the
    logits either, and is the faster on a GPU (reports/gpu.md). Rotary positions are replaced for the whole process.

    Returns:
        What is in force, in words.

    Raises:
        NotInForce: no module of this architecture was replaced.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
    replaced = Counter(
        type(module).__name__
        for module in model.modules()
        if getattr(getattr(module.forward, "__func__", None), "__module__", "").startswith("liger_kernel.")
    )
    if not replaced:
        raise NotInForce(f"training.kernels=liger: Liger-Kernel has none for {model.config.model_type}")
    return "liger: " + ", ".join(f"{count} {name}" for name, count in sorted(replaced.items()))


@contextmanager
def float8_products(model: nn.Module, *, emulate: bool = False) -> Iterator[int]:
    """Inside, the linear layers of `model` multiply in float8, by torchao, scaled tensor by tensor as they go.

    Weights stay what they are and are trained as such; the output head, and layers whose sizes float8 cannot take, are
    left out. Afterwards the layers are the plain ones again: what is evaluated and saved is an ordinary model.

    Args:
        emulate: compute what float8 would give without its instructions (tests).

    Yields:
        How many layers do.

    Raises:
        NotInForce: the card has no such instructions, or no layer was converted.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    if not emulate and torch.cuda.get_device_capability() < FLOAT8_CAPABILITY:
        raise NotInForce(
            f"training.float8=true: {torch.cuda.get_device_name()} has no float8 products (Ada, Hopper and later have)"
        )
    head = getattr(model, "get_output_embeddings", lambda: None)()

    def fits(module: nn.Module, _name: str) -> bool:
        sizes = (getattr(module, "in_features", 1), getattr(module, "out_features", 1))
        return module is not head and all(size % _MULTIPLE == 0 for size in sizes)

    plain = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    convert_to_float8_training(model, module_filter_fn=fits, config=Float8LinearConfig(emulate=emulate))
    converted = [name for name, module in plain.items() if model.get_submodule(name) is not module]
    if not converted:
        raise NotInForce("training.float8=true: the model has no linear layer whose sizes are multiples of 16")
    try:
        yield len(converted)
    finally:
        for name in converted:
            model.set_submodule(name, plain[name])  # of the same weights

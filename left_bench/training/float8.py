"""Training with linear layers in 8-bit floating point (torchao); weights and optimizer are unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from left_bench.core.errors import NotInForce, UserError
from left_bench.core.paths import is_installed
from left_bench.model.load import layers_of
from left_bench.spec.cell import Cell

_CAPABILITY = (8, 9)
"""The lowest compute capability with float8 products: Ada; Hopper follows."""
_MULTIPLE = 16
"""Both sizes of a weight must be multiples of this, because of the hardware."""


def check(cell: Cell, *, device: str) -> None:
    """Refuse GPUs without float8 products, and what the rules refuse, for cells that were forced past them.

    The capability is checked here and not by a rule, because rules are evaluated in the launching process, without
    torch.

    Raises:
        NotInForce: this device has no float8 products.
        UserError: the package is not installed.
    """
    if not cell.training.float8:
        return
    if not is_installed("torchao"):
        raise UserError("training.float8=true needs the package torchao: pip install 'left-bench[torchao]'")
    if device != "cuda":
        raise NotInForce(f"training.float8=true: products in float8 need CUDA, not {device}")
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < _CAPABILITY:
        raise NotInForce(
            f"training.float8=true: this GPU has compute capability {capability[0]}.{capability[1]}, and "
            "products in float8 need 8.9 (Ada, Hopper and later); set training.float8=false"
        )


@contextmanager
def in_float8(model: Any, cell: Cell, *, emulate: bool = False) -> Iterator[dict[str, int]]:
    """Inside the context, the linear layers of the model's blocks multiply in float8.

    Inputs, weights and gradients are rescaled at every product, each tensor by one number (torchao's default). Layers
    outside the blocks, such as the output head, and layers whose sizes are not multiples of 16 are excluded. Evaluation
    comes afterwards: the trained weights are bfloat16 and are scored as such.

    Args:
        emulate: round to float8 and multiply in the weights' dtype, on any device (for tests).

    Yields:
        For the record: `float8_layers`, the number of converted layers.

    Raises:
        NotInForce: no layer qualifies.
    """
    if not cell.training.float8:
        yield {}
        return
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    head = model.get_output_embeddings()
    inside = {id(module) for layer in layers_of(model) for module in layer.modules() if module is not head}
    converted: dict[str, torch.nn.Module] = {}

    def qualifies(module: torch.nn.Module, name: str) -> bool:
        sizes: torch.Size = module.weight.shape  # type: ignore[assignment]
        if id(module) not in inside or any(size % _MULTIPLE for size in sizes):
            return False
        converted[name] = module
        return True

    # padded, because a weight's gradient is summed over a pass's tokens, whose number is arbitrary
    settings = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)
    try:
        convert_to_float8_training(model, module_filter_fn=qualifies, config=settings)
        if not converted:
            raise NotInForce(f"training.float8=true: no linear layer has sizes that are multiples of {_MULTIPLE}")
        yield {"float8_layers": len(converted)}
    finally:
        for name, module in converted.items():
            model.set_submodule(name, module)

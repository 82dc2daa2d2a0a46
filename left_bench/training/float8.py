"""Training whose linear layers multiply in 8-bit floating point (torchao); weights and optimizer stay as they are."""

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
"""The first with float8 products: Ada, then Hopper."""
_MULTIPLE = 16
"""What both sizes of a weight must be multiples of, by the products' hardware."""


def check(cell: Cell, *, device: str) -> None:
    """Refuse what the rules refuse where a cell was forced past them, and GPUs without float8 products.

    The capability is asked here and not by a rule: a rule is asked where the launch is, without torch.

    Raises:
        NotInForce: this device has no such products.
        UserError: the package is not installed.
    """
    if not cell.training.float8:
        return
    if not is_installed("torchao"):
        raise UserError("training.float8=true needs the package torchao: pip install 'left-bench[torchao]'")
    if device != "cuda":
        raise NotInForce(f"training.float8=true: products in float8 are CUDA's, not {device}'s")
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < _CAPABILITY:
        raise NotInForce(
            f"training.float8=true: this GPU has compute capability {capability[0]}.{capability[1]}, and products in "
            "float8 come with 8.9 (Ada, Hopper and later); training.float8=false"
        )


@contextmanager
def in_float8(model: Any, cell: Cell, *, emulate: bool = False) -> Iterator[dict[str, int]]:
    """Let the linear layers of the model's blocks multiply in float8 as long as it lasts.

    Inputs, weights and gradients are scaled anew at every product, each tensor by one number (torchao's default). The
    output head, what else lies outside the blocks, and layers whose sizes are no multiples of 16 are left out.
    Evaluation comes after: what was trained are bfloat16 weights, and they are scored as such.

    Args:
        emulate: round to float8 and multiply in the weights' dtype, on any device (for tests).

    Yields:
        For the record: `float8_layers`, how many there are.

    Raises:
        NotInForce: no layer qualifies.
    """
    if not cell.training.float8:
        yield {}
        return
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    head = model.get_output_embeddings()
    inside = {id(module) for layer in layers_of(model) for module in layer.modules() if module is not head}
    taken: dict[str, torch.nn.Module] = {}

    def qualifies(module: torch.nn.Module, name: str) -> bool:
        sizes: torch.Size = module.weight.shape  # type: ignore[assignment]
        if id(module) not in inside or any(size % _MULTIPLE for size in sizes):
            return False
        taken[name] = module
        return True

    # padded: the gradient of a weight is summed over a pass's tokens, and their number is any
    settings = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)
    try:
        convert_to_float8_training(model, module_filter_fn=qualifies, config=settings)
        if not taken:
            raise NotInForce(f"training.float8=true: no linear layer has sizes that are multiples of {_MULTIPLE}")
        yield {"float8_layers": len(taken)}
    finally:
        for name, module in taken.items():
            model.set_submodule(name, module)

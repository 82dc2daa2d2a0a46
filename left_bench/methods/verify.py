"""Checks that an attached method is really in effect: silent errors become failed cells.

A method that does not support a quantized layer may read the stored integers as if they were the weight, or cast its
own matrices to the weight's integer dtype, where they round to zero. No error is raised, and the run ends with
meaningless numbers. Both are detected here for every method: the first in a forward pass before training, the second in
the first step's gradient. peft's quantized layers also drop variants of LoRA that they do not support, and train plain
LoRA.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from left_bench.compat.peft import dropped_variants
from left_bench.compat.torch import TorchDispatchMode
from left_bench.core.errors import NotInForce
from left_bench.measure.meter import plain_parts
from left_bench.model.load import quantized_weights
from left_bench.quantization import backends
from left_bench.spec.task import probe_inputs

# modules that may read the stored integers, because they use the constants that belong to them
_OWNERS = ("torch", "left_bench.methods.verify", *(reader for backend in backends() for reader in backend.readers))
_PROBE_TOKENS = 8


@contextmanager
def stored_integers_are_not_read(model: torch.nn.Module) -> Iterator[None]:
    """Inside the context, only the quantization's own code may convert the stored integers to floating point.

    Raises:
        NotInForce: other code did; names the layer and the code's module.
    """
    with _Watch(stored) if (stored := _stored(model)) else nullcontext():
        yield


def _stored(model: torch.nn.Module) -> dict[int, str]:
    """Address of every quantized layer's integers -> the layer's name."""
    return {
        part.untyped_storage().data_ptr(): name
        for name, weight in quantized_weights(model).items()
        if not hasattr(weight, "__tensor_flatten__")  # a tensor subclass acts as the dense weight itself
        for part in plain_parts(weight)
        if not part.is_floating_point()
    }


class _Watch(TorchDispatchMode):
    def __init__(self, stored: dict[int, str]) -> None:
        super().__init__()
        self.stored = stored

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and isinstance(result, torch.Tensor) and result.is_floating_point():
            for argument in args:
                if isinstance(argument, torch.Tensor) and not argument.is_floating_point():
                    name = self.stored.get(argument.untyped_storage().data_ptr())
                    if name is not None and not (reader := _reader()).startswith(_OWNERS):
                        raise NotInForce(
                            f"{reader} reads the stored integers of '{name}' as if they were its weight; "
                            "this method does not support this quantization"
                        )
        return result


def _reader() -> str:
    """The module of the code that called torch."""
    frame: Any = inspect.currentframe()
    frame = frame.f_back.f_back  # the caller of `__torch_dispatch__`
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("torch."):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "?"))


def check_forward(model: torch.nn.Module) -> None:
    """Run a short forward pass under `stored_integers_are_not_read`, if there are stored integers.

    It leaves the random state unchanged.
    """
    if not _stored(model):
        return
    network: Any = model
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(), torch.no_grad(), stored_integers_are_not_read(model):
            network(**probe_inputs(model, tokens=_PROBE_TOKENS))
    finally:
        model.train(training)


def check_variant(model: Any) -> None:
    """Refuse a variant of LoRA (DoRA, KaSA, ...) that one of the layers does not support.

    Raises:
        NotInForce: names the variant, the layer and its class.
    """
    for name, layer, variant in dropped_variants(model):
        raise NotInForce(
            f"peft's layer {type(layer).__module__}.{type(layer).__name__} at '{name}' does not support "
            f"{variant} and is plain LoRA"
        )


def check_gradient(norm: float) -> None:
    """Refuse a zero gradient in the first step: such a run would learn nothing.

    Raises:
        NotInForce: the gradient's norm is zero.
    """
    if norm == 0:
        raise NotInForce(
            "no trainable parameter received a gradient in the first step; the method has no effect on the loss"
        )

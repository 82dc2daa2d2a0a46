"""Quantization error: how far quantized weights are from the original ones; and converting them back to dense."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from left_bench.core.errors import UserError
from left_bench.model.load import quantized_weights
from left_bench.quantization import dequantized


def quantization_error(model: torch.nn.Module, folder: Path | None) -> float | None:
    """Mean over the quantized layers of ||W_q - W|| / ||W|| (Frobenius), against the checkpoint's own weights.

    It works layer by layer, so that no second model is in memory. None if the checkpoint's files are not on this
    machine, are not dense safetensors, or use other weight names than the model.
    """
    errors = []
    with _Checkpoint(folder) as checkpoint:
        for name, weight in quantized_weights(model).items():
            dense = checkpoint.tensor(f"{name}.weight")
            approximate = dequantized(weight)
            if dense is None or approximate is None or approximate.shape != dense.shape:
                return None
            reference = dense.float().to(approximate.device)
            errors.append(((approximate - reference).norm() / reference.norm()).item())
    return sum(errors) / len(errors) if errors else None


def make_dense(model: Any, *, dtype: torch.dtype) -> None:
    """Replace every quantized layer by a dense one with the dequantized weight.

    Raises:
        UserError: the quantization's weights cannot be dequantized.
    """
    for name, weight in quantized_weights(model).items():
        dense = dequantized(weight)
        if dense is None:
            raise UserError(f"{name}: a {type(weight).__name__} cannot be converted to a dense weight")
        old = model.get_submodule(name)
        layer = torch.nn.Linear(1, 1, bias=False, device="meta")
        layer.out_features, layer.in_features = dense.shape
        layer.weight = torch.nn.Parameter(dense.to(dtype), requires_grad=False)
        layer.register_parameter("bias", getattr(old, "bias", None))
        model.set_submodule(name, layer)
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(model, mark):
            setattr(model, mark, False)


class _Checkpoint:
    """Reads single tensors from a folder's safetensors files."""

    def __init__(self, folder: Path | None) -> None:
        self._files = sorted(folder.glob("*.safetensors")) if folder and folder.is_dir() else []
        self._open: list[Any] = []

    def __enter__(self) -> _Checkpoint:
        self._open = [safe_open(str(path), "pt") for path in self._files]
        for file in self._open:
            file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for file in self._open:
            file.__exit__(*error)

    def tensor(self, name: str) -> torch.Tensor | None:
        return next((file.get_tensor(name) for file in self._open if name in self._keys(file)), None)

    @staticmethod
    def _keys(file: Any) -> Iterator[str]:
        return file.keys()

"""Reload the model of a run folder: the cell's base model with what the cell trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from left_bench.core.errors import UserError
from left_bench.spec.cell import Cell
from left_bench.spec.run_files import CELL_NAME

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def cell_of(run_dir: Path) -> Cell:
    """The cell whose run wrote this folder.

    Raises:
        UserError: its `cell.json` is missing or invalid.
    """
    path = run_dir / CELL_NAME
    try:
        return Cell.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name the whole folder of a run") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{path}: {where}: {first['msg']}; it was written by another version; run the cell again"
        ) from error


def load_base(cell: Cell, *, folder: str, classes: Sequence[str] | None = None) -> PreTrainedModel:
    """The cell's base model from `folder`, with the cell's quantization.

    Args:
        classes: class names, for a classifier.
    """
    from left_bench.model import load as models
    from left_bench.model import quantized_cache

    device = cell.device_type
    models.apply_precision(cell, device=device)
    quantized = quantized_cache.kept(cell, folder=folder, device=device)
    return models.load_model(cell, folder=folder, device=device, quantized=quantized, classes=classes)[0].eval()


def with_adapter(base: PreTrainedModel, cell: Cell, adapter_folder: Path) -> torch.nn.Module:
    """A fresh base model with what the cell trained, ready for inference."""
    from left_bench.methods import attach
    from left_bench.model import load as models

    adapted = attach.load_trained(base, adapter_folder, adapter_dtype=models.DTYPES[cell.precision.adapter_dtype])
    if cell.autocast:
        attach.let_autocast_convert(adapted)
    return adapted.eval()

"""The base model's own scores: measured once per model, quantization, precision and data, shared by a sweep's cells."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from left_bench.cell import Cell, fingerprint
from left_bench.data import Example
from left_bench.evaluate import Evaluation, evaluate_model
from left_bench.measure import Meter
from left_bench.record import write_atomically

BASE_FOLDER = "base"


def evaluate_base(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    cell: Cell,
    *,
    meter: Meter,
    runs_dir: Path,
) -> tuple[Evaluation, str]:
    """The evaluation of the model before training, from `runs_dir/base/` where an earlier cell left it.

    Returns:
        The evaluation, and where it comes from: `measured here` or the shared file's name.
    """
    path = runs_dir / BASE_FOLDER / f"{base_key(cell)}.json"
    if path.exists():
        try:
            return Evaluation.model_validate_json(path.read_text(encoding="utf-8")), f"{BASE_FOLDER}/{path.name}"
        except ValueError:  # an older or damaged file: measure again and replace it
            pass
    with meter.phase("evaluate_base") as counts:
        found = evaluate_model(model, tokenizer, rows, cell, device=meter.device.kind)
        counts.tokens = found.tokens
    write_atomically(path, found.model_dump_json())
    return found, "measured here"


def base_key(cell: Cell) -> str:
    """Fingerprint of all that decides the base model's scores."""
    identity = cell.identity
    parts = {group: identity[group] for group in ("model", "quantization", "precision", "data", "eval", "hardware")}
    parts["max_length"] = cell.training.max_length
    parts["versions"] = [version(name) for name in ("torch", "transformers")]
    return fingerprint(parts)

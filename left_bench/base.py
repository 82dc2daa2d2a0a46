"""What a sweep's cells share, measured once and kept beside the runs: the base model's scores, the machine's peak."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from left_bench.cell import Cell, fingerprint
from left_bench.data import Example
from left_bench.device import describe_machine, matrix_product_peak
from left_bench.evaluate import Evaluation, evaluate_model
from left_bench.measure import Meter
from left_bench.paths import versions_of
from left_bench.record import write_atomically

BASE_FOLDER = "base"
_DECIDING = ("torch", "transformers", "bitsandbytes", "torchao", "hqq", "optimum-quanto", "llvmlite")


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
    path = runs_dir / BASE_FOLDER / f"{base_key(cell, rows)}.json"
    if path.exists():
        try:
            return Evaluation.model_validate_json(path.read_text(encoding="utf-8")), f"{BASE_FOLDER}/{path.name}"
        except ValueError:  # an older or damaged file: measure again and replace it
            pass
    # without the adapter that autocast may be on for: the file is shared by all methods
    with meter.phase("evaluate_base") as counts:
        found = evaluate_model(model, tokenizer, rows, cell.without_adapter(), device=meter.device.kind)
        counts.tokens = found.tokens
    write_atomically(path, found.model_dump_json())
    return found, "measured here"


def shared_peak(cell: Cell, *, meter: Meter, runs_dir: Path, threads: int, at_once: int) -> float:
    """FLOP/s of this machine's matrix products in the cell's compute dtype, from `runs_dir/base/` or measured now.

    Shared among cells with as many threads that run as many at once: beside others a machine gives less.
    """
    machine = describe_machine(meter.device)["id"]
    dtype = cell.precision.compute_dtype
    rounding = "tf32" if cell.precision.tf32 else dtype  # two speeds of one dtype
    path = runs_dir / BASE_FOLDER / f"peak-{machine}-{rounding}-{threads}x{at_once}.json"
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["flops_per_second"])
    except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged: measure and replace it
        pass
    with meter.phase("peak"):
        found = matrix_product_peak(meter.device.kind, dtype)
    facts = {"machine": machine, "dtype": rounding, "threads": threads, "concurrent_cells": at_once}
    write_atomically(path, json.dumps(facts | {"flops_per_second": found}) + "\n")
    return found


def base_key(cell: Cell, rows: Sequence[Example]) -> str:
    """Fingerprint of all that decides the base model's scores on these rows."""
    identity = cell.identity
    parts = {group: identity[group] for group in ("model", "quantization", "precision", "data", "eval", "hardware")}
    parts["rows"] = [row.identity for row in rows]
    parts["generation"] = "greedy, without the checkpoint's penalties"
    parts["kernels"] = [cell.training.attention, cell.training.output_head]
    parts["versions"] = versions_of(_DECIDING)
    return fingerprint(parts)

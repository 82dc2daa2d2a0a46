"""Results that a sweep's cells share, measured once and stored with the runs: base-model scores, machine peak."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from left_bench.core.files import write_atomically
from left_bench.core.paths import versions_of
from left_bench.data import Example
from left_bench.evaluation import harness
from left_bench.evaluation.evaluate import Evaluation, evaluate_model, room_of
from left_bench.measure.cpu_contention import Quiet, measured_quietly
from left_bench.measure.device import describe_machine, matrix_product_peak
from left_bench.measure.meter import Meter
from left_bench.quantization import backends
from left_bench.spec.cell import Cell, fingerprint
from left_bench.spec.events import progress_of

BASE_FOLDER = "base"
_ATTEMPTS = 3  # to measure the peak undisturbed, a second or two each
_DECIDING = ("torch", "transformers", *(package for backend in backends() for package in backend.packages))


def evaluate_base(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    cell: Cell,
    *,
    meter: Meter,
    runs_dir: Path,
    tasks: dict[str, Any] | None = None,
) -> tuple[Evaluation, str]:
    """The evaluation of the model before training, from `runs_dir/base/` if an earlier cell stored it.

    Args:
        tasks: tasks of lm-evaluation-harness to run as well (`harness.load_tasks`).

    Returns:
        The evaluation, and its source: `measured here` or the shared file's name.
    """
    path = runs_dir / BASE_FOLDER / f"{base_key(cell, rows)}.json"
    if path.exists():
        try:
            return Evaluation.model_validate_json(path.read_text(encoding="utf-8")), f"{BASE_FOLDER}/{path.name}"
        except ValueError:  # an older or damaged file: measure again and replace it
            pass
    # without an adapter, which may turn autocast on, because all methods share the file
    with meter.phase("evaluate_base") as counts:
        common: dict[str, Any] = {"device": meter.device.kind, "tell": progress_of(meter.events)}
        bare = cell.without_adapter()
        result = evaluate_model(model, tokenizer, rows, bare, **common)
        if tasks is not None:
            result.tasks = harness.ask(tasks, model, tokenizer, bare, room=room_of(model, bare), **common)
        counts.tokens = result.tokens
    write_atomically(path, result.model_dump_json())
    return result, "measured here"


def shared_peak(
    cell: Cell, *, meter: Meter, runs_dir: Path, threads: int, at_once: int, doubted: bool = False
) -> Quiet:
    """FLOP/s of this machine's matrix products in the cell's compute dtype, from `runs_dir/base/` or measured now.

    Shared by cells with the same number of threads and of cells at once, because concurrent cells slow each other down.
    A peak that was disturbed by other load is measured again by the next cell, until it is undisturbed.

    Args:
        doubted: measure again in any case, because the known value is too low.
    """
    machine = describe_machine(meter.device)["id"]
    dtype = cell.precision.compute_dtype
    rounding = "tf32" if cell.precision.tf32 else dtype  # float32 has two speeds
    path = runs_dir / BASE_FOLDER / f"peak-{machine}-{rounding}-{threads}x{at_once}.json"
    known = _known_peak(path)
    if known is not None and known.disturbed_by is None and not doubted:
        return known
    measured = 0

    def measure() -> float:
        nonlocal measured
        tell("matrix products, measured", measured, _ATTEMPTS)  # progress: each takes a second or two
        measured += 1
        return matrix_product_peak(meter.device.kind, dtype)

    with meter.phase("peak"):
        tell = progress_of(meter.events)
        result = measured_quietly(
            measure,
            cores=threads if meter.device.kind == "cpu" else 0,
            attempts=_ATTEMPTS if known is None or doubted else 1,
        )
    if known is not None:
        result = result._replace(
            value=max(result.value, known.value)
        )  # load makes a peak lower, nothing makes it higher
    facts = {"machine": machine, "dtype": rounding, "threads": threads, "concurrent_cells": at_once}
    facts |= {"flops_per_second": result.value, "other_cpu_share": result.disturbed_by}
    write_atomically(path, json.dumps(facts) + "\n")
    return result


def _known_peak(path: Path) -> Quiet | None:
    """The peak stored by an earlier cell; None if there is none or the file is damaged."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return Quiet(float(facts["flops_per_second"]), facts["other_cpu_share"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def peak_facts(peak: Quiet, *, processes: int, above: float | None) -> dict[str, Any]:
    """The record's facts about the peak (`environment.effective`).

    Args:
        above: the steps' FLOP/s relative to the peak, if above 1.
    """
    facts: dict[str, Any] = {"peak_flops_per_second": processes * peak.value}
    if peak.disturbed_by is not None:
        facts["peak_other_cpu_share"] = peak.disturbed_by
    if above is not None:
        facts["utilization_withheld"] = f"the steps came to {above:.2f} times the measured peak, which must be wrong"
    return facts


def base_key(cell: Cell, rows: Sequence[Example]) -> str:
    """Fingerprint of everything that decides the base model's scores on these rows."""
    parts = cell.base_identity
    parts["rows"] = [row.identity for row in rows]
    parts["generation"] = "greedy, without the checkpoint's penalties, ended by any of its end tokens"
    parts["general_text"] = "after the tokenizer's start token, within the model's positions"
    parts["versions"] = versions_of((*_DECIDING, harness.PACKAGE) if cell.eval.tasks else _DECIDING)
    return fingerprint(parts)

"""Merging an adapter into the base weights, and how much that changes the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from left_bench.data import Example, collate
from left_bench.measure.meter import Meter
from left_bench.model.load import autocast, quantized_weights
from left_bench.spec.cell import Cell
from left_bench.training.loss import AnswerLoss

_COMPARED_TOKENS = 8
"""Number of answer tokens per row whose logits are compared; later tokens of a long answer would add nothing."""


def merge(
    model: torch.nn.Module, rows: Sequence[Example], cell: Cell, *, meter: Meter, pad_id: int
) -> tuple[torch.nn.Module | None, str]:
    """Merge the adapter into the base weights and compare the logits before and after on `rows`.

    `model` must not be used afterwards. `merge_max_abs_difference` goes into `meter`.

    Returns:
        The merged model, and `merged` or `merged and quantized again` with the rounding of the dtype; or None and why
        it was not merged.
    """
    refusal = why_not(model)
    if refusal is not None:
        return None, refusal
    attached = answer_logits(model, rows, cell, pad_id=pad_id, device=meter.device.kind)
    try:
        merged = fold_in(model)
        # some merges leave weights of an unusable shape
        logits = answer_logits(merged, rows, cell, pad_id=pad_id, device=meter.device.kind)
    except (NotImplementedError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        return None, f"not merged: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    difference = (logits - attached).abs().max().item()
    meter.metrics["merge_max_abs_difference"] = difference
    dtype = next(p.dtype for p in merged.parameters() if p.is_floating_point())
    rounding = torch.finfo(dtype).eps * attached.abs().max().item()
    how = "merged and quantized again" if quantized_weights(merged) else "merged"  # its rounding is included
    return merged, f"{how}; one rounding of the largest logit in {str(dtype).removeprefix('torch.')} is {rounding:.2g}"


def fold_in(model: Any) -> torch.nn.Module:
    """The base model with the adapter merged into its weights; `model` must not be used afterwards."""
    _untie(model)
    merged: torch.nn.Module = model.base_model.merge_and_unload()
    return merged


def why_not(model: torch.nn.Module) -> str | None:
    """Why the method cannot be merged, or None."""
    if not isinstance(model, PeftModel):
        return "not merged: the method is no peft adapter"
    if model.active_peft_config.is_prompt_learning:
        return "not merged: virtual tokens are no weights"
    if any(hasattr(parameter, "left_dequantize") for parameter in model.parameters()):
        return "not merged: these quantized layers hold no dense weight to merge into"
    if not hasattr(model.base_model, "merge_and_unload"):
        return f"not merged: {type(model.base_model).__name__} has no merge"
    return None


def _untie(model: Any) -> None:
    """Untie output head and embedding if one of them has an adapter.

    Merging into the shared weight would change the other one as well.
    """
    base = model.get_base_model()
    ends = (base.get_output_embeddings(), base.get_input_embeddings())
    parts: list[Any] = [part for part in ends if part is not None]
    adapted: list[Any] = [part for part in parts if isinstance(part, BaseTunerLayer)]
    if len(parts) < 2 or len(adapted) != 1:
        return
    plain: list[Any] = [part.get_base_layer() if isinstance(part, BaseTunerLayer) else part for part in parts]
    if plain[0].weight.data_ptr() != plain[1].weight.data_ptr():
        return
    owner = adapted[0].get_base_layer()
    owner.weight = torch.nn.Parameter(owner.weight.detach().clone(), requires_grad=False)
    base.config.tie_word_embeddings = False


def answer_logits(
    model: torch.nn.Module, rows: Sequence[Example], cell: Cell, *, pad_id: int, device: str
) -> torch.Tensor:
    """Float32 logits that predict each row's first answer tokens (or its class), shape (tokens, vocabulary)."""
    if cell.task.writes:
        rows = [replace(row, answer_ids=row.answer_ids[:_COMPARED_TOKENS]) for row in rows]
    model.eval()
    with torch.no_grad(), autocast(cell, device=device):
        loss = AnswerLoss(model, everywhere=cell.training.output_head == "all")
        starts = range(0, len(rows), cell.eval.batch_size)
        batches = [collate(rows[start : start + cell.eval.batch_size], pad_id=pad_id) for start in starts]
        return torch.cat([loss.logits_of_tokens(batch.to(device)) for batch in batches])

"""The prompts' common prefix (template start and system message, often half of a prompt) is processed only once.

A decoder's keys and values at a position depend only on earlier positions, so those of a common prefix can be reused
for every row. Whether this works is tried on two rows at each evaluation instead of looked up by family or method: a
model that attends to the whole input, or a method that depends on positions in it, would answer differently.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from left_bench.data import Example, collate
from left_bench.methods.attach import has_virtual_tokens
from left_bench.spec.cell import Cell
from left_bench.training.loss import AnswerLoss

_WORTH_IT = 8  # tokens; for a shorter prefix, the trial costs as much as it saves
TRIED_ROWS = 2
"""Number of rows that are also processed in full, to compare the losses."""
_LARGEST_DIFFERENCE = {"float32": 1e-3}
_LARGEST_DIFFERENCE_OF_HALVES = 0.03
"""Nats, mean over the tried rows' answer tokens: the rounding difference between products of different shapes."""


class SharedPrompt:
    """The common prefix of rows' prompts, with the model's cache for it.

    Attributes:
        ids: its tokens; empty if nothing is shared.
    """

    def __init__(self, model: torch.nn.Module, ids: Sequence[int] = (), cache: DynamicCache | None = None) -> None:
        self.model: Any = model
        self.ids = list(ids)
        self._cache = cache

    def rest(self, row: Any) -> Any:
        """The row without the prefix; unchanged if nothing is shared."""
        return row if not self.ids else replace(row, prompt_ids=row.prompt_ids[len(self.ids) :])

    def arguments(self, rows: int) -> dict[str, Any]:
        """Additional arguments of a forward pass or `generate`: a copy of the prefix's cache for `rows` rows.

        Empty if nothing is shared.
        """
        if self._cache is None:
            return {}
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(rows)
        return {"past_key_values": cache}

    def after(self, loss: AnswerLoss) -> AnswerLoss:
        """`loss` for batches of `rest`."""
        return loss.through(self._forward) if self.ids else loss

    def _forward(self, **inputs: Any) -> Any:
        """A forward pass over the tokens after the prefix, with a model's signature."""
        mask = inputs["attention_mask"]
        before = mask.new_ones(len(mask), len(self.ids))
        whole = {"attention_mask": torch.cat([before, mask], dim=1), "use_cache": True}
        return self.model(**inputs | whole | self.arguments(len(mask)))


def common_beginning(rows: Sequence[Any]) -> list[int]:
    """The common prefix of all rows' prompts, without the last token of the shortest prompt.

    Empty if it has fewer than eight tokens, or the rows are not a decoder's (images, prompts for an encoder).
    """
    if len(rows) < TRIED_ROWS or not isinstance(rows[0], Example) or rows[0].decoder_start is not None:
        return []
    prompts = [row.prompt_ids for row in rows]
    same = takewhile(lambda at: len(set(at)) == 1, zip(*prompts, strict=False))
    ids = [at[0] for at in same][: max(0, min(map(len, prompts)) - 1)]
    return ids if len(ids) >= _WORTH_IT else []


def read_shared_prompt(
    model: torch.nn.Module, rows: Sequence[Any], cell: Cell, *, pad_id: int, device: str
) -> SharedPrompt:
    """Process the prompts' common prefix, if the model can continue from it; call without gradients.

    `ids` is empty if there is no `common_beginning`, if a method puts tokens or keys before the prompt, if a layer
    caches anything but plain keys and values, or if the loss of two rows differs.
    """
    nothing = SharedPrompt(model)
    ids = [] if has_virtual_tokens(model) else common_beginning(rows)
    if not ids:
        return nothing
    outputs: Any = model(input_ids=torch.tensor([ids], device=device), use_cache=True)
    cache = getattr(outputs, "past_key_values", None)
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return nothing
    shared = SharedPrompt(model, ids, cache)
    loss, tried = AnswerLoss(model, everywhere=cell.training.output_head == "all"), rows[:TRIED_ROWS]
    whole = loss.of_tokens(collate(tried, pad_id=pad_id).to(device))
    with_prefix = shared.after(loss).of_tokens(collate([shared.rest(row) for row in tried], pad_id=pad_id).to(device))
    allowed = _LARGEST_DIFFERENCE.get(cell.precision.compute_dtype, _LARGEST_DIFFERENCE_OF_HALVES)
    return shared if (whole - with_prefix).abs().mean().item() <= allowed else nothing

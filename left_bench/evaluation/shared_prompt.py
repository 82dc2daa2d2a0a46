"""What all rows' prompts begin with is read once: the template's start and the system message, often half of a prompt.

A decoder's keys and values at a position depend on what stands before it alone, so those of a common beginning serve
every row. Whether they do is tried on two rows at each evaluation and not looked up by family or method: a model that
looks at the whole input at once, or a method that reads its own places out of it, would answer otherwise.
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

_WORTH_IT = 8  # tokens; what a shorter beginning saves is spent on finding out
TRIED_ROWS = 2
"""Rows that are read whole too, to see whether they come out alike."""
_LARGEST_DIFFERENCE = {"float32": 1e-3}
_LARGEST_DIFFERENCE_OF_HALVES = 0.03
"""Nats, the mean over the tried rows' answer tokens: what other shapes of the same products round differently."""


class SharedPrompt:
    """The common beginning of rows' prompts, with what the model keeps of it.

    Attributes:
        ids: its tokens; empty where nothing is shared.
    """

    def __init__(self, model: torch.nn.Module, ids: Sequence[int] = (), cache: DynamicCache | None = None) -> None:
        self.model: Any = model
        self.ids = list(ids)
        self._cache = cache

    def rest(self, row: Any) -> Any:
        """The row without the beginning; as it is where nothing is shared."""
        return row if not self.ids else replace(row, prompt_ids=row.prompt_ids[len(self.ids) :])

    def arguments(self, rows: int) -> dict[str, Any]:
        """What a model's pass or `generate` takes besides: the beginning's keys and values for so many rows, its own.

        Empty where nothing is shared.
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
        """A pass over what follows the beginning, as a model is called."""
        mask = inputs["attention_mask"]
        before = mask.new_ones(len(mask), len(self.ids))
        whole = {"attention_mask": torch.cat([before, mask], dim=1), "use_cache": True}
        return self.model(**inputs | whole | self.arguments(len(mask)))


def common_beginning(rows: Sequence[Any]) -> list[int]:
    """The tokens that all rows' prompts begin with, but for the last token of the shortest.

    Empty where they are fewer than eight, or no decoder's (rows of pictures, prompts for an encoder).
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
    """Read the beginning that all rows' prompts share, where the model can go on from it; call without gradients.

    `ids` is empty where there is no `common_beginning`, where a method puts tokens or keys before the prompt, where a
    layer keeps anything but plain keys and values, and where the loss of two rows comes out otherwise.
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
    apart = shared.after(loss).of_tokens(collate([shared.rest(row) for row in tried], pad_id=pad_id).to(device))
    allowed = _LARGEST_DIFFERENCE.get(cell.precision.compute_dtype, _LARGEST_DIFFERENCE_OF_HALVES)
    return shared if (whole - apart).abs().mean().item() <= allowed else nothing

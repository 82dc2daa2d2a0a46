"""What kinds of model there are to fine-tune, and what differs between them; everything else is one path for all."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Task(NamedTuple):
    """How transformers and peft name a kind of model."""

    auto_class: str
    """The class of `transformers` that loads it."""
    peft_type: str | None
    """`peft.TaskType`; None: peft has no word for it and wraps the model as it is."""


TASKS: dict[str, Task] = {
    "causal_lm": Task("AutoModelForCausalLM", "CAUSAL_LM"),
    "seq2seq_lm": Task("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
}
"""`model.task` -> how it is loaded and adapted."""


def probe_inputs(model: Any, *, tokens: int = 2) -> dict[str, Any]:
    """Arguments of a forward pass over a few tokens that mean nothing: to see what a model does, not what it says."""
    ids = torch.ones(1, tokens, dtype=torch.long, device=next(model.parameters()).device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return inputs

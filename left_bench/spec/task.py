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
    "image_classification": Task("AutoModelForImageClassification", None),
}
"""`model.task` -> how it is loaded and adapted."""


def classifier_of(model: Any) -> str | None:
    """Name of the layer that a picture's classes come from, new for every set of classes; None where there is none."""
    if model.main_input_name != "pixel_values":
        return None
    classes = model.config.num_labels
    found = [
        name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear) and one.out_features == classes
    ]
    return found[-1] if found else None


def probe_inputs(model: Any, *, tokens: int = 2) -> dict[str, Any]:
    """Arguments of a forward pass over little that means nothing: to see what a model does, not what it says."""
    if model.main_input_name == "pixel_values":
        size, first = model.config.image_size, next(model.parameters())
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.zeros(1, model.config.num_channels, height, width, device=first.device)}
    ids = torch.ones(1, tokens, dtype=torch.long, device=next(model.parameters()).device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return inputs

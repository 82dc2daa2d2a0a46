"""A cell's model and adapter on the meta device: shapes and dtypes as in a run, and no numbers."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig

from left_bench.methods.attach import attach_adapter
from left_bench.model.load import DTYPES
from left_bench.pretrained import fetched, make, source, unloadable
from left_bench.spec.cell import Cell
from left_bench.spec.task import TASKS

_STARTS_FROM_NUMBERS = ("pissa", "olora", "loftq", "eva", "corda", "lora_ga", "orthogonal", "mica")
"""peft's values of `init_lora_weights`, or their beginnings, that look at weights or rows."""


def architecture(cell: Cell) -> Any:
    """The model's configuration: the cell's own, or the one in its folder or on the hub.

    Raises:
        UserError: it cannot be had, or a value in it is none of its architecture's.
    """
    model, folder = cell.model, fetched(cell.model, dtype=cell.precision.weights_dtype)
    if source(model) in ("random", "wheel") and model.config is not None:
        return make.architecture(model.config)
    try:
        return AutoConfig.from_pretrained(
            folder or model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise unloadable(model, error) from error


def model_of_shapes(cell: Cell) -> Any:
    """The base model as it is before quantizing.

    Raises:
        UserError: its configuration cannot be had.
    """
    with torch.device("meta"):
        return getattr(transformers, TASKS[cell.model.task].auto_class).from_config(
            architecture(cell),
            dtype=DTYPES[cell.precision.weights_dtype],
            attn_implementation=cell.training.attention,
            trust_remote_code=cell.model.trust_remote_code,
        )


def adapter_of_shapes(model: Any, cell: Cell) -> Any:
    """The adapter attached to `model`, without a start that asks for numbers (EVA's, PiSSA's, a prefix's do).

    Raises:
        Exception: the method refuses its arguments or the model, or needs more than shapes.
    """
    config = {name: value for name, value in cell.peft.config.items() if name not in ("eva_config", "loftq_config")}
    if str(config.get("init_lora_weights")).startswith(_STARTS_FROM_NUMBERS):  # a name that peft knows not is refused
        del config["init_lora_weights"]
    peft = cell.peft.model_copy(update={"config": config, "init_text": None})
    with torch.device("meta"):
        return attach_adapter(model, cell.model_copy(update={"peft": peft}), tokenizer=None, rows=[])  # type: ignore[arg-type]

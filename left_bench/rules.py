"""What cannot be combined: one table of rules, asked once for each cell before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from left_bench.cell import Cell

# Seen with peft 0.21: `peft.tuners.adaption_prompt` patches the attention of these families and no others.
_ADAPTION_PROMPT_FAMILIES = {"llama", "mistral", "gpt2"}


def model_type(cell: Cell) -> str | None:
    """The architecture's family, where it can be known without loading anything."""
    if cell.model.config is not None:
        return cell.model.config.get("model_type")
    config = Path(cell.model.name_or_path).expanduser() / "config.json"
    if config.is_file():
        return json.loads(config.read_text(encoding="utf-8")).get("model_type")
    return None


def _is(cell: Cell, target: str) -> bool:
    return cell.peft.target == target


RULES: tuple[tuple[Callable[[Cell], bool], str], ...] = (
    (
        lambda cell: cell.peft.target is None and cell.quantization.target is not None,
        "full fine-tuning needs unquantized weights: integer storage takes no gradient",
    ),
    (
        lambda cell: cell.precision.tf32 and cell.hardware.device != "cuda",
        "TF32 is a rounding mode of CUDA matrix products; this device has none",
    ),
    (
        lambda cell: (
            _is(cell, "peft.AdaptionPromptConfig") and model_type(cell) not in _ADAPTION_PROMPT_FAMILIES | {None}
        ),
        "peft's LLaMA-Adapter knows the attention of Llama, Mistral and GPT-2 models alone",
    ),
    (
        lambda cell: cell.quantization.name == "int8" and bool(cell.peft.config.get("use_dora")),
        "DoRA over bitsandbytes int8 weights fails inside peft (seen with peft 0.21.2, bitsandbytes 0.50.2)",
    ),
)


def why_unsupported(cell: Cell) -> str | None:
    """The first rule that refuses the cell, or None."""
    return next((reason for refuses, reason in RULES if refuses(cell)), None)

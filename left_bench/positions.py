"""How many positions a model has learned: beyond them its embedding has no row, and torch ends in an IndexError.

Rotary and relative positions go on for ever, if not well; they are nobody's limit here.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from left_bench.cell import Cell
from left_bench.errors import UserError

_LEARNED = {"gpt2", "gpt_neo", "gpt_bigcode", "opt", "biogpt", "bart", "mbart"}
"""Families, by `model_type`, whose positions are rows of an embedding."""


def positions_of(config: Mapping[str, Any]) -> int | None:
    """The positions that a model's configuration (config.json) has room for; None where they are not learned."""
    if config.get("model_type") not in _LEARNED:
        return None
    found = config.get("max_position_embeddings", config.get("n_positions"))
    return found if isinstance(found, int) else None


def config_at_hand(cell: Cell) -> Mapping[str, Any]:
    """The model's configuration where it can be read without a download; else empty."""
    if cell.model.config is not None:
        return cell.model.config
    path = Path(cell.model.name_or_path).expanduser() / "config.json"
    with contextlib.suppress(OSError, ValueError):  # no such folder, or a broken file: loading will say
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def check_positions(cell: Cell) -> None:
    """Refuse rows that may be longer than the model has positions.

    Raises:
        UserError: naming the keys, the model and its positions.
    """
    positions, virtual = positions_of(config_at_hand(cell)), virtual_tokens(cell)
    if positions is None or cell.training.max_length + virtual <= positions:
        return
    beside = f" and peft.config.num_virtual_tokens={virtual}" if virtual else ""
    raise UserError(
        f"training.max_length={cell.training.max_length}{beside}: {cell.model.name} has learned {positions} positions; "
        f"give training.max_length={positions - virtual} or less"
    )


def check_generation(cell: Cell, config: Mapping[str, Any], *, longest_prompt: int) -> None:
    """Refuse answers that may run beyond the model's positions.

    Raises:
        UserError: naming the key, the longest prompt and the model's positions.
    """
    positions, longest = positions_of(config), longest_prompt + virtual_tokens(cell)
    wanted = cell.eval.max_new_tokens or 0
    if positions is None or not cell.generates or longest + wanted <= positions:
        return
    raise UserError(
        f"eval.max_new_tokens={wanted}: the longest prompt has {longest} tokens and {cell.model.name} has learned "
        f"{positions} positions; give eval.max_new_tokens={max(1, positions - longest)} or less, or shorter prompts"
    )


def virtual_tokens(cell: Cell) -> int:
    """Positions that the method itself takes up before a row."""
    found = cell.peft.config.get("num_virtual_tokens", 0)
    return found if isinstance(found, int) else 0

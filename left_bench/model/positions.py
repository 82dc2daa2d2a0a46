"""How many positions a model has learned: beyond them its embedding has no row, and torch raises an IndexError.

Rotary positions have no hard limit, but quality drops: training beyond the configured length is refused as a mistake,
generating is not.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from left_bench.core.errors import UserError
from left_bench.spec.cell import Cell

_LEARNED = {"gpt2", "gpt_neo", "gpt_bigcode", "opt", "biogpt", "bart", "mbart"}
"""Families, by `model_type`, whose positions are rows of an embedding."""


def positions_of(config: Mapping[str, Any]) -> int | None:
    """The number of learned positions in a model's configuration (config.json); None if they are not learned."""
    if config.get("model_type") not in _LEARNED:
        return None
    result = config.get("max_position_embeddings", config.get("n_positions"))
    return result if isinstance(result, int) else None


def config_at_hand(cell: Cell) -> Mapping[str, Any]:
    """The model's configuration if it can be read without a download; else empty."""
    if cell.model.config is not None:
        return cell.model.config
    path = Path(cell.model.name_or_path).expanduser() / "config.json"
    with contextlib.suppress(OSError, ValueError):  # no such folder, or a broken file: loading will report it
        result = json.loads(path.read_text(encoding="utf-8"))
        return result if isinstance(result, dict) else {}
    return {}


def check_positions(cell: Cell) -> None:
    """Refuse rows that may be longer than the model has positions, learned or configured.

    Raises:
        UserError: names the keys, the model and its positions.
    """
    most, virtual = most_tokens(cell), virtual_tokens(cell)
    if most is None or cell.training.max_length <= most:
        return
    positions = most + virtual
    learned = positions_of(config_at_hand(cell))
    also = f" and peft.config.num_virtual_tokens={virtual}" if virtual else ""
    has = "has learned" if learned else "is configured for"
    raise UserError(
        f"training.max_length={cell.training.max_length}{also}: {cell.model.name} {has} {positions} positions; "
        f"give training.max_length={most} or less"
    )


def most_tokens(cell: Cell) -> int | None:
    """Tokens that a row may have in addition to virtual tokens; None if the model's configuration does not say."""
    config = config_at_hand(cell)
    positions = positions_of(config) or _configured(config)
    return None if positions is None else positions - virtual_tokens(cell)


def _configured(config: Mapping[str, Any]) -> int | None:
    """The length for which a model's rotary positions are configured; None if its configuration does not say."""
    text = config.get("text_config")
    config = text if isinstance(text, dict) else config
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int):
        return None
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    result = scaling.get("factor", 1) if isinstance(scaling, dict) else 1
    return positions * max(1, int(result)) if isinstance(result, (int, float)) else positions


def check_generation(cell: Cell, config: Mapping[str, Any], *, longest_prompt: int) -> None:
    """Refuse answers that may run beyond the model's positions.

    Raises:
        UserError: names the key, the longest prompt and the model's positions.
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
    """Positions that the method itself uses before a row."""
    result = cell.peft.config.get("num_virtual_tokens", 0)
    return result if isinstance(result, int) else 0

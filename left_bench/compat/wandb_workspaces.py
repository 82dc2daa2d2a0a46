"""wandb-workspaces, seen with 0.4.13.

- `as_saved`: what would be saved can be had by saving it, for which one has to be logged in, or from the private
  `_to_model` (wandb_workspaces/workspaces/interface.py, wandb_workspaces/reports/v2/interface.py).
"""

from __future__ import annotations

from typing import Any


def as_saved(built: Any) -> dict[str, Any]:
    """A workspace or report as the plain data that Weights & Biases would be sent."""
    result: dict[str, Any] = built._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
    return result

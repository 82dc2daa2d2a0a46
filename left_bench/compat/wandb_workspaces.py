"""wandb-workspaces, seen with 0.4.13.

- `as_saved`: the data to be saved are only available by saving, which needs a login, or from the private `_to_model`
  (wandb_workspaces/workspaces/interface.py, wandb_workspaces/reports/v2/interface.py).
"""

from __future__ import annotations

from typing import Any


def as_saved(built: Any) -> dict[str, Any]:
    """A workspace or report as the plain data that would be sent to Weights & Biases."""
    result: dict[str, Any] = built._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
    return result

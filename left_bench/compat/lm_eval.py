"""lm-eval, seen with 0.4.13.

- `weights_left_tied`: `HFLM` ties the weights of every model that it is given (lm_eval/models/huggingface.py,
  `HFLM.__init__`), which is for a model just loaded: in one with an adapter on its head it would undo the adapter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def weights_left_tied(model: Any) -> Iterator[None]:
    """Inside, nobody ties the weights of `model` anew."""
    model.tie_weights = lambda *_, **__: None
    try:
        yield
    finally:
        del model.tie_weights

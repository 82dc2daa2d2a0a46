"""lm-eval, seen with 0.4.13.

- `weights_left_tied`: `HFLM` ties the weights of every model it receives (lm_eval/models/huggingface.py,
  `HFLM.__init__`), which is meant for a newly loaded model: with an adapter on the head it would undo the adapter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def weights_left_tied(model: Any) -> Iterator[None]:
    """Inside the context, `model.tie_weights` does nothing."""
    model.tie_weights = lambda *_, **__: None
    try:
        yield
    finally:
        del model.tie_weights

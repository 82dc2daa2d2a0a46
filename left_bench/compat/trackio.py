"""trackio, seen with 0.40 to 0.43.

- `as_logged`: only `trackio.log` converts tables, texts and images for its store, and it starts a run whose id and
  times cannot be set (trackio/media/media.py, `_save` and `_to_dict`; table.py; markdown.py).
"""

from __future__ import annotations

from typing import Any


def as_logged(value: Any, *, project: str, run: str, step: int = 0) -> Any:
    """What trackio stores for a run's `trackio.Table`, `Markdown` or `Image`; an image's file is saved too."""
    import trackio

    if isinstance(value, trackio.Table):
        return value._to_dict(project, run, step)
    if isinstance(value, trackio.Image):
        value._save(project, run, step)
    return value._to_dict()

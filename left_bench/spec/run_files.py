"""Names of the files in a run's folder, in addition to `record.json` and `events.jsonl`."""

from __future__ import annotations

CELL_NAME = "cell.json"
"""The cell as the launching process passes it to the worker."""
ADAPTER_NAME = "adapter"
"""Folder with what was trained: an adapter, or a whole model."""
ROWS_NAME = "rows.jsonl"
"""One line for each held-out row: losses, answers, scores."""

"""Names of the files in a run's folder, beside `record.json` and `events.jsonl`."""

from __future__ import annotations

CELL_NAME = "cell.json"
"""The cell as the launching process hands it to the worker."""
ADAPTER_NAME = "adapter"
"""Folder of what was trained: an adapter, or a whole model."""
ROWS_NAME = "rows.jsonl"
"""One line for each held-out row: losses, answers, scores."""

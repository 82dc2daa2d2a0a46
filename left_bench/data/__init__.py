"""Data: rows -> prompts -> tokens -> batches.

`rows` reads questions and answers and holds some out (standard library alone, for files), `tokens` turns them into
token ids and keeps those on disk, `pictures` stands for both where a model sees and does not read, `batches` says which
rows a step sees and pads them.
"""

from __future__ import annotations

from left_bench.data.batches import Batch, collate, split_passes, step_rows
from left_bench.data.pictures import Picture, load_pictures
from left_bench.data.rows import load_rows
from left_bench.data.shapes import Row
from left_bench.data.tokens import Example, Splits, load_data, start_ids, turn_end

__all__ = [
    "Batch",
    "Example",
    "Picture",
    "Row",
    "Splits",
    "collate",
    "load_data",
    "load_pictures",
    "load_rows",
    "split_passes",
    "start_ids",
    "step_rows",
    "turn_end",
]

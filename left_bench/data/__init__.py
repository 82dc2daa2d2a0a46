"""Data: rows -> prompts -> tokens -> batches.

`rows` reads questions and answers and splits them (local files with only the standard library), `rendering` applies
the model's chat template, `tokens` turns the result into rows of token ids and caches them on disk, `pictures` and
`classified_texts` do all of this for classification, and `batches` chooses each step's rows and pads them.
"""

from __future__ import annotations

from left_bench.data.batches import Batch, ClassBatch, collate, split_passes, step_rows
from left_bench.data.classified_texts import load_classified_texts
from left_bench.data.pictures import Picture, load_pictures
from left_bench.data.rendering import start_ids, turn_end
from left_bench.data.rows import load_rows
from left_bench.data.shapes import Row
from left_bench.data.tokens import Example, Splits, load_data, prompt_of

__all__ = [
    "Batch",
    "ClassBatch",
    "Example",
    "Picture",
    "Row",
    "Splits",
    "collate",
    "load_classified_texts",
    "load_data",
    "load_pictures",
    "load_rows",
    "prompt_of",
    "split_passes",
    "start_ids",
    "step_rows",
    "turn_end",
]

"""Data: rows -> prompts -> tokens -> batches.

`rows` reads questions and answers and splits them (local files with only the standard library), `rendering` applies
the model's chat template, `tokens` turns the result into rows of token ids and caches them on disk. For a model that
does not generate text, `texts` and the modules that use it (`classified_texts`, `scored_texts`, `tagged_texts`,
`text_pairs`) take the place of those two, and `pictures` of all of it for images. `batches` chooses each step's rows
and pads them.
"""

from __future__ import annotations

from left_bench.data.batches import Batch, ClassBatch, PairBatch, TagBatch, collate, split_passes, step_rows
from left_bench.data.classified_texts import load_classified_texts
from left_bench.data.pictures import Picture, load_pictures
from left_bench.data.rendering import start_ids, turn_end
from left_bench.data.rows import load_rows
from left_bench.data.scored_texts import load_scored_texts
from left_bench.data.shapes import Row
from left_bench.data.tagged_texts import load_tagged_texts
from left_bench.data.text_pairs import Passage, TextPair, load_text_pairs
from left_bench.data.texts import padded
from left_bench.data.tokens import Example, Splits, load_data, prompt_of

__all__ = [
    "Batch",
    "ClassBatch",
    "Example",
    "PairBatch",
    "Passage",
    "Picture",
    "Row",
    "Splits",
    "TagBatch",
    "TextPair",
    "collate",
    "load_classified_texts",
    "load_data",
    "load_pictures",
    "load_rows",
    "load_scored_texts",
    "load_tagged_texts",
    "load_text_pairs",
    "padded",
    "prompt_of",
    "split_passes",
    "start_ids",
    "step_rows",
    "turn_end",
]

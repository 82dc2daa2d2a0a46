"""The people of reasoning_gym's stories about families, tagged: words and tags for token classification."""

from __future__ import annotations

import re
from typing import Any

_WORDS = re.compile(r"\w+|[^\w\s]")


def tagged_people(story: str, settings: Any) -> dict[str, list[str]]:
    """The story's words (and marks) as `tokens`, and as `tags` which of them are men's and women's names.

    Args:
        settings: of reasoning_gym's dataset, with `male_names` and `female_names`.
    """
    tag_of = dict.fromkeys(settings.male_names, "B-MAN") | dict.fromkeys(settings.female_names, "B-WOMAN")
    words = _WORDS.findall(story)
    return {"tokens": words, "tags": [tag_of.get(word, "O") for word in words]}

"""The part of an answer that counts: a number, a choice's letter, code, a field of JSON; and when two are equal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from left_bench.core.errors import nearest

_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")
_ALL_NUMBER = re.compile(rf"([-+]?)[$€£]?\s*({_NUMBER.pattern})\s*%?\.?")
_FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
# "A" and "I" are also words, so they do not count where a sentence continues after them
_LETTER = r"([B-HJ]|[AI](?!\s+(?!because\b|since\b|as\b)[a-z]))\b(?!')"
_CHOICES = (
    re.compile(r"\A[\s*(\[]*([A-Ja-j])[\s*)\].:]*\Z"),  # "B", "(b)", "**B.**"
    re.compile(
        rf"(?i:\banswer)[\s:*]*(?i:is|would be)?[\s:*]*(?i:option|choice)?[\s:*(\[]*{_LETTER}"
    ),  # "answer is (B)"
    re.compile(r"\A[\s*]*[(\[]?([A-J])[)\].:]+\s"),  # "B. Paris", "(B) Paris"
    re.compile(r"[(\[]([A-J])[)\]]"),  # "... so it is (B)"
)
"""Ways of naming a choice, the plainest first. If one pattern matches several times, the last match counts, because
people correct themselves."""


def extracted(extractor: str, text: str) -> str | None:
    """What an extractor (`number`, `choice`, `json:answer`, ...) finds in a text; None: nothing.

    Raises:
        ValueError: there is no such extractor.
    """
    name, _, argument = check_extractor(extractor).partition(":")
    return _json(text, argument) if name == "json" else EXTRACTORS[name](text)


def check_extractor(extractor: str) -> str:
    """Return the extractor's name if it is valid.

    Raises:
        ValueError: there is no such extractor, or it takes no argument.
    """
    name, colon, _ = extractor.partition(":")
    known = [*EXTRACTORS, "json"]
    if name not in known:
        raise ValueError(f"no such extractor{nearest(name, known)} (choose from {', '.join(EXTRACTORS)}, json:FIELD)")
    if colon and name != "json":
        raise ValueError(f"{name} takes nothing after a colon; only json:FIELD does")
    return extractor


def same(one: str, other: str) -> bool:
    """Whether two extracted texts are equal: as numbers if both are numbers (`$1,000` and `1000.0`), else exactly."""
    numbers = _number_of(one), _number_of(other)
    return one == other if None in numbers else numbers[0] == numbers[1]


def _number_of(text: str) -> Decimal | None:
    match = _ALL_NUMBER.fullmatch(text.strip())
    if match is None:
        return None
    value = Decimal(match[2].replace(",", ""))
    return -value if match[1] == "-" else value


def _whole(text: str) -> str:
    return text.strip()


def _number(text: str) -> str | None:
    """The number after the last `####` (GSM8K's mark), else the last number in the text."""
    marked = text.rpartition("####")[2]
    after = _NUMBER.search(marked) if marked != text else None
    return after[0] if after else _last_number(text)


def _last_number(text: str) -> str | None:
    result = _NUMBER.findall(text)
    return result[-1] if result else None


def _marked(text: str) -> str | None:
    """The rest of the line after the last `####`."""
    _, mark, rest = text.rpartition("####")
    line = next(iter(rest.strip().splitlines()), "").strip()
    return line if mark and line else None


def _boxed(text: str) -> str | None:
    """The content of the last `\\boxed{}`, without purely typographic commands."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    depth = 0
    for position in range(text.find("{", start), len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            inner = text[text.find("{", start) + 1 : position]
            inner = re.sub(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}", r"\1", inner.replace("{,}", ","))
            return re.sub(r"\\[!,;:]|\\(?=[$%])|\$(?!\d)", "", inner).strip() or None
    return None


def _choice(text: str) -> str | None:
    for pattern in _CHOICES:
        result = pattern.findall(text)
        if result:
            return str(result[-1]).upper()
    return None


def _code(text: str) -> str | None:
    """The first fenced block, else the whole text; trailing white space is ignored."""
    fenced = _FENCED.search(text)
    lines = [line.rstrip() for line in (fenced[1] if fenced else text).splitlines()]
    return "\n".join(lines).strip() or None


EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    "whole": _whole,
    "number": _number,
    "last_number": _last_number,
    "marked": _marked,
    "boxed": _boxed,
    "choice": _choice,
    "code": _code,
}
"""Name -> function that extracts from a text. `json` and `json:FIELD` exist in addition."""


def _json(text: str, path: str) -> str | None:
    """The first JSON object or list in the text, or its value at `path` (`answer`, `result.0.name`)."""
    decoder = json.JSONDecoder()
    for start in re.finditer(r"[{\[]", text):
        try:
            value, _ = decoder.raw_decode(text, start.start())
        except ValueError:  # no JSON begins here, or only half of it
            continue
        except RecursionError:  # not a real answer, and each further bracket would take as long
            return None
        for step in filter(None, path.split(".")):
            if isinstance(value, dict) and step in value:
                value = value[step]
            elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
                value = value[int(step)]
            else:
                return None
        return value.strip() if isinstance(value, str) else json.dumps(_plain(value), sort_keys=True)
    return None


def _plain(value: Any) -> Any:
    """The value with every 1.0 written as 1."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value

"""GitHub-flavoured Markdown from text that nobody vouches for: whatever a record holds, it prints and does nothing."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from left_bench.report.values import clean, one_line

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "\\": "&#92;", "@": "&#64;"}
# An underscore inside a word is no emphasis, and escaping it there would spoil every name in the source.
_PUNCTUATION = re.compile(r"[`*\[\]~$]|(?<![^\W_])_|_(?![^\W_])")
# GitHub links bare addresses.
_ADDRESS = re.compile(r"://|(?i:www)\.|(?i:mailto|xmpp):")
# A list, a heading, a rule or a quotation, where the text happens to begin a line.
_BLOCK = re.compile(r"^(?:#(?=#*(?:\s|$))|[-+](?=\s|$)|[-=](?=[-=\s]+$)|\d+(?=[.)](?:\s|$)))")
_PLAIN_CODE = re.compile(r"[\w .,:;=+/@%()\[\]{}'\"^~*#!?-]+")


def escape(text: object, *, limit: int | None = None) -> str:
    """Text as inline Markdown on one line that shows exactly these characters, also in a table.

    Args:
        limit: cut longer text to so many characters, an ellipsis at its end.
    """
    line = one_line(text, limit=limit)
    line = "".join(_ENTITIES.get(character, character) for character in line)
    line = _PUNCTUATION.sub(lambda match: "\\" + match[0], line)
    line = _ADDRESS.sub(lambda match: match[0].replace(":", "&#58;").replace(".", "&#46;"), line)
    return _BLOCK.sub(lambda match: "".join(f"&#{ord(character)};" for character in match[0]), line)


def code(text: object) -> str:
    """Text in a code span; text that could end the span or the table cell is escaped instead."""
    line = one_line(text)
    return f"`{line}`" if _PLAIN_CODE.fullmatch(line) else escape(line)


def fence(text: object, language: str = "") -> str:
    """Text as a code block, its fence longer than any run of backticks in the text."""
    body = clean(text).strip("\n")
    longest = max((len(run) for run in re.findall(r"`+", body)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}{language}\n{body}\n{marks}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, labels: int = 1) -> str:
    """A table of cells that are Markdown already; the first `labels` columns stand left, numbers stand right."""
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"{len(row)} cells in a table of {len(header)} columns: {row}")
    rule = ["---" if i < labels else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def details(summary: str, body: str) -> str:
    """`body`, Markdown, folded under `summary`, plain text."""
    return f"<details>\n<summary>{html.escape(one_line(summary))}</summary>\n\n{body}\n\n</details>"

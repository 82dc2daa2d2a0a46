"""The shapes in which people keep questions and answers, found by looking at a record, and read as rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from left_bench.core.errors import UserError, nearest
from left_bench.data.files import kind_of_value
from left_bench.spec.cell import Data

Message = Mapping[str, Any]

_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function", "function_response"), "tool"),
    "function_call": "assistant",
}
_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
# names under which a question and its answer stand in public data
_PAIRS = (
    *(("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("question", "response")),
    *(("query", "response"), ("query", "answer"), ("instruction", "response"), ("input", "output")),
)


@dataclass(frozen=True)
class Row:
    """One question and its answer."""

    prompt: str
    """The user's turn, after `data.template`; of a conversation the last one before the answer."""
    answer: str
    rejected: str | None = None
    """A worse answer to the same question, for preference tuning."""
    before: tuple[Message, ...] | None = None
    """The conversation up to the answer, as chat templates take it; None: the prompt is all there is."""
    group: str | None = None
    """What is held out together: a conversation, by its first two questions; None: the row, by its prompt."""

    @property
    def whole(self) -> bool:
        """Whether there is a question and an answer, and the worse answer is one."""
        return bool(self.prompt and self.answer) and self.rejected not in ("", self.answer)


class Shape(NamedTuple):
    """One way of keeping them."""

    name: str
    words: str
    """What a person is told that it is."""
    rows: Callable[[Mapping[str, Any], str, Data], Iterator[Row]]
    """The rows of a record, of which it is given the place too, for errors."""


def shape_of(section: Data, record: Mapping[str, Any], where: str) -> Shape | None:
    """What a record is; None: columns, by the names that the section has for them.

    Raises:
        UserError: `data.shape` names no shape, or the record is plain text.
    """
    if section.shape == "columns":
        return None
    if section.shape is not None:
        if section.shape not in SHAPES:
            hint = nearest(section.shape, (*SHAPES, "columns")) or f"; there are columns, {', '.join(SHAPES)}"
            raise UserError(f"data.shape={section.shape!r}: there is no such shape{hint}")
        return SHAPES[section.shape]
    if isinstance(record.get("chosen"), list):
        return SHAPES["preference"]
    named = (section.prompt_column, section.answer_column, section.template) != ("prompt", "answer", "{prompt}")
    if named or {"prompt", "answer"} <= record.keys():
        return None
    for key in ("messages", "conversations", "conversation"):
        turns = record.get(key)
        if isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
            return SHAPES["sharegpt" if "from" in turns[0] else "messages"]
    if {"chosen", "rejected"} <= record.keys():
        return SHAPES["preference"]
    if {"instruction", "output"} <= record.keys():
        return SHAPES["alpaca"]
    if any(set(pair) <= record.keys() for pair in _PAIRS):
        return SHAPES["completion"]
    if isinstance(record.get("text"), str) and not {"prompt", "answer", "label"} & record.keys():
        raise UserError(
            f"{where}: has plain text and no question with an answer, which is not trained on yet; "
            "name two columns with data.prompt_column= and data.answer_column="
        )
    return None


def text_of(value: Any, where: str) -> str:
    """Text as it is, numbers and booleans as JSON writes them, null as nothing.

    Raises:
        UserError: a list, an object, or half a character.
    """
    if value is None:
        return ""
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if not isinstance(value, str):
        raise UserError(f"{where} holds {kind_of_value(value)}, not text; write it as a string or name another column")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where} holds half a character (a lone surrogate); mend the text") from error
    return value


def whole_lines(answer: str) -> str:
    """Without blank lines before and white space after; a first line's indent is the answer's own, as in code."""
    lines = answer.rstrip().splitlines(keepends=True)
    first = next((number for number, line in enumerate(lines) if line.strip()), len(lines))
    return "".join(lines[first:])


def _alpaca(record: Mapping[str, Any], where: str, _: Data) -> Iterator[Row]:
    asked = [text_of(record.get(key), f"{where}: column '{key}'").strip() for key in ("instruction", "input")]
    answer = text_of(record.get("output"), f"{where}: column 'output'")
    yield Row(prompt="\n\n".join(filter(None, asked)), answer=whole_lines(answer))


def _completion(record: Mapping[str, Any], where: str, _: Data) -> Iterator[Row]:
    found = next((pair for pair in _PAIRS if set(pair) <= record.keys()), _PAIRS[0])
    prompt, answer = (text_of(record.get(key), f"{where}: column '{key}'") for key in found)
    yield Row(prompt=prompt.strip(), answer=whole_lines(answer))


def _conversation(record: Mapping[str, Any], where: str, section: Data) -> Iterator[Row]:
    """A row for every assistant's turn, or for the last one alone (`data.train_on`)."""
    key = next((key for key in ("messages", "conversations", "conversation") if key in record), "messages")
    turns = _messages(record.get(key), f"{where}: column '{key}'")
    system = record.get("system")  # ShareGPT keeps it beside the turns
    if isinstance(system, str) and system.strip() and (not turns or turns[0]["role"] != "system"):
        turns = [{"role": "system", "content": system}, *turns]
    rows = [row for index, turn in enumerate(turns) if turn["role"] == "assistant" and (row := _row(turns, index))]
    yield from rows[-1:] if section.train_on == "last" else rows


def _row(turns: Sequence[Message], index: int) -> Row | None:
    """The turn as the answer to what comes before it; None where nobody has asked, or it says nothing."""
    asked = [turn for turn in turns[:index] if turn["role"] == "user"]
    answer = whole_lines(turns[index]["content"])
    if not asked or not answer:
        return None
    opening = [turn["content"] for turn in turns if turn["role"] == "user"][:2]  # many begin with the same greeting
    return Row(prompt=asked[-1]["content"], answer=answer, before=tuple(turns[:index]), group="\n".join(opening))


def _preference(record: Mapping[str, Any], where: str, _: Data) -> Iterator[Row]:
    """Two answers to one question: as text beside a prompt, or as conversations that part at their last turn."""
    better, worse = record.get("chosen"), record.get("rejected")
    if not isinstance(better, list):
        texts = [text_of(record.get(key), f"{where}: column '{key}'") for key in ("prompt", "chosen", "rejected")]
        yield Row(texts[0].strip(), whole_lines(texts[1]), whole_lines(texts[2]))
        return
    first = _messages(better, f"{where}: column 'chosen'")
    second = _messages(worse, f"{where}: column 'rejected'")
    prompt = record.get("prompt")
    if isinstance(prompt, list):
        before = _messages(prompt, f"{where}: column 'prompt'")
    elif isinstance(prompt, str) and len(first) == 1:
        before = [{"role": "user", "content": prompt}]
    else:
        before = []
    if first[: len(before)] != before:
        first, second = [*before, *first], [*before, *second]
    if not first or not second or first[:-1] != second[:-1]:
        raise UserError(f"{where}: 'chosen' and 'rejected' must be the same up to their last turn, an answer each")
    row = _row(first, len(first) - 1)
    if row is not None:
        yield Row(row.prompt, row.answer, whole_lines(second[-1]["content"]), row.before, row.group)


def _messages(turns: Any, where: str) -> list[dict[str, Any]]:
    """Turns as chat templates take them.

    Raises:
        UserError: no list of turns, a turn without a role that is known, or content that is no text.
    """
    form = 'turns are written {"role": "user", "content": "..."} or {"from": "human", "value": "..."}'
    if turns is None:
        return []
    if not isinstance(turns, list):
        raise UserError(f"{where} holds {kind_of_value(turns)}, not a list of turns; {form}")
    found = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping):
            raise UserError(f"{where}: turn {number} is {kind_of_value(turn)}; {form}")
        role = turn.get("role", turn.get("from"))
        known = _SHAREGPT_ROLES.get(str(role).lower(), role)
        if known not in _ROLES:
            hint = nearest(str(role), (*_ROLES, *_SHAREGPT_ROLES)) or f"; roles are {', '.join(_ROLES)}"
            raise UserError(f"{where}: turn {number} has the role {role!r}, which is not known{hint}")
        content = _content(turn.get("content", turn.get("value")), f"{where}: turn {number}")
        kept = {key: turn[key] for key in ("tool_calls", "name", "tool_call_id") if turn.get(key) is not None}
        found.append({"role": known, "content": content, **kept})
    return found


def _content(value: Any, where: str) -> str:
    """A turn's text; a list of parts is joined where all of them are text."""
    if isinstance(value, list):
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in value]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where} has a part that is no text (an image, say), which no model here is shown")
        value = "".join(map(str, texts))
    return text_of(value, where)


SHAPES: dict[str, Shape] = {
    one.name: one
    for one in (
        Shape("completion", "questions and answers", _completion),
        Shape("alpaca", "Alpaca's instructions, inputs and outputs", _alpaca),
        Shape("messages", "conversations (OpenAI's messages)", _conversation),
        Shape("sharegpt", "conversations (ShareGPT's)", _conversation),
        Shape("preference", "pairs of a chosen and a rejected answer", _preference),
    )
}
"""By the names that `data.shape` takes."""


def in_words(shape: Shape, section: Data) -> str:
    """What was found, and what of it is trained on."""
    if shape.rows is _conversation:
        turns = "the last assistant turn of each" if section.train_on == "last" else "every assistant turn"
        return f"{shape.words}, {turns}"
    return shape.words if section.pairs or shape.name != "preference" else f"{shape.words}, the chosen ones"

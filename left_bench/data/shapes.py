"""The common shapes of question-and-answer records: detecting a record's shape and reading it as rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
# column names of questions and answers in public data
_PAIRS = (
    *(("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("question", "response")),
    *(("query", "response"), ("query", "answer"), ("instruction", "response"), ("input", "output")),
    ("text", "label"),
)


@dataclass(frozen=True)
class Row:
    """One question and its answer."""

    prompt: str
    """The user's turn, after `data.template`; in a conversation, the last one before the answer."""
    answer: str
    rejected: str | None = None
    """A worse answer to the same question, for preference tuning."""
    second: str | None = None
    """The second of a pair of texts that are read together (`data.second_column`)."""
    margin: float | None = None
    """By how much the answer is better than the worse one, where `data.margin_column` says so."""
    desirable: bool | None = None
    """Whether the answer is a good one, where `data.label_column` says so."""
    before: tuple[Message, ...] | None = None
    """The conversation up to the answer, as chat templates take it; None: only the prompt."""
    group: str | None = None
    """Key of rows that stay in one split: a conversation's first two questions, or a plain text; None: the prompt."""
    earlier: tuple[Row, ...] = ()
    """The conversation's earlier answers, which are trained on together with this one."""
    turn: Message | None = None
    """The answer as a turn if it has tool calls, which only a chat template can write."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """The functions that the assistant may call, as chat templates take them."""
    place: str | None = None
    """The row's place, for errors; only set where tools are declared or used."""
    plain: bool = False
    """Whether it is plain text, without a question: every token is trained on."""
    record: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    """The source's unchanged record, if requested."""

    @property
    def lacks(self) -> str | None:
        """Why the row cannot be used; None: it can."""
        if self.plain:
            return None if self.answer else "no text"
        if not self.prompt or not self.answer:
            return "no answer" if self.prompt else "no prompt"
        if self.rejected == "":
            return "no worse answer"
        return "the worse answer is the answer" if self.rejected == self.answer else None


class Shape(NamedTuple):
    """One common shape of records."""

    name: str
    words: str
    """Its description for the user."""
    rows: Callable[[Mapping[str, Any], str, Data], Iterator[Row]]
    """(record, its place for errors, section) -> the rows of a record."""


def shape_of(section: Data, record: Mapping[str, Any]) -> Shape | None:
    """The shape of a record; None: plain columns with the names given in the section.

    Raises:
        UserError: `data.shape` names no shape.
    """
    if section.shape == "columns":
        return None
    if section.shape is not None:
        if section.shape not in SHAPES:
            hint = nearest(section.shape, (*SHAPES, "columns")) or f"; choose from columns, {', '.join(SHAPES)}"
            raise UserError(f"data.shape={section.shape!r}: there is no such shape{hint}")
        return SHAPES[section.shape]
    if isinstance(record.get("chosen"), list):
        return SHAPES["preference"]
    named = (section.prompt_column, section.answer_column, section.template) != ("prompt", "answer", "{prompt}")
    if named or {"prompt", "answer"} <= record.keys():
        return None
    if isinstance(record.get("tokens"), list):
        return SHAPES["tags"]
    for key in ("messages", "conversations", "conversation"):
        turns = record.get(key)
        if isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
            return SHAPES["sharegpt" if "from" in turns[0] else "messages"]
    if {"chosen", "rejected"} <= record.keys():
        return SHAPES["preference"]
    if {"instruction", "output"} <= record.keys():
        return SHAPES["alpaca"]
    if result := next((pair for pair in _PAIRS if set(pair) <= record.keys()), None):
        return SHAPES["classification" if result == ("text", "label") else "completion"]
    if isinstance(record.get("text"), str) and not {"prompt", "answer", "label"} & record.keys():
        return SHAPES["text"]
    return None


def text_of(value: Any, where: str) -> str:
    """Text unchanged, numbers and booleans as in JSON, null as an empty string.

    Raises:
        UserError: a list, an object, or a lone surrogate.
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
        raise UserError(f"{where} holds an incomplete character (a lone surrogate); fix the text") from error
    return value


def whole_lines(answer: str) -> str:
    """Remove leading blank lines and trailing white space; the first line keeps its indentation, as in code."""
    lines = answer.rstrip().splitlines(keepends=True)
    first = next((number for number, line in enumerate(lines) if line.strip()), len(lines))
    return "".join(lines[first:])


def _tags(record: Mapping[str, Any], where: str, section: Data) -> Iterator[Row]:
    """Words and the tag of each, as lists or with blanks between; a blank inside a word becomes a no-break space."""
    texts = []
    for key, given, usual in (
        ("data.prompt_column", section.prompt_column, ("tokens", "words")),
        ("data.answer_column", section.answer_column, ("tags", "ner_tags", "labels")),
    ):
        default = Data.model_fields[key.removeprefix("data.")].default
        column = given if given != default else next((name for name in usual if name in record), usual[0])
        if column not in record:
            there = f"it has {', '.join(map(str, record)) or 'none'}{nearest(column, map(str, record))}"
            raise UserError(f"{key}={column!r}: no such column in {where}; {there}")
        value = record[column]
        items = value.split() if isinstance(value, str) else value
        if not isinstance(items, list):
            raise UserError(
                f"{where}: column '{column}' holds {kind_of_value(value)}, not a list with an item for each word"
            )
        texts.append([text_of(item, f"{where}: column '{column}'").strip() for item in items])
    words, tags = texts
    if len(words) != len(tags):
        raise UserError(f"{where}: has {len(words)} words and {len(tags)} tags; give each word one")
    told = [(word.replace(" ", "\u00a0"), tag) for word, tag in zip(words, tags, strict=True) if word and tag]
    yield Row(prompt=" ".join(word for word, _ in told), answer=" ".join(tag for _, tag in told))


def _alpaca(record: Mapping[str, Any], where: str, _: Data) -> Iterator[Row]:
    parts = [text_of(record.get(key), f"{where}: column '{key}'").strip() for key in ("instruction", "input")]
    answer = text_of(record.get("output"), f"{where}: column 'output'")
    yield Row(prompt="\n\n".join(filter(None, parts)), answer=whole_lines(answer))


def _completion(record: Mapping[str, Any], where: str, _: Data) -> Iterator[Row]:
    result = next((pair for pair in _PAIRS if set(pair) <= record.keys()), _PAIRS[0])
    prompt, answer = (text_of(record.get(key), f"{where}: column '{key}'") for key in result)
    yield Row(prompt=prompt.strip(), answer=whole_lines(answer))


def _text(record: Mapping[str, Any], where: str, section: Data) -> Iterator[Row]:
    """A document, from the column `text` or the one that `data.answer_column` names."""
    column = "text" if section.answer_column == "answer" else section.answer_column
    if column not in record:
        there = f"it has {', '.join(map(str, record)) or 'none'}{nearest(column, map(str, record))}"
        raise UserError(f"{where}: has no column {column!r}; name the text's column with data.answer_column=; {there}")
    text = text_of(record[column], f"{where}: column '{column}'")
    yield Row(prompt="", answer=text if text.strip() else "", group=text, plain=True)


def _conversation(record: Mapping[str, Any], where: str, section: Data) -> Iterator[Row]:
    """The last assistant turn, together with the earlier ones if `data.train_on=assistant`.

    With `data.pairs`, which compares single answers, every turn is a row of its own.
    """
    key = next((key for key in ("messages", "conversations", "conversation") if key in record), "messages")
    turns = _messages(record.get(key), f"{where}: column '{key}'")
    system = record.get("system")  # in ShareGPT it is outside the turns
    if isinstance(system, str) and system.strip() and (not turns or turns[0]["role"] != "system"):
        turns = [{"role": "system", "content": system}, *turns]
    tools = _tools(record, where)
    answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    rows = [row for index in answers if (row := _row(turns, index, tools=tools, where=where))]
    if section.pairs and section.train_on == "assistant":
        yield from rows
    elif rows:
        yield replace(rows[-1], earlier=tuple(rows[:-1]) if section.train_on == "assistant" else ())


def _row(
    turns: Sequence[Message], index: int, *, tools: Sequence[Mapping[str, Any]] = (), where: str = ""
) -> Row | None:
    """The turn as the answer to the turns before it; None if there is no question or no answer."""
    before, turn = turns[:index], turns[index]
    questions = [item for item in before if item["role"] == "user"]
    calls = [item["function"] for item in turn.get("tool_calls", ())]
    answer = "\n".join(filter(None, [turn["content"], *map(json.dumps, calls)]))
    if not questions or not answer:
        return None
    opening = [item["content"] for item in turns if item["role"] == "user"][:2]  # many begin with the same greeting
    with_tools = bool(tools) or any(item["role"] == "tool" or "tool_calls" in item for item in (*before, turn))
    return Row(
        prompt=questions[-1]["content"],
        answer=answer,
        before=tuple(before),
        group="\n".join(opening),
        turn=turn if calls else None,
        tools=tuple(tools),
        place=where if with_tools else None,
    )


def _tools(record: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The functions that a record declares: OpenAI's `tools` (a list, or its JSON), or the older `functions`.

    Raises:
        UserError: neither is a list of objects.
    """
    for key in ("tools", "functions"):
        declared = record.get(key)
        if isinstance(declared, str):
            try:
                declared = json.loads(declared or "null")
            except (ValueError, RecursionError):
                declared = record[key]
        if not declared:
            continue
        if not isinstance(declared, list) or not all(isinstance(item, Mapping) for item in declared):
            form = '[{"type": "function", "function": {"name": "...", "parameters": {...}}}]'
            raise UserError(f"{where}: column '{key}' holds {kind_of_value(declared)}; declare functions as {form}")
        return [dict(item) if key == "tools" else {"type": "function", "function": dict(item)} for item in declared]
    return []


def _preference(record: Mapping[str, Any], where: str, _: Data) -> Iterator[Row]:
    """Two answers to one question: texts with a prompt, or conversations that differ only in their last turn."""
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
        raise UserError(f"{where}: 'chosen' and 'rejected' must be the same except for their last turn, the answer")
    row = _row(first, len(first) - 1, tools=_tools(record, where), where=where)
    if row is not None and (row.turn is not None or "tool_calls" in second[-1]):
        raise UserError(f"{where}: answers that call tools cannot be compared; remove such rows")
    if row is not None:
        yield replace(row, rejected=whole_lines(second[-1]["content"]))


def _messages(turns: Any, where: str) -> list[dict[str, Any]]:
    """Turns as chat templates take them.

    Raises:
        UserError: not a list of turns, an unknown role, or content that is not text.
    """
    form = 'write turns as {"role": "user", "content": "..."} or {"from": "human", "value": "..."}'
    if turns is None:
        return []
    if not isinstance(turns, list):
        raise UserError(f"{where} holds {kind_of_value(turns)}, not a list of turns; {form}")
    results = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping):
            raise UserError(f"{where}: turn {number} is {kind_of_value(turn)}; {form}")
        role = turn.get("role", turn.get("from"))
        known = _SHAREGPT_ROLES.get(str(role).lower(), role)
        if known not in _ROLES:
            hint = nearest(str(role), (*_ROLES, *_SHAREGPT_ROLES)) or f"; roles are {', '.join(_ROLES)}"
            raise UserError(f"{where}: turn {number} has the role {role!r}, which is not known{hint}")
        content = _content(turn.get("content", turn.get("value")), f"{where}: turn {number}")
        extra = {key: turn[key] for key in ("name", "tool_call_id") if turn.get(key) is not None}
        if calls := _tool_calls(turn, f"{where}: turn {number}"):
            extra["tool_calls"] = calls
        if known == "assistant":
            content = whole_lines(content)
        results.append({"role": known, "content": content, **extra})
    return results


def _tool_calls(turn: Message, where: str) -> list[dict[str, Any]]:
    """OpenAI's `tool_calls`, or the older `function_call`, with arguments as an object, as chat templates take them.

    Raises:
        UserError: not a list of calls, a call without a name, or arguments that are not an object.
    """
    calls = turn.get("tool_calls")
    if calls is None and isinstance(turn.get("function_call"), Mapping):
        calls = [{"function": turn["function_call"]}]
    if calls is None:
        return []
    form = 'write a call as {"type": "function", "function": {"name": "...", "arguments": {...}}}'
    if not isinstance(calls, list):
        raise UserError(f"{where}: 'tool_calls' holds {kind_of_value(calls)}, not a list; {form}")
    results = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(f"{where}: a tool call names no function; {form}")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: the arguments of {function['name']} are not JSON; {form}") from error
        if not isinstance(arguments, Mapping):
            raise UserError(f"{where}: the arguments of {function['name']} are {kind_of_value(arguments)}; {form}")
        id_of_call = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        named = {"name": function["name"], "arguments": dict(arguments)}
        results.append({**id_of_call, "type": "function", "function": named})
    return results


def _content(value: Any, where: str) -> str:
    """A turn's text; a list of text parts is joined."""
    if isinstance(value, list):
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in value]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where} has a part that is not text (an image, for example), which is not supported")
        value = "".join(map(str, texts))
    return text_of(value, where)


SHAPES: dict[str, Shape] = {
    item.name: item
    for item in (
        Shape("completion", "questions and answers", _completion),
        Shape("alpaca", "Alpaca's instructions, inputs and outputs", _alpaca),
        Shape("messages", "conversations (OpenAI's messages)", _conversation),
        Shape("sharegpt", "conversations (ShareGPT's)", _conversation),
        Shape("preference", "pairs of a chosen and a rejected answer", _preference),
        Shape("classification", "texts and their labels", _completion),
        Shape("tags", "words and their tags", _tags),
        Shape("text", "plain text", _text),
    )
}
"""Value of `data.shape` -> shape."""


def in_words(shape: Shape, section: Data) -> str:
    """A description of the detected shape and of what is trained on."""
    if shape.rows is _text:
        return f"{shape.words} in blocks, scored only by its loss (it has no answers, so none are generated)"
    if section.train_on == "all":
        return f"{shape.words}, every token of a row"
    if shape.rows is _conversation:
        turns = "the last assistant turn of each" if section.train_on == "last" else "every assistant turn"
        return f"{shape.words}, {turns}"
    return shape.words if section.pairs or shape.name != "preference" else f"{shape.words}, the chosen ones"

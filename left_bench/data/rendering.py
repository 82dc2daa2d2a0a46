"""Rendering: questions, answers and turns as text and tokens, by the model's own chat template and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from left_bench.core.errors import UserError
from left_bench.data.shapes import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Variables that a chat template may read. Reasoning models would spend the answer's tokens on thinking, and today's
# date would change a row's tokens tomorrow (this date is the Llama templates' own fallback).
_TEMPLATE_ARGUMENTS: dict[str, Any] = {"enable_thinking": False, "date_string": "26 Jul 2024"}
_QUESTION, _ANSWER = "A question.", "An answer."


def turn_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: what the chat template writes after an assistant turn, up to the first marker.

    Without a template, or if it writes no marker: the tokenizer's end token.
    """
    _, text = _probed(tokenizer)
    after = tokenizer(text.rpartition(_ANSWER)[2], add_special_tokens=False)["input_ids"] if _ANSWER in text else []
    markers = _markers(tokenizer)
    for position, id in enumerate(after):
        if id in markers:
            return list(after[: position + 1])
    return [tokenizer.eos_token_id]


def turn_lead(tokenizer: PreTrainedTokenizerBase) -> str:
    """White space that the chat template writes between the generation prompt and the answer, as Mistral's do.

    Empty if the tokenizer adds it by itself (SentencePiece's leading space).
    """
    prompt, text = _probed(tokenizer)
    lead = text[len(prompt) : text.find(_ANSWER, len(prompt))] if text.startswith(prompt) and _ANSWER in text else ""
    if not lead or not lead.isspace():
        return ""
    prompt_ids, both_ids, answer_ids = (
        list(tokenizer(part, add_special_tokens=False)["input_ids"])
        for part in (prompt, prompt + lead + _ANSWER, _ANSWER)
    )
    return "" if both_ids == prompt_ids + answer_ids else lead


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The start token if the tokenizer would put one before plain text; else empty."""
    bos_id = tokenizer.bos_token_id
    return [bos_id] if bos_id is not None and tokenizer("a")["input_ids"][0] == bos_id else []


def fit(
    prompt_ids: list[int], answer_ids: list[int], *, max_length: int, text: tuple[int, int]
) -> tuple[list[int], list[int]]:
    """Truncate a row to `max_length` tokens: prompt and answer get half each, and what the other does not need.

    The prompt loses the left end of the user's text, which is farthest from the answer. Start token, system message and
    template markers are kept while there is text to cut, because models rely on them. The answer loses its right end,
    and with it the end token, so that the model does not learn to stop in mid-sentence.

    Args:
        text: begin and end of the user's text among the prompt's tokens.
    """
    if len(prompt_ids) + len(answer_ids) <= max_length:
        return prompt_ids, answer_ids
    answer_ids = answer_ids[: max(max_length // 2, max_length - len(prompt_ids))]
    surplus = len(prompt_ids) + len(answer_ids) - max_length
    if surplus > 0:
        begin, end = text
        cut = min(surplus, end - begin)
        prompt_ids = prompt_ids[:begin] + prompt_ids[begin + cut :]
        prompt_ids = prompt_ids[surplus - cut :]  # no text is left and the rest is still too long
    return prompt_ids, answer_ids


def prompts_to_ids(
    rows: Sequence[Row], *, instruction: str | None, tokenizer: PreTrainedTokenizerBase, encoder: bool
) -> list[tuple[list[int], tuple[int, int]]]:
    """Each prompt's tokens, and the begin and end of the user's text among them."""
    start: list[int] = []  # a template, or an encoder's special tokens, bring their own start token
    if not encoder and getattr(tokenizer, "chat_template", None):
        texts = _chat_texts(rows, instruction=instruction, tokenizer=tokenizer)
    else:
        head, tail = f"{instruction}\n" if instruction else "", "" if encoder else "\n"
        for row in rows:
            if row.place is not None:
                raise UserError(
                    f"{row.place}: has tool calls, which only a chat template can write, and"
                    f" model.name_or_path={tokenizer.name_or_path!r} has none; choose a chat model, or remove such"
                    " rows"
                )
        texts = [f"{head}{_plain_turns(row)}{tail}" for row in rows]
        start = [] if encoder else start_ids(tokenizer)
    offsets = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(texts, add_special_tokens=encoder, return_offsets_mapping=offsets)
    results = []
    for index, (text, prompt) in enumerate(zip(texts, (row.prompt for row in rows), strict=True)):
        ids = list(encoded["input_ids"][index])
        begin, end = 0, len(ids)
        first = text.rfind(prompt)
        if offsets and first >= 0:  # a template may have changed the text; then any part of the prompt may be cut
            inside = [
                position
                for position, (left, right) in enumerate(encoded["offset_mapping"][index])
                if left < right and first <= left and right <= first + len(prompt)
            ]
            if inside:
                begin, end = inside[0], inside[-1] + 1
        results.append((start + ids, (len(start) + begin, len(start) + end)))
    return results


def _plain_turns(row: Row) -> str:
    """All turns up to the answer, one per line, for a model without a chat template."""
    return "\n".join(turn["content"] for turn in row.before) if row.before else row.prompt


def _chat_texts(
    rows: Sequence[Row], *, instruction: str | None, tokenizer: PreTrainedTokenizerBase, answered: bool = False
) -> list[str]:
    """Each row's rendered prompt, with the generation prompt; `answered`: with the answer's turn instead."""
    from jinja2 import TemplateError

    def render(turns: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        text = tokenizer.apply_chat_template(
            [dict(turn) for turn in turns],
            tools=[dict(tool) for tool in tools] or None,
            tokenize=False,
            add_generation_prompt=not answered,
            **_TEMPLATE_ARGUMENTS,
        )
        assert isinstance(text, str)
        return text

    def rendered(row: Row, *, system: bool) -> str:
        turns = turns_of(row, system=system)
        if answered and row.turn is not None:
            turns.append(dict(row.turn))
        if row.place is None:
            return render(turns)
        try:
            text = render(turns, row.tools)
        except TemplateError as error:
            raise _no_tools(row, tokenizer, f"cannot render its tools ({error})") from error
        called = [call["function"]["name"] for turn in turns for call in turn.get("tool_calls", ())]
        declared = [str(tool.get("function", tool).get("name", "")) for tool in row.tools]
        results = [turn["content"] for turn in turns if turn["role"] == "tool"]
        if lost := next((part for part in (*called, *declared, *results) if not _is_in(text, part.strip())), None):
            raise _no_tools(row, tokenizer, f"silently drops {lost[:80]!r} from its tools")
        return text

    def takes_system() -> bool:
        """Whether the template keeps a system message: some refuse it, others silently drop it."""
        message = "A system message."
        try:
            return message in render([{"role": "system", "content": message}, {"role": "user", "content": "?"}])
        except TemplateError:
            return False

    def turns_of(row: Row, *, system: bool) -> list[dict[str, Any]]:
        turns = [dict(turn) for turn in row.before] if row.before else [{"role": "user", "content": row.prompt}]
        if instruction and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": instruction})
        if turns[0]["role"] == "system" and not system:
            first = turns.pop(0)["content"]
            question = next((turn for turn in turns if turn["role"] == "user"), None)
            if question is not None:
                question["content"] = f"{first}\n\n{question['content']}"
        return turns

    try:
        wanted = bool(instruction) or any(row.before and row.before[0]["role"] == "system" for row in rows)
        system = wanted and takes_system()
        return [rendered(row, system=system) for row in rows]
    except TemplateError as error:
        raise UserError(
            f"model.name_or_path={tokenizer.name_or_path!r}: its chat template cannot render a user's turn ({error});"
            " choose a model whose template can"
        ) from error


def _is_in(text: str, part: str) -> bool:
    """Whether `part` occurs in the text, verbatim or escaped as in JSON: templates write tool results either way."""
    return part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text


def answers_to_ids(answers: list[str], tokenizer: PreTrainedTokenizerBase, *, end: list[int]) -> list[list[int]]:
    """Each answer's tokens, followed by those that end a turn."""
    return [[*ids, *end] for ids in tokenizer(answers, add_special_tokens=False)["input_ids"]]


def turn_to_ids(row: Row, *, instruction: str | None, tokenizer: PreTrainedTokenizerBase, end: list[int]) -> list[int]:
    """The tokens of an answer that calls tools, as the template writes it, up to the last marker, which ends the turn.

    Raises:
        UserError: the template does not write the calls, or not right after the generation prompt.
    """
    [prompt], [text] = (
        _chat_texts([row], instruction=instruction, tokenizer=tokenizer, answered=answered)
        for answered in (False, True)
    )
    if not text.startswith(prompt):
        raise _no_tools(row, tokenizer, "does not write tool calls after the generation prompt")
    ids = list(tokenizer(text[len(prompt) :], add_special_tokens=False)["input_ids"])
    markers = _markers(tokenizer)
    last = max((position for position, id in enumerate(ids) if id in markers), default=-1)
    return ids[: last + 1] if last > 0 else [*ids, *end]


def without_oldest_turn(row: Row) -> Row:
    """The conversation from its second question on, with the system message; `before` is None if there is none."""
    turns = list(row.before or ())
    head = turns[:1] if turns and turns[0]["role"] == "system" else []
    questions = [index for index, turn in enumerate(turns) if turn["role"] == "user"]
    return replace(row, before=(*head, *turns[questions[1] :]) if len(questions) > 1 else None)


def _no_tools(row: Row, tokenizer: PreTrainedTokenizerBase, what: str) -> UserError:
    return UserError(
        f"{row.place}: the chat template of model.name_or_path={tokenizer.name_or_path!r} {what}; choose a model whose"
        " template supports tools, or remove such rows"
    )


def _probed(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """A probe question as the chat template renders it, without and with an answer; empty if no template can."""
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        return "", ""
    turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, **_TEMPLATE_ARGUMENTS))
        prompt = tokenizer.apply_chat_template(
            turns[:1], tokenize=False, add_generation_prompt=True, **_TEMPLATE_ARGUMENTS
        )
    except TemplateError:  # it can only render questions
        return "", ""
    return str(prompt), text


def _markers(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """All special tokens, including those marked as special only in the vocabulary."""
    return {*tokenizer.all_special_ids} | {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}

"""Rendering: questions, answers and whole turns as a model's own chat template and tokenizer write them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from left_bench.core.errors import UserError
from left_bench.data.shapes import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a chat template may ask for. Reasoning models would spend the answer's tokens on thoughts, and the date (this
# one is the Llama templates' own fallback) would make other tokens of the same row tomorrow.
_TEMPLATE_ARGUMENTS: dict[str, Any] = {"enable_thinking": False, "date_string": "26 Jul 2024"}
_QUESTION, _ANSWER = "A question.", "An answer."


def turn_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends an answer: the tokens that the chat template writes after an assistant's turn, up to its first marker.

    Without a template, or where that writes no marker, the tokenizer's end token.
    """
    _, text = _probed(tokenizer)
    after = tokenizer(text.rpartition(_ANSWER)[2], add_special_tokens=False)["input_ids"] if _ANSWER in text else []
    markers = _markers(tokenizer)
    for position, id in enumerate(after):
        if id in markers:
            return list(after[: position + 1])
    return [tokenizer.eos_token_id]


def turn_lead(tokenizer: PreTrainedTokenizerBase) -> str:
    """White space that the chat template writes between asking for an answer and the answer, as Mistral's do.

    Nothing where the tokenizer puts it there by itself (SentencePiece's first space).
    """
    asked, text = _probed(tokenizer)
    lead = text[len(asked) : text.find(_ANSWER, len(asked))] if text.startswith(asked) and _ANSWER in text else ""
    if not lead or not lead.isspace():
        return ""
    before, both, alone = (
        list(tokenizer(part, add_special_tokens=False)["input_ids"])
        for part in (asked, asked + lead + _ANSWER, _ANSWER)
    )
    return "" if both == before + alone else lead


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The start token, where the tokenizer itself would put one before a plain text; else nothing."""
    bos_id = tokenizer.bos_token_id
    return [bos_id] if bos_id is not None and tokenizer("a")["input_ids"][0] == bos_id else []


def fit(
    prompt_ids: list[int], answer_ids: list[int], *, max_length: int, text: tuple[int, int]
) -> tuple[list[int], list[int]]:
    """Cut a row to `max_length` tokens: each half may have what the other leaves, and is sure of half.

    The prompt loses the left of the user's text, farthest from the answer; start token, system message and the marks of
    a template stay whole while there is text to cut, for models lean on them. The answer loses its right end, and with
    it the end token, so that nothing teaches to stop in mid-sentence.

    Args:
        text: where among the prompt's tokens the user's text begins and ends.
    """
    if len(prompt_ids) + len(answer_ids) <= max_length:
        return prompt_ids, answer_ids
    answer_ids = answer_ids[: max(max_length // 2, max_length - len(prompt_ids))]
    surplus = len(prompt_ids) + len(answer_ids) - max_length
    if surplus > 0:
        begin, end = text
        cut = min(surplus, end - begin)
        prompt_ids = prompt_ids[:begin] + prompt_ids[begin + cut :]
        prompt_ids = prompt_ids[surplus - cut :]  # no text is left, and the rest is still too long
    return prompt_ids, answer_ids


def prompts_to_ids(
    rows: Sequence[Row], *, instruction: str | None, tokenizer: PreTrainedTokenizerBase, encoder: bool
) -> list[tuple[list[int], tuple[int, int]]]:
    """Each prompt's tokens, and where among them the user's text begins and ends."""
    start: list[int] = []  # a template writes its own start token, and so do an encoder's special tokens
    if not encoder and getattr(tokenizer, "chat_template", None):
        texts = _chat_texts(rows, instruction=instruction, tokenizer=tokenizer)
    else:
        head, tail = f"{instruction}\n" if instruction else "", "" if encoder else "\n"
        for row in rows:
            if row.place is not None:
                raise UserError(
                    f"{row.place}: has calls of tools, which a chat template alone can write, and"
                    f" model.name_or_path={tokenizer.name_or_path!r} has none here; choose a chat model, or leave such"
                    " rows out"
                )
        texts = [f"{head}{_said(row)}{tail}" for row in rows]
        start = [] if encoder else start_ids(tokenizer)
    offsets = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(texts, add_special_tokens=encoder, return_offsets_mapping=offsets)
    results = []
    for index, (text, prompt) in enumerate(zip(texts, (row.prompt for row in rows), strict=True)):
        ids = list(encoded["input_ids"][index])
        begin, end = 0, len(ids)
        first = text.rfind(prompt)
        if offsets and first >= 0:  # a template may have changed the text; then all of the prompt may be cut
            inside = [
                position
                for position, (left, right) in enumerate(encoded["offset_mapping"][index])
                if left < right and first <= left and right <= first + len(prompt)
            ]
            if inside:
                begin, end = inside[0], inside[-1] + 1
        results.append((start + ids, (len(start) + begin, len(start) + end)))
    return results


def _said(row: Row) -> str:
    """All turns up to the answer, a line each, for a model without a chat template."""
    return "\n".join(turn["content"] for turn in row.before) if row.before else row.prompt


def _chat_texts(
    rows: Sequence[Row], *, instruction: str | None, tokenizer: PreTrainedTokenizerBase, answered: bool = False
) -> list[str]:
    """Each row as the template asks for its answer; `answered`: with the turn that is the answer."""
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
        told = [turn["content"] for turn in turns if turn["role"] == "tool"]
        if lost := next((part for part in (*called, *declared, *told) if not _stands_in(text, part.strip())), None):
            raise _no_tools(row, tokenizer, f"passes over {lost[:80]!r} of its tools without a word")
        return text

    def takes_system() -> bool:
        """Some templates refuse a system message, others drop it without a word."""
        asked = "A system message."
        try:
            return asked in render([{"role": "system", "content": asked}, {"role": "user", "content": "?"}])
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


def _stands_in(text: str, part: str) -> bool:
    """As it is, or as JSON writes it: templates do either with what a tool has answered."""
    return part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text


def answers_to_ids(answers: list[str], tokenizer: PreTrainedTokenizerBase, *, end: list[int]) -> list[list[int]]:
    """Each answer's tokens and, behind them, those that end a turn."""
    return [[*ids, *end] for ids in tokenizer(answers, add_special_tokens=False)["input_ids"]]


def turn_to_ids(row: Row, *, instruction: str | None, tokenizer: PreTrainedTokenizerBase, end: list[int]) -> list[int]:
    """An answer that calls tools, as the template writes it: to its last marker, which ends the turn.

    Raises:
        UserError: the template does not write the calls, or not where it asks for an answer.
    """
    [asked], [text] = (
        _chat_texts([row], instruction=instruction, tokenizer=tokenizer, answered=answered)
        for answered in (False, True)
    )
    if not text.startswith(asked):
        raise _no_tools(row, tokenizer, "writes a call of a tool elsewhere than where it asks for an answer")
    ids = list(tokenizer(text[len(asked) :], add_special_tokens=False)["input_ids"])
    markers = _markers(tokenizer)
    last = max((position for position, id in enumerate(ids) if id in markers), default=-1)
    return ids[: last + 1] if last > 0 else [*ids, *end]


def without_oldest_turn(row: Row) -> Row:
    """The conversation from its next question on, the system message kept; with `before` None where there is none."""
    turns = list(row.before or ())
    head = turns[:1] if turns and turns[0]["role"] == "system" else []
    asked = [index for index, turn in enumerate(turns) if turn["role"] == "user"]
    return replace(row, before=(*head, *turns[asked[1] :]) if len(asked) > 1 else None)


def _no_tools(row: Row, tokenizer: PreTrainedTokenizerBase, what: str) -> UserError:
    return UserError(
        f"{row.place}: the chat template of model.name_or_path={tokenizer.name_or_path!r} {what}; choose a model whose"
        " template has tools, or leave such rows out"
    )


def _probed(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """A question as the chat template asks it, and with its answer; empty where there is no template that can."""
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        return "", ""
    turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, **_TEMPLATE_ARGUMENTS))
        asked = tokenizer.apply_chat_template(
            turns[:1], tokenize=False, add_generation_prompt=True, **_TEMPLATE_ARGUMENTS
        )
    except TemplateError:  # it renders questions alone
        return "", ""
    return str(asked), text


def _markers(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every special token, those that only the vocabulary marks as special too."""
    return {*tokenizer.all_special_ids} | {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}

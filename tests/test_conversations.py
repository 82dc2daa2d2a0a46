"""Conversations as training rows: every answer at once, calls of tools as templates write them. And plain text."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from test_data import CHAT, byte_tokenizer, jsonl, section

from left_bench.core.errors import UserError
from left_bench.data import Example, collate, load_data
from left_bench.data.rows import split_rows

# it writes calls of tools as JSON behind a mark of its own, as public templates do
CHAT_WITH_TOOLS = (
    "{{ bos_token }}{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}\n{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% for call in m.tool_calls or [] %}[CALL]{{ call.function | tojson }}{% endfor %}"
    "{{ eos_token if m['role'] == 'assistant' else '' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CLOSED = CHAT.replace("{{ m['content'] }}\n", "{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' else '' }}\n")
LEADING = CLOSED.replace("<{{ m['role'] }}>", "<{{ m['role'] }}>{{ ' ' if m['role'] == 'assistant' else '' }}")


def talk(number: int, *, turns: int = 3) -> dict[str, Any]:
    results = []
    for turn in range(turns):
        results.append({"role": "user", "content": f"Question {number}, {turn}?"})
        results.append({"role": "assistant", "content": f"Answer {turn} to {number}.\n"})
    return {"messages": results}


def loaded(path: str, *, template: str | None = CLOSED, max_length: int = 512, **keys: Any) -> Any:
    apart = keys.pop("one_answer_a_row", False)
    data = section(path=path, test_rows=1, **keys)
    return load_data(data, byte_tokenizer(chat_template=template), max_length=max_length, one_answer_a_row=apart)


def labelled(rows: Any) -> Counter[tuple[Any, int]]:
    """Each token that carries loss, with all that stands before it."""
    result: Counter[tuple[Any, int]] = Counter()
    for row in rows:
        batch = collate([row], pad_id=0)
        ids = batch.input_ids[0].tolist()
        for position in batch.label_positions.tolist():
            result[tuple(ids[: position + 1]), ids[position + 1]] += 1
    return result


@pytest.mark.parametrize("template", [CLOSED, LEADING])
def test_a_conversation_in_one_row_teaches_what_its_answers_teach_apart(template, tmp_path):
    path = jsonl(tmp_path / "r.jsonl", [talk(number) for number in range(4)])
    together = loaded(path, template=template).train
    apart = loaded(path, template=template, one_answer_a_row=True).train
    assert (len(together), len(apart)) == (3, 9)
    assert labelled(together) == labelled(apart)
    assert sum(row.length for row in together) < 0.6 * sum(row.length for row in apart)
    assert [row.labels for row in together] == [sum(row.of_answer) for row in together]


def test_what_a_model_makes_of_a_conversation_in_one_row_is_its_answers_loss(tmp_path, tiny_cell, load_tiny):
    from left_bench.training.loss import AnswerLoss

    model, tokenizer = load_tiny(tiny_cell())
    tokenizer.chat_template = CLOSED.replace("{{ bos_token }}", "")
    path = jsonl(tmp_path / "r.jsonl", [talk(number, turns=2 + number) for number in range(4)])
    data, losses = section(path=path, test_rows=1), []
    for apart in (False, True):
        rows = list(load_data(data, tokenizer, max_length=512, one_answer_a_row=apart).train)
        with torch.no_grad():
            of_tokens = AnswerLoss(model).of_tokens(collate(rows, pad_id=tokenizer.pad_token_id))
        losses.append(of_tokens.sort().values)
    assert losses[0].shape == losses[1].shape
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)


def test_the_labels_of_a_packed_conversation_are_those_of_a_padded_one(tmp_path):
    rows = list(loaded(jsonl(tmp_path / "r.jsonl", [talk(number) for number in range(4)])).train)
    padded, packed = (collate(rows, pad_id=0, packed=packed) for packed in (False, True))
    assert padded.targets.tolist() == packed.targets.tolist() and padded.answer_lengths == packed.answer_lengths
    assert (padded.labels != -100).sum() == (packed.labels != -100).sum() == sum(row.labels for row in rows)


@pytest.mark.parametrize(
    "template", [None, CHAT, CLOSED.replace("{% for m in messages %}", "{% for m in messages[-3:] %}")]
)
def test_answers_whose_context_is_rendered_otherwise_later_are_rows_apart(template, tmp_path):
    """No template, one without a turn's end, one that forgets: what follows does not begin with the row before."""
    path = jsonl(tmp_path / "r.jsonl", [talk(number) for number in range(4)])
    together, apart = (loaded(path, template=template, one_answer_a_row=item).train for item in (False, True))
    assert labelled(together) == labelled(apart)
    assert len(together) > 3


def test_a_conversation_that_is_too_long_is_one_row_as_far_as_it_fits(tmp_path):
    path = jsonl(tmp_path / "r.jsonl", [talk(number, turns=8) for number in range(3)])
    splits, apart = loaded(path, max_length=160), loaded(path, max_length=160, one_answer_a_row=True)
    assert all(row.length <= 160 for row in splits.train)
    assert labelled(splits.train) == labelled(apart.train)
    assert splits.truncated_rows == apart.truncated_rows > 0
    assert 2 < len(splits.train) < len(apart.train) and splits.longest_row > 160


def test_a_held_out_conversation_is_asked_for_one_of_its_turns(tmp_path):
    path = jsonl(tmp_path / "r.jsonl", [talk(number) for number in range(30)])
    result = split_rows(section(path=path, test_rows=20))
    assert len(result.test) == 20 and all(not row.earlier for row in result.test)
    assert {row.answer.split()[1] for row in result.test} == {"0", "1", "2"}
    assert result.test == split_rows(section(path=path, test_rows=20)).test


@pytest.mark.parametrize("template", [CLOSED, LEADING, None])
def test_trained_on_all_every_token_but_the_first_carries_loss(template, tmp_path):
    path = jsonl(tmp_path / "r.jsonl", [talk(number) for number in range(4)])
    every = loaded(path, template=template, train_on="all")
    last = loaded(path, template=template, train_on="last")
    assert [row.prompt_ids + row.answer_ids for row in every.train] == [
        row.prompt_ids + row.answer_ids for row in last.train
    ]
    assert all(row.labels == row.length - 1 for row in every.train)
    assert [row.labels for row in every.test] == [row.labels for row in last.test]


def test_white_space_that_a_template_writes_before_an_answer_is_the_answers(tmp_path):
    path = jsonl(tmp_path / "r.jsonl", [talk(number, turns=1) for number in range(3)])
    tokenizer, row = byte_tokenizer(chat_template=LEADING), loaded(path, template=LEADING).train[0]
    turns = [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.reference}]
    assert (
        tokenizer.decode(row.prompt_ids + row.answer_ids) == tokenizer.apply_chat_template(turns, tokenize=False)[:-1]
    )
    assert tokenizer.decode(row.answer_ids) == f" {row.reference}</s>"


# ---- tools


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def with_tools(number: int, *, arguments: Any = None, **record: Any) -> dict[str, Any]:
    call = {"name": "weather", "arguments": json.dumps({"city": f"Ulm {number}"}) if arguments is None else arguments}
    turns = [
        {"role": "user", "content": f"Is it warm, {number}?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "c1", "content": '{"degrees": 7}'},
        {"role": "assistant", "content": "No."},
    ]
    return {"messages": turns, "tools": [TOOL], **record}


def test_a_call_of_a_tool_is_an_answer_as_the_template_writes_it(tmp_path):
    path = jsonl(tmp_path / "r.jsonl", [with_tools(number) for number in range(3)])
    splits = loaded(path, template=CHAT_WITH_TOOLS)
    tokenizer = byte_tokenizer(chat_template=CHAT_WITH_TOOLS)
    [row] = [item for item in splits.train if "Ulm 0" in tokenizer.decode(item.answer_ids)] or [splits.train[0]]
    number = row.prompt.rpartition(" ")[2].rstrip("?")
    call = f'[CALL]{{"name": "weather", "arguments": {{"city": "Ulm {number}"}}}}'
    ids = [id for id, of_answer in zip(row.answer_ids, row.of_answer, strict=True) if of_answer]
    assert tokenizer.decode(ids) == f"{call}</s>No.</s>"
    assert '<tools>{"type": "function"' in tokenizer.decode(row.prompt_ids)
    assert '<tool>{"degrees": 7}' in tokenizer.decode(row.answer_ids)


def test_a_held_out_call_is_compared_with_the_text_of_the_call(tmp_path):
    path = jsonl(tmp_path / "r.jsonl", [{**with_tools(n), "messages": with_tools(n)["messages"][:2]} for n in range(3)])
    [row] = loaded(path, template=CHAT_WITH_TOOLS).test
    assert row.reference.startswith('[CALL]{"name": "weather"') and row.reference.endswith("}")


@pytest.mark.parametrize(
    "changes",
    [{"tools": json.dumps([TOOL])}, {"tools": None, "functions": [TOOL["function"]]}, {"arguments": {"city": "Ulm"}}],
)
def test_other_ways_of_writing_tools_are_read(changes, tmp_path):
    path = jsonl(tmp_path / "r.jsonl", [with_tools(number, **changes) for number in range(3)])
    [row] = loaded(path, template=CHAT_WITH_TOOLS).test
    assert '"name": "weather"' in byte_tokenizer().decode(row.prompt_ids)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (CLOSED, "silently drops 'weather' from its tools"),
        (None, "only a chat template can write"),
        (CHAT_WITH_TOOLS.replace("<tools>", "{{ raise_exception('no tools') }}"), "cannot render its tools (no tools)"),
    ],
)
def test_a_template_without_tools_is_refused_with_file_and_row(template, words, tmp_path):
    path = jsonl(tmp_path / "r.jsonl", [{"messages": talk(9, turns=1)["messages"]}, *map(with_tools, range(3))])
    with pytest.raises(UserError) as raised:
        loaded(path, template=template)
    message = str(raised.value)
    assert words in message and f"of data.path={path}" in message and message.startswith("line "), message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [("{", "line 1 of data.path=.*: turn 2: the arguments of weather are not JSON"), ("[1]", "are a list")],
)
def test_arguments_that_are_no_object_are_refused(arguments, words, tmp_path):
    path = jsonl(tmp_path / "r.jsonl", [with_tools(number, arguments=arguments) for number in range(3)])
    with pytest.raises(UserError, match=words):
        loaded(path, template=CHAT_WITH_TOOLS)


# ---- plain text


def texts(path: Path, lengths: list[int], *, column: str = "text") -> str:
    return jsonl(path, [{column: f"{number} " + "x" * length} for number, length in enumerate(lengths)])


def test_documents_are_packed_end_to_end_and_every_token_is_trained_on_once(tmp_path):
    path = texts(tmp_path / "r.jsonl", [10, 300, 5, 70, 20])
    splits, tokenizer = loaded(path, max_length=64), byte_tokenizer()
    stream = [id for row in splits.train for id in row.prompt_ids + row.answer_ids]
    held_out = splits.test[0].reference
    documents = [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]
    assert sorted(tokenizer.decode(stream).split("</s>")[:-1]) == sorted(
        f"<s>{document}" for document in documents if document != held_out
    )
    assert {row.length for row in splits.train[:-1]} == {64} and splits.truncated_rows == 0
    assert all(len(row.prompt_ids) == 1 and row.labels == row.length - 1 for row in splits.train)
    assert "plain text" in str(splits.shape)


def test_a_held_out_document_is_scored_by_itself_and_what_does_not_fit_is_counted(tmp_path):
    splits = loaded(texts(tmp_path / "r.jsonl", [300] * 4), max_length=64)
    [row] = splits.test
    assert row.length == 64 and row.prompt_ids == [byte_tokenizer().bos_token_id] and splits.truncated_test_rows == 1


def test_a_document_that_is_held_out_is_not_trained_on(tmp_path):
    path = jsonl(tmp_path / "r.jsonl", [{"text": f"text {number % 4}"} for number in range(12)])
    result = split_rows(section(path=path, test_rows=1))
    assert (len(result.train), len(result.test), result.repeated) == (9, 1, 2)


def test_another_column_of_texts_is_named(tmp_path):
    path = texts(tmp_path / "r.jsonl", [3, 4, 5], column="body")
    assert len(loaded(path, shape="text", answer_column="body").train) == 1
    with pytest.raises(UserError, match=r"line 1 of .*: has no column 'bodi'.*did you mean 'body'"):
        loaded(path, shape="text", answer_column="bodi")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"pairs": True}, "data.pairs=True: plain text has neither questions nor turns"),
        ({"instruction": "Be brief."}, "data.instruction=Be brief.: plain text"),
        ({"train_on": "all"}, "data.train_on=all: plain text"),
        ({"template": "{prompt}!"}, "data.template={prompt}!: plain text"),
    ],
)
def test_what_has_no_meaning_for_plain_text_is_refused(keys, words, tmp_path):
    with pytest.raises(UserError) as raised:
        split_rows(section(path=texts(tmp_path / "r.jsonl", [1, 2, 3]), shape="text", **keys))
    assert words in str(raised.value)


def test_texts_and_questions_are_not_held_against_each_other(tmp_path):
    questions = jsonl(tmp_path / "q.jsonl", [{"prompt": "P", "answer": "A"}])
    with pytest.raises(UserError, match=r"data.path=.*r.jsonl: holds plain text, and data.test_path=.* does not"):
        split_rows(section(path=texts(tmp_path / "r.jsonl", [1, 2, 3]), test_path=questions))


def test_a_cell_of_plain_text_knows_it_and_generates_nothing(tmp_path, tiny_cell, work_in_process):
    path = texts(tmp_path / "r.jsonl", [40, 50, 60, 70, 80])
    given = ("data=jsonl", f"data.path={path}", "data.train_rows=null", "data.test_rows=2", "training.max_length=64")
    cell, named = tiny_cell(*given), tiny_cell(*given, "data.shape=text")
    assert cell.data.shape == "text" and not cell.generates and cell.id == named.id
    result = work_in_process(cell)
    assert "generate_tokens_per_second" not in result["metrics"] and result["metrics"]["train_rows"] == 3
    lines = [json.loads(line) for line in (result["run_dir"] / "rows.jsonl").read_text().splitlines()]
    assert all(line["nll"] > 0 and line["prediction"] is None and line["answer_tokens"] > 40 for line in lines)


def test_a_model_with_an_encoder_does_not_take_plain_text(tiny_cell):
    from left_bench.grid.rules import why_unsupported

    cell = tiny_cell("model=tiny_t5", "data=jsonl", "data.path=nowhere.jsonl", "data.shape=text")
    assert "plain text is for decoder-only models" in str(why_unsupported(cell))
    cell = tiny_cell("model=tiny_t5", "data=jsonl", "data.path=nowhere.jsonl", "data.train_on=all")
    assert "data.train_on=all" in str(why_unsupported(cell))


def test_an_activated_lora_is_given_its_answers_apart(tmp_path, tiny_cell):
    """It begins to act at the last invocation of a row: earlier answers in it would be the base model's."""
    from left_bench.model.load import load_rows_of

    path = jsonl(tmp_path / "r.jsonl", [talk(number) for number in range(4)])
    given = ("data=jsonl", f"data.path={path}", "data.test_rows=1", "data.train_rows=null", "training.max_length=512")
    tokenizer = byte_tokenizer(chat_template=CLOSED)
    counts = [
        len(load_rows_of(tiny_cell(*given, f"peft={item}"), tokenizer, folder="").train) for item in ("lora", "alora")
    ]
    assert counts == [3, 9]


def test_examples_count_their_tokens_as_their_columns_do(tmp_path):
    splits = loaded(jsonl(tmp_path / "r.jsonl", [talk(number) for number in range(4)]))
    context, answer = splits.train.lengths()
    assert answer == [row.labels for row in splits.train]
    assert context == [row.length - row.labels for row in splits.train]
    assert isinstance(splits.train[0], Example)

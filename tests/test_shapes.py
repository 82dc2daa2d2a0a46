"""Files and shapes of people's own rows: found by looking, read alike, and refused in one sentence."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from test_data import CHAT, byte_tokenizer, section

from left_bench.core.errors import UserError
from left_bench.data import load_data, load_rows
from left_bench.data.files import with_content
from left_bench.data.rows import split_rows
from left_bench.data.shapes import Row

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "First."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Second."},
]


def written(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def rows_of(path: Path, **keys: Any) -> list[Row]:
    """All rows of a file, one of them held out."""
    train, test = load_rows(section(path=str(path), test_rows=1, **keys))
    return sorted([*train, *test], key=lambda row: (row.prompt, row.answer))


def asked(number: int) -> list[dict[str, str]]:
    """The conversation, with questions of its own."""
    return [turn | {"content": turn["content"].replace("?", f" {number}?")} for turn in TURNS]


# ---- shapes


@pytest.mark.parametrize(
    ("record", "prompt", "answer"),
    [
        ({"prompt": "P{}", "completion": "A"}, "P0", "A"),
        ({"question": "P{}", "answer": 7}, "P0", "7"),
        ({"instruction": "P{}", "input": "", "output": "A"}, "P0", "A"),
        ({"instruction": "P{}", "input": "more", "output": "A"}, "P0\n\nmore", "A"),
        ({"instruction": "P{}", "output": "    indented\n"}, "P0", "    indented"),
        ({"messages": [{"role": "user", "content": "P{}"}, {"role": "assistant", "content": "A"}]}, "P0", "A"),
        ({"conversations": [{"from": "human", "value": "P{}"}, {"from": "gpt", "value": "A"}]}, "P0", "A"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "P{}"}]}, TURNS[2]]},
            "P0",
            "First.",
        ),
        ({"prompt": "P{}", "chosen": "A", "rejected": "B"}, "P0", "A"),
        ({"text": "P{}", "label": 3, "idx": 9}, "P0", "3"),
    ],
)
def test_a_shape_is_found_by_looking(record, prompt, answer, tmp_path):
    lines = [json.loads(json.dumps(record).replace("P{}", f"P{number}")) for number in range(4)]
    first = rows_of(written(tmp_path / "r.jsonl", lines))[0]
    assert (first.prompt, first.answer) == (prompt, answer)


@pytest.mark.parametrize(("train_on", "earlier"), [("assistant", ["First."]), ("last", []), ("all", [])])
def test_every_assistant_turn_is_trained_on_or_the_last_alone(train_on, earlier, tmp_path):
    path = written(tmp_path / "r.jsonl", [{"messages": asked(number)} for number in range(5)])
    result = split_rows(section(path=str(path), test_rows=1, train_on=train_on))
    assert len(result.train) == 4 and result.test[0].earlier == ()
    assert {row.group for row in result.train}.isdisjoint({result.test[0].group})
    words = {"assistant": "every assistant turn", "last": "the last assistant turn of each", "all": "every token"}
    assert words[train_on] in str(result.shape)
    row = result.train[0]
    assert row.answer == "Second." and [item.answer for item in row.earlier] == earlier
    assert row.before is not None and [turn["role"] for turn in row.before] == ["system", "user", "assistant", "user"]


def test_a_conversation_is_rendered_as_its_template_has_it(tmp_path):
    path = written(tmp_path / "r.jsonl", [{"messages": asked(number)} for number in range(3)])
    tokenizer = byte_tokenizer(chat_template=CHAT)
    splits = load_data(section(path=str(path), test_rows=1, train_on="last"), tokenizer, max_length=512)
    number = splits.train[0].prompt.split()[1]
    turns = asked(int(number.rstrip("?")))[:-1]
    expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(splits.train[0].prompt_ids) == expected
    assert splits.shape == "conversations (OpenAI's messages), the last assistant turn of each"


def test_a_conversation_that_is_too_long_loses_its_oldest_turns_whole(tmp_path):
    lines = []
    for number in range(3):
        turns = asked(number)
        for turn in turns[1:3]:
            turn["content"] += " " + "x" * 200
        lines.append({"messages": turns})
    path = written(tmp_path / "r.jsonl", lines)
    tokenizer = byte_tokenizer(chat_template=CHAT)
    splits = load_data(section(path=str(path), test_rows=1, train_on="last"), tokenizer, max_length=128)
    text = tokenizer.decode(splits.train[0].prompt_ids)
    kept = [TURNS[0], {"role": "user", "content": splits.train[0].prompt}]
    assert text == tokenizer.apply_chat_template(kept, tokenize=False, add_generation_prompt=True)
    assert splits.truncated_rows == len(splits.train)


def test_pairs_of_conversations_part_at_their_last_turn(tmp_path):
    lines = [
        {"chosen": [*asked(n)[:-1], {"role": "assistant", "content": "yes"}],
         "rejected": [*asked(n)[:-1], {"role": "assistant", "content": "no"}]}
        for n in range(3)
    ]  # fmt: skip
    keys = {"answer_column": "chosen", "rejected_column": "rejected", "pairs": True}
    row = rows_of(written(tmp_path / "r.jsonl", lines), **keys)[0]
    assert (row.prompt, row.answer, row.rejected) == ("Two 0?", "yes", "no")
    assert row.before is not None and len(row.before) == 4
    lines[1]["rejected"][1]["content"] = "another question"
    with pytest.raises(UserError, match=r"line 2 of .*'chosen' and 'rejected' must be the same except for their last"):
        rows_of(written(tmp_path / "r.jsonl", lines), **keys)


def test_columns_that_a_person_names_are_no_shape(tmp_path):
    lines = [{"instruction": f"P{n}", "input": "i", "output": "A", "title": f"T{n}"} for n in range(3)]
    path = written(tmp_path / "r.jsonl", lines)
    assert rows_of(path, prompt_column="title", answer_column="output")[0].prompt == "T0"
    assert rows_of(path, shape="alpaca", prompt_column="title")[0].prompt == "P0\n\ni"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": [{"role": "usr", "content": "x"}]}, ["turn 1 has the role 'usr'", "did you mean 'user'?"]),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, ["turn 1 holds an object, not text"]),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}]},
            ["turn 1 has a part that is not text"],
        ),
        ({"messages": [TURNS[1]]}, ["data.shape=messages: none of the 3 rows"]),
    ],
)
def test_what_is_no_such_shape_is_one_sentence(record, words, tmp_path):
    with pytest.raises(UserError) as raised:
        rows_of(written(tmp_path / "r.jsonl", [record] * 3))
    assert all(word in str(raised.value) for word in words), raised.value
    assert len(str(raised.value).splitlines()) == 1


def test_a_mistyped_shape_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data\.shape='alpacca': there is no such shape; did you mean 'alpaca'\?"):
        rows_of(written(tmp_path / "r.jsonl", [{"a": 1}]), shape="alpacca")


# ---- files


ROWS = [{"prompt": f"P{number}", "answer": "NA" if number == 1 else str(number)} for number in range(4)]


def save(kind: str, folder: Path) -> Path:
    """The rows, in a file of that kind."""
    path, table = folder / f"rows{kind}", datasets.Dataset.from_list(ROWS)
    if kind == ".json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif kind == ".data.json":
        path.write_text("\ufeff" + json.dumps({"version": 1, "data": ROWS}), encoding="utf-8")
    elif kind == ".lines.json":
        written(path, ROWS)
    elif kind == ".jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\r\n" for row in ROWS).encode()))
    elif kind == ".csv":
        table.to_csv(path, index=False)
    elif kind == ".tsv":
        table.to_csv(path, index=False, sep="\t")
    elif kind == ".parquet":
        table.to_parquet(path)
    else:
        table.save_to_disk(path)
    return path


@pytest.mark.parametrize(
    "kind", [".json", ".data.json", ".lines.json", ".jsonl.gz", ".csv", ".tsv", ".parquet", "_saved"]
)
def test_a_kind_of_file_is_read(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    result = rows_of(save(kind, tmp_path))
    assert [(row.prompt, row.answer) for row in result] == [("P0", "0"), ("P1", "NA"), ("P2", "2"), ("P3", "3")]


def test_several_files_are_one_set_of_rows_known_by_what_is_in_them(tmp_path):
    for number in range(2):
        written(tmp_path / f"part{number}.jsonl", [{"prompt": f"P{number}{n}", "answer": "a"} for n in range(3)])
    data = section(path=str(tmp_path / "part*.jsonl"), test_rows=1)
    assert sum(map(len, load_rows(data))) == 6
    before = with_content(data).content
    written(tmp_path / "part1.jsonl", [{"prompt": "new", "answer": "a"}])
    assert None is not before != with_content(data).content


def test_test_rows_of_ones_own_are_the_test_rows_and_are_not_trained_on(tmp_path):
    path = written(tmp_path / "train.jsonl", [{"prompt": f"P{n}", "answer": "a"} for n in range(6)])
    apart = written(tmp_path / "test.jsonl", [{"prompt": f"P{n}", "answer": "b"} for n in (0, 10, 11)])
    data = section(path=str(path), test_path=str(apart), test_rows=50)
    result = split_rows(data)
    assert sorted(row.prompt for row in result.test) == ["P0", "P10", "P11"]
    assert sorted(row.prompt for row in result.train) == ["P1", "P2", "P3", "P4", "P5"] and result.repeated == 1
    before = with_content(data).content
    written(apart, [{"prompt": "P1", "answer": "b"}])
    assert before != with_content(data).content


def test_a_saved_data_set_brings_its_own_test_split(tmp_path):
    parts = {"train": ROWS[:3], "test": [{"prompt": "T", "answer": "t"}]}
    datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}).save_to_disk(
        tmp_path / "saved"
    )
    train, test = load_rows(section(path=str(tmp_path / "saved"), test_rows=5))
    assert len(train) == 3 and [row.prompt for row in test] == ["T"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.xlsx", b"PK", [".xlsx files are not supported", ".parquet"]),
        ("rows.parquet", b"PAR?", ["is not readable as .parquet"]),
        ("rows.json", b"[1, 2]", ["row 1 is a number, not an object"]),
        ("rows.json", b"3", ["holds a number, not rows"]),
        ("rows.jsonl.gz", b"no gzip", ["cannot be read"]),
        ("rows.json", b"\xff\xfe", ["is not UTF-8 text"]),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as raised:
        rows_of(tmp_path / name)
    assert all(word in str(raised.value) for word in words), raised.value
    assert f"data.path={tmp_path / name}" in str(raised.value)


# ---- what a value may be


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("r.jsonl", '\ufeff{"prompt": "P0", "answer": "a"}\n{"prompt": "P1", "answer": "b"}\n'),
        ("r.jsonl", '{"prompt": "P0", "answer": "a"}\r\n\r\n{"prompt": "P1", "answer": "b"}\r\n'),
        ("r.json", '\ufeff[{"prompt": "P0", "answer": "a"},\r\n {"prompt": "P1", "answer": "b"}]'),
        ("r.csv", "\ufeffprompt,answer\r\nP0,a\r\nP1,b\r\n"),
        ("r.tsv", "\ufeffprompt\tanswer\nP0\ta\nP1\tb\n"),
    ],
)
def test_a_byte_order_mark_and_line_ends_of_other_systems_are_no_part_of_the_text(name, text, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / name).write_bytes(text.encode())
    assert [(row.prompt, row.answer) for row in rows_of(tmp_path / name)] == [("P0", "a"), ("P1", "b")]


@pytest.mark.parametrize(
    ("value", "answer"),
    [(7, "7"), (-0.5, "-0.5"), (1e21, "1e+21"), (True, "true"), (False, "false"), ("  x\r\n", "  x")],
)
def test_an_answer_that_is_a_number_is_its_text(value, answer, tmp_path):
    lines = [{"prompt": f"P{n}", "answer": value} for n in range(2)]
    assert rows_of(written(tmp_path / "r.jsonl", lines))[0].answer == answer
    with_turns = [{"messages": [TURNS[1] | {"content": f"P{n}"}, TURNS[2] | {"content": value}]} for n in range(2)]
    assert rows_of(written(tmp_path / "m.jsonl", with_turns))[0].answer == answer


def test_values_of_a_csv_file_stay_as_they_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    answers = ["007", "1.50", "True", "NA", "1e3", "null"]
    text = "prompt,answer\n" + "".join(f"P{number},{answer}\n" for number, answer in enumerate(answers))
    (tmp_path / "r.csv").write_text(text + "P6,\n")
    result = split_rows(section(path=str(tmp_path / "r.csv"), test_rows=1))
    assert sorted(row.answer for row in [*result.train, *result.test]) == sorted(answers)
    assert result.dropped == ["row 7: no answer"]


@pytest.mark.parametrize(
    ("record", "lacks"),
    [
        ({"prompt": "P", "answer": None}, "no answer"),
        ({"prompt": "P", "answer": " \n"}, "no answer"),
        ({"prompt": None, "answer": "A"}, "no prompt"),
        ({"messages": []}, "no assistant turn that answers a user"),
        ({"messages": TURNS[1:2]}, "no assistant turn that answers a user"),
        ({"messages": [TURNS[1], {"role": "assistant", "content": None}]}, "no assistant turn that answers a user"),
        ({"prompt": "P", "chosen": "A", "rejected": None}, "no worse answer"),
        ({"prompt": "P", "chosen": "A", "rejected": "A"}, "the worse answer is the answer"),
    ],
)
def test_a_row_that_lacks_something_is_dropped_and_says_what(record, lacks, tmp_path):
    whole: dict[str, Any] = {"prompt": "P{}", "answer": "A"}
    if "messages" in record:
        whole = {"messages": [{"role": "user", "content": "P{}"}, TURNS[2]]}
    elif "chosen" in record:
        whole = {"prompt": "P{}", "chosen": "A", "rejected": "B"}
    lines = [json.loads(json.dumps(whole).replace("{}", str(number))) for number in range(3)]
    result = split_rows(section(path=str(written(tmp_path / "r.jsonl", [*lines, record])), test_rows=1))
    assert result.dropped == [f"line 4: {lacks}"] and len(result.train) + len(result.test) == 3


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "P", "answer": ["a", "b"]}, "column 'answer' holds a list, not text"),
        ({"prompt": "P", "answer": {"a": 1}}, "column 'answer' holds an object, not text"),
        ({"prompt": ["P"], "completion": "A"}, "column 'prompt' holds a list, not text"),
        ({"instruction": "P", "output": ["A"]}, "column 'output' holds a list, not text"),
        ({"prompt": "P", "chosen": "A", "rejected": ["B"]}, "column 'rejected' holds a list, not text"),
        ({"messages": "Hello"}, "column 'messages' holds a text, not a list of turns"),
        ({"messages": ["Hello"]}, "column 'messages': turn 1 is a text"),
        ({"text": ["a novel"]}, "column 'text' holds a list, not text"),
        ({"prompt": "P", "answer": "\ud800"}, "column 'answer' holds an incomplete character"),
    ],
)
def test_a_value_that_is_no_text_is_refused_with_file_and_row(record, words, tmp_path):
    path = tmp_path / "r.jsonl"
    shapes = {"messages": "messages", "text": "text"}
    keys = {"shape": next((name for column, name in shapes.items() if column in record), None)}
    whole = {"prompt": "P", "answer": "A", "completion": "A", "instruction": "P", "output": "A", "text": "T"}
    first = {key: whole.get(key, "other") for key in record} | ({"messages": TURNS} if "messages" in record else {})
    with pytest.raises(UserError) as raised:
        rows_of(written(path, [first, record]), **keys)
    assert f"line 2 of data.path={path}: {words}" in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


# ---- preference pairs


ASKED = {"role": "user", "content": "P{}"}
GOOD, BAD = ({"role": "assistant", "content": answer} for answer in "AB")
SHAREGPT = [[{"from": "human", "value": "P{}"}, {"from": "gpt", "value": answer}] for answer in "AB"]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "P{}", "chosen": "A", "rejected": "B"},
        {"prompt": "P{}", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": "P{}", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"chosen": SHAREGPT[0], "rejected": SHAREGPT[1]},
    ],
)
@pytest.mark.parametrize("pairs", [True, False])
def test_pairs_are_read_as_texts_and_as_messages(record, pairs, tmp_path):
    lines = [json.loads(json.dumps(record).replace("{}", str(number))) for number in range(3)]
    named = {"answer_column": "chosen", "rejected_column": "rejected"} if pairs else {}
    path = written(tmp_path / "r.jsonl", lines)
    splits = load_data(
        section(path=str(path), test_rows=1, pairs=pairs, **named), byte_tokenizer(chat_template=CHAT), max_length=512
    )
    [row] = splits.test
    text = byte_tokenizer().decode(row.prompt_ids)
    assert text == f"<s><user>{row.prompt}\n<assistant>" and row.prompt.startswith("P")
    assert (row.reference, row.rejected) == ("A", "B")


# ---- rows of the test set that stand in the training set too


def test_rows_of_both_sets_are_left_out_of_training_and_counted(tmp_path):
    path = written(tmp_path / "train.jsonl", [{"prompt": f"P{n}", "answer": "a"} for n in range(6)])
    apart = written(tmp_path / "test.jsonl", [{"prompt": p, "answer": "b"} for p in ("P0", " p0 ", "P1", "T")])
    for test_rows in (1, 50):  # one that is not drawn is a test row all the same
        result = split_rows(section(path=str(path), test_path=str(apart), test_rows=test_rows))
        assert sorted(row.prompt for row in result.train) == ["P2", "P3", "P4", "P5"]
        assert (
            result.repeated == 3 and result.test_there == 3
        )  # two training rows, and the test row that repeats another
        assert len(result.test) == min(test_rows, 3)


def test_a_conversation_of_both_sets_is_known_by_its_questions(tmp_path):
    path = written(tmp_path / "train.jsonl", [{"messages": asked(number)} for number in range(4)])
    apart = written(tmp_path / "test.jsonl", [{"messages": asked(0)[1:]}, {"messages": asked(9)}])
    result = split_rows(section(path=str(path), test_path=str(apart), test_rows=9))
    assert (len(result.train), len(result.test), result.repeated) == (3, 2, 1)


def test_a_question_that_stands_twice_is_held_out_once_and_not_trained_on(tmp_path):
    lines = [{"prompt": f"P{n % 4}", "answer": f"a{n}"} for n in range(12)]
    result = split_rows(section(path=str(written(tmp_path / "r.jsonl", lines)), test_rows=2))
    assert {row.prompt for row in result.train}.isdisjoint({row.prompt for row in result.test})
    assert (len(result.train), len(result.test), result.repeated, result.test_there) == (6, 2, 4, None)

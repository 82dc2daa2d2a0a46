"""Rows: where questions and answers come from, and which of them are held out."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from left_bench.core.errors import UserError, nearest
from left_bench.data.files import Records, data_files, file_records, has_split, split_records
from left_bench.data.shapes import Row, Shape, in_words, shape_of, text_of, whole_lines
from left_bench.spec.cell import Data

_ROUNDS = 50  # draws of a generator, in multiples of the rows asked for, before it counts as exhausted
DEFAULT_VALIDATION_ROWS = 32
"""Of `data.validation_rows: null`, where they cost training no row."""
_BARREN_ROUNDS = 3  # rounds in a row without one new question: the same


class RowSplits(NamedTuple):
    """What a source's rows became."""

    train: list[Row]
    test: list[Row]
    dropped: list[str]
    """Where rows stand that lack a prompt or an answer, or whose worse answer is none, each with what it lacks."""
    repeated: int
    """Rows left out because their question is a test row's; test rows of a set of their own that repeat another too."""
    shape: str | None = None
    """What the records were found to be, in words; None: columns by their names."""
    test_there: int | None = None
    """Different questions that the source's own test rows have; None: they are held out of the rows."""
    validation: Sequence[Row] = ()
    repeated_validation: int = 0
    """Validation rows left out because their question is trained on, tested on or repeated."""


def load_rows(section: Data) -> tuple[list[Row], list[Row]]:
    """The training rows and the test rows of `split_rows`."""
    result = split_rows(section)
    return result.train, result.test


def split_rows(section: Data, *, keep_records: bool = False) -> RowSplits:
    """Training, validation and test rows, drawn from one distribution, with no question in two of them, and what was
    left out.

    With `data.pairs` every row has a worse answer: that of `data.rejected_column`, else another row's of its split.

    A file (`data.path`, whatever the source) is read with the standard library alone. Rows with a blank prompt or
    answer are left out; a question that repeats stays on its side of the split. The test rows do not depend on
    `data.train_rows` where rows are read rather than generated, and in no case on `data.validation_rows`.

    Args:
        keep_records: each row with the record it comes from, all its columns included.

    Raises:
        UserError: a source, column, value or count that cannot be used; the message names the key and the fix.
    """
    if section.shape == "text":
        for key in ("pairs", "instruction", "template", "train_on"):
            if (given := getattr(section, key)) != Data.model_fields[key].default:
                raise UserError(f"data.{key}={given}: plain text has neither questions nor turns; leave it out")
    if section.pairs and section.train_on == "all":
        raise UserError("data.train_on=all: of a pair (data.pairs) the answers alone are compared; leave it out")
    dropped: list[str] = []
    held_out: list[Row] | None = None
    for_validation: list[Row] | None = None
    read = functools.partial(_rows, keep_records=keep_records)
    if section.path is not None or section.source == "jsonl":
        paths = data_files(section)
        source = f"data.path={section.path if len(paths) > 1 else paths[0]}"
        records, shape = _detect_shape(section, file_records(paths))
        rows = list(read(section, records, source, dropped, shape))
        held_out = _rows_apart(section, "test", paths, shape, source=source, read=read, dropped=dropped)
        if section.validation_rows != 0 and section.hold_out:
            for_validation = _rows_apart(section, "validation", paths, shape, source=source, read=read, dropped=dropped)
    elif section.source == "hub":
        source = f"data.hub_id={section.hub_id}"
        records, shape = _detect_shape(section, _hub_records(section, whole=keep_records))
        if _plain(shape) and section.shape is None:
            raise UserError(
                f"{source}: holds plain text; to train on that, give data.shape=text, else name two columns"
            )
        rows = list(read(section, records, source, dropped, shape))
        if section.validation_path is not None:
            raise UserError(
                f"data.validation_path={section.validation_path}: {source} is no file; its split `validation` is taken"
                " where it has one, else set data.validation_rows=NUMBER"
            )
        if section.validation_rows != 0 and section.hold_out:
            for_validation = _hub_validation(section, f"{source}: split validation", read, dropped)
    else:
        source, shape = f"data.task={section.task}", None
        rows, for_validation = _generated_rows(section, source, read)
    train, test, repeated = _hold_out(section, rows, source, held_out=held_out)
    validation: list[Row] = []
    left_out = 0
    if section.hold_out:
        train, validation, left_out = _for_validation(section, train, held_out or test, source, apart=for_validation)
        train = train[: section.train_rows]
    if section.pairs and section.rejected_column is None and not any(row.rejected for row in rows):
        validation = _mismatched([*validation, *train], source)[: len(validation)]
        train, test = _mismatched(train, source), _mismatched(test, source)
    words = None if shape is None else in_words(shape, section)
    there = None if held_out is None else len({_question(row) for row in held_out})
    return RowSplits(
        *(train, test),
        dropped=dropped,
        repeated=repeated,
        shape=words,
        test_there=there,
        validation=validation,
        repeated_validation=left_out,
    )


def _rows_apart(
    section: Data,
    part: Literal["test", "validation"],
    paths: Sequence[Path],
    shape: Shape | None,
    *,
    source: str,
    read: Callable[..., Iterator[Row]],
    dropped: list[str],
) -> list[Row] | None:
    """The rows of a file of their own, or of the data set's own split; None where there is neither."""
    given = section.test_path if part == "test" else section.validation_path
    if given is not None:
        records: Records = file_records(data_files(section, part=part))
        named = f"data.{part}_path={given}"
    elif len(paths) == 1 and has_split(paths[0], part):
        records, named = split_records(paths[0], part), f"{source}: split {part}"
    else:
        return None
    records, shape_apart = _detect_shape(section, records)
    if _plain(shape_apart) != _plain(shape):
        one, other = (named, source) if _plain(shape_apart) else (source, named)
        raise UserError(f"{one}: holds plain text, and {other} does not; give {part} rows of the same shape")
    return list(read(section, records, named, dropped, shape_apart))


def with_shape(section: Data) -> Data:
    """The section with `shape: text` where its file is found to hold that: nothing is generated from such a cell.

    Other shapes change nothing of a cell, and are found where its rows are read; which says what is wrong, too.
    """
    if section.shape is not None or section.path is None or section.image_column is not None:
        return section
    return section.model_copy(update={"shape": "text"}) if _is_text(section.model_dump_json()) else section


@functools.cache  # a sweep composes one file thousands of times
def _is_text(section_json: str) -> bool:
    section = Data.model_validate_json(section_json)
    try:
        _, shape = _detect_shape(section, file_records(data_files(section)))
    except (UserError, OSError):
        return False
    return _plain(shape)


def _plain(shape: Shape | None) -> bool:
    return shape is not None and shape.name == "text"


def _detect_shape(section: Data, records: Records) -> tuple[Records, Shape | None]:
    """The records, and what the first of them is found to be (or `data.shape` says)."""
    iterator = iter(records)
    first = next(iterator, None)
    if first is None:
        return [], None
    if section.label_column is not None or section.margin_column is not None:
        return itertools.chain([first], iterator), None
    return itertools.chain([first], iterator), shape_of(section, first[1])


# --- sources: records with named columns ---


def _hub_records(section: Data, *, whole: bool, split: str | None = None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    result = _hub_dataset(section, split=split)
    needed = [column for _, column in _columns(section)]
    if not whole and result.column_names is not None and set(needed) <= set(result.column_names):
        result = result.select_columns(sorted(set(needed)))  # images and the like beside the text are not decoded
    for number, record in enumerate(result, start=1):
        yield f"{'' if split is None else f'{split} '}row {number}", record


def _hub_validation(
    section: Data, named: str, read: Callable[..., Iterator[Row]], dropped: list[str]
) -> list[Row] | None:
    """The rows of the data set's split `validation`; None where there is none, or where it is trained on."""
    if not brings_validation(_hub_dataset(section), section):
        return None
    records, shape = _detect_shape(section, _hub_records(section, whole=False, split="validation"))
    return list(read(section, records, named, dropped, shape))


def brings_validation(rows: Any, section: Data) -> bool:
    """Whether a data set of `datasets` has a split `validation` beside the one that was asked for."""
    return "validation" in (rows.info.splits or {}) and "validation" not in str(section.config.get("split", ""))


def _hub_dataset(section: Data, *, split: str | None = None) -> Any:
    """A split of the data set: `split`, else `data.config.split`, else `train`."""
    if not section.hub_id:
        raise UserError("data.hub_id is missing; set it to a hub dataset, or data.path=FILE to a JSON-lines file")
    import datasets

    where = f"data.hub_id={section.hub_id}"
    local = "point data.path= at a local JSON-lines file"
    try:
        asked = {"split": "train", **section.config} | ({} if split is None else {"split": split})
        dataset = datasets.load_dataset(section.hub_id, **asked)
    except ConnectionError as error:
        raise UserError(f"{where}: the hub cannot be reached from here; {local}") from error
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(f"{where}: no such dataset, or it wants a login (`hf auth login`); or {local}") from error
    except (datasets.exceptions.DatasetsError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{where}: not loaded with data.config={section.config} ({reason}); or {local}") from error
    if isinstance(dataset, dict):
        raise UserError(f"{where}: data.config.split must name one split; it has {', '.join(map(str, dataset))}")
    return dataset


def _generated_rows(
    section: Data, source: str, read: Callable[..., Iterator[Row]]
) -> tuple[list[Row], list[Row] | None]:
    """Unique questions of a reasoning_gym task (https://github.com/open-thought/reasoning-gym): enough for training and
    test, and those generated after them, which are for validation; None where validation was asked for and they do not
    suffice."""
    if not section.task:
        raise UserError("data.task is missing; name a reasoning_gym dataset, such as data.task=chain_sum")
    if section.train_rows is None:
        raise UserError(f"data.train_rows=null: {source} is generated without end; give a number")
    wanted = section.train_rows + section.test_rows
    beside = validation_rows_wanted(section)
    # The library seeds item i with seed + i: neighbouring seeds would share all but one of their items.
    seeds = random.Random(section.seed)
    unique: dict[str, Row] = {}
    barren = 0
    for _ in range(_ROUNDS):
        before = len(unique)
        drawn = _drawn_records(section, size=max(wanted, 100), seed=seeds.getrandbits(31))
        for row in read(section, drawn, source):
            unique.setdefault(_question(row), row)
            if len(unique) == wanted + beside:
                return _split_at(wanted, unique)
        barren = barren + 1 if len(unique) == before else 0
        if barren == _BARREN_ROUNDS:
            break
    if len(unique) >= wanted and section.validation_rows is None:
        return _split_at(wanted, unique)
    if len(unique) >= wanted:
        most = len(unique) - wanted
        raise UserError(
            f"data.validation_rows={section.validation_rows}: {source} has only {most} questions beside"
            f" {section.train_rows} training and {section.test_rows} test rows; set data.validation_rows={most} or"
            " lower, or widen data.config"
        )
    most = max(len(unique) - section.test_rows, 0)
    fix = f"set data.train_rows={most} or lower" if most else "lower data.train_rows and data.test_rows"
    raise UserError(
        f"data.train_rows={section.train_rows}: {source} has only {len(unique)} different questions"
        f" for {section.train_rows} training and {section.test_rows} test rows; {fix}, or widen data.config"
    )


def _split_at(place: int, unique: Mapping[str, Row]) -> tuple[list[Row], list[Row]]:
    rows = list(unique.values())
    return rows[:place], rows[place:]


def check_generated(section: Data) -> None:
    """Draw one item of a reasoning_gym task, to see that its settings, columns and template go together.

    Raises:
        UserError: as `load_rows`.
    """
    if not section.task:
        raise UserError("data.task is missing; name a reasoning_gym dataset, such as data.task=chain_sum")
    list(_rows(section, _drawn_records(section, size=1, seed=section.seed), f"data.task={section.task}"))


def _drawn_records(section: Data, *, size: int, seed: int) -> Records:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    task = str(section.task)
    if task not in DATASETS:
        hint = nearest(task, DATASETS) or f"; it has {', '.join(sorted(DATASETS))}"
        raise UserError(f"data.task={task!r}: reasoning_gym has no such dataset{hint}")
    known = [field.name for field in dataclasses.fields(DATASETS[task][1]) if field.name not in ("seed", "size")]
    for key in section.config:
        if key not in known:
            own = {"seed": "; use data.seed", "size": "; use data.train_rows and data.test_rows"}.get(key)
            hint = own or nearest(key, known) or f"; it has {', '.join(known)}"
            raise UserError(f"data.config.{key}: {task} has no such setting{hint}")
    try:
        items = reasoning_gym.create_dataset(task, size=size, seed=seed, **section.config)
        # `question` is the library's own word; `prompt` lets the default columns work as well.
        return [
            (
                f"item {i}",
                {
                    "prompt": item["question"],
                    "question": item["question"],
                    "answer": item["answer"],
                    "metadata": item.get("metadata"),  # what a verifier may ask for
                },
            )
            for i, item in enumerate(items[j] for j in range(size))
        ]
    except (AssertionError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"data.config={section.config}: {task} refuses it ({error}); change those settings") from error


# --- records to rows ---


def _rows(
    section: Data,
    records: Records,
    source: str,
    dropped: list[str] | None = None,
    shape: Shape | None = None,
    *,
    keep_records: bool = False,
) -> Iterator[Row]:
    """Rows with a prompt and an answer; at least one, or an error. What the others lack is noted in `dropped`."""
    parts, columns = _template_parts(section.template), _columns(section)

    def by_columns(record: Mapping[str, Any], where: str, _: Data) -> Iterator[Row]:
        texts: dict[str, str] = {}
        for key, column in columns:
            if column not in record:
                raise UserError(_missing_column(section, key, column, record, where))
            texts[column] = text_of(record[column], f"{where}: column '{column}'")
        prompt = "".join(
            literal + (texts[_column_of(section, field)] if field is not None else "") for literal, field in parts
        ).strip()
        rejected = whole_lines(texts[section.rejected_column]) if section.pairs and section.rejected_column else None
        answer = whole_lines(texts[section.answer_column])
        desirable = None if section.label_column is None else _is_good(texts[section.label_column], section, where)
        margin = None if section.margin_column is None else _margin(texts[section.margin_column], section, where)
        yield Row(prompt=prompt, answer=answer, rejected=rejected, margin=margin, desirable=desirable)

    read = by_columns if shape is None else shape.rows
    seen = kept = 0
    for where, record in records:
        seen += 1
        rows = list(read(record, f"{where} of {source}", section))
        whole = [row for row in rows if row.lacks is None]
        kept += len(whole)
        yield from (dataclasses.replace(row, record=record) for row in whole) if keep_records else whole
        if not whole and dropped is not None:
            dropped.append(f"{where}: {rows[0].lacks if rows else 'no assistant turn that answers a user'}")
    if not seen:
        raise UserError(f"{source}: is empty; it needs rows with a question and an answer")
    if not kept and _plain(shape):
        raise UserError(f"data.shape=text: none of the {seen} rows of {source} has any text; check the file")
    if not kept:
        column = f"data.answer_column={section.answer_column!r}" if shape is None else f"data.shape={shape.name}"
        raise UserError(
            f"{column}: none of the {seen} rows of {source} has both a prompt"
            " and an answer; name the column that holds the answers"
        )


def _template_parts(template: str) -> list[tuple[str, str | None]]:
    """Literal text and the column that follows it. `str.format` itself would follow attributes of the value."""
    where = f"data.template={template!r}"
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"{where}: {error}; a brace that is text is written twice") from error
    if any(spec or conversion for _, _, spec, conversion in parsed):
        raise UserError(f"{where}: a placeholder is a column's name in braces, without ':' or '!'")
    if all(field is None for _, field, _, _ in parsed):
        raise UserError(f"{where}: has no placeholder, so every row would ask the same; put {{prompt}} in it")
    return [(literal, field) for literal, field, _, _ in parsed]


def filled(section: Data, text: str) -> str:
    """`data.template` with a text in the place of the prompt, and nothing in that of other columns."""
    parts = _template_parts(section.template)
    asked = {_column_of(section, field) for _, field in parts if field is not None}
    place = section.prompt_column if section.prompt_column in asked else min(asked)
    values = dict.fromkeys(asked, "") | {place: text}
    return "".join(
        literal + ("" if field is None else values[_column_of(section, field)]) for literal, field in parts
    ).strip()


def _column_of(section: Data, field: str) -> str:
    """`{prompt}` stands for `data.prompt_column`, every other placeholder for the column of its name."""
    return section.prompt_column if field == "prompt" else field


def _columns(section: Data) -> list[tuple[str, str]]:
    """The key that asks for a column, and the column, for all that a row needs."""
    asked = [("data.answer_column", section.answer_column)]
    if section.pairs and section.rejected_column is not None:
        asked.append(("data.rejected_column", section.rejected_column))
    if section.label_column is not None:
        asked.append(("data.label_column", section.label_column))
    if section.margin_column is not None:
        asked.append(("data.margin_column", section.margin_column))
    for _, field in _template_parts(section.template):
        if field is not None:
            key = "data.prompt_column" if field == "prompt" else "data.template"
            asked.append((key, _column_of(section, field)))
    return asked


def _missing_column(section: Data, key: str, column: str, record: Mapping[str, Any], where: str) -> str:
    there = f"it has {', '.join(map(str, record)) or 'none'}{nearest(column, map(str, record))}"
    if key == "data.template":
        return f"data.template={section.template!r}: '{{{column}}}' is no column of {where}; {there}"
    return f"{key}={column!r}: no such column in {where}; {there}"


# --- worse answers ---


def _is_good(text: str, section: Data, where: str) -> bool:
    if text.strip().casefold() not in ("true", "false", "1", "0"):
        raise UserError(f"data.label_column={section.label_column!r}: {where} holds {text[:40]!r}; write true or false")
    return text.strip().casefold() in ("true", "1")


def _margin(text: str, section: Data, where: str) -> float:
    try:
        result = float(text)
    except ValueError:
        result = math.nan
    if not math.isfinite(result):
        raise UserError(f"data.margin_column={section.margin_column!r}: {where} holds {text[:40]!r}; write a number")
    return result


def _mismatched(rows: list[Row], source: str) -> list[Row]:
    """Every row with the answer of the next row that has another."""
    results = []
    for i, row in enumerate(rows):
        others = (rows[(i + ahead) % len(rows)].answer for ahead in range(1, len(rows)))
        other = next((answer for answer in others if answer != row.answer), None)
        if other is None:
            raise UserError(
                f"data.rejected_column=null: {source} has one and the same answer to all questions of a split, so none"
                " can stand for a worse one; name the column with worse answers"
            )
        results.append(dataclasses.replace(row, rejected=other))
    return results


# --- the split ---


def _hold_out(
    section: Data, rows: list[Row], source: str, *, held_out: list[Row] | None = None
) -> tuple[list[Row], list[Row], int]:
    """Shuffle by `data.seed`; the first different questions are the test rows, the other questions the training.

    Test rows that the source brings itself (`held_out`) are drawn from those alone, and none of them is trained on,
    drawn or not. Of a conversation that is held out one turn is asked: those of one conversation are no independent
    draws. The number is of the rows that repeat a test row's question. Without `data.hold_out` all are training rows,
    those of `held_out` too. How many of the training rows are taken is not decided here.
    """
    shuffled = random.Random(section.seed).sample(rows, len(rows))
    if held_out is None:
        questions = len({_question(row) for row in rows})
        if questions < section.test_rows + 1:
            if questions == 1:
                one, two = ("text", "texts") if rows[0].plain else ("question with an answer", "two")
                raise UserError(f"{source}: has one {one}; {two} are needed, to train on one and test one")
            raise UserError(
                f"data.test_rows={section.test_rows}: {source} has only {questions} different questions with an"
                f" answer, and one must be left to train on; set data.test_rows={questions - 1} or lower"
            )
        drawn = shuffled
    else:
        drawn = random.Random(section.seed).sample(held_out, len(held_out))
    test: dict[str, Row] = {}
    good = [row for row in drawn if row.desirable is not False]  # a bad answer is nothing to score by
    if not good:
        raise UserError(
            f"data.label_column={section.label_column!r}: {source} has no row that it calls good, and answers are"
            " scored by such; name the column that says so"
        )
    for row in good:
        if len(test) == section.test_rows:
            break
        test.setdefault(_question(row), _one_turn(row, seed=section.seed))
    asked = test.keys() if held_out is None else {_question(row) for row in held_out}
    train = [row for row in shuffled if _question(row) not in asked]
    if not train:
        raise UserError(f"{source}: each of its questions is a test row's too, and none is left to train on")
    _check_train_rows(section, train, source, beside=f"{len(test)} test rows")
    if not section.hold_out:  # the limit is of both together, and a question of the test rows may repeat
        together = [*shuffled, *(drawn if held_out is not None else [])]
        return together[: section.train_rows and section.train_rows + len(test)], [], 0
    repeated = len(rows) - len(train) - len(test) if held_out is None else len(rows) - len(train)
    repeated += 0 if held_out is None else len(held_out) - len(asked)
    return train, list(test.values()), repeated


def _check_train_rows(section: Data, train: Sequence[Row], source: str, *, beside: str) -> None:
    if section.train_rows is not None and len(train) < section.train_rows:
        raise UserError(
            f"data.train_rows={section.train_rows}: {source} leaves only {len(train)} training rows beside"
            f" {beside}; set data.train_rows={len(train)} or lower, or null for all"
        )


def validation_rows_wanted(section: Data) -> int:
    """How many validation rows there are to be, if there can be so many."""
    if not section.hold_out:
        return 0
    return DEFAULT_VALIDATION_ROWS if section.validation_rows is None else section.validation_rows


def _for_validation(
    section: Data, train: list[Row], test: Sequence[Row], source: str, *, apart: Sequence[Row] | None
) -> tuple[list[Row], list[Row], int]:
    """The rows that are left to train on, the validation rows, and how many of `apart` could not be such.

    Rows from a place of their own (`apart`) are drawn by `data.seed`; those whose question is trained on or tested on
    are left out, so that they take no row from training. Without such a place they are rows beyond `data.train_rows`,
    and then, if asked for by number, the last of the training rows.

    Args:
        train: all rows that may be trained on, in their order.
        test: the test rows, or all that they were drawn from.
    """
    wanted, asked = validation_rows_wanted(section), section.validation_rows is not None
    used = train if section.train_rows is None else train[: section.train_rows]
    taken = {_question(row) for row in [*used, *test]}
    results: dict[str, Row] = {}
    if apart is not None:
        fresh: dict[str, Row] = {}
        for row in random.Random(section.seed).sample(apart, len(apart)):
            if (question := _question(row)) not in taken and row.desirable is not False:
                fresh.setdefault(question, _one_turn(row, seed=section.seed))
        results = dict(itertools.islice(fresh.items(), wanted))
        left_out = len(apart) - len(fresh)
        if asked and len(results) < wanted:
            raise UserError(
                f"data.validation_rows={wanted}: {source} has only {len(results)} validation rows whose question is"
                f" neither trained on nor tested on; set data.validation_rows={len(results)} or lower"
            )
        return train, list(results.values()), left_out
    beyond = [row for row in train[len(used) :] if _question(row) not in taken]
    for row in [*beyond, *(reversed(used) if asked else ())]:
        if len(results) == wanted:
            break
        if row.desirable is not False:
            results.setdefault(_question(row), _one_turn(row, seed=section.seed))
    left = [row for row in train if _question(row) not in results]
    if asked and (len(results) < wanted or not left):
        most = max(0, len({_question(row) for row in train}) - 1)
        raise UserError(
            f"data.validation_rows={wanted}: {source} has only {most + 1} different questions beside {len(test)} test"
            f" rows, and one must be left to train on; set data.validation_rows={most} or lower"
        )
    _check_train_rows(section, left, source, beside=f"{len(test)} test rows and {len(results)} validation rows")
    return left, list(results.values()), 0


def _one_turn(row: Row, *, seed: int) -> Row:
    if not row.earlier:
        return row
    turns = [*row.earlier, dataclasses.replace(row, earlier=())]
    turn = random.Random(f"{seed} {_question(row)}").choice(turns)
    return dataclasses.replace(turn, record=row.record)


def _question(row: Row) -> str:
    """What makes two questions the same: their words, whatever the spacing and case."""
    return " ".join((row.group or row.prompt).split()).casefold()

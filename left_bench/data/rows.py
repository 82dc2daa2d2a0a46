"""Rows: reading questions and answers from their source, and splitting them."""

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
from left_bench.data.files import Records, data_files, file_records, has_split, split_records, with_class_names
from left_bench.data.people import tagged_people
from left_bench.data.published import published_records
from left_bench.data.shapes import Row, Shape, in_words, shape_of, text_of, whole_lines
from left_bench.spec.cell import Data

_ROUNDS = 50  # draws from a generator, in multiples of the requested rows, before it counts as exhausted
DEFAULT_VALIDATION_ROWS = 32
"""The number for `data.validation_rows: null`, where it costs training no row."""
_BARREN_ROUNDS = 3  # it also counts as exhausted after this many consecutive rounds without a new question


class RowSplits(NamedTuple):
    """A source's rows after splitting."""

    train: list[Row]
    test: list[Row]
    dropped: list[str]
    """The places of rows that lack a prompt, an answer or a usable worse answer, each with what it lacks."""
    repeated: int
    """Rows left out because a test row has the same question, including repeated questions in a separate test set."""
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
    """Training, validation and test rows from one distribution, with no question in two of them, and what was left out.

    With `data.pairs` every row has a worse answer: from `data.rejected_column`, else that of another row of its split.

    A file (`data.path`, whatever the source) is read with only the standard library. Rows with a blank prompt or
    answer are left out; repeated questions stay in one split. The test rows never depend on `data.validation_rows`, and
    depend on `data.train_rows` only where rows are generated.

    Args:
        keep_records: keep each row's source record, with all its columns.

    Raises:
        UserError: a source, column, value or count that cannot be used; the message names the key and the fix.
    """
    if section.shape == "text":
        for key in ("pairs", "instruction", "template", "train_on"):
            if (given := getattr(section, key)) != Data.model_fields[key].default:
                raise UserError(f"data.{key}={given}: plain text has neither questions nor turns; leave it out")
    if section.pairs and section.train_on == "all":
        raise UserError("data.train_on=all: data.pairs compares only the answers of a pair; leave it out")
    dropped: list[str] = []
    held_out: list[Row] | None = None
    for_validation: list[Row] | None = None
    read = functools.partial(_rows, keep_records=keep_records)
    if section.path is not None or section.source == "jsonl":
        paths = data_files(section)
        source = f"data.path={section.path if len(paths) > 1 else paths[0]}"
        records, shape = _detect_shape(section, file_records(paths))
        rows = list(read(section, records, source, dropped, shape))
        held_out = _own_split(section, "test", paths, shape, source=source, read=read, dropped=dropped)
        if section.validation_rows != 0 and section.hold_out:
            for_validation = _own_split(section, "validation", paths, shape, source=source, read=read, dropped=dropped)
    elif section.source == "hub":
        source = f"data.hub_id={section.hub_id}"
        dataset = _hub_dataset(section)
        records, shape = _detect_shape(section, _hub_records(section, dataset, whole=keep_records))
        if _plain(shape) and section.shape is None:
            raise UserError(
                f"{source}: holds plain text; to train on it set data.shape=text, otherwise name two columns"
            )
        rows = list(read(section, records, source, dropped, shape))
        separate = functools.partial(_hub_rows_apart, section, dataset, source, read, dropped, whole=keep_records)
        held_out = separate("test")
        if section.validation_path is not None:
            raise UserError(
                f"data.validation_path={section.validation_path}: {source} is not a file; leave it out"
                " (its split `validation` is used if there is one) or set data.validation_rows=NUMBER"
            )
        if section.validation_rows != 0 and section.hold_out:
            for_validation = separate("validation")
    elif section.source == "wheel":
        source, shape = f"data.task={section.task}", _given_shape(section)
        rows = list(read(section, published_records(section), source, dropped, shape))
    else:
        source, shape = f"data.task={section.task}", _given_shape(section)
        rows, for_validation = _generated_rows(section, source, functools.partial(read, shape=shape))
    train, test, repeated = _hold_out(section, rows, source, held_out=held_out)
    validation: list[Row] = []
    left_out = 0
    if section.hold_out:
        train, validation, left_out = _for_validation(section, train, held_out or test, source, separate=for_validation)
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


def _own_split(
    section: Data,
    part: Literal["test", "validation"],
    paths: Sequence[Path],
    shape: Shape | None,
    *,
    source: str,
    read: Callable[..., Iterator[Row]],
    dropped: list[str],
) -> list[Row] | None:
    """The rows of a separate file or of the data set's own split; None if there is neither."""
    given = section.test_path if part == "test" else section.validation_path
    if given is not None:
        records: Records = file_records(data_files(section, part=part))
        named = f"data.{part}_path={given}"
    elif len(paths) == 1 and has_split(paths[0], part):
        records, named = split_records(paths[0], part), f"{source}: split {part}"
    else:
        return None
    records, separate_shape = _detect_shape(section, records)
    if _plain(separate_shape) != _plain(shape):
        one, other = (named, source) if _plain(separate_shape) else (source, named)
        raise UserError(f"{one}: holds plain text, and {other} does not; give {part} rows of the same shape")
    return list(read(section, records, named, dropped, separate_shape))


def with_shape(section: Data) -> Data:
    """The section with `shape: text` if its file holds plain text: such a cell generates no answers.

    Other shapes do not change the cell; they are detected when the rows are read, which also reports any error.
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


def _given_shape(section: Data) -> Shape | None:
    """The shape that `data.shape` names; None: none is named, and columns are read by their names."""
    return None if section.shape is None else shape_of(section, {})


def _plain(shape: Shape | None) -> bool:
    return shape is not None and shape.name == "text"


def _detect_shape(section: Data, records: Records) -> tuple[Records, Shape | None]:
    """The records, and the shape of the first one (or the one that `data.shape` names)."""
    iterator = iter(records)
    first = next(iterator, None)
    if first is None:
        return [], None
    if section.label_column is not None or section.margin_column is not None:
        return itertools.chain([first], iterator), None
    return itertools.chain([first], iterator), shape_of(section, first[1])


# --- sources: records with named columns ---


def _hub_records(
    section: Data, dataset: Any, *, whole: bool, split: str | None = None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    needed = [column for _, column in _columns(section)]
    if not whole and dataset.column_names is not None and set(needed) <= set(dataset.column_names):
        dataset = dataset.select_columns(sorted(set(needed)))  # do not decode other columns, such as images
    for number, record in enumerate(with_class_names(dataset), start=1):
        yield f"{'' if split is None else f'{split} '}row {number}", record


def _hub_rows_apart(
    section: Data,
    trained_on: Any,
    source: str,
    read: Callable[..., Iterator[Row]],
    dropped: list[str],
    part: Literal["test", "validation"],
    *,
    whole: bool,
) -> list[Row] | None:
    """The rows of the data set's own split; None if there is none, if it is trained on, or if its answers are
    withheld."""
    if not brings_split(trained_on, section, part):
        return None
    dataset = _hub_dataset(section, split=part)
    if _answers_withheld(dataset, section.answer_column):
        return None
    records, shape = _detect_shape(section, _hub_records(section, dataset, whole=whole, split=part))
    return list(read(section, records, f"{source}: split {part}", dropped, shape))


def brings_split(rows: Any, section: Data, part: str) -> bool:
    """Whether a data set of `datasets` has a split of this name that is not among those trained on."""
    return part in (rows.info.splits or {}) and part not in str(section.config.get("split", ""))


def _answers_withheld(dataset: Any, column: str) -> bool:
    """Whether a split was published without its answers, as leaderboards do: all are null, empty or the class -1."""
    import datasets

    plain = (datasets.Value, datasets.ClassLabel)
    if not isinstance(dataset, datasets.Dataset) or not isinstance(dataset.features.get(column), plain):
        return False
    return set(dataset.unique(column)) <= {None, "", -1}


def _hub_dataset(section: Data, *, split: str | None = None) -> Any:
    """A split of the data set: `split`, else `data.config.split`, else `train`."""
    if not section.hub_id:
        raise UserError("data.hub_id is missing; set it to a hub dataset, or data.path=FILE to a JSON-lines file")
    import datasets

    where = f"data.hub_id={section.hub_id}"
    local = "point data.path= at a local JSON-lines file"
    try:
        options = {"split": "train", **section.config} | ({} if split is None else {"split": split})
        dataset = datasets.load_dataset(section.hub_id, **options)
    except ConnectionError as error:
        raise UserError(f"{where}: the hub cannot be reached from here; {local}") from error
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(f"{where}: no such dataset, or it requires a login (`hf auth login`); or {local}") from error
    except (datasets.exceptions.DatasetsError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"{where}: cannot be loaded with data.config={section.config} ({reason}); fix it, or {local}"
        ) from error
    if isinstance(dataset, dict):
        raise UserError(f"{where}: data.config.split must name one split; it has {', '.join(map(str, dataset))}")
    return dataset


def _generated_rows(
    section: Data, source: str, read: Callable[..., Iterator[Row]]
) -> tuple[list[Row], list[Row] | None]:
    """Unique questions of a reasoning_gym task (https://github.com/open-thought/reasoning-gym): first those for
    training and test, then those for validation."""
    if not section.task:
        raise UserError("data.task is missing; name a reasoning_gym dataset, such as data.task=chain_sum")
    if section.train_rows is None:
        raise UserError(f"data.train_rows=null: {source} generates rows endlessly; give a number")
    wanted = section.train_rows + section.test_rows
    for_validation = validation_rows_wanted(section)
    # The library seeds item i with seed + i, so adjacent seeds would share all but one of their items.
    seeds = random.Random(section.seed)
    unique: dict[str, Row] = {}
    barren = 0
    for _ in range(_ROUNDS):
        before = len(unique)
        drawn = _drawn_records(section, size=max(wanted, 100), seed=seeds.getrandbits(31))
        for row in read(section, drawn, source):
            unique.setdefault(_question(row), row)
            if len(unique) == wanted + for_validation:
                return _split_at(wanted, unique)
        barren = barren + 1 if len(unique) == before else 0
        if barren == _BARREN_ROUNDS:
            break
    if len(unique) >= wanted and section.validation_rows is None:
        return _split_at(wanted, unique)
    if len(unique) >= wanted:
        most = len(unique) - wanted
        raise UserError(
            f"data.validation_rows={section.validation_rows}: {source} has only {most} questions besides"
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
    """Draw one item of a reasoning_gym task, to check that its settings, columns and template fit together.

    Raises:
        UserError: as `load_rows`.
    """
    if not section.task:
        raise UserError("data.task is missing; name a reasoning_gym dataset, such as data.task=chain_sum")
    drawn = _drawn_records(section, size=1, seed=section.seed)
    list(_rows(section, drawn, f"data.task={section.task}", shape=_given_shape(section)))


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
        # `question` is the library's own key; `prompt` makes the default columns work as well.
        records: list[tuple[str, dict[str, Any]]] = [
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
        if task == "family_relationships" and section.shape == "tags":
            return [(where, tagged_people(record["question"], items.config)) for where, record in records]
        return records
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
    """Rows with a prompt and an answer. Incomplete rows are listed in `dropped`; no complete row is an error."""
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
        second = None if section.second_column is None else texts[section.second_column].strip()
        yield Row(
            prompt=prompt,
            answer=answer,
            rejected=rejected,
            margin=margin,
            desirable=desirable,
            second=second,
            group=None if second is None else f"{prompt}\n{second}",
        )

    read = by_columns if shape is None else shape.rows
    seen = complete = 0
    for where, record in records:
        seen += 1
        rows = list(read(record, f"{where} of {source}", section))
        whole = [row for row in rows if row.lacks is None]
        complete += len(whole)
        yield from (dataclasses.replace(row, record=record) for row in whole) if keep_records else whole
        if not whole and dropped is not None:
            dropped.append(f"{where}: {rows[0].lacks if rows else 'no assistant turn that answers a user'}")
    if not seen:
        raise UserError(f"{source}: is empty; it needs rows with a question and an answer")
    if not complete and _plain(shape):
        raise UserError(f"data.shape=text: none of the {seen} rows of {source} has any text; check the file")
    if not complete:
        column = f"data.answer_column={section.answer_column!r}" if shape is None else f"data.shape={shape.name}"
        raise UserError(
            f"{column}: none of the {seen} rows of {source} has both a prompt"
            " and an answer; name the column that holds the answers"
        )


def _template_parts(template: str) -> list[tuple[str, str | None]]:
    """Literal texts, each with the column that follows it. (`str.format` would allow access to attributes.)"""
    where = f"data.template={template!r}"
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"{where}: {error}; write literal braces twice") from error
    if any(spec or conversion for _, _, spec, conversion in parsed):
        raise UserError(f"{where}: a placeholder is a column's name in braces, without ':' or '!'")
    if all(field is None for _, field, _, _ in parsed):
        raise UserError(f"{where}: has no placeholder, so every row would ask the same; put {{prompt}} in it")
    return [(literal, field) for literal, field, _, _ in parsed]


def filled(section: Data, text: str) -> str:
    """`data.template` with the prompt replaced by a text and all other columns empty."""
    parts = _template_parts(section.template)
    columns = {_column_of(section, field) for _, field in parts if field is not None}
    place = section.prompt_column if section.prompt_column in columns else min(columns)
    values = dict.fromkeys(columns, "") | {place: text}
    return "".join(
        literal + ("" if field is None else values[_column_of(section, field)]) for literal, field in parts
    ).strip()


def _column_of(section: Data, field: str) -> str:
    """`{prompt}` stands for `data.prompt_column`, any other placeholder for the column of that name."""
    return section.prompt_column if field == "prompt" else field


def _columns(section: Data) -> list[tuple[str, str]]:
    """All columns that a row needs, each with the configuration key that names it."""
    columns = [("data.answer_column", section.answer_column)]
    if section.pairs and section.rejected_column is not None:
        columns.append(("data.rejected_column", section.rejected_column))
    if section.second_column is not None:
        columns.append(("data.second_column", section.second_column))
    if section.label_column is not None:
        columns.append(("data.label_column", section.label_column))
    if section.margin_column is not None:
        columns.append(("data.margin_column", section.margin_column))
    for _, field in _template_parts(section.template):
        if field is not None:
            key = "data.prompt_column" if field == "prompt" else "data.template"
            columns.append((key, _column_of(section, field)))
    return columns


def _missing_column(section: Data, key: str, column: str, record: Mapping[str, Any], where: str) -> str:
    there = f"it has {', '.join(map(str, record)) or 'none'}{nearest(column, map(str, record))}"
    if key == "data.template":
        return f"data.template={section.template!r}: '{{{column}}}' is not a column of {where}; {there}"
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
    """Every row with a worse answer: that of the next row whose answer differs."""
    results = []
    for i, row in enumerate(rows):
        others = (rows[(i + ahead) % len(rows)].answer for ahead in range(1, len(rows)))
        other = next((answer for answer in others if answer != row.answer), None)
        if other is None:
            raise UserError(
                f"data.rejected_column=null: {source} has the same answer to all questions of a split, so none"
                " can serve as a worse one; name the column with worse answers"
            )
        results.append(dataclasses.replace(row, rejected=other))
    return results


# --- the split ---


def _hold_out(
    section: Data, rows: list[Row], source: str, *, held_out: list[Row] | None = None
) -> tuple[list[Row], list[Row], int]:
    """Shuffle by `data.seed`; the first distinct questions become test rows, the other questions training rows.

    If the source has its own test rows (`held_out`), test rows are drawn only from those, and none of them is trained
    on, drawn or not. A held-out conversation contributes one turn, because the turns of one conversation are not
    independent draws. The returned number counts the rows that repeat a test row's question. Without `data.hold_out`
    all rows are training rows, including `held_out`. The number of training rows is not limited here.
    """
    shuffled = random.Random(section.seed).sample(rows, len(rows))
    if held_out is None:
        questions = len({_question(row) for row in rows})
        if questions < section.test_rows + 1:
            if questions == 1:
                one, two = ("text", "two texts") if rows[0].plain else ("question with an answer", "two")
                raise UserError(f"{source}: has only one {one}; {two} are needed, one to train on and one to test on")
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
    test_questions = test.keys() if held_out is None else {_question(row) for row in held_out}
    train = [row for row in shuffled if _question(row) not in test_questions]
    if not train:
        raise UserError(f"{source}: all of its questions are also test rows, so none is left to train on")
    _check_train_rows(section, train, source, others=f"{len(test)} test rows")
    if not section.hold_out:  # the limit applies to both together, and questions of test rows may repeat
        together = [*shuffled, *(drawn if held_out is not None else [])]
        return together[: section.train_rows and section.train_rows + len(test)], [], 0
    repeated = len(rows) - len(train) - len(test) if held_out is None else len(rows) - len(train)
    repeated += 0 if held_out is None else len(held_out) - len(test_questions)
    return train, list(test.values()), repeated


def _check_train_rows(section: Data, train: Sequence[Row], source: str, *, others: str) -> None:
    if section.train_rows is not None and len(train) < section.train_rows:
        raise UserError(
            f"data.train_rows={section.train_rows}: {source} leaves only {len(train)} training rows besides"
            f" {others}; set data.train_rows={len(train)} or lower, or null for all"
        )


def validation_rows_wanted(section: Data) -> int:
    """The desired number of validation rows; fewer may be available."""
    if not section.hold_out:
        return 0
    return DEFAULT_VALIDATION_ROWS if section.validation_rows is None else section.validation_rows


def _for_validation(
    section: Data, train: list[Row], test: Sequence[Row], source: str, *, separate: Sequence[Row] | None
) -> tuple[list[Row], list[Row], int]:
    """The rows left to train on, the validation rows, and how many of `separate` could not be used.

    Rows with a source of their own (`separate`) are drawn by `data.seed`; those whose question is trained on or tested
    on are left out, so that training keeps all its rows. Otherwise validation rows are those beyond `data.train_rows`,
    and then, if a number was set, the last of the training rows.

    Args:
        train: all rows that may be trained on, in order.
        test: the test rows, or all that they were drawn from.
    """
    wanted, explicit = validation_rows_wanted(section), section.validation_rows is not None
    used = train if section.train_rows is None else train[: section.train_rows]
    taken = {_question(row) for row in [*used, *test]}
    results: dict[str, Row] = {}
    if separate is not None:
        fresh: dict[str, Row] = {}
        for row in random.Random(section.seed).sample(separate, len(separate)):
            if (question := _question(row)) not in taken and row.desirable is not False:
                fresh.setdefault(question, _one_turn(row, seed=section.seed))
        results = dict(itertools.islice(fresh.items(), wanted))
        left_out = len(separate) - len(fresh)
        if explicit and len(results) < wanted:
            raise UserError(
                f"data.validation_rows={wanted}: {source} has only {len(results)} validation rows whose question is"
                f" neither trained on nor tested on; set data.validation_rows={len(results)} or lower"
            )
        return train, list(results.values()), left_out
    beyond = [row for row in train[len(used) :] if _question(row) not in taken]
    for row in [*beyond, *(reversed(used) if explicit else ())]:
        if len(results) == wanted:
            break
        if row.desirable is not False:
            results.setdefault(_question(row), _one_turn(row, seed=section.seed))
    left = [row for row in train if _question(row) not in results]
    if explicit and (len(results) < wanted or not left):
        most = max(0, len({_question(row) for row in train}) - 1)
        raise UserError(
            f"data.validation_rows={wanted}: {source} has only {most + 1} different questions besides {len(test)} test"
            f" rows, and one must be left to train on; set data.validation_rows={most} or lower"
        )
    _check_train_rows(section, left, source, others=f"{len(test)} test rows and {len(results)} validation rows")
    return left, list(results.values()), 0


def _one_turn(row: Row, *, seed: int) -> Row:
    if not row.earlier:
        return row
    turns = [*row.earlier, dataclasses.replace(row, earlier=())]
    turn = random.Random(f"{seed} {_question(row)}").choice(turns)
    return dataclasses.replace(turn, record=row.record)


def _question(row: Row) -> str:
    """A key that is equal for questions with the same words, ignoring spacing and case."""
    return " ".join((row.group or row.prompt).split()).casefold()

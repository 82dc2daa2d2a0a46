"""Rows: where questions and answers come from, and which of them are held out."""

from __future__ import annotations

import dataclasses
import functools
import glob
import json
import random
import string
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from left_bench.cell import Data, fingerprint
from left_bench.errors import UserError, nearest
from left_bench.paths import contents_of, file_sha256

# Named records of a source: `line 3`, and the columns found there.
Records = Iterable[tuple[str, Mapping[str, Any]]]

_ROUNDS = 50  # draws of a generator, in multiples of the rows asked for, before it counts as exhausted
_BARREN_ROUNDS = 3  # rounds in a row without one new question: the same


@dataclass(frozen=True)
class Row:
    """One question and its answer."""

    prompt: str
    """The user's turn, after `data.template`."""
    answer: str
    rejected: str | None = None
    """A worse answer to the same question, for preference tuning."""


class RowSplits(NamedTuple):
    """What a source's rows became."""

    train: list[Row]
    test: list[Row]
    dropped: int
    """Rows without a prompt or an answer, or whose worse answer is none."""
    repeated: int
    """Rows left out because their question is a test row's."""


def load_rows(section: Data) -> tuple[list[Row], list[Row]]:
    """The training rows and the test rows of `split_rows`."""
    found = split_rows(section)
    return found.train, found.test


def split_rows(section: Data) -> RowSplits:
    """Training rows and test rows, drawn from one distribution, with no question in both, and what was left out.

    With `data.pairs` every row has a worse answer: that of `data.rejected_column`, else another row's of its split.

    A file (`data.path`, whatever the source) is read with the standard library alone. Rows with a blank prompt or
    answer are left out; a question that repeats stays on its side of the split. The test rows do not depend on
    `data.train_rows` where rows are read rather than generated.

    Raises:
        UserError: a source, column, value or count that cannot be used; the message names the key and the mend.
    """
    dropped: list[str] = []
    if section.path is not None or section.source == "jsonl":
        path = data_file(section)
        source = f"data.path={path}"
        rows = list(_rows(section, _file_records(path), source, dropped))
    elif section.source == "hub":
        source = f"data.hub_id={section.hub_id}"
        rows = list(_rows(section, _hub_records(section), source, dropped))
    else:
        source = f"data.task={section.task}"
        rows = _generated_rows(section, source)
    train, test, repeated = _hold_out(section, rows, source)
    if section.pairs and section.rejected_column is None:
        train, test = _mismatched(train, source), _mismatched(test, source)
    return RowSplits(train, test, dropped=len(dropped), repeated=repeated)


def with_content(section: Data) -> Data:
    """The section with its file's SHA-256, where there is such a file; `load_rows` says what is wrong elsewhere."""
    try:
        if section.image_column is not None and section.path is not None:
            return section.model_copy(update={"content": _of_folder(Path(section.path).expanduser().absolute())})
        content = content_of(section)
        return section if content is None else section.model_copy(update={"content": content})
    except (UserError, OSError):
        return section


def content_of(section: Data) -> str | None:
    """A hash of the local files that the rows come from, wherever they lie; None where there are none.

    Raises:
        UserError, OSError: as `data_file`, or a file that cannot be read.
    """
    if section.path is not None or section.source == "jsonl":
        return _known_sha256(data_file(section))
    found = _local_files(section)
    return fingerprint([_known_sha256(path) for path in found]) if found else None


def _local_files(section: Data) -> list[Path]:
    """What `datasets.load_dataset` would read from this machine: a folder in the hub's place, `data_files`, globs."""
    if section.source != "hub" or not section.hub_id:
        return []
    folder = Path(section.hub_id).expanduser()
    if folder.is_dir():
        return sorted(path for path in folder.rglob("*") if path.is_file())
    root = Path(str(section.config.get("data_dir") or "."))
    named: list[str] = []

    def walk(value: Any) -> None:
        if isinstance(value, str):
            named.append(value)
        elif isinstance(value, (list, tuple)):
            for one in value:
                walk(one)
        elif isinstance(value, Mapping):
            walk(list(value.values()))

    walk(section.config.get("data_files"))
    if not named and "data_dir" in section.config and root.is_dir():
        return sorted(path for path in root.rglob("*") if path.is_file())
    patterns = [str(root / Path(name).expanduser()) for name in named]
    found = {Path(match) for pattern in patterns for match in glob.glob(pattern, recursive=True)}  # noqa: PTH207
    return sorted(path for path in found if path.is_file())


def _known_sha256(path: Path) -> str:
    stat = path.stat()
    return _sha256(str(path.absolute()), stat.st_size, stat.st_mtime_ns)


@functools.cache
def _of_folder(folder: Path) -> str:
    return contents_of((path for path in folder.rglob("*") if path.is_file()), root=folder)


@functools.cache  # a sweep composes one file thousands of times
def _sha256(path: str, size: int, modified: int) -> str:
    return file_sha256(Path(path))


def data_file(section: Data) -> Path:
    """The local file of `data.path`.

    Raises:
        UserError: no path, no such file, or a folder.
    """
    if not section.path:
        raise UserError("data.path is missing; set data.path=FILE to a JSON-lines file, one object on each line")
    path = Path(section.path).expanduser()
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # longer than a name may be, a null character, no permission
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"data.path={section.path[:200]!r}: cannot be opened ({reason}); check the path") from error
    if path.is_dir():
        inside = sorted(entry.name for entry in path.iterdir() if entry.suffix in (".jsonl", ".json"))
        hint = f", such as {path / inside[0]}" if inside else ""
        raise UserError(f"data.path={path}: is a folder; name one JSON-lines file{hint}")
    if not path.is_file():
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"data.path={path}: no such file{nearest(path.name, beside) or '; check the path'}")
    return path


# --- sources: records with named columns ---


def _file_records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    number = 0
    try:
        # Bytes split at "\n" alone: text mode would also end a line at characters that JSON allows inside a string.
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if line:
                    yield f"line {number}", _json_object(line, path=path, number=number)
    except UnicodeDecodeError as error:
        raise UserError(f"data.path={path}: line {number} is not UTF-8 text; save the file as UTF-8") from error
    except OSError as error:
        raise UserError(f"data.path={path}: cannot be read ({error.strerror}); check its permissions") from error


def _json_object(line: str, *, path: Path, number: int) -> Mapping[str, Any]:
    form = 'write one JSON object on each line, such as {"prompt": "...", "answer": "..."}'
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"data.path={path}: line {number} is not JSON ({reason}); {form}") from error
    if not isinstance(value, dict):
        raise UserError(f"data.path={path}: line {number} is {_kind(value)}, not an object; {form}")
    return value


def _hub_records(section: Data) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not section.hub_id:
        raise UserError("data.hub_id is missing; set it to a hub dataset, or data.path=FILE to a JSON-lines file")
    import datasets

    where = f"data.hub_id={section.hub_id}"
    local = "point data.path= at a local JSON-lines file"
    try:
        found = datasets.load_dataset(section.hub_id, **{"split": "train", **section.config})
    except ConnectionError as error:
        raise UserError(f"{where}: the hub cannot be reached from here; {local}") from error
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(f"{where}: no such dataset, or it wants a login (`hf auth login`); or {local}") from error
    except (datasets.exceptions.DatasetsError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{where}: not loaded with data.config={section.config} ({reason}); or {local}") from error
    if isinstance(found, dict):
        raise UserError(f"{where}: data.config.split must name one split; it has {', '.join(map(str, found))}")
    needed = [column for _, column in _columns(section)]
    if found.column_names is not None and set(needed) <= set(found.column_names):
        found = found.select_columns(sorted(set(needed)))  # images and the like beside the text are not decoded
    for number, record in enumerate(found, start=1):
        yield f"row {number}", record


def _generated_rows(section: Data, source: str) -> list[Row]:
    """Unique questions of a reasoning_gym task (https://github.com/open-thought/reasoning-gym), enough for both."""
    if not section.task:
        raise UserError("data.task is missing; name a reasoning_gym dataset, such as data.task=chain_sum")
    if section.train_rows is None:
        raise UserError(f"data.train_rows=null: {source} is generated without end; give a number")
    wanted = section.train_rows + section.test_rows
    # The library seeds item i with seed + i: neighbouring seeds would share all but one of their items.
    seeds = random.Random(section.seed)
    unique: dict[str, Row] = {}
    barren = 0
    for _ in range(_ROUNDS):
        before = len(unique)
        drawn = _drawn_records(section, size=max(wanted, 100), seed=seeds.getrandbits(31))
        for row in _rows(section, drawn, source):
            unique.setdefault(_question(row), row)
            if len(unique) == wanted:
                return list(unique.values())
        barren = barren + 1 if len(unique) == before else 0
        if barren == _BARREN_ROUNDS:
            break
    most = max(len(unique) - section.test_rows, 0)
    mend = f"set data.train_rows={most} or lower" if most else "lower data.train_rows and data.test_rows"
    raise UserError(
        f"data.train_rows={section.train_rows}: {source} has only {len(unique)} different questions"
        f" for {section.train_rows} training and {section.test_rows} test rows; {mend}, or widen data.config"
    )


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
            (f"item {i}", {"prompt": item["question"], "question": item["question"], "answer": item["answer"]})
            for i, item in enumerate(items[j] for j in range(size))
        ]
    except (AssertionError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"data.config={section.config}: {task} refuses it ({error}); change those settings") from error


# --- records to rows ---


def _rows(section: Data, records: Records, source: str, dropped: list[str] | None = None) -> Iterator[Row]:
    """Rows with a prompt and an answer; at least one, or an error. Where the others stood is noted in `dropped`."""
    parts, columns = _template_parts(section.template), _columns(section)
    seen = kept = 0
    for where, record in records:
        seen += 1
        texts: dict[str, str] = {}
        for key, column in columns:
            if column not in record:
                raise UserError(_missing_column(section, key, column, record, f"{where} of {source}"))
            texts[column] = _text(record[column], f"{where} of {source}: column '{column}'")
        prompt = "".join(
            literal + (texts[_column_of(section, field)] if field is not None else "") for literal, field in parts
        ).strip()
        answer = _whole_lines(texts[section.answer_column])
        rejected = _whole_lines(texts[section.rejected_column]) if section.pairs and section.rejected_column else None
        if prompt and answer and rejected not in ("", answer):
            kept += 1
            yield Row(prompt=prompt, answer=answer, rejected=rejected)
        elif dropped is not None:
            dropped.append(where)
    if not seen:
        raise UserError(f"{source}: is empty; it needs rows with a question and an answer")
    if not kept:
        raise UserError(
            f"data.answer_column={section.answer_column!r}: none of the {seen} rows of {source} has both a prompt"
            " and an answer; name the column that holds the answers"
        )


def _whole_lines(answer: str) -> str:
    """Without blank lines before and white space after; a first line's indent is the answer's own, as in code."""
    lines = answer.rstrip().splitlines(keepends=True)
    first = next((number for number, line in enumerate(lines) if line.strip()), len(lines))
    return "".join(lines[first:])


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


def _column_of(section: Data, field: str) -> str:
    """`{prompt}` stands for `data.prompt_column`, every other placeholder for the column of its name."""
    return section.prompt_column if field == "prompt" else field


def _columns(section: Data) -> list[tuple[str, str]]:
    """The key that asks for a column, and the column, for all that a row needs."""
    asked = [("data.answer_column", section.answer_column)]
    if section.pairs and section.rejected_column is not None:
        asked.append(("data.rejected_column", section.rejected_column))
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


def _text(value: Any, where: str) -> str:
    """Text as it is, numbers and booleans as JSON writes them, null as nothing."""
    if value is None:
        return ""
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if not isinstance(value, str):
        raise UserError(f"{where} holds {_kind(value)}, not text; write it as a string or name another column")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where} holds half a character (a lone surrogate); mend the text") from error
    return value


def _kind(value: Any) -> str:
    kinds = {list: "a list", dict: "an object", str: "a text", int: "a number", float: "a number", bool: "a boolean"}
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")


# --- worse answers ---


def _mismatched(rows: list[Row], source: str) -> list[Row]:
    """Every row with the answer of the next row that has another."""
    found = []
    for i, row in enumerate(rows):
        others = (rows[(i + ahead) % len(rows)].answer for ahead in range(1, len(rows)))
        other = next((answer for answer in others if answer != row.answer), None)
        if other is None:
            raise UserError(
                f"data.rejected_column=null: {source} has one and the same answer to all questions of a split, so none"
                " can stand for a worse one; name the column with worse answers"
            )
        found.append(dataclasses.replace(row, rejected=other))
    return found


# --- the split ---


def _hold_out(section: Data, rows: list[Row], source: str) -> tuple[list[Row], list[Row], int]:
    """Shuffle by `data.seed`; the first different questions are the test rows, the other questions the training.

    The number is of the rows that repeat a test row's question.
    """
    shuffled = random.Random(section.seed).sample(rows, len(rows))
    questions = len({_question(row) for row in rows})
    if questions < section.test_rows + 1:
        if questions == 1:
            raise UserError(f"{source}: has one question with an answer; two are needed, to train on one and test one")
        raise UserError(
            f"data.test_rows={section.test_rows}: {source} has only {questions} different questions with an"
            f" answer, and one must be left to train on; set data.test_rows={questions - 1} or lower"
        )
    test: dict[str, Row] = {}
    for row in shuffled:
        if len(test) == section.test_rows:
            break
        test.setdefault(_question(row), row)
    train = [row for row in shuffled if _question(row) not in test]
    if section.train_rows is not None and len(train) < section.train_rows:
        raise UserError(
            f"data.train_rows={section.train_rows}: {source} leaves only {len(train)} training rows beside"
            f" {section.test_rows} test rows; set data.train_rows={len(train)} or lower, or null for all"
        )
    return train[: section.train_rows], list(test.values()), len(rows) - len(train) - len(test)


def _question(row: Row) -> str:
    """What makes two questions the same: their words, whatever the spacing and case."""
    return " ".join(row.prompt.split()).casefold()

"""Local files of rows: finding them, reading their records, and hashing their content."""

from __future__ import annotations

import functools
import glob
import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal

from left_bench.core.errors import UserError, nearest
from left_bench.core.paths import contents_of, file_sha256, is_installed
from left_bench.spec.cell import Data, fingerprint

Records = Iterable[tuple[str, Mapping[str, Any]]]
"""Records of a source: the place (`line 3`) and the columns of each."""

_LINES = (".jsonl", ".ndjson", ".jsonlines")
_BUILDERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
_KINDS = (*_LINES, ".json", *_BUILDERS)
_PACKED = (".gz", ".zst")
_DATASET = ("dataset_info.json", "dataset_dict.json")  # written by `save_to_disk`


def check_source(section: Data) -> None:
    """Refuse a source whose package is not installed, before anything runs.

    Raises:
        UserError: names what to install.
    """
    if section.source == "scikit_learn" and not is_installed("sklearn"):
        raise UserError(
            f"data.source=scikit_learn: {section.name} is read from the package scikit-learn, which is not installed: "
            "pip install 'left-bench[digits]', or choose other data"
        )


def with_content(section: Data) -> Data:
    """The section with its file's SHA-256, if there is such a file; `load_rows` reports any error."""
    try:
        if section.image_column is not None and section.path is not None:
            return section.model_copy(update={"content": _of_folder(Path(section.path).expanduser().absolute())})
        content = content_of(section)
        return section if content is None else section.model_copy(update={"content": content})
    except (UserError, OSError):
        return section


def content_of(section: Data) -> str | None:
    """A hash of the local files that the rows come from, independent of their location; None if there are none.

    Raises:
        UserError, OSError: as `data_file`, or a file that cannot be read.
    """
    if section.path is not None or section.source == "jsonl":
        results = [_known_content(path) for path in data_files(section)]
        if section.test_path is not None:
            results += ["test", *(_known_content(path) for path in data_files(section, part="test"))]
        if section.validation_path is not None:
            results += ["validation", *(_known_content(path) for path in data_files(section, part="validation"))]
        return results[0] if len(results) == 1 else fingerprint(results)
    read = _local_files(section)
    return fingerprint([_known_sha256(path) for path in read]) if read else None


def _local_files(section: Data) -> list[Path]:
    """The local files that `datasets.load_dataset` would read: a folder given as hub id, `data_files`, globs."""
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
            for item in value:
                walk(item)
        elif isinstance(value, Mapping):
            walk(list(value.values()))

    walk(section.config.get("data_files"))
    if not named and "data_dir" in section.config and root.is_dir():
        return sorted(path for path in root.rglob("*") if path.is_file())
    patterns = [str(root / Path(name).expanduser()) for name in named]
    results = {Path(match) for pattern in patterns for match in glob.glob(pattern, recursive=True)}  # noqa: PTH207
    return sorted(path for path in results if path.is_file())


def _known_content(path: Path) -> str:
    return _of_folder(path.absolute()) if path.is_dir() else _known_sha256(path)


def _known_sha256(path: Path) -> str:
    stat = path.stat()
    return _sha256(str(path.absolute()), stat.st_size, stat.st_mtime_ns)


@functools.cache
def _of_folder(folder: Path) -> str:
    return contents_of((path for path in folder.rglob("*") if path.is_file()), root=folder)


@functools.cache  # a sweep composes cells with the same file thousands of times
def _sha256(path: str, size: int, modified: int) -> str:
    return file_sha256(Path(path))


def data_files(section: Data, *, part: Literal["train", "test", "validation"] = "train") -> list[Path]:
    """The files that `data.path` (`data.test_path`, `data.validation_path`) names: one file, a glob's matches, or a
    folder of `save_to_disk`.

    Raises:
        UserError: no path, nothing there, a folder that holds no data set, or an unsupported file type.
    """
    key, given = {
        "train": ("data.path", section.path),
        "test": ("data.test_path", section.test_path),
        "validation": ("data.validation_path", section.validation_path),
    }[part]
    if not given:
        raise UserError(f"{key} is missing; set {key}=FILE to a file of rows: {', '.join(_KINDS)}")
    path = Path(given).expanduser()
    try:
        path.stat()
    except FileNotFoundError:
        if any(sign in given for sign in "*?["):
            results = sorted(Path(item) for item in glob.glob(str(path), recursive=True) if Path(item).is_file())  # noqa: PTH207
            if results:
                return [_of_known_kind(item, key) for item in results]
    except (OSError, ValueError) as error:  # longer than a name may be, a null character, no permission
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{key}={given[:200]!r}: cannot be opened ({reason}); check the path") from error
    if path.is_dir():
        if any((path / name).is_file() for name in _DATASET):
            return [path]
        inside = sorted(entry.name for entry in path.iterdir() if _kind_of(entry) in _KINDS)
        hint = f", such as {path / inside[0]}, or several, {path}/*{_kind_of(Path(inside[0]))}" if inside else ""
        raise UserError(f"{key}={path}: is a folder; name a file, or a folder written by `save_to_disk`{hint}")
    if not path.is_file():
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{key}={path}: no such file{nearest(path.name, names) or '; check the path'}")
    return [_of_known_kind(path, key)]


def _kind_of(path: Path) -> str:
    """The suffix, ignoring compression suffixes."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _of_known_kind(path: Path, key: str) -> Path:
    kind = _kind_of(path)
    if kind in (".xlsx", ".xls", ".bin", ".pkl", ".pickle", ".pt", ".zip", ".docx", ".pdf"):
        raise UserError(f"{key}={path}: {kind} files are not supported; save the rows as one of {', '.join(_KINDS)}")
    return path


def file_records(paths: Iterable[Path]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The records of some files in order, each with its place.

    Raises:
        UserError: a file cannot be read as the type that its name says.
    """
    paths = list(paths)
    for path in paths:
        for where, record in _records_of(path):
            yield (where if len(paths) == 1 else f"{path.name} {where}"), record


def _records_of(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    kind = _kind_of(path)
    if path.is_dir() or kind in _BUILDERS or path.suffix.lower() == ".zst":
        yield from _by_datasets(path, kind)
    elif kind == ".json":
        yield from _json_records(path)
    else:
        yield from _line_records(path)


def _by_datasets(path: Path, kind: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import datasets

    try:
        if path.is_dir():
            dataset: Any = datasets.load_from_disk(str(path))
        else:
            more = _as_text(path, sep="\t" if kind == ".tsv" else ",") if _BUILDERS.get(kind) == "csv" else {}
            builder = _BUILDERS.get(kind, "json")
            dataset = datasets.load_dataset(builder, data_files=[str(path)], split="train", **more)
    except (datasets.exceptions.DatasetsError, OSError, RuntimeError, TypeError, ValueError, ImportError) as error:
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:300] or type(cause).__name__
        raise UserError(f"data.path={path}: is not readable as {kind or 'a data set'} ({reason}); fix it") from error
    if isinstance(dataset, dict):  # a DatasetDict
        if "train" not in dataset:
            raise UserError(f"data.path={path}: has no split 'train'; it has {', '.join(map(str, dataset))}")
        dataset = dataset["train"]
    for number, record in enumerate(with_class_names(dataset), start=1):
        yield f"row {number}", record


def with_class_names(dataset: Any) -> Iterator[Mapping[str, Any]]:
    """The rows of a data set of `datasets`, with the names of classes where it keeps their numbers (`ClassLabel`).

    A class that is not known (-1, as in test sets whose answers are withheld) becomes None.
    """
    import datasets

    names: dict[str, list[str]] = {}
    for column, feature in (getattr(dataset, "features", None) or {}).items():
        inner = getattr(feature, "feature", feature)  # a list has that of its items
        if isinstance(inner, datasets.ClassLabel):
            names[column] = list(inner.names)

    def named(value: Any, of: list[str]) -> Any:
        if isinstance(value, list):
            return [named(item, of) for item in value]
        return of[value] if isinstance(value, int) and 0 <= value < len(of) else None

    for record in dataset:
        yield record | {column: named(record[column], of) for column, of in names.items()} if names else record


def _as_text(path: Path, *, sep: str) -> dict[str, Any]:
    """Arguments that keep every value of a CSV file as text, including `007`, `True` and `NA`."""
    import datasets
    import pandas

    arguments: dict[str, Any] = {"sep": sep, "keep_default_na": False}
    columns = pandas.read_csv(path, nrows=0, **arguments).columns
    return arguments | {"features": datasets.Features({str(name): datasets.Value("string") for name in columns})}


def has_split(path: Path, split: str) -> bool:
    """Whether a folder is a DatasetDict with the split `split`."""
    listed = path / _DATASET[1]
    return listed.is_file() and split in json.loads(listed.read_text(encoding="utf-8")).get("splits", [])


def split_records(path: Path, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of one split of a DatasetDict."""
    import datasets

    result: Any = datasets.load_from_disk(str(path))[split]
    for number, record in enumerate(with_class_names(result), start=1):
        yield f"{split} row {number}", record


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _json_records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Records of an array of objects, of such an array under one key, or of JSON lines in a `.json` file."""
    try:
        with _opened(path) as file:
            text = file.read().decode("utf-8-sig")
        value = json.loads(text)
    except UnicodeDecodeError as error:
        raise UserError(f"data.path={path}: is not UTF-8 text; save the file as UTF-8") from error
    except OSError as error:
        raise UserError(f"data.path={path}: cannot be read ({error}); check the file") from error
    except (ValueError, RecursionError):
        yield from _line_records(path)
        return
    if isinstance(value, dict):
        arrays = [item for item in value.values() if isinstance(item, list) and item and isinstance(item[0], dict)]
        shaped = "messages" in value or "conversations" in value  # one conversation, not many
        value = arrays[0] if len(arrays) == 1 and not shaped else [value]
    if not isinstance(value, list):
        raise UserError(f"data.path={path}: holds {kind_of_value(value)}, not rows; write an array of objects")
    for number, record in enumerate(value, start=1):
        if not isinstance(record, dict):
            raise UserError(f"data.path={path}: row {number} is {kind_of_value(record)}, not an object")
        yield f"row {number}", record


def _line_records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    number = 0
    try:
        # Bytes are split only at "\n"; text mode would also split at characters that JSON allows inside a string.
        with _opened(path) as file:
            for number, raw in enumerate(file, start=1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if line:
                    yield f"line {number}", _json_object(line, path=path, number=number)
    except UnicodeDecodeError as error:
        raise UserError(f"data.path={path}: line {number} is not UTF-8 text; save the file as UTF-8") from error
    except OSError as error:
        raise UserError(f"data.path={path}: cannot be read ({error.strerror or error}); check the file") from error


def _json_object(line: str, *, path: Path, number: int) -> Mapping[str, Any]:
    form = 'write one JSON object on each line, such as {"prompt": "...", "answer": "..."}'
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"data.path={path}: line {number} is not JSON ({reason}); {form}") from error
    if not isinstance(value, dict):
        raise UserError(f"data.path={path}: line {number} is {kind_of_value(value)}, not an object; {form}")
    return value


def kind_of_value(value: Any) -> str:
    """The type of a JSON value, in words."""
    kinds = {list: "a list", dict: "an object", str: "a text", int: "a number", float: "a number", bool: "a boolean"}
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")

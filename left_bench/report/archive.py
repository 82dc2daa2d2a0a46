"""All records of a report in one file of JSON lines, with the steps and held-out rows beside them.

The first line is the sweep, each other one a cell: `{"cell_id", "record", "events", "rows"}`. Reading gives every
record the path that it had in its runs folder, below the file: `peft_methods.jsonl/<cell id>/record.json`. What reads
beside a record (`lines_beside`) finds it there, so a report is made of such a file as of a folder, word for word.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from left_bench.core.files import write_atomically
from left_bench.spec.events import EVENTS_NAME
from left_bench.spec.record import RECORD_NAME
from left_bench.spec.run_files import ROWS_NAME

ENDING = ".jsonl"
SWEEP = "sweep"
_PARTS = {EVENTS_NAME: "events", ROWS_NAME: "rows"}


class Archive:
    """The lines of one file, read once."""

    def __init__(self, path: Path) -> None:
        self.sweep: Any = None
        self.cells: dict[str, dict[str, Any]] = {}
        """Cell id -> its line; a cell that ran more than once has a number behind its id."""
        self.broken: list[str] = []
        """What is wrong with a line, naming it."""
        for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            try:
                line = json.loads(text)
            except (ValueError, RecursionError) as error:
                self.broken.append(f"line {number}: no JSON ({error})")
                continue
            if isinstance(line, dict) and isinstance(line.get("record"), dict):
                self._add(line)
            elif isinstance(line, dict) and SWEEP in line:
                self.sweep = line[SWEEP]
            else:
                self.broken.append(f"line {number}: neither a cell with its record nor a sweep")

    def _add(self, line: dict[str, Any]) -> None:
        name = cell = str(line["record"].get("cell_id")).replace("/", "_")
        number = 2
        while name in self.cells:
            name, number = f"{cell}.{number}", number + 1
        self.cells[name] = line


def is_archive(path: Path) -> bool:
    return path.suffix == ENDING and path.is_file()


def open_archive(path: Path) -> Archive:
    """The file's lines; kept until it changes."""
    return _open(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=16)
def _open(path: Path, _changed: int) -> Archive:
    return Archive(path)


def paths_in(path: Path) -> list[Path]:
    """The records of a file, each by the path it has below it."""
    return [path / name / RECORD_NAME for name in open_archive(path).cells]


def member(path: Path) -> dict[str, Any] | None:
    """The line of a path below such a file; None where the path is a plain one."""
    file = path.parent.parent
    return open_archive(file).cells.get(path.parent.name) if is_archive(file) else None


def lines_beside(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file beside a record; those that are broken are left out, and a missing file has none."""
    line = member(path)
    if line is not None:
        result = line.get(_PARTS.get(path.name, ""))
        return [item for item in result if isinstance(item, dict)] if isinstance(result, list) else []
    return [*_read_lines(path)]


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for text in lines:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict):
            yield line


def write_archive(path: Path, records: Sequence[tuple[dict[str, Any], Path]], sweep: dict[str, Any] | None) -> Path:
    """Write records (as their files have them), and what lies beside each, into one file.

    Args:
        sweep: what the launcher noted, as its own file has it.
    """
    lines: list[dict[str, Any]] = [] if sweep is None else [{SWEEP: sweep}]
    for record, at in records:
        beside = {part: result for name, part in _PARTS.items() if (result := lines_beside(at.with_name(name)))}
        lines.append({"cell_id": record.get("cell_id"), "record": record, **beside})
    text = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
    return write_atomically(path, text)

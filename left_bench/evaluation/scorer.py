"""A user-defined scorer: `def score(prediction: str, reference: str, row: dict) -> float | dict[str, float]`.

Its source is checked before anything runs, without importing it, so that the launching process does not need its
dependencies. The worker imports it after training, and an error in it costs its scores, not the cell.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import PathFinder
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from left_bench.core.errors import UserError, nearest
from left_bench.core.paths import file_sha256
from left_bench.spec.cell import Cell
from left_bench.spec.record import SCORER_PREFIX, Score

_CALLED = "(prediction, reference, row)"
_NAME = re.compile(r"[A-Za-z0-9_]+")
Scorer = Callable[[str, str, dict[str, Any]], Any]


class ScorerFailed(RuntimeError):
    """The scorer gave no usable score; the message is one sentence."""


class Source(NamedTuple):
    """Where a scorer is defined."""

    path: Path
    function: str
    module: str | None
    """The module's name for importing it; None: the file is loaded directly."""


def with_content(cell: Cell, folders: Sequence[Path]) -> Cell:
    """The cell with its scorer's path and SHA-256, after checking its source.

    Args:
        folders: of options (`--config-dir`), where files are looked for if they are not in the working directory.

    Raises:
        UserError: there is no such file, module or function, it has the wrong parameters, or nothing is scored.
    """
    named = cell.eval.scorer
    if named is None:
        return cell
    if not cell.eval.generate and cell.task.writes:
        raise UserError(
            f"eval.scorer={named}: it scores answers, and eval.generate=false generates none; leave one of the two out"
        )
    where, content = _placed(named, folders, key="eval.scorer")
    changed = {"scorer": where, "scorer_content": content}
    return cell.model_copy(update={"eval": cell.eval.model_copy(update=changed)})


def with_reward_content(cell: Cell, folders: Sequence[Path]) -> Cell:
    """The cell with the place and SHA-256 of the scorer that says what sampled answers are worth (`training.reward`).

    Raises:
        UserError: as `with_content`.
    """
    if cell.training.reward is None:
        return cell
    where, content = _placed(cell.training.reward, folders, key="training.reward")
    changed = {"reward": where, "reward_content": content}
    return cell.model_copy(update={"training": cell.training.model_copy(update=changed)})


def _placed(named: str, folders: Sequence[Path], *, key: str) -> tuple[str, str]:
    try:
        source = find(named, folders)
        _check(source, named)
    except UserError as error:  # its messages are of eval.scorer
        raise UserError(str(error).replace("eval.scorer=", f"{key}=")) from error
    where = named if source.module is not None else f"{source.path}:{source.function}"
    return where, file_sha256(source.path)


def find(named: str, folders: Sequence[Path] = ()) -> Source:
    """The source that `module:function` or `path/file.py:function` names; nothing is imported.

    Raises:
        UserError: it does not exist.
    """
    where, colon, function = named.rpartition(":")
    if not (colon and where and function.isidentifier()):
        raise UserError(
            f"eval.scorer={named}: name a function, as in eval.scorer=my_module:score or eval.scorer=score.py:score"
        )
    if where.endswith(".py") or "/" in where or "\\" in where:
        file = Path(where).expanduser()
        path = next((path for path in (file, *(folder / file for folder in folders)) if path.is_file()), None)
        if path is None:
            others = [item.name for item in file.parent.glob("*.py")] if file.parent.is_dir() else []
            hint = nearest(file.name, others) or "; give the path of a Python file, from here or from --config-dir"
            raise UserError(f"eval.scorer={named}: there is no file {file}{hint}")
        return Source(path, function, None)
    path = _file_of_module(where)
    if path is None:
        raise UserError(
            f"eval.scorer={named}: there is no module {where!r} here or among installed packages; a file is given with "
            f"its suffix, eval.scorer={where.replace('.', '/')}.py:{function}"
        )
    return Source(path, function, where)


def _file_of_module(name: str) -> Path | None:
    """A module's source in the working directory or on Python's path, found without importing its packages."""
    if not all(part.isidentifier() for part in name.split(".")):
        return None
    folders: Any = [str(Path.cwd()), *sys.path]
    spec = None
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        full = ".".join(parts[:depth])
        spec = PathFinder.find_spec(full, folders)
        if spec is None and depth == 1:
            spec = importlib.util.find_spec(full)  # an editable installation has its own finder
        if spec is None:
            return None
        folders = spec.submodule_search_locations or []
    origin = Path(spec.origin) if spec is not None and spec.origin else None
    return origin if origin is not None and origin.suffix == ".py" and origin.is_file() else None


def _check(source: Source, named: str) -> None:
    """Refuse a source that cannot be a scorer."""
    try:
        body = ast.parse(source.path.read_bytes()).body
    except SyntaxError as error:
        where = f"{source.path}, line {error.lineno}" if error.lineno else str(source.path)
        raise UserError(f"eval.scorer={named}: {where} is not Python ({error.msg}); correct it") from error
    except (OSError, ValueError) as error:
        raise UserError(f"eval.scorer={named}: {source.path} cannot be read ({error})") from error
    defined = {node.name: node for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    function = defined.get(source.function)
    if function is None:
        if source.function not in set(_bound(body)):
            hint = nearest(source.function, defined) or f"; it defines {', '.join(defined) or 'none'}"
            raise UserError(f"eval.scorer={named}: {source.path} has no function {source.function!r}{hint}")
        return  # imported or created there: its parameters are unknown until it is called
    if isinstance(function, ast.AsyncFunctionDef):
        raise UserError(f"eval.scorer={named}: {source.function} is asynchronous; write it as a plain function")
    parameters = function.args
    positional = len(parameters.posonlyargs) + len(parameters.args)
    least = positional - len(parameters.defaults)
    keywords = any(default is None for default in parameters.kw_defaults)
    if least > 3 or keywords or (positional < 3 and parameters.vararg is None):
        raise UserError(
            f"eval.scorer={named}: {source.function}({ast.unparse(parameters)}) cannot be called with three arguments; "
            f"write def {source.function}{_CALLED}"
        )


def _bound(body: Sequence[ast.stmt]) -> Iterator[str]:
    """Names that a module's statements bind, except by defining a function."""
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Import | ast.ImportFrom):
                yield from (alias.asname or alias.name for alias in node.names)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
            elif isinstance(node, ast.ClassDef | ast.FunctionDef) and node is not statement:
                yield node.name
    yield from (node.name for node in body if isinstance(node, ast.ClassDef))


def score_answers(
    cell: Cell,
    rows: Sequence[Any],
    answers: Sequence[str],
    base_answers: Sequence[str] | None,
    *,
    tell: Callable[[str, int, int], None],
) -> tuple[list[Score], dict[str, list[float]]]:
    """Scores of the cell's answers and of the base model's, by the cell's scorer.

    Returns:
        The scores, and each row's score by the metric's name.

    Raises:
        ScorerFailed: it cannot be imported, raises an error, or returns something invalid.
    """
    assert cell.eval.scorer is not None
    score = load(cell.eval.scorer, cell.eval.scorer_content)
    records = _records(cell, rows)
    of_rows = _call(score, rows, records, answers, tell=lambda done: tell("scorer", done, len(rows)))
    before = None
    if base_answers is not None:
        before = _call(score, rows, records, base_answers, tell=lambda done: tell("scorer, base", done, len(rows)))
        if before.keys() != of_rows.keys():
            raise ScorerFailed(f"it scored {_listed(of_rows)} first, then {_listed(before)}; all rows need the same")
    scores = []
    for metric, values in of_rows.items():
        mean = math.fsum(values) / len(values)
        spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
        scores.append(
            Score(
                task=cell.data.name,
                metric=metric,
                value=mean,
                stderr=spread / math.sqrt(len(values)),
                n=len(values),
                base_value=None if before is None else math.fsum(before[metric]) / len(values),
            )
        )
    return scores, of_rows


def load(named: str, content: str | None) -> Scorer:
    """Import the function, after checking that its source is still the one recorded in the cell.

    Raises:
        ScorerFailed: it is gone, has changed, or cannot be imported.
    """
    try:
        source = find(named)
    except UserError as error:
        raise ScorerFailed(str(error)) from error
    if file_sha256(source.path) != content:
        raise ScorerFailed(f"{source.path} has changed since this cell was launched")
    folder = str(Path.cwd() if source.module is not None else source.path.absolute().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that files next to it do not shadow libraries
    try:
        if source.module is not None:
            module = importlib.import_module(source.module)
            if module.__file__ is None or not Path(module.__file__).samefile(source.path):
                raise ScorerFailed(f"{source.module} is already imported from {module.__file__}; name the file instead")
        else:
            name = f"left_bench_scorer_{str(content)[:12]}"
            spec = importlib.util.spec_from_file_location(name, source.path)
            assert spec is not None and spec.loader is not None
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        result = getattr(module, source.function)
    except ScorerFailed:
        raise
    except (Exception, SystemExit) as error:
        raise ScorerFailed(f"it cannot be imported: {_described(error)}") from error
    if not callable(result):
        raise ScorerFailed(f"{source.function} is not a function")
    scorer: Scorer = result
    return scorer


def _records(cell: Cell, rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Each row's columns as in the data; for images, their name and class."""
    if cell.data.image_column is not None:
        return [{"prompt": row.prompt, "answer": row.reference} for row in rows]
    from left_bench.data.rows import split_rows

    read = split_rows(cell.data, keep_records=True).test[: len(rows)]
    if [(row.prompt, row.answer) for row in read] != [(row.prompt, row.reference) for row in rows]:
        raise ScorerFailed("the data have changed since this cell was launched")
    return [dict(row.record or {}) for row in read]


def _call(
    score: Scorer,
    rows: Sequence[Any],
    records: Sequence[Mapping[str, Any]],
    answers: Sequence[str],
    *,
    tell: Callable[[int], None],
) -> dict[str, list[float]]:
    """Metric -> the score of each row."""
    outcome: dict[str, list[float]] = {}
    for number, (row, record, answer) in enumerate(zip(rows, records, answers, strict=True)):
        tell(number)
        try:
            result = score(answer, row.reference, dict(record))
        except (Exception, SystemExit) as error:
            raise ScorerFailed(f"it failed on row {number + 1}: {_described(error)}") from error
        scores = result if isinstance(result, Mapping) else {getattr(score, "__name__", "score"): result}
        for name, value in scores.items():
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ScorerFailed(f"it named a score {name!r} on row {number + 1}; use letters, digits and _")
            if not isinstance(value, Real) or not math.isfinite(value):
                raise ScorerFailed(f"it returned {name}={value!r} on row {number + 1}; a score is a finite number")
        of_row = {f"{SCORER_PREFIX}{name}": float(value) for name, value in scores.items()}
        if not of_row or (number and of_row.keys() != outcome.keys()):
            first = f" and {_listed(outcome)} before" if number else ""
            raise ScorerFailed(f"it scored {_listed(of_row)} on row {number + 1}{first}; all rows need the same scores")
        for name, value in of_row.items():
            outcome.setdefault(name, []).append(value)
    return outcome


def _listed(scores: Mapping[str, Any]) -> str:
    return ", ".join(name.removeprefix(SCORER_PREFIX) for name in scores) or "nothing"


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"

"""Which arguments a configured class takes, read from its source without importing it, so that typos are found early.

Importing peft or torch takes seconds and belongs in the worker. Classes whose source does not show their arguments
(they take any keyword, or are created at run time) are left to the worker, and fail there.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

from left_bench.core.errors import UserError, nearest
from left_bench.spec.cell import Cell

_CLASS = re.compile(r"^class (\w+)\b", re.MULTILINE)
_TOO_LARGE = ("torchao",)
"""Packages with many files, whose configurations accept any keyword anyway."""
_KINDS: dict[str, tuple[type, ...]] = {"int": (int, float), "float": (int, float), "bool": (bool,), "str": (str,)}
"""Annotations simple enough to check a value against; some `int` annotations mean any number (DeLoRA's lambda)."""
_WITHOUT_FIELDS = ("object", "PushToHubMixin", "ABC", "Generic", "Protocol")


def check_arguments(cell: Cell) -> None:
    """Refuse arguments that the cell's adapter, quantization or optimizer does not have.

    Raises:
        UserError: names the key and the closest valid argument.
    """
    for name, instead in (("lr", "training.learning_rate"), ("params", "peft")):
        if name in cell.optimizer.config:
            raise UserError(
                f"optimizer.config.{name}={cell.optimizer.config[name]!r}: set it with {instead}=, which applies to "
                "every optimizer"
            )
    for group in ("quantization", "peft", "optimizer"):
        section: Any = getattr(cell, group)
        known = arguments_of(section.target) if section.target and section.config else None
        if known is None:
            continue
        for name in section.config:
            if name not in known:
                hint = nearest(name, known) or f"; it takes {', '.join(known)}"
                raise UserError(f"{group}.config.{name}: {section.target} has no such argument{hint}")
            value, kind = section.config[name], _KINDS.get(known[name])
            if (
                kind is not None
                and value is not None
                and (not isinstance(value, kind) or (isinstance(value, bool) and bool not in kind))
            ):
                raise UserError(f"{group}.config.{name}={value!r}: {section.target} takes {known[name]} here")
    rank = cell.peft.config.get("r", 1)
    if cell.peft.target in ("peft.LoraConfig", "peft.AdaLoraConfig") and isinstance(rank, int) and rank < 1:
        raise UserError(f"peft.config.r={rank}: a rank is at least 1; give peft.config.r=8")


@functools.cache
def arguments_of(target: str) -> dict[str, str] | None:
    """The arguments of the class behind a dotted name, with their annotations; None if the source does not show
    them."""
    parts = target.split(".")
    if (
        parts[0] == "transformers"
    ):  # its quantization configurations accept any keyword, and silently ignore unknown ones
        return _named_in(_folder_of("transformers"), parts[-1])
    if parts[0] in _TOO_LARGE:
        return None
    folder = _folder_of(parts[0])
    while folder is not None and len(parts) > 2 and (folder / parts[1]).is_dir():
        folder, parts = folder / parts[1], parts[1:]
    return None if folder is None else _arguments(folder, parts[-1])


def _named_in(transformers: Path | None, name: str) -> dict[str, str] | None:
    path = transformers and transformers / "utils" / "quantization_config.py"
    if path is None or not path.is_file():
        return None
    for item in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(item, ast.ClassDef) and item.name == name:
            for made in item.body:
                if isinstance(made, ast.FunctionDef) and made.name == "__init__":
                    arguments = made.args
                    named = [kind for kind in [*arguments.args, *arguments.kwonlyargs] if kind.arg != "self"]
                    return {kind.arg: ast.unparse(kind.annotation) if kind.annotation else "" for kind in named}
    return None


def _arguments(folder: Path, name: str) -> dict[str, str] | None:
    result = _class_of(folder, name)
    if result is None:
        return None
    for statement in result.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            arguments = statement.args
            if arguments.kwarg is not None or arguments.vararg is not None:
                return None
            own = [item for item in [*arguments.args, *arguments.kwonlyargs] if item.arg != "self"]
            return {item.arg: ast.unparse(item.annotation) if item.annotation else "" for item in own}
    fields: dict[str, str] = {}
    for base in result.bases:
        if isinstance(base, ast.Name) and base.id in _WITHOUT_FIELDS:
            continue
        above = _arguments(folder, base.id) if isinstance(base, ast.Name) else None
        if above is None:
            return None
        fields |= above
    is_dataclass = any("dataclass" in ast.dump(decorator) for decorator in result.decorator_list)
    for item in result.body if is_dataclass else ():
        if (
            isinstance(item, ast.AnnAssign)
            and isinstance(item.target, ast.Name)
            and "ClassVar" not in ast.dump(item.annotation)
            and not (isinstance(item.value, ast.Call) and _made_without(item.value))
        ):
            fields[item.target.id] = ast.unparse(item.annotation)
    return fields


def _made_without(call: ast.Call) -> bool:
    """Whether it is `field(init=False)`."""
    return any(
        keyword.arg == "init" and isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        for keyword in call.keywords
    )


def _class_of(folder: Path, name: str) -> ast.ClassDef | None:
    """A class of a package by its name; None if there is none or several."""
    paths = _classes(folder).get(name, [])
    if len(paths) != 1:
        return None
    tree = ast.parse(paths[0].read_text(encoding="utf-8"))
    return next(item for item in tree.body if isinstance(item, ast.ClassDef) and item.name == name)


@functools.cache
def _classes(folder: Path) -> dict[str, list[Path]]:
    """Class name -> the files of a package that define it."""
    result: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.py")):
        for name in _CLASS.findall(path.read_text(encoding="utf-8", errors="replace")):
            result.setdefault(name, []).append(path)
    return result


def _folder_of(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)  # a top-level package, so nothing is imported
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    return Path(places[0]) if places else None

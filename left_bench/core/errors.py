"""The one error type that means: the user can mend this."""

from __future__ import annotations

import difflib
import sys
import traceback
from collections.abc import Iterable
from typing import Any

_LONGEST = 500


class UserError(Exception):
    """Input that cannot be used; the message is one sentence naming the key, the value and the mend.

    The command line prints it without a traceback and exits with 2.
    """


class Unsupported(ValueError):
    """Options that are right each by itself and cannot go together: a row of the report, and no end of a sweep."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'grid'?"` when a known word is close to `word`, else an empty string."""
    word = str(word)
    close = difflib.get_close_matches(word, list(known), n=5, cutoff=0.5)
    if not close:
        return ""
    # letters that changed places are a likelier slip than letters that are none of the word's: lroa is lora, not road
    same_letters = [one for one in close if sorted(one) == sorted(word)]
    return f"; did you mean '{(same_letters or close)[0]}'?"


def in_one_sentence(error: Exception) -> str:
    """The words of an exception of Hydra's, which come in paragraphs with where it has looked after them."""
    text = str(error).partition("Config search path")[0]
    found = " ".join(text.split())
    return found if len(found) <= _LONGEST else f"{found[:_LONGEST]}…"


class user_errors:
    """Turns a UserError into one line and exit code 2.

    Hydra swallows what its callbacks raise, with a warning, and would run what could not be checked: `callback` makes
    an end of any other exception as well.
    """

    def __init__(self, *, callback: bool = False) -> None:
        self._callback = callback

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UserError):
            print(f"left-bench: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        if isinstance(error, Exception) and type(error).__module__.startswith(("hydra.", "omegaconf.")):
            print(f"left-bench: {in_one_sentence(error)}", file=sys.stderr)
            raise SystemExit(2) from None
        if isinstance(error, Exception) and self._callback:
            traceback.print_exception(error)
            raise SystemExit(1) from None


class NotInForce(RuntimeError):
    """Something that was asked for silently did not happen; the cell's numbers would bear a wrong name."""

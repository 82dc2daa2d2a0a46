"""Error types: `UserError` is the one that the user can fix."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator

_LONGEST = 500


class UserError(Exception):
    """Input that cannot be used; the message is one sentence naming the key, the value and the fix.

    The command line prints it without a traceback and exits with 2.
    """


class Unsupported(ValueError):
    """Options that are each valid but cannot be combined: a row of the report; the sweep goes on."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'grid'?"` when a known word is close to `word`, else an empty string."""
    word = str(word)
    close = difflib.get_close_matches(word, list(known), n=5, cutoff=0.5)
    if not close:
        return ""
    # swapped letters are a likelier typo than wrong letters: lroa is lora, not road
    same_letters = [item for item in close if sorted(item) == sorted(word)]
    return f"; did you mean '{(same_letters or close)[0]}'?"


def in_one_sentence(error: Exception) -> str:
    """The message of a Hydra exception on one line, without the list of search paths that follows it."""
    text = str(error).partition("Config search path")[0]
    result = " ".join(text.split())
    return result if len(result) <= _LONGEST else f"{result[:_LONGEST]}…"


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn a UserError raised in a Hydra task into one line and exit code 2; Hydra would print a line of its own first.

    Raises:
        SystemExit: with code 2.
    """
    try:
        yield
    except UserError as error:
        print(f"left-bench: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Exception as error:
        if not type(error).__module__.startswith(("hydra.", "omegaconf.")):
            raise
        print(f"left-bench: {in_one_sentence(error)}", file=sys.stderr)
        raise SystemExit(2) from None


class NotInForce(RuntimeError):
    """A requested option silently had no effect, so the cell's numbers would be reported under the wrong name."""

"""The one error type that means: the user can mend this."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Input that cannot be used; the message is one sentence naming the key, the value and the mend.

    The command line prints it without a traceback and exits with 2.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'grid'?"` when a known word is close to `word`, else an empty string."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""

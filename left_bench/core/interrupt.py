"""A request to end (Ctrl-C, a batch system's SIGTERM, a closed terminal), taken where nothing can swallow it.

Python runs a signal's handler between any two instructions: also in a weakref's callback, a finalizer or an import's
lock, whose exceptions are printed and forgotten, and within the `except:` of other people's code. A KeyboardInterrupt
raised there is lost. So the handler only notes the request, and a launch asks for it (`check`) where it may safely
stop: before it composes a job, before a cell, at each look at a worker or a lock. What comes to no such place in time,
as a download or a plugin that waits for its jobs, is interrupted in Python's own way.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

_PATIENCE_SECONDS = 1.0
_AGAIN_SECONDS = 10.0
"""After so long, with no end in sight, Python's own way was swallowed or what it interrupted hangs: once more."""
_SAME_REQUEST_SECONDS = 0.5
"""Wrappers (`uv run`, `srun`) pass a terminal's Ctrl-C on to a process that the terminal has told already."""

_asked: tuple[int, float] | None = None
"""Signal and time (monotonic) of a request that stands."""


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Note requests to end while the block runs; one that stands at its end makes the end a KeyboardInterrupt.

    The exception carries the signal's number. A second request ends the process at once, as the system would. Outside
    the main thread, where Python lets no one handle signals, the block just runs.

    Raises:
        KeyboardInterrupt: at a `check`, at the block's end, or wherever the program was when patience was over.
    """
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked = None
    handled = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # what is ignored stays ignored (`nohup`), and a handler that is not Python's (None) could not be put back
    before = {n: result for n in handled if (result := signal.getsignal(n)) not in (signal.SIG_IGN, None)}
    alarm = signal.getsignal(signal.SIGALRM) if hasattr(signal, "SIGALRM") else None
    try:
        for number in before:
            signal.signal(number, _note)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if _asked is not None:
            number, _asked = _asked[0], None
            _stop_alarm()
            if alarm is not None:
                signal.signal(signal.SIGALRM, alarm)
            raise KeyboardInterrupt(number)


def check() -> None:
    """Stop here if that was asked for; call it where stopping does no harm, and often.

    Raises:
        KeyboardInterrupt: with the signal's number.
    """
    if _asked is not None:
        _stop_alarm()  # the way out is not to be interrupted again
        raise KeyboardInterrupt(_asked[0])


def _note(number: int, _frame: object) -> None:
    global _asked
    now = time.monotonic()
    if _asked is None:
        _asked = number, now
        if not hasattr(signal, "setitimer"):  # Windows has no such clock
            raise KeyboardInterrupt(number)
        signal.signal(signal.SIGALRM, _patience_is_over)
        signal.setitimer(signal.ITIMER_REAL, _PATIENCE_SECONDS, _AGAIN_SECONDS)
    elif now - _asked[1] > _SAME_REQUEST_SECONDS:
        # records are whole at any moment and workers die with this process, so nothing has to be done before
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


def _patience_is_over(_number: int, _frame: object) -> None:
    if _asked is not None:
        raise KeyboardInterrupt(_asked[0])


def _stop_alarm() -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)

"""Requests to stop (Ctrl-C, a batch system's SIGTERM, a closed terminal), handled where nothing can swallow them.

Python runs a signal handler between any two instructions, including inside a weakref callback, a finalizer or an import
lock, whose exceptions are printed and forgotten, and inside a library's bare `except:`. A KeyboardInterrupt raised
there is lost. So the handler only records the request, and a launch checks for it (`check`) where it can safely stop:
before it composes a job, before a cell, and whenever it polls a worker or a lock. Code that reaches no such place in
time, such as a download or a plugin that waits for its jobs, gets a KeyboardInterrupt as usual.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

_GRACE_SECONDS = 1.0
_REPEAT_SECONDS = 10.0
"""If the process still runs after this time, the KeyboardInterrupt was swallowed or the handling hangs: repeat it."""
_SAME_REQUEST_SECONDS = 0.5
"""Wrappers (`uv run`, `srun`) forward a Ctrl-C to a process that has already received it from the terminal."""

_request: tuple[int, float] | None = None
"""Signal number and time (monotonic) of a pending request."""


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Record requests to stop while the block runs; if one is pending at the end, raise KeyboardInterrupt there.

    The exception carries the signal's number. A second request ends the process at once, as the system's default would.
    Outside the main thread, where Python allows no signal handlers, the block just runs.

    Raises:
        KeyboardInterrupt: at a `check`, at the block's end, or wherever the program is when the grace period ends.
    """
    global _request
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _request = None
    handled = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # ignored signals stay ignored (`nohup`); a handler not installed from Python (None) could not be restored
    before = {n: result for n in handled if (result := signal.getsignal(n)) not in (signal.SIG_IGN, None)}
    alarm = signal.getsignal(signal.SIGALRM) if hasattr(signal, "SIGALRM") else None
    try:
        for number in before:
            signal.signal(number, _note)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if _request is not None:
            number, _request = _request[0], None
            _stop_alarm()
            if alarm is not None:
                signal.signal(signal.SIGALRM, alarm)
            raise KeyboardInterrupt(number)


def check() -> None:
    """Stop here if a stop was requested. Call it often, where stopping does no harm.

    Raises:
        KeyboardInterrupt: with the signal's number.
    """
    if _request is not None:
        _stop_alarm()  # do not interrupt the way out
        raise KeyboardInterrupt(_request[0])


def _note(number: int, _frame: object) -> None:
    global _request
    now = time.monotonic()
    if _request is None:
        _request = number, now
        if not hasattr(signal, "setitimer"):  # Windows has no such timer
            raise KeyboardInterrupt(number)
        signal.signal(signal.SIGALRM, _grace_period_over)
        signal.setitimer(signal.ITIMER_REAL, _GRACE_SECONDS, _REPEAT_SECONDS)
    elif now - _request[1] > _SAME_REQUEST_SECONDS:
        # records are always complete and workers die with this process, so no cleanup is needed
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


def _grace_period_over(_number: int, _frame: object) -> None:
    if _request is not None:
        raise KeyboardInterrupt(_request[0])


def _stop_alarm() -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)

"""A lock per cell, so that several launches can share a runs folder.

A launch that finds a cell locked continues with the next one and returns to it at the end, when the record exists or
the lock's owner is dead. Nothing has to be cleaned up after a killed launch: the kernel releases its locks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from left_bench.core import interrupt
from left_bench.core.files import write_atomically

LOCK_NAME, ATTEMPT_NAME = ".lock", "attempt"
_PAUSE_SECONDS = 0.25
_Done = TypeVar("_Done")


@contextlib.contextmanager
def claim(run_dir: Path) -> Iterator[bool]:
    """Try to become the only process that runs this cell; yields whether this succeeded, and never waits.

    The lock is `flock`'s, which Linux supports over NFS (v4, or v3 with lockd), so launches on several machines can
    share a folder too. If the file system or the operating system has no locks, the cell is claimed without one, with a
    warning.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    handle = _locked(run_dir / LOCK_NAME)
    if handle is None:
        yield False
        return
    try:
        yield True
    finally:
        os.close(handle)


def next_attempt(run_dir: Path, *, recorded: int) -> int:
    """The number of the attempt that begins now, from 1, including killed attempts without a record.

    `recorded`: the attempt of the existing record, 0 for none. Call it only while the cell is claimed.
    """
    path = run_dir / ATTEMPT_NAME
    begun = path.read_text(encoding="ascii", errors="replace").strip() if path.exists() else ""
    attempt = max(recorded, int(begun) if begun.isdecimal() and len(begun) < 10 else 0) + 1
    write_atomically(path, f"{attempt}\n")
    return attempt


def until_done(attempts: list[Callable[[], _Done | None]]) -> list[_Done]:
    """Call each repeatedly until it returns something other than None; for cells that another launch is running.

    They are taken in the order in which they become free, so a dead launch's cells do not wait for a running one's.
    """
    done: list[_Done] = []
    waiting = list(attempts)
    while waiting:
        still = []
        for attempt in waiting:
            interrupt.check()
            result = attempt()
            if result is None:
                still.append(attempt)
            else:
                done.append(result)
        if len(still) == len(waiting):
            time.sleep(_PAUSE_SECONDS)
        waiting = still
    return done


def _locked(path: Path) -> int | None:
    """A handle that holds the lock on `path` until it is closed, or None if another process holds it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return _unlocked(path, "this system has no flock")
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return None
            return _unlocked(path, error.strerror or type(error).__name__)
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        os.close(handle)  # the folder was deleted and created again meanwhile, so the lock is on a deleted file


def _unlocked(path: Path, why: str) -> int:
    print(f"warning: {path} cannot be locked ({why}); do not start a second launch on this folder", file=sys.stderr)
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)

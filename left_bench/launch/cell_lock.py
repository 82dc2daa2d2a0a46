"""Who runs a cell: a lock for each cell that dies with its process, so that several launches can share a runs folder.

A launch that finds a cell taken goes on to the next one and comes back at the end, by which time the record is there or
its owner is dead. Nothing has to be cleaned up after a killed launch: the kernel lets go of its locks.
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
    """Try to become the one process that runs this cell; yields whether this one now is, and never waits.

    The lock is `flock`'s: Linux carries it over NFS (v4, or v3 with lockd), so that launches on several machines share
    as well. Where the file system or the system has no locks, the cell is claimed without one and a warning says so.
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
    """The number of the attempt that begins now, from 1; attempts that were killed and left no record are counted.

    `recorded` is the attempt of the record that is there, 0 for none. Call it only while the cell is claimed.
    """
    path = run_dir / ATTEMPT_NAME
    begun = path.read_text(encoding="ascii", errors="replace").strip() if path.exists() else ""
    attempt = max(recorded, int(begun) if begun.isdecimal() and len(begun) < 10 else 0) + 1
    write_atomically(path, f"{attempt}\n")
    return attempt


def until_done(attempts: list[Callable[[], _Done | None]]) -> list[_Done]:
    """Call each until it gives something other than None: cells that another launch has in hand.

    Whichever comes free first is taken first, so a dead launch's cells do not wait behind a living one's.
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
    """A handle that holds the lock on `path` until it is closed, or None when another process holds it."""
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
        os.close(handle)  # the folder was deleted and made again meanwhile: that lock is nobody's


def _unlocked(path: Path, why: str) -> int:
    print(f"warning: {path} cannot be locked ({why}); do not start a second launch on this folder", file=sys.stderr)
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)

"""Starting a worker: a fresh interpreter, or on CPU a fork of a server that has done the imports already.

Importing torch, transformers and peft takes longer than a small cell trains. The server imports them once for a sweep
and does nothing else, so every fork starts from the same state as the first: no thread pool, no random state, no
allocation of a run. CUDA contexts do not survive a fork; accelerators always get a fresh interpreter, and so do all
workers off Linux: macOS has a fork server too, but its own frameworks, which torch has loaded by then, may end a fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from left_bench.core import interrupt

PRELOAD = "left_bench.worker.preload"
LAUNCHER_PID = "LEFT_BENCH_LAUNCHER_PID"
STACK_SIGNAL = getattr(signal, "SIGUSR1", None)
_MOMENT_SECONDS = 0.5
_LOOK_EVERY_SECONDS = 0.05


class Process(Protocol):
    """A started worker."""

    def wait(self, seconds: float) -> int | None:
        """Wait at most so long; the exit code (negative: a signal), or None while it runs."""

    def show_stack(self) -> None:
        """Have the worker write to its log where it is, and give it a moment to do so."""

    def end(self) -> int | None:
        """Kill the worker and all its children; the exit code it had or now has."""


def start(
    run_dir: Path,
    *,
    log: Path,
    environment: dict[str, str],
    fork: bool,
    command: list[str] | None = None,
    program: str = "left_bench.worker.run",
) -> Process:
    """Start a program of the package on `run_dir` in a process group of its own, its output in `log`.

    Args:
        command: what to start in its place (tests).
        program: the module, whose `main([run_dir], forked=True)` a fork calls.
    """
    if fork and command is None and may_fork():
        return _Forked(program, run_dir, log=log, environment=environment)
    return _Spawned([*(command or [sys.executable, "-m", program]), str(run_dir)], log, environment)


def may_fork() -> bool:
    """Whether a process that has imported torch can be forked on this platform and go on."""
    return sys.platform == "linux" and "forkserver" in multiprocessing.get_all_start_methods()


def serve_forks(preload: str, *, environment: dict[str, str]) -> None:
    """Start the server that processes are forked from, where none runs yet, and come back while it imports.

    Args:
        preload: the module that it imports, with all that this one imports.
    """
    from multiprocessing import forkserver  # of systems that can fork

    multiprocessing.get_context("forkserver").set_forkserver_preload([preload])
    # the server keeps the environment of its start; what a cell sets itself is set again in the fork
    with _environment(environment), output_discarded():
        forkserver.ensure_running()


def run_within(seconds: float, folder: Path, *, environment: dict[str, str], fork: bool, program: str) -> None:
    """Run a program of the package on `folder` to its end, or end it after so many seconds; its log lies there too.

    Raises:
        KeyboardInterrupt: the launch was told to stop; the program is ended.
    """
    process = start(folder, log=folder / "log", environment=environment, fork=fork, program=program)
    end = time.monotonic() + seconds
    try:
        while process.wait(_LOOK_EVERY_SECONDS) is None and time.monotonic() < end:
            interrupt.check()
    finally:
        process.end()


class _Spawned:
    def __init__(self, command: list[str], log: Path, environment: dict[str, str]) -> None:
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Windows passes it by: see `end_with_children`
                env=environment | {LAUNCHER_PID: str(os.getpid())},
            )

    def wait(self, seconds: float) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(seconds)
        return None

    def show_stack(self) -> None:
        _ask_for_stack(self._process.pid)
        self.wait(_MOMENT_SECONDS)

    def end(self) -> int | None:
        end_with_children(self._process.pid)
        return self._process.wait()


class _Forked:
    def __init__(self, program: str, run_dir: Path, *, log: Path, environment: dict[str, str]) -> None:
        serve_forks(PRELOAD, environment=environment)
        context = multiprocessing.get_context("forkserver")
        self._process: Any = context.Process(target=_run_forked, args=(program, str(run_dir), str(log), environment))
        with _main_hidden():
            self._process.start()

    def wait(self, seconds: float) -> int | None:
        self._process.join(seconds)
        code: int | None = self._process.exitcode
        return code

    def show_stack(self) -> None:
        _ask_for_stack(self._process.pid)
        self.wait(_MOMENT_SECONDS)

    def end(self) -> int | None:
        end_with_children(self._process.pid)
        self._process.kill()  # in its first moments it has no group of its own yet
        self._process.join()
        code: int | None = self._process.exitcode
        return code


def _run_forked(program: str, run_dir: str, log: str, environment: dict[str, str]) -> None:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    importlib.import_module(program).main([run_dir], forked=True)


def _end_with_launcher() -> None:
    """Wait, asleep, for the launching process to end, and end this one's group with it.

    The worker's own request to the kernel (`die_with_parent`) is no help here: a fork's parent is the server, and the
    server outlives the launcher for as long as it has a fork.
    """
    launcher: Any = multiprocessing.parent_process()
    multiprocessing.connection.wait([launcher.sentinel])
    os.killpg(0, signal.SIGKILL)


@contextlib.contextmanager
def _environment(wanted: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(wanted)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def output_discarded() -> Iterator[None]:
    """What libraries say when they are imported belongs to no cell; a fork's own output goes to its log."""
    kept = [os.dup(1), os.dup(2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        for stream, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, stream)
            os.close(copy)
        os.close(nowhere)


@contextlib.contextmanager
def _main_hidden() -> Iterator[None]:
    """Keep multiprocessing from running the parent's main module again in the fork: the worker needs none of it.

    Nor the parent's default start method: in a joblib process that is `loky`, which the fork has never heard of.
    """
    main = sys.modules["__main__"]
    kept = {name: getattr(main, name, None) for name in ("__file__", "__spec__")}
    method: Any = multiprocessing.get_start_method(allow_none=True)
    try:
        multiprocessing.set_start_method("forkserver", force=True)
        for name in kept:
            setattr(main, name, None)
        yield
    finally:
        multiprocessing.set_start_method(method, force=True)
        for name, value in kept.items():
            setattr(main, name, value)


def _ask_for_stack(pid: int | None) -> None:
    if pid is not None and STACK_SIGNAL is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, STACK_SIGNAL)


def end_with_children(pid: int | None) -> None:
    """Kill a worker and what it has started: its process group, or on Windows, which has none, its descendants."""
    if pid is None:
        return
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        return
    import psutil

    with contextlib.suppress(psutil.Error):
        worker = psutil.Process(pid)
        for process in [worker, *worker.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                process.kill()


def end_alone(pid: int) -> None:
    """Kill one process."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))  # on Windows, any signal ends a process at once


def die_with_parent() -> None:
    """See to it that this process ends when its parent does, however that happens.

    Linux is asked for it (PR_SET_PDEATHSIG). Elsewhere a thread waits for the parent's end.
    """
    # a spawned worker is told whose it is: the parent may have ended while the imports were still running
    parent = int(os.environ.pop(LAUNCHER_PID, os.getppid()))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before the request took hold
            os._exit(1)
    else:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(pid: int) -> None:
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):  # it has ended already
        psutil.Process(pid).wait()
    os._exit(1)

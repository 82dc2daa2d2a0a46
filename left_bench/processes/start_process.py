"""Starting a worker: a fresh interpreter, or on CPU a fork of a server that has done the imports already.

Importing torch, transformers and peft takes longer than a small cell trains. The server (`fork_server`) imports them
once for a sweep and does nothing else, so every fork starts from the same state as the first. CUDA contexts do not
survive a fork; accelerators always get a fresh interpreter, and so do all workers off Linux: macOS can fork too, but
its own frameworks, which torch has loaded by then, may end a fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from left_bench.core import interrupt
from left_bench.processes.fork_server import Connection, ask

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
    return sys.platform == "linux"


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
        self._pid, self._connection = _server_of_this_process(environment).fork(
            program=program,
            run_dir=str(run_dir),
            log=str(log),
            environment=environment,
            folder=str(Path.cwd()),
            path=sys.path,
        )
        self._code: int | None = None

    def wait(self, seconds: float) -> int | None:
        if self._code is None:
            try:
                message = self._connection.receive(seconds)
            except EOFError:  # the server has ended, and the kernel its workers with it
                message = {"code": -signal.SIGKILL}
            if message is not None:
                self._code = message["code"]
                self._connection.close()
        return self._code

    def show_stack(self) -> None:
        _ask_for_stack(self._pid)
        self.wait(_MOMENT_SECONDS)

    def end(self) -> int | None:
        end_with_children(self._pid)
        while self.wait(_MOMENT_SECONDS) is None:
            pass
        return self._code


class _Server:
    """The fork server of this process, begun when it is first asked; see `fork_server`."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.launcher = os.getpid()
        self._socket, its = socket.socketpair()
        with its:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "left_bench.processes.fork_server", str(its.fileno()), str(self.launcher)],
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                # what libraries say when they are imported belongs to no cell; a fork's own output goes to its log
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                # it keeps the environment of its start; what a cell sets itself is set again in the fork
                env=environment,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_ours(self) -> bool:
        """Whether it runs, and is no other process's, of which this one is a fork."""
        return self.launcher == os.getpid() and self._process.poll() is None

    def fork(self, **request: Any) -> tuple[int, Connection]:
        """A worker's process id, and what will tell its exit code; the first has to wait for the imports.

        Raises:
            EOFError, OSError: there is no process to be had, or the server was ended; the next request gets a new one.
            KeyboardInterrupt: the launch was told to stop.
        """
        try:
            connection = ask(self._socket, **request)
            try:
                while (message := connection.receive(_LOOK_EVERY_SECONDS)) is None:
                    interrupt.check()
            except BaseException:
                connection.close()
                raise
        except (BrokenPipeError, ConnectionResetError, EOFError) as error:
            self.end()
            raise EOFError("the process that workers are forked from was ended") from error
        if "pid" in message:
            return message["pid"], connection
        connection.close()
        if "errno" in message:
            raise OSError(message["errno"], os.strerror(message["errno"]))
        raise EOFError(f"the worker ended before it began, with exit code {message['code']}")

    def end(self) -> None:
        """End it, and with it its workers."""
        self._socket.close()
        self._process.kill()
        self._process.wait()


_server: _Server | None = None
_one_at_a_time = threading.Lock()


def _server_of_this_process(environment: dict[str, str]) -> _Server:
    global _server
    with _one_at_a_time:
        if _server is None or not _server.is_ours():
            _server = _Server(environment)
        return _server


@contextlib.contextmanager
def output_discarded() -> Iterator[None]:
    """Inside, nothing that is written to standard output or error is shown, whoever writes it."""
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

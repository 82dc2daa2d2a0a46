"""Starting a worker: a new interpreter, or on CPU a fork of a server that has already done the imports.

Importing torch, transformers and peft takes longer than training a small cell. The server (`fork_server`) imports them
once for a sweep and does nothing else, so every fork starts from the same state. CUDA contexts do not survive a fork,
so accelerators always get a new interpreter, and so do all workers outside Linux: macOS can fork too, but its own
frameworks, which torch has loaded by then, may crash a fork.
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
        """Wait at most `seconds`; return the exit code (negative: a signal), or None if it still runs."""

    def show_stack(self) -> None:
        """Make the worker write its stack to its log, and wait a moment for it."""

    def end(self) -> int | None:
        """Kill the worker and all its children, and return its exit code."""


def start(
    run_dir: Path,
    *,
    log: Path,
    environment: dict[str, str],
    fork: bool,
    command: list[str] | None = None,
    program: str = "left_bench.worker.run",
) -> Process:
    """Start a module of the package on `run_dir` in its own process group, with its output in `log`.

    Args:
        command: a replacement command, for tests.
        program: the module's name; a fork calls its `main([run_dir], forked=True)`.
    """
    if fork and command is None and may_fork():
        return _Forked(program, run_dir, log=log, environment=environment)
    return _Spawned([*(command or [sys.executable, "-m", program]), str(run_dir)], log, environment)


def may_fork() -> bool:
    """Whether a process that has imported torch can safely be forked on this platform."""
    return sys.platform == "linux"


def serve_forks(environment: dict[str, str]) -> None:
    """Start the fork server if it is not running, and return while it is still importing."""
    _server_of_this_process(environment)


def run_within(seconds: float, folder: Path, *, environment: dict[str, str], fork: bool, program: str) -> None:
    """Run a module of the package on `folder`, ending it after `seconds` at the latest; its log is in the folder, too.

    Raises:
        KeyboardInterrupt: a stop was requested; the program is ended.
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
                start_new_session=True,  # ignored on Windows: see `end_with_children`
                env=environment | {LAUNCHER_PID: str(os.getpid())},
            )

    def wait(self, seconds: float) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(seconds)
        return None

    def show_stack(self) -> None:
        _request_stack(self._process.pid)
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
            except EOFError:  # the server has ended, and the kernel has killed its workers
                message = {"code": -signal.SIGKILL}
            if message is not None:
                self._code = message["code"]
                self._connection.close()
        return self._code

    def show_stack(self) -> None:
        _request_stack(self._pid)
        self.wait(_MOMENT_SECONDS)

    def end(self) -> int | None:
        end_with_children(self._pid)
        while self.wait(_MOMENT_SECONDS) is None:
            pass
        return self._code


class _Server:
    """The fork server of this process, started on first use; see `fork_server`."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.launcher = os.getpid()
        self._socket, its = socket.socketpair()
        with its:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "left_bench.processes.fork_server", str(its.fileno()), str(self.launcher)],
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                # output during imports belongs to no cell; a fork's own output goes to its log
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                # it keeps its initial environment; variables of a cell are set again in the fork
                env=environment,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_ours(self) -> bool:
        """Whether it is running and was started by this process, not by one that this was forked from."""
        return self.launcher == os.getpid() and self._process.poll() is None

    def fork(self, **request: Any) -> tuple[int, Connection]:
        """Fork a worker: its process id, and the connection that will report its exit code; the first waits for the
        imports.

        Raises:
            EOFError, OSError: no process is available, or the server was ended; the next request starts a new one.
            KeyboardInterrupt: a stop was requested.
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
            raise EOFError("the fork server was ended") from error
        if "pid" in message:
            return message["pid"], connection
        connection.close()
        if "errno" in message:
            raise OSError(message["errno"], os.strerror(message["errno"]))
        raise EOFError(f"the worker ended before it started, with exit code {message['code']}")

    def end(self) -> None:
        """End it and its workers."""
        self._socket.close()
        self._process.kill()
        self._process.wait()


_server: _Server | None = None
_server_lock = threading.Lock()


def _server_of_this_process(environment: dict[str, str]) -> _Server:
    global _server
    with _server_lock:
        if _server is None or not _server.is_ours():
            _server = _Server(environment)
        return _server


@contextlib.contextmanager
def output_discarded() -> Iterator[None]:
    """Inside the context, everything written to standard output or error is discarded, also by C libraries."""
    saved = [os.dup(1), os.dup(2)]
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        os.dup2(null, 2)
        yield
    finally:
        for stream, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, stream)
            os.close(copy)
        os.close(null)


def _request_stack(pid: int | None) -> None:
    if pid is not None and STACK_SIGNAL is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, STACK_SIGNAL)


def end_with_children(pid: int | None) -> None:
    """Kill a worker and its children: its process group, or on Windows, which has none, its descendants."""
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
    """Ensure that this process ends when its parent does.

    On Linux the kernel does it (PR_SET_PDEATHSIG); elsewhere a thread waits for the parent's end.
    """
    # a spawned worker is given its parent's id, because the parent may have ended during the imports
    parent = int(os.environ.pop(LAUNCHER_PID, os.getppid()))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before the request took effect
            os._exit(1)
    else:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(pid: int) -> None:
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):  # it has ended already
        psutil.Process(pid).wait()
    os._exit(1)

"""The fork server: a process that has imported what a worker needs, and forks workers on request.

`start_process` runs it as `python -m left_bench.processes.fork_server SOCKET PID`, once per launching process, and
keeps the other end of that socket. Each request sends another socket through it: the launcher writes the job there as a
line of JSON, the worker answers with its process id, and the server, its parent, later sends its exit code. Nothing is
pickled, and the worker shares no memory with the launcher.

The server only does the imports, so that every fork begins in the same state: no thread pool, no random state, no
allocations of an earlier run. It ends with the launcher, and its workers end with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import wait
from typing import Any

PRELOAD = "left_bench.worker.preload"
_PR_SET_PDEATHSIG = 1
_LOOK_EVERY_SECONDS = 2.0
"""The socket closes when the launcher ends, unless a process forked by the launcher still holds it; so poll as well."""
_ONE_REQUEST = b"+"


class Connection:
    """Sends and receives JSON objects, one per line, through a socket that it owns."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._received = b""

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, **message: Any) -> None:
        """Write one line.

        Raises:
            OSError: the other end has closed.
        """
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float | None = None) -> dict[str, Any] | None:
        """The next message, waiting at most `seconds` (None: without limit); None if there is none yet.

        Raises:
            EOFError: the other end has closed.
        """
        while b"\n" not in self._received:
            if not wait([self._socket], seconds):
                return None
            try:
                part = self._socket.recv(2**16)
            except ConnectionResetError:
                part = b""
            if not part:
                raise EOFError("the other end of the socket has closed")
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        self._socket.close()


def ask(server: socket.socket, **request: Any) -> Connection:
    """Request a worker from a fork server; the returned connection reports about it.

    Raises:
        OSError: the server has ended.
    """
    own, workers = socket.socketpair()
    try:
        with workers:
            socket.send_fds(server, [_ONE_REQUEST], [workers.fileno()])
        connection = Connection(own)
        connection.send(**request)
    except BaseException:
        own.close()
        raise
    return connection


def main(argv: Sequence[str]) -> int:
    """Do the imports, then fork workers until the launcher ends."""
    descriptor, launcher = map(int, argv)
    # During the imports nothing reads the socket, so the kernel must end this process. Afterwards it must not: for the
    # kernel, the parent ends when the thread that started the server ends, and the server serves all threads.
    _kill_this_with(launcher)
    with contextlib.suppress(Exception):  # each worker's log will show the import error
        importlib.import_module(PRELOAD)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)
    with socket.socket(fileno=descriptor) as requests:
        _serve(requests, launcher)
    return 0


def _serve(requests: socket.socket, launcher: int) -> None:
    workers: dict[int, Connection] = {}
    woken, wakes = socket.socketpair()
    for end in (woken, wakes):
        end.setblocking(False)
    signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler is needed so that a worker's end wakes this process
    while True:
        ready = wait([requests, woken], _LOOK_EVERY_SECONDS)
        if woken in ready:
            with contextlib.suppress(BlockingIOError):
                woken.recv(2**16)
        _report_ends(workers)
        if requests in ready:
            received, descriptors, _, _ = socket.recv_fds(requests, 1, 1)
            if not received:
                break
            worker = Connection(socket.socket(fileno=descriptors[0]))
            _fork(worker, workers, others=(requests, woken, wakes))
        if os.getppid() != launcher:
            break
    for pid in workers:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def _fork(worker: Connection, workers: dict[int, Connection], *, others: Sequence[socket.socket]) -> None:
    server = os.getpid()
    try:
        pid = os.fork()
    except OSError as error:  # no process or memory available: this request fails, the server goes on
        with contextlib.suppress(OSError):
            worker.send(errno=error.errno)
        worker.close()
        return
    if pid:
        workers[pid] = worker
        return
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for end in others:
            end.close()
        for other in workers.values():
            other.close()
        code = _work(worker, server=server)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _work(launcher: Connection, *, server: int) -> int:
    """Become the requested worker; runs in the fork."""
    _kill_this_with(server)
    os.setsid()  # its own process group, so that it can be killed together with its children
    request = launcher.receive()
    launcher.send(pid=os.getpid())
    launcher.close()
    assert request is not None
    os.chdir(request["folder"])  # the log's path may be relative to it
    output = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    sys.path[:] = request["path"]
    os.environ.clear()
    os.environ.update(request["environment"])
    importlib.import_module(request["program"]).main([request["run_dir"]], forked=True)
    return 0


def _report_ends(workers: dict[int, Connection]) -> None:
    """Report to the launcher the exit codes of workers that have ended."""
    while workers:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        worker = workers.pop(pid)
        with contextlib.suppress(OSError):  # the launcher no longer listens
            worker.send(code=os.waitstatus_to_exitcode(status))
        worker.close()


def _kill_this_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, or exit now if it has already ended."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

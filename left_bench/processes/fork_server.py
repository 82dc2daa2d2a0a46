"""The fork server: a process that has done the imports of a worker, and becomes one by a fork whenever it is asked.

`start_process` runs it as `python -m left_bench.processes.fork_server SOCKET PID`, one for each launching process, and
keeps the other end of that socket. A request is one more socket, sent through it: the launcher writes there, as a line
of JSON, what is to run; the worker answers with its process id, and the server, its parent, with its exit code. Nothing
is pickled, and nothing of the launcher's memory is in the worker.

The server runs nothing but the imports, so that every fork begins in the same state: no thread pool, no random state,
no allocation of an earlier run. It ends with the launcher, and its workers end with it.
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
"""At the launcher's end the socket ends too, unless a process that the launcher has forked still holds it."""
_ONE_REQUEST = b"+"


class Connection:
    """Lines of JSON, one object each, through a socket that this end owns."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._received = b""

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, **message: Any) -> None:
        """Write one line.

        Raises:
            OSError: the other end is gone.
        """
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float | None = None) -> dict[str, Any] | None:
        """The next line, waiting at most so long (None: until there is one); None where there is none yet.

        Raises:
            EOFError: the other end is gone.
        """
        while b"\n" not in self._received:
            if not wait([self._socket], seconds):
                return None
            try:
                part = self._socket.recv(2**16)
            except ConnectionResetError:
                part = b""
            if not part:
                raise EOFError("the other end of the socket is gone")
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        self._socket.close()


def ask(server: socket.socket, **request: Any) -> Connection:
    """Ask a fork server for a worker; what is returned tells of it.

    Raises:
        OSError: the server is gone.
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
    # while the imports run nobody looks at the socket. Afterwards it would be too much: what the kernel means by a
    # parent's end is the end of the thread that asked, and the server is for all threads
    _kill_this_with(launcher)
    with contextlib.suppress(Exception):  # what cannot be imported says so in each worker's log
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
    signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler, so that the end of a worker wakes this process
    while True:
        ready = wait([requests, woken], _LOOK_EVERY_SECONDS)
        if woken in ready:
            with contextlib.suppress(BlockingIOError):
                woken.recv(2**16)
        _tell_ends(workers)
        if requests in ready:
            asked, descriptors, _, _ = socket.recv_fds(requests, 1, 1)
            if not asked:
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
    except OSError as error:  # no process or no memory to be had: this request's trouble, and not the server's
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
    """What a fork does: become the worker that was asked for."""
    _kill_this_with(server)
    os.setsid()  # the worker's own group, to be ended with all that it starts
    asked = launcher.receive()
    launcher.send(pid=os.getpid())
    launcher.close()
    assert asked is not None
    os.chdir(asked["folder"])  # which the log's path may be relative to
    output = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    sys.path[:] = asked["path"]
    os.environ.clear()
    os.environ.update(asked["environment"])
    importlib.import_module(asked["program"]).main([asked["run_dir"]], forked=True)
    return 0


def _tell_ends(workers: dict[int, Connection]) -> None:
    """Tell the launcher of the workers that have ended."""
    while workers:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        worker = workers.pop(pid)
        with contextlib.suppress(OSError):  # it does not listen any more
            worker.send(code=os.waitstatus_to_exitcode(status))
        worker.close()


def _kill_this_with(parent: int) -> None:
    """Have the kernel end this process when its parent ends, or end it now where that has happened already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

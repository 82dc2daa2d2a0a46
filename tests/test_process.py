"""The fork server: imports once, a process of its own for each cell, and nobody outlives the launcher."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from left_bench.core import interrupt
from left_bench.launch.supervise import run_isolated
from left_bench.processes import fork_server, start_process
from left_bench.spec.events import EVENTS_NAME

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fork server is used on Linux alone")

LAUNCHER = """
import pathlib, sys
from left_bench.spec.cell import Cell
from left_bench.launch.supervise import run_isolated
folder = pathlib.Path(sys.argv[1])
cell = Cell.model_validate_json((folder / "wanted.json").read_text())
run_isolated(cell, folder / "run", on_event=lambda event: None)
"""


def wait_for(condition, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


def test_the_second_cell_finds_the_imports_done(tiny_cell, tmp_path):
    first = run_isolated(tiny_cell("peft=ia3"), tmp_path / "first", on_event=lambda event: None)
    second = run_isolated(tiny_cell("peft=lora"), tmp_path / "second", on_event=lambda event: None)
    assert (first.status, second.status) == ("ok", "ok"), (first.reason, second.reason)
    # the baseline is the same imports in both: what one cell allocated is not the next one's
    baselines = [record.metrics["baseline_memory_bytes"] for record in (first, second)]
    assert baselines[1] == pytest.approx(baselines[0], rel=0.1)


def test_a_killed_launcher_takes_a_forked_worker_along(tiny_cell, tmp_path):
    cell = tiny_cell("peft=lora", "training.steps=1000000")
    (tmp_path / "wanted.json").write_text(cell.model_dump_json(by_alias=True))
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(tmp_path)], stderr=subprocess.DEVNULL)
    events = tmp_path / "run" / EVENTS_NAME
    assert wait_for(lambda: events.exists() and '"step"' in events.read_text())
    family = psutil.Process(launcher.pid).children(recursive=True)
    assert len(family) >= 2  # the server and the worker
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    assert wait_for(lambda: not any(process.is_running() for process in family), seconds=10)


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """`fork(source)`: a worker started by the fork server, whose `main` has that body."""
    monkeypatch.syspath_prepend(tmp_path)

    def fork(body: str, **environment: str) -> start_process.Process:
        lines = ["def main(argv, *, forked=False):", *(f"    {line}" for line in body.splitlines())]
        name = f"program_{len(list(tmp_path.glob('program_*.py')))}"
        (tmp_path / f"{name}.py").write_text("\n".join(["import json, os, pathlib, signal, sys", *lines, ""]))
        return start_process.start(
            tmp_path, log=tmp_path / "log", environment=dict(os.environ) | environment, fork=True, program=name
        )

    return fork


@pytest.fixture
def no_server_yet(monkeypatch):
    """The launcher as it is before its first worker; a server that the test begins is ended."""
    monkeypatch.setattr(start_process, "_server", None)
    yield
    if start_process._server is not None:
        start_process._server.end()


@pytest.mark.parametrize(
    ("body", "code", "told"),
    [
        ("print('done')", 0, "done"),
        ("sys.exit(3)", 3, ""),
        ("raise ValueError('of a worker')", 1, "ValueError: of a worker"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("os._exit(7)", 7, ""),
    ],
)
def test_a_forked_workers_end_is_told_and_its_output_is_in_the_log(body, code, told, fork, tmp_path):
    worker = fork(body)
    assert worker.wait(60) == code
    assert worker.end() == code
    assert told in (tmp_path / "log").read_text()


def test_a_forked_worker_has_the_environment_folder_and_import_path_it_was_given(fork, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts = "[dict(os.environ), os.getcwd(), sys.path, argv, forked, os.getpgrp() == os.getpid()]"
    assert fork(f"pathlib.Path('facts').write_text(json.dumps({facts}))", LEFT_BENCH_TEST="ä=1\n2").wait(60) == 0
    environment, *facts = json.loads((tmp_path / "facts").read_text())
    assert environment == dict(os.environ) | {"LEFT_BENCH_TEST": "ä=1\n2"}
    assert facts == [str(tmp_path), sys.path, [str(tmp_path)], True, True]


def test_a_logs_relative_path_is_of_the_folder_that_the_launcher_is_in_now(fork, tmp_path, monkeypatch):
    assert fork("pass").wait(60) == 0  # the server has begun elsewhere
    monkeypatch.chdir(tmp_path)
    options = {"environment": dict(os.environ), "fork": True, "program": "program_0"}
    assert start_process.start(tmp_path, log=Path("relative.log"), **options).wait(60) == 0
    assert (tmp_path / "relative.log").is_file()


def test_workers_run_side_by_side_and_end_one_by_one(fork, tmp_path):
    waiting = "import time\nwhile not pathlib.Path(argv[0], {!r}).exists(): time.sleep(0.02)\nsys.exit({})"
    first, second = fork(waiting.format("go-1", 11)), fork(waiting.format("go-2", 12))
    (tmp_path / "go-2").touch()
    assert second.wait(60) == 12
    assert first.wait(0.1) is None
    (tmp_path / "go-1").touch()
    assert first.wait(60) == 11


def test_a_worker_is_ended_with_what_it_has_started(fork, tmp_path):
    worker = fork(
        "import subprocess, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "pathlib.Path(argv[0], 'pid').write_text(str(child.pid))\n"
        "time.sleep(600)"
    )
    assert wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    child = psutil.Process(int((tmp_path / "pid").read_text()))
    assert worker.end() == -signal.SIGKILL
    assert wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, seconds=10)


@pytest.mark.usefixtures("no_server_yet")
def test_a_server_killed_while_it_imports_is_this_cells_row_and_the_next_cell_gets_a_new_one(tiny_cell, tmp_path):
    def kill_at_once() -> None:
        wait_for(lambda: start_process._server is not None)
        os.kill(start_process._server.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_at_once)
    killer.start()
    cell = tiny_cell("training.steps=1", "eval.generate=false")
    records = [run_isolated(cell, tmp_path / f"run-{i}", on_event=lambda event: None) for i in range(2)]
    killer.join()
    assert [record.status for record in records] == ["crashed", "ok"], records[1].reason
    assert "the fork server was ended" in records[0].reason


def test_a_server_killed_between_two_workers_is_replaced(fork):
    assert fork("pass").wait(60) == 0
    killed = start_process._server
    os.kill(killed.pid, signal.SIGKILL)
    psutil.Process(killed.pid).wait(10)
    assert fork("pass").wait(60) == 0
    assert start_process._server is not killed


def test_a_server_killed_beside_a_worker_takes_it_along(fork, tmp_path):
    worker = fork("import time\npathlib.Path(argv[0], 'pid').write_text(str(os.getpid()))\ntime.sleep(600)")
    assert wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    process = psutil.Process(int((tmp_path / "pid").read_text()))
    os.kill(start_process._server.pid, signal.SIGKILL)
    assert worker.wait(10) == -signal.SIGKILL
    assert wait_for(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, seconds=10)
    assert worker.end() == -signal.SIGKILL


def test_a_fork_that_is_refused_is_told_and_the_server_goes_on(monkeypatch):
    def refuse() -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    ours, theirs = socket.socketpair()
    workers: dict[int, fork_server.Connection] = {}
    fork_server._fork(fork_server.Connection(theirs), workers, others=())
    assert fork_server.Connection(ours).receive(1) == {"errno": errno.EAGAIN}
    assert not workers
    ours.close()


@pytest.mark.usefixtures("no_server_yet")
def test_a_launch_told_to_stop_does_not_wait_for_the_imports(fork, monkeypatch):
    def stop() -> None:
        raise KeyboardInterrupt(signal.SIGINT)

    monkeypatch.setattr(interrupt, "check", stop)
    with pytest.raises(KeyboardInterrupt):
        fork("raise AssertionError('nobody waits for it')")


@pytest.mark.parametrize("moment", ["while it imports", "when it has imported"])
def test_the_server_ends_with_its_launcher(moment, tmp_path):
    program = (
        "import os, pathlib, sys, threading, time\n"
        "from left_bench.processes import start_process\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "def ask():\n"
        "    start_process.start(folder, log=folder / 'log', environment=dict(os.environ), fork=True, program='this')\n"
        "    (folder / 'asked').touch()\n"
        "threading.Thread(target=ask, daemon=True).start()\n"
        "while start_process._server is None: time.sleep(0.01)\n"
        "print(start_process._server.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    launcher = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    server = psutil.Process(int(launcher.stdout.readline()))
    if moment == "when it has imported":
        assert wait_for((tmp_path / "asked").exists, seconds=120)
    with contextlib.closing(launcher.stdout):
        launcher.kill()
        launcher.wait()
        assert wait_for(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE, seconds=10)


def test_another_processs_server_is_not_asked(fork):
    assert fork("pass").wait(60) == 0
    server = start_process._server
    assert server.is_ours()
    server.launcher += 1  # as a fork of this process would see it
    try:
        assert not server.is_ours()
    finally:
        server.launcher -= 1


def test_what_is_no_whole_line_yet_is_waited_for():
    ours, theirs = socket.socketpair()
    connection = fork_server.Connection(ours)
    theirs.sendall(b'{"code"')
    assert connection.receive(0.05) is None
    theirs.sendall(b': 1}\n{"code": 2}\n')
    assert [connection.receive(1), connection.receive(1)] == [{"code": 1}, {"code": 2}]
    theirs.close()
    with pytest.raises(EOFError):
        connection.receive(1)
    connection.close()

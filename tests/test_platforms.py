"""What stands in for Linux's own on macOS and Windows: here the names that those lack are taken away.

Nothing of it has been run on such a system; docs/hardware.md says so.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from left_bench.core import interrupt
from left_bench.launch import cell_lock
from left_bench.launch.supervise import run_isolated
from left_bench.measure import device
from left_bench.processes import memory_limit as limits
from left_bench.processes import resources, start_process
from left_bench.training import checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="takes Linux's names away")
OTHERS = ["darwin", "win32"]
SLEEPS = [sys.executable, "-c", "import time; time.sleep(60)"]
# what Windows lacks, and its name, for the worker's own modules: libraries have parts for it that are not here
AS_ON_WINDOWS = """
import left_bench.worker.preload, os, psutil, signal, sys
from left_bench.measure import device
from left_bench.processes import memory_limit as limits, ranks, start_process as process
from left_bench.training import checkpoint
from left_bench.worker import run as worker
class Windows:
    platform = "win32"
    def __getattr__(self, name):
        return getattr(sys, name)
for module in (checkpoint, limits, process, ranks, worker):
    module.sys = Windows()
for module, names in {
    os: ("fork", "killpg", "setsid", "sched_setaffinity", "sched_getaffinity", "getuid"),
    signal: ("SIGKILL", "SIGUSR1", "setitimer"),
}.items():
    for name in names:
        delattr(module, name)
sys.modules |= {"fcntl": None, "resource": None}
worker.STACK_SIGNAL = None
device._reset_high_water_mark = lambda: False
limits._memory_groups = lambda root: []
worker.main(sys.argv[1:])
"""


def ended(pid: int, *, within: float = 10) -> bool:
    """Whether a process is gone, or a zombie that its parent has not asked for."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_a_cell_runs_without_what_windows_lacks(tiny_cell, tmp_path):
    overrides = [
        "hardware.timeout=600",
        "training.checkpoint_every=1",
        "eval.generate=false",
        "eval.check_reload=false",
    ]
    cell = tiny_cell("hardware.memory_limit=8GiB", *overrides)
    record = run_isolated(
        cell, tmp_path / "run", on_event=lambda event: None, command=[sys.executable, "-c", AS_ON_WINDOWS]
    )
    assert record.status == "ok", record.provenance
    assert record.environment["effective"]["memory_limit"] == "watchdog"
    assert record.environment["effective"]["peak_memory"] == "resident set sampled every 5 ms"
    assert record.metrics["peak_memory_bytes"] > 0


# --- processes ---


@pytest.mark.parametrize("platform", OTHERS)
def test_workers_are_new_interpreters(platform, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    assert not start_process.may_fork()
    started = start_process.start(
        tmp_path, log=tmp_path / "log", environment=dict(os.environ), fork=True, program="left_bench.no_such_module"
    )
    assert started.wait(30) == 1
    assert "No module named left_bench.no_such_module" in (tmp_path / "log").read_text()


def test_without_process_groups_a_worker_ends_with_its_children(tmp_path, monkeypatch):
    program = (
        "import pathlib, subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; "
        "time.sleep(60)']); pathlib.Path(sys.argv[1]).write_text(f'{child.pid}\\n'); time.sleep(60)"
    )
    worker = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "pid")])
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.02)
    monkeypatch.delattr(os, "killpg")
    start_process.end_with_children(worker.pid)
    assert worker.wait(10) != 0
    assert ended(int((tmp_path / "pid").read_text()))
    start_process.end_with_children(worker.pid)  # it is gone already


def test_without_sigkill_a_rank_is_ended(monkeypatch):
    rank = subprocess.Popen(SLEEPS)
    monkeypatch.delattr(signal, "SIGKILL")
    start_process.end_alone(rank.pid)
    assert rank.wait(10) != 0


@pytest.mark.parametrize("platform", OTHERS)
def test_a_worker_ends_with_the_launcher_that_it_was_told(platform, tmp_path):
    launcher = subprocess.Popen(SLEEPS)
    program = (
        "import psutil, sys, time; from left_bench.processes import start_process\n"
        f"sys.platform = {platform!r}; start_process.die_with_parent(); print('begun', flush=True); time.sleep(60)"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | {start_process.LAUNCHER_PID: str(launcher.pid)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout is not None and worker.stdout.readline() == "begun\n"
    assert worker.poll() is None
    launcher.kill()
    launcher.wait()
    assert worker.wait(10) == 1


def test_without_a_timer_a_request_to_end_interrupts_at_once(monkeypatch):
    monkeypatch.delattr(signal, "setitimer")
    after = []
    with pytest.raises(KeyboardInterrupt), interrupt.noted():
        signal.raise_signal(signal.SIGINT)
        after.append("went on")
    assert after == []


# --- memory, cores, files ---


@pytest.mark.parametrize("platform", OTHERS)
def test_the_watchdog_is_the_only_limit_of_memory(platform, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(limits, "enter_group", lambda *_, **__: False)
    assert device.CpuDevice().limit(2**40, run_dir=tmp_path, exceeded=print) == "watchdog"


def test_without_proc_the_watchdog_asks_psutil(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with limits._resident() as resident:
        before = resident()
        held = bytearray(b"x") * 50_000_000
        assert resident() - before > 40_000_000
        del held


def test_without_an_affinity_every_core_counts(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert resources.available_cores() == list(range(os.cpu_count() or 1))
    assert device.describe_machine(device.CpuDevice())["cores"] == os.cpu_count()


def test_without_locks_seats_are_shared(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    first, second = (resources._try_lock(tmp_path / "cores-2-0.lock") for _ in range(2))
    assert first is not None and second is not None
    first.close()
    second.close()


def test_without_locks_a_cell_is_claimed_with_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with cell_lock.claim(tmp_path) as mine:
        assert mine
    assert "do not start a second launch on this folder" in capsys.readouterr().err


def test_windows_opens_no_folder_and_flushes_what_may_be_written(tmp_path, monkeypatch):
    opened, system = [], os.open

    def windows(path, flags, *arguments):
        assert not Path(path).is_dir()
        opened.append(flags & os.O_RDWR)
        return system(path, flags, *arguments)

    (tmp_path / "state.json").write_text(json.dumps({}))
    monkeypatch.setattr(os, "open", windows)
    monkeypatch.setattr(sys, "platform", "win32")
    checkpoint._flush(tmp_path / "state.json")
    checkpoint._flush(tmp_path)
    assert opened == [os.O_RDWR]

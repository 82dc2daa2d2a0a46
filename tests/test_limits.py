"""`hardware.memory_limit`: each of its nets, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from left_bench.launch.supervise import run_isolated
from left_bench.processes import memory_limit as limits

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel")
MB = 10**6


def run(program: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


def test_private_memory_is_refused_and_given_again_to_say_so():
    program = """
from left_bench.processes import memory_limit as limits
limits.limit_data(200_000_000)
held = bytearray(100_000_000)
try:
    bytearray(150_000_000); print("no limit")
except MemoryError:
    print("limited")
limits.lift()
bytearray(150_000_000); print("lifted")
"""
    assert run(program) == "limited\nlifted\n"


def test_pages_of_a_mapped_file_are_seen_by_the_watchdog(tmp_path):
    """They count towards no rlimit, but towards the resident peak that is reported."""
    file = tmp_path / "weights"
    with file.open("wb") as sparse:
        sparse.truncate(300 * MB)
    program = """
import mmap, os, sys, time
from left_bench.processes import memory_limit as limits
from left_bench.measure.device import CpuDevice
def exceeded(used):
    print(used); sys.stdout.flush(); os._exit(7)
limits.watch(150_000_000, baseline_bytes=CpuDevice().set_baseline(), exceeded=exceeded)
with open(sys.argv[1], "rb") as file:
    pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for start in range(0, len(pages), 4096):
        pages[start]
        if start % 8192000 == 0: time.sleep(0.01)
print("no limit")
"""
    said = run(program, str(file))
    assert said.strip().isdigit(), said
    assert 150 * MB < int(said) < 300 * MB


def test_a_limit_that_is_kept_is_not_felt():
    program = """
import sys, time
from left_bench.processes import memory_limit as limits
limits.watch(500_000_000, baseline_bytes=0, exceeded=lambda used: print("exceeded", used))
held = bytearray(b"x") * 100_000_000
time.sleep(0.2)
print("fine")
"""
    assert run(program) == "fine\n"


def test_a_control_group_of_version_2(tmp_path, monkeypatch):
    """The files as cgroup v2 has them; that the kernel then enforces them is the kernel's own promise."""
    inside = tmp_path / "user.slice" / "session"
    inside.mkdir(parents=True)
    monkeypatch.setattr(limits, "_memory_groups", lambda root: [(inside, 2)])
    assert limits.enter_group(tmp_path / "run", 5 * MB)
    [group] = inside.iterdir()
    assert (group / "memory.max").read_text() == str(5 * MB)
    assert (group / "memory.swap.max").read_text() == "0"
    assert (group / "cgroup.procs").read_text() == str(os.getpid())
    for file in group.iterdir():
        file.unlink()
    limits.remove_group(tmp_path / "run")
    assert not group.exists()


def test_where_no_group_may_be_made_there_is_none(tmp_path, monkeypatch):
    closed = tmp_path / "closed"
    closed.write_text("")
    monkeypatch.setattr(limits, "_memory_groups", lambda root: [(closed, 2)])
    assert not limits.enter_group(tmp_path / "run", 5 * MB)
    limits.remove_group(tmp_path / "run")


def test_which_group_accounts_for_memory(tmp_path, monkeypatch):
    for folder in ("memory/a/b", "user.slice"):
        (tmp_path / folder).mkdir(parents=True)

    def groups(text: str) -> list[tuple[Path, int]]:
        monkeypatch.setattr(limits.Path, "read_text", lambda path: text)
        return limits._memory_groups(tmp_path)

    assert groups("4:memory:/a/b\n0::/user.slice\n") == [(tmp_path / "memory/a/b", 1), (tmp_path / "user.slice", 2)]
    assert groups("0::/user.slice\n") == [(tmp_path / "user.slice", 2)]
    assert groups("0::/elsewhere\n") == []


@pytest.fixture
def may_group(tmp_path):
    program = (
        "import pathlib, sys; from left_bench.processes import memory_limit as limits\n"
        "print(limits.enter_group(pathlib.Path(sys.argv[1]), 10**9))"
    )
    said = run(program, str(tmp_path / "probe"))
    limits.remove_group(tmp_path / "probe")
    if said.strip() != "True":
        pytest.skip("this process may make no control group")


def test_the_kernel_ends_a_run_beyond_its_group(may_group, tiny_cell, tmp_path):
    """A real out-of-memory kill: a child's memory is beyond every rlimit of the run itself."""
    cell = tiny_cell("hardware.memory_limit=100MB")
    program = """
import json, os, pathlib, sys
from left_bench.processes import memory_limit as limits
folder = pathlib.Path(sys.argv[1])
with open(folder / "events.jsonl", "w") as events:
    events.write(json.dumps({"event": "phase", "name": "train", "time": 0}) + "\\n")
assert limits.enter_group(folder, json.loads((folder / "cell.json").read_text())["hardware"]["memory_limit"])
held = bytearray(b"x") * 300_000_000
print("no limit")
"""
    record = run_isolated(cell, tmp_path / "run", on_event=lambda event: None, command=[sys.executable, "-c", program])
    assert record.status == "oom", record
    assert record.reason == (
        "the kernel killed the worker because memory ran out in phase train (hardware.memory_limit=95MiB)"
    )
    name = limits._group_name(tmp_path / "run")
    assert not [group for parent, _ in limits._memory_groups(limits._CGROUPS) for group in parent.glob(name)]


def test_the_limit_of_a_real_cell_is_in_its_record(tiny_cell, tmp_path):
    fits = run_isolated(
        tiny_cell("hardware.memory_limit=4GiB", "eval.generate=false"), tmp_path / "fits", on_event=lambda event: None
    )
    assert fits.status == "ok", fits.reason
    assert fits.environment["effective"]["memory_limit"] in (
        "RLIMIT_DATA, watchdog",
        "RLIMIT_DATA, control group, watchdog",
    )
    assert json.loads((tmp_path / "fits" / "cell.json").read_text())["hardware"]["memory_limit"] == 4 * 2**30

"""The fork server: imports once, a process of its own for each cell, and nobody outlives the launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from left_bench.launch.supervise import run_isolated
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

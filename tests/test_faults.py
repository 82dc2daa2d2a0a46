"""What happens to a real worker, and to what had been measured by then."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from faulty import FAULT

from left_bench.launch import supervise
from left_bench.launch.supervise import run_isolated
from left_bench.processes import start_process
from left_bench.spec.record import Record, read_record

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")


@pytest.fixture
def strike(monkeypatch, tiny_cell, tmp_path):
    """`strike("segfault@step2", *overrides)`: the record of a cell with that fault, and its events."""

    def strike(fault: str, *overrides: str) -> tuple[Record, list[dict[str, Any]]]:
        monkeypatch.setenv(FAULT, fault)
        monkeypatch.setattr(start_process, "start", partial(start_process.start, program="faulty"))
        seen: list[dict[str, Any]] = []
        cell = tiny_cell("training.steps=4", "training.measure_after=0", "eval.generate=false", *overrides)
        return run_isolated(cell, tmp_path / "run", on_event=seen.append), seen

    return strike


@pytest.fixture(scope="module", autouse=True)
def _warm_fork_server(tmp_path_factory):
    """The fork server has imported what a worker needs: else the first cell's limits would run out meanwhile."""
    start_process.start(
        tmp_path_factory.mktemp("warm"), log=Path(os.devnull), environment=dict(os.environ), command=None, fork=True
    ).end()


def family() -> list[psutil.Process]:
    """Workers of this process that are alive: forks of the server."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.status() != psutil.STATUS_ZOMBIE and child.ppid() != os.getpid()]


@pytest.mark.parametrize(
    ("fault", "status", "words"),
    [
        ("exception@step2", "failed", ["ValueError: a fault of two lines"]),
        ("memory_error@step2", "oom", ["MemoryError", "machine memory "]),
        ("cuda_oom@step2", "oom", ["CUDA out of memory", "machine memory "]),
        ("segfault@step2", "crashed", ["SIGSEGV", "in phase train after step 2"]),
        ("kill@step2", "crashed", ["SIGKILL", "in phase train after step 2"]),
        ("exit@step2", "crashed", ["exited with code 3", "in phase train after step 2"]),
        ("disk_full_once@step2", "failed", ["disk full: ", "No space left on device", "events.jsonl"]),
        ("disk_full@step2", "failed", ["could not write its outcome", "MiB are free"]),
    ],
)
def test_a_fault_while_training(fault, status, words, strike, monkeypatch):
    monkeypatch.setattr(supervise, "_kernel_kills", lambda: 0)
    record, seen = strike(fault)
    assert record.status == status, (record.reason, record.provenance["log_tail"])
    for word in words:
        assert word in record.reason
    assert "\n" not in record.reason
    # what was measured before is kept, by the definitions of a run that ends
    assert [phase.name for phase in record.phases][:2] == ["load", "attach"]
    losses = [event["loss"] for event in seen if event["event"] == "step"]
    assert len(losses) == 2
    assert record.metrics["train_steps"] == 2
    assert record.metrics["first_train_loss"] == losses[0]
    assert record.metrics["train_loss"] == losses[1]
    assert record.metrics["peak_memory_bytes"] > 0
    assert record.metrics["train_tokens_per_second"] > 0
    assert set(record.metrics) >= {"wall_seconds", "overhead_seconds"}
    tail = record.provenance["log_tail"]
    assert {"failed": "Error", "oom": "Error", "crashed": ""}[status] in tail
    if "segfault" in fault:
        assert "Segmentation fault" in tail
        assert "faulty.py" in tail  # where it was
    assert not family()


def test_the_kernels_kill_names_the_limit(strike, monkeypatch):
    kills = iter([0, 1])
    monkeypatch.setattr(supervise, "_kernel_kills", lambda: next(kills))
    record, _ = strike("kill@step1", "hardware.memory_limit=3GiB")
    assert record.status == "oom"
    assert "because memory ran out in phase train after step 1 (hardware.memory_limit=3072MiB)" in record.reason


@pytest.mark.parametrize(("fault", "where"), [("hang@load", "in phase load"), ("hang@step1", "after step 1")])
def test_a_hang_is_ended_and_shows_where(fault, where, strike):
    start = time.monotonic()
    record, _ = strike(fault, "hardware.phase_timeout=3")
    assert time.monotonic() - start < 30
    assert record.status == "timeout"
    assert record.reason.startswith("no progress for hardware.phase_timeout=3 s in phase ")
    assert record.reason.endswith(where)
    assert "hang_for_ever" in record.provenance["log_tail"]
    assert not family()


def test_progress_is_no_hang(tiny_cell, tmp_path):
    cell = tiny_cell("training.steps=100000", "hardware.phase_timeout=3", "hardware.timeout=8")
    record = run_isolated(cell, tmp_path / "run", on_event=lambda event: None)
    assert record.reason.startswith("ended after hardware.timeout=8 s in phase train after step ")
    assert record.metrics["train_steps"] > 1


def test_an_exploding_loss_is_divergence(tiny_cell, work_in_process, monkeypatch):
    from left_bench.training import loop

    monkeypatch.setattr(loop, "EXPLODED", 5.0)  # an untrained model of 512 tokens is at ln 512 = 6.2
    with pytest.raises(loop.Diverged, match=r"^loss 6\.\d+, gradient norm \S+ at step 1 of 2$"):
        work_in_process(tiny_cell())


# --- faults of the parent ---

QUICK = ["model=tiny_llama", "precision=fp32", "hardware=cpu", "tracker=none", "data.train_rows=8", "training.steps=1"]

# The command line as it is, with a worker that waits for leave to end in place of the measured run.
LAUNCHER = """
import sys
from functools import partial
from left_bench.cli import main
from left_bench.launch import launching, run_cell
from left_bench.launch.supervise import run_isolated
run_cell._fetch_model = lambda cell: None
launching.say_estimate = lambda planned, runs_dir, **_: None
run_cell.run_isolated = partial(run_isolated, command=[sys.executable, "-I", "-S", "-c", sys.argv.pop(1)])
sys.exit(main.main())
"""
WAITING_WORKER = """
import ctypes, json, os, pathlib, signal, sys, time
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
folder = pathlib.Path(sys.argv[1])
cell = json.loads((folder / "cell.json").read_text())
(folder / "pid").write_text(str(os.getpid()))
while not pathlib.Path(f"go-{cell['seed']}").exists():
    time.sleep(0.02)
record = {"schema_version": 1, "cell_id": folder.name, "status": "ok", "started_at": "", "finished_at": "",
          "choices": cell["choices"], "config": {"seed": cell["seed"]}}
(folder / "outcome.json").write_text(json.dumps(record))
"""


def start(place: Path) -> subprocess.Popen[str]:
    for pid in place.glob("runs/*/pid"):  # an earlier attempt's
        pid.unlink()
    command = [sys.executable, "-c", LAUNCHER, WAITING_WORKER, "-m", *QUICK, "seed=0,1"]
    return subprocess.Popen(
        command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def worker_of(place: Path, *, seed: int) -> psutil.Process:
    """The worker of that cell, as soon as it runs."""
    end = time.monotonic() + 90
    while time.monotonic() < end:
        for path in place.glob(f"runs/*-s{seed}-*/pid"):
            if path.read_text():
                return psutil.Process(int(path.read_text()))
        time.sleep(0.05)
    raise AssertionError("the sweep did not get there")


def test_an_interrupted_sweep_leaves_nothing_torn_and_goes_on(tmp_path):
    sweep = start(tmp_path)
    worker = worker_of(tmp_path, seed=0)
    os.killpg(sweep.pid, signal.SIGINT)  # as a terminal's Ctrl-C: the whole foreground group
    out, err = sweep.communicate(timeout=60)
    assert sweep.returncode == 130, out + err
    assert "0 of 2 cells have their record" in err
    assert "has no record of this attempt and is run again" in err
    assert "the same command goes on" in err
    assert "Traceback" not in err
    assert psutil.wait_procs([worker], timeout=10)[0]

    (tmp_path / "go-0").touch()
    sweep = start(tmp_path)
    worker = worker_of(tmp_path, seed=1)
    sweep.terminate()
    out, err = sweep.communicate(timeout=60)
    assert sweep.returncode == 143, out + err
    assert "1 of 2 cells have their record" in err
    assert psutil.wait_procs([worker], timeout=10)[0]
    [first] = [read_record(path) for path in tmp_path.glob("runs/*/record.json")]
    assert (first.status, first.attempt) == ("ok", 2)

    sweep = start(tmp_path)
    worker = worker_of(tmp_path, seed=1)
    sweep.kill()
    sweep.communicate()
    assert psutil.wait_procs([worker], timeout=10)[0]
    for unfinished in ("record", "attempt"):  # as a kill in the middle of a write would leave
        next(tmp_path.glob("runs/*-s1-*")).joinpath(f".{unfinished}.json.abcdef").write_text('{"schema')

    (tmp_path / "go-1").touch()
    sweep = start(tmp_path)
    out, err = sweep.communicate(timeout=60)
    assert sweep.returncode == 0, out + err
    assert "kept from an earlier run" in out
    records = {record.config["seed"]: record for record in map(read_record, tmp_path.glob("runs/*/record.json"))}
    assert {seed: (record.status, record.attempt) for seed, record in records.items()} == {0: ("ok", 2), 1: ("ok", 3)}
    assert not [path.name for path in tmp_path.glob("runs/*/.*.*")]


def test_a_full_disk_stops_the_launch_and_says_so(left_bench, tmp_path, monkeypatch):
    """The parent's own writes: no traceback, and what is finished stays."""
    from left_bench.core.files import write_atomically
    from left_bench.spec import record as records

    monkeypatch.chdir(tmp_path)

    def run_at_once(cell, run_dir, *, on_event):
        return Record(
            cell_id=cell.id, status="ok", started_at="s", finished_at="f", choices=cell.choices, config=cell.sections()
        )

    def no_room(path: Path, text: str) -> Path:
        if path.name == records.RECORD_NAME:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write_atomically(path, text)

    monkeypatch.setattr("left_bench.launch.run_cell.run_isolated", run_at_once)
    monkeypatch.setattr(records, "write_atomically", no_room)
    answer = left_bench(*QUICK)
    assert answer.code == 2, answer
    assert "record.json cannot be written (No space left on device)" in answer.err
    assert "give the same command again, finished cells are kept" in answer.err
    assert not list(tmp_path.glob("runs/*/record.json"))
    monkeypatch.setattr(records, "write_atomically", write_atomically)
    assert left_bench(*QUICK).code == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_really_full_disk(tiny_cell, tmp_path):
    """The whole of the run's folder on a file system with room for everything but the adapter."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("this machine lets no one mount")
    try:
        cell = tiny_cell("training.steps=1", "peft.config.r=64", "eval.generate=false")
        record = run_isolated(cell, place / "run", on_event=lambda event: None)
        assert record.status == "failed", record
        assert record.reason.startswith("disk full: ")
        assert record.metrics["train_steps"] == 1
        assert "train" in [phase.name for phase in record.phases]
        assert not (place / "run" / "adapter").exists()
        record.write(place / "run")
        assert read_record(place / "run" / "record.json") == record
    finally:
        subprocess.run(["umount", str(place)], check=True)

"""Several launches over one runs folder: one runs a cell, the others go on and pick its record up."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from left_bench.launch import cell_lock as claims
from left_bench.launch.cell_lock import ATTEMPT_NAME, claim, next_attempt, until_done

HOLDER = """
import pathlib, sys, time
from left_bench.launch.cell_lock import claim
with claim(pathlib.Path(sys.argv[1])) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def held(tmp_path):
    """A cell's folder that another process has claimed, and that process."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "cell")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "True\n"
    yield tmp_path / "cell", holder
    holder.kill()
    holder.wait()
    holder.stdout.close()


def test_a_claim_is_one_processs(tmp_path):
    with claim(tmp_path / "cell") as first:
        with claim(tmp_path / "cell") as second, claim(tmp_path / "other") as other:
            assert (first, second, other) == (True, False, True)
        with claim(tmp_path / "cell") as third:
            assert not third  # that one who gave up did not free it
    with claim(tmp_path / "cell") as again:
        assert again


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_claim_dies_with_its_process(how, held):
    folder, holder = held
    with claim(folder) as mine:
        assert not mine
    os.kill(holder.pid, how)
    holder.wait()
    with claim(folder) as mine:
        assert mine


def test_a_child_of_the_claimer_does_not_keep_the_claim(tmp_path):
    with claim(tmp_path) as mine:
        assert mine
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with claim(tmp_path) as mine:
            assert mine
    finally:
        child.kill()
        child.wait()


def test_a_folder_made_anew_is_claimed_anew(tmp_path, monkeypatch):
    import fcntl

    folder, lock = tmp_path / "cell", fcntl.flock

    def delete_first(handle, how):
        monkeypatch.setattr(fcntl, "flock", lock)
        shutil.rmtree(folder)  # between opening the lock's file and locking it
        folder.mkdir()
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", delete_first)
    with claim(folder) as mine, claim(folder) as second:
        assert (mine, second) == (True, False)


def test_where_there_are_no_locks_a_warning_says_so(tmp_path, monkeypatch, capsys):
    import errno
    import fcntl

    def no_locks(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with claim(tmp_path) as mine:
        assert mine
    assert "cannot be locked (No locks available)" in capsys.readouterr().err


def test_attempts_are_counted_also_those_that_left_no_record(tmp_path):
    assert [next_attempt(tmp_path, recorded=0) for _ in range(3)] == [1, 2, 3]
    assert next_attempt(tmp_path, recorded=7) == 8
    for damage in ("", "many\n", "-3", "9" * 5000, "²"):
        (tmp_path / ATTEMPT_NAME).write_text(damage, encoding="utf-8")
        assert next_attempt(tmp_path, recorded=2) == 3


def test_what_comes_free_first_is_taken_first(monkeypatch):
    monkeypatch.setattr(claims, "_PAUSE_SECONDS", 0)
    left = {"slow": 3, "quick": 1}

    def attempt(name: str) -> str | None:
        left[name] -= 1
        return None if left[name] >= 0 else name

    assert until_done([lambda: attempt("slow"), lambda: attempt("quick")]) == ["quick", "slow"]
    assert until_done([]) == []


# --- launches ---

QUICK = ["model=tiny_llama", "precision=fp32", "hardware=cpu", "tracker=none", "training.steps=1", "data.train_rows=8"]


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Cells that were run in this launch, in order, by a stand-in for the measured run."""
    from left_bench.spec.record import Record

    started: list[str] = []

    def run_isolated(cell, run_dir, *, on_event):
        started.append(cell.peft.name)
        return Record(
            cell_id=cell.id, status="ok", started_at="s", finished_at="f", choices=cell.choices, config=cell.sections()
        )

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("left_bench.launch.run_cell.run_isolated", run_isolated)
    return started


def taken(left_bench, names: str) -> dict[str, Path]:
    """The folders that the cells of these methods have."""
    from left_bench.spec.record import read_record

    assert left_bench("-m", *QUICK, f"peft={names}", "runs_dir=probe").code == 0
    results = [read_record(path) for path in Path("probe").glob("*/record.json")]
    return {record.choices["peft"]: Path("runs") / record.cell_id for record in results}


def test_a_launch_takes_other_cells_first_and_picks_the_record_up(runs, left_bench):
    folder = taken(left_bench, "lora,ia3")["lora"]
    probe = Path("probe") / folder.name / "record.json"
    runs.clear()
    # another launch has the first cell, and leaves its (failed) record when the second has one
    program = (
        "import pathlib, sys, time\n"
        "from left_bench.launch.cell_lock import claim\n"
        "with claim(pathlib.Path(sys.argv[1])):\n"
        "    print(flush=True)\n"
        "    while len(list(pathlib.Path('runs').glob('*/record.json'))) < 1:\n"
        "        time.sleep(0.05)\n"
        "    pathlib.Path(sys.argv[1], 'record.json').write_text(sys.argv[2])\n"
    )
    text = probe.read_text().replace('"status": "ok"', '"status": "failed", "reason": "theirs"')
    other = subprocess.Popen([sys.executable, "-c", program, str(folder), text], stdout=subprocess.PIPE)
    other.stdout.readline()
    answer = left_bench("-m", *QUICK, "peft=lora,ia3")
    assert runs == ["ia3"], answer  # the failed cell was done once, so it is not done again by this launch
    assert "waiting for 1 cells that another launch is running" in answer.out
    assert answer.code == 1
    assert "theirs" in answer.out
    other.wait()
    other.stdout.close()
    assert left_bench("-m", *QUICK, "peft=lora,ia3").code == 0  # a later launch does
    assert runs == ["ia3", "lora"]


def test_a_dead_launchs_cell_is_taken_over(runs, left_bench):
    folder = taken(left_bench, "lora,ia3")["lora"]
    runs.clear()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    holder.stdout.readline()
    when = "until ls runs/*/record.json >/dev/null 2>&1; do sleep 0.1; done"  # the second cell is done
    killer = subprocess.Popen(["/bin/sh", "-c", f"{when}; kill -9 {holder.pid}"])
    answer = left_bench("-m", *QUICK, "peft=lora,ia3")
    assert answer.code == 0, answer
    assert runs == ["ia3", "lora"]
    for process in (killer, holder):
        process.wait()
    holder.stdout.close()


def test_an_attempt_puts_the_earlier_record_aside(runs, left_bench):
    assert left_bench(*QUICK).code == 0
    assert left_bench(*QUICK, "force=true").code == 0
    [folder] = [path.parent for path in Path("runs").glob("*/record.json")]
    assert '"attempt": 1' in (folder / "record.1.json").read_text()
    assert '"attempt": 2' in (folder / "record.json").read_text()
    assert len(runs) == 2

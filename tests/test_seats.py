"""Cells of one machine have accelerators and cores of their own."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from left_bench.core.errors import UserError
from left_bench.processes import resources
from left_bench.processes.resources import AT_ONCE, CORES, Seat, cells_at_once, seated, share_of, take, visible_devices


@pytest.fixture(autouse=True)
def own_locks(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(resources, "_LOOK_EVERY_SECONDS", 0.01)
    for variable in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK", CORES, AT_ONCE, "SLURM_JOB_ID"):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize(
    ("kind", "environment", "present", "names"),
    [
        ("cuda", {}, 4, ["0", "1", "2", "3"]),
        ("cuda", {"CUDA_VISIBLE_DEVICES": "2,3"}, 4, ["2", "3"]),
        ("cuda", {"CUDA_VISIBLE_DEVICES": "GPU-8f2c, GPU-11aa"}, 4, ["GPU-8f2c", "GPU-11aa"]),
        ("cuda", {"CUDA_VISIBLE_DEVICES": ""}, 4, []),
        ("cuda", {"CUDA_VISIBLE_DEVICES": "1,-1,2"}, 4, ["1"]),
        ("cuda", {"HIP_VISIBLE_DEVICES": "1"}, 2, ["1"]),
        ("xpu", {"ZE_AFFINITY_MASK": "0,1"}, 1, ["0", "1"]),
        ("xpu", {"CUDA_VISIBLE_DEVICES": "1"}, 2, ["0", "1"]),
    ],
)
def test_visible_devices(kind, environment, present, names):
    assert visible_devices(kind, environment, present=present) == names


class Lock:
    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


def test_all_or_none_is_taken():
    held = {"1"}
    given_out = {}

    def try_lock(name: str) -> Lock | None:
        if name in held:
            return None
        given_out[name] = Lock()
        return given_out[name]

    taken = take(["0", "1", "2"], 2, try_lock)
    assert taken is not None
    assert list(taken) == ["0", "2"]
    assert take(["0", "1", "2"], 3, try_lock) is None
    assert all(lock.closed for lock in given_out.values())  # who holds two and waits for a third blocks others


@given(st.integers(1, 256), st.integers(1, 300))
def test_shares_of_the_cores(cores, parts):
    shares = [share_of(range(cores), parts, number=number) for number in range(parts)]
    assert {len(share) for share in shares} == {max(1, cores // parts)}
    if parts <= cores:
        assert sum(map(len, shares)) == len({core for share in shares for core in share})


@pytest.mark.parametrize(
    ("name", "launcher", "cores", "cells"),
    [
        ("basic", {}, 8, 1),
        ("joblib", {"n_jobs": 3}, 8, 3),
        ("joblib", {"n_jobs": -1}, 8, 8),
        ("joblib", {"n_jobs": -2}, 8, 7),
        ("joblib", {"n_jobs": None}, 8, 1),
        ("submitit_local", {"cpus_per_task": 2}, 8, 1),
        ("submitit_slurm", {}, 8, 1),
        ("ray", {"ray": {"remote": {}}}, 8, 8),
        ("ray", {"ray": {"remote": {"num_cpus": 4}}}, 8, 2),
        ("ray", {"ray": {"remote": {"num_cpus": 16}}}, 8, 1),
    ],
)
def test_cells_at_once(name, launcher, cores, cells):
    assert cells_at_once(launcher, name, cores=cores) == cells


def test_a_lone_cell_on_cpu_has_the_whole_machine():
    with seated("cpu", at_once=1) as seat, seated("cpu", at_once=1) as other:
        assert seat == other == Seat()
    assert seat.environment("cpu") == {}


def test_parallel_cells_divide_the_cores(monkeypatch):
    monkeypatch.setattr(resources, "available_cores", lambda: [0, 1, 2, 3])
    with seated("cpu", at_once=2) as first, seated("cpu", at_once=2) as second:
        assert {first.cores, second.cores} == {(0, 1), (2, 3)}
        assert second.environment("cpu") == {CORES: ",".join(map(str, second.cores)), AT_ONCE: "2"}
    with seated("cpu", at_once=64) as crowded:
        assert (len(crowded.cores), crowded.at_once) == (1, 4)


def test_no_two_cells_share_a_gpu(monkeypatch):
    """Eight cells, three devices: never more than three at once, never two on one device, and none waits for ever."""
    import os

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    monkeypatch.setattr(resources, "_variables_set", lambda variables: __import__("contextlib").nullcontext())
    running: list[str] = []
    seen: list[tuple[str, ...]] = []

    def cell() -> None:
        with seated("cuda", at_once=8) as seat:
            [device] = seat.devices
            running.append(device)
            seen.append(tuple(running))
            time.sleep(0.02)
            running.remove(device)

    threads = [threading.Thread(target=cell) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(seen) == 8
    assert all(len(set(at_once)) == len(at_once) for at_once in seen)
    assert {device for at_once in seen for device in at_once} == {"4", "5", "6"}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5,6"


def test_a_seat_is_named_in_the_environment_and_given_back(monkeypatch):
    import os

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    with seated("cuda", at_once=1, devices=2) as pair:
        assert pair.devices == ("2", "3")
    with seated("cuda", at_once=1) as seat:
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"
        assert seat.devices == ("2",)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_devices_are_shared_or_scheduled_only_when_asked(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with (
        seated("cuda", at_once=1),
        seated("cuda", at_once=1, share=True) as shared,
        seated("cuda", at_once=1, scheduled=True) as scheduled,
    ):
        assert shared.devices == scheduled.devices == ()


def test_more_devices_than_there_are(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UserError, match="needs 4 of them and 2 are visible"), seated("cuda", at_once=1, devices=4):
        pass


def test_a_report_ranks_no_speed_of_cells_that_ran_beside_others_with_that_of_lone_ones():
    from recorded.build import make_record

    from left_bench.report.cells import row_of
    from left_bench.report.confounders import confounders
    from left_bench.report.ranking import rankable

    told = [{"concurrent_cells": 1}, {"concurrent_cells": 4}, {}, {"concurrent_cells": 4}]
    lone, beside, before, too = (row_of(make_record(effective=effective)) for effective in told)
    assert not rankable([lone, beside], "train_tokens_per_second")
    names = {id(lone): "lone", id(beside): "beside"}
    assert ("concurrent_cells", "1: lone; 4: beside") in confounders([lone, beside], names)
    assert rankable([lone, before], "train_tokens_per_second")
    assert rankable([beside, too], "train_tokens_per_second")
    for metric in ("peak_memory_bytes", "eval_loss"):
        assert rankable([lone, beside, before], metric)

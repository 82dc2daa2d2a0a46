"""`benchmarks/engine.py` before it starts anything: which contenders the free memory holds at the same time."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "engine.py"
GB = 2**30
pytestmark = pytest.mark.skipif(not PATH.is_file(), reason="benchmarks are in the checkout alone")


@pytest.fixture(scope="module")
def engine() -> ModuleType:
    spec = importlib.util.spec_from_file_location("engine_benchmark", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def names(engine) -> list[str]:
    return [name for name in engine.CONTENDERS if name not in engine.WANTS_CUDA]


@pytest.fixture
def needed(engine, names) -> dict[str, int]:
    return {name: 2 * GB if name == engine.PACKED else 4 * GB for name in names}


@pytest.mark.parametrize("free", [100, 22, 14, 10, 8, 6])
def test_every_group_fits_and_has_the_packed_one(free, engine, names, needed):
    groups = engine.groups_of(names, needed, free=free * GB)
    assert all(sum(needed[name] for name in group) <= free * GB for group in groups)
    assert all(group[0] == engine.PACKED for group in groups)
    assert sorted(name for group in groups for name in group[1:]) == sorted(set(names) - {engine.PACKED})
    assert (len(groups) == 1) == (free >= 22)


def test_the_two_that_do_the_same_work_stay_together_where_they_fit(engine, names, needed):
    apart = [name for name in names if name != "left_bench padded"]
    for chosen in (names, apart):
        groups = engine.groups_of(chosen, needed, free=10 * GB)
        assert any(set(engine.SAME_WORK) <= set(group) for group in groups)
    assert not any(set(engine.SAME_WORK) <= set(group) for group in engine.groups_of(names, needed, free=9 * GB))


def test_what_cannot_be_predicted_runs_in_pairs(engine, names, needed):
    groups = engine.groups_of(names, needed | {"bare loop": None}, free=100 * GB)
    assert [engine.PACKED, "bare loop"] in groups
    assert len(groups) == 3  # those before it, itself, those after it
    assert engine.groups_of([engine.PACKED], needed, free=GB) == [[engine.PACKED]]


def test_a_pair_that_does_not_fit_is_refused_before_anything_runs(engine, names, needed):
    with pytest.raises(SystemExit, match=r"5\.0 GiB of memory are free.*takes about 6\.0 GiB; lower --batch-size"):
        engine.groups_of(names, needed, free=5 * GB)


def test_what_each_needs_is_the_plan_of_what_it_trains(engine, names):
    tiny = ["model=tiny_llama", "peft=lora", "precision=fp32", "hardware=cpu", "training.steps=2"]
    tiny += ["data.train_rows=16", "data.test_rows=4", "training.batch_size=4"]
    needed = engine.needed_bytes(names, tiny)
    beyond = {name: size - engine.PROCESS_BYTES for name, size in needed.items()}
    assert 0 < beyond["left_bench padded"] < beyond["left_bench padded, plain loss"]
    assert beyond["bare loop"] == beyond["TRL"] == int(beyond["left_bench padded, plain loss"] * engine.PEERS_HOLD)
    assert engine.free_bytes("cpu") > 0

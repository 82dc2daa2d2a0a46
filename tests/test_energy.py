"""Joules: what the counters say, over which steps, of which ranks, and what they cost."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recorded.build import LAPTOP, make_record, peft, write_runs, write_sweep

from left_bench.cli.doctor import main as doctor
from left_bench.measure import energy
from left_bench.measure.device import CpuDevice
from left_bench.measure.energy import (
    Energy,
    NoCounter,
    NvmlGpu,
    RaplCounter,
    Stretch,
    open_counters,
    open_cpu,
    open_gpu,
)
from left_bench.measure.meter import Meter, Step
from left_bench.processes.resources import AT_ONCE, SHARED, Seat
from left_bench.report import load_records, main, write_report
from left_bench.report.cells import row_of
from left_bench.report.confounders import confounders, touching
from left_bench.report.cost import Prices
from left_bench.report.ranking import rankable
from left_bench.spec.events import EVENTS_NAME, EventWriter

UUID = "8b1f0c5e-0000-1111-2222-333344445555"


class NVMLError(Exception):
    pass


class Nvml:
    """What of pynvml is used, over two GPUs; torch's is the second."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2
    NVMLError = NVMLError

    def __init__(self, *, counter: bool = True, mig: int | None = None, driver: bool = True) -> None:
        self.millijoules = 5_000_000
        self.counter, self.mig, self.driver = counter, mig, driver

    def nvmlInit(self) -> None:
        if not self.driver:
            raise NVMLError("NVML Shared Library Not Found")

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != f"GPU-{UUID}":
            raise NVMLError("Not Found")
        return "second"

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return ("first", "second")[index]

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:
        if self.mig is None:
            raise NVMLError("Not Supported")
        return [self.mig, self.mig]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if not self.counter:
            raise NVMLError("Not Supported")
        return self.millijoules if handle == "second" else 0

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.95"

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return 700_000

    def nvmlDeviceGetMaxClockInfo(self, handle: str, which: int) -> int:
        return {1: 1980, 2: 2619}[which]

    def nvmlDeviceGetClockInfo(self, handle: str, which: int) -> int:
        if which == 2:
            raise NVMLError("Not Supported")
        return 1755


@pytest.fixture
def gpu(monkeypatch):
    """`gpu(...)`: a machine with such an NVML, and a torch that computes on its second GPU."""

    def gpu(*, uuid: str | None = UUID, **how: Any) -> Nvml:
        nvml = Nvml(**how)
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        properties = SimpleNamespace() if uuid is None else SimpleNamespace(uuid=uuid)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(energy, "POWERCAP", Path("/nowhere"))
        return nvml

    return gpu


@pytest.fixture
def powercap(tmp_path, monkeypatch):
    """`powercap(...)`: the kernel's folder with such zones, `name -> (what it is, microjoules)`."""

    def powercap(size: int = 1_000_000, **zones: tuple[str, int]) -> Path:
        root = tmp_path / "powercap"
        for name, (what, microjoules) in zones.items():
            zone = root / name.replace("_", ":")
            zone.mkdir(parents=True, exist_ok=True)
            (zone / "name").write_text(f"{what}\n")
            (zone / "energy_uj").write_text(f"{microjoules}\n")
            (zone / "max_energy_range_uj").write_text(f"{size}\n")
        monkeypatch.setattr(energy.open_cpu, "__defaults__", (root,))
        return root

    return powercap


def set_zone(root: Path, name: str, microjoules: int) -> None:
    fresh = root / "fresh"  # a reader sees the old number or the new one, as with the kernel's
    fresh.write_text(f"{microjoules}\n")
    fresh.replace(root / name / "energy_uj")


class Said:
    """A counter that says what it is told to."""

    readable = True
    source = "told"

    def __init__(self, joules: float | None = 0.0, *, updates_every_seconds: float = 0.0) -> None:
        self.now, self.updates_every_seconds = joules, updates_every_seconds

    def joules(self) -> float | None:
        return self.now


# --- NVML ---


def test_a_gpu_is_found_by_its_uuid_and_counted_in_joules(gpu):
    nvml = gpu()
    result = open_gpu("cuda")
    assert result.readable and result.source == "NVML total energy counter"
    before = result.joules()
    nvml.millijoules += 1500
    assert result.joules() - before == 1.5


def test_the_drivers_facts_are_an_allow_list_and_hold_no_uuid(gpu):
    gpu()
    result = open_gpu("cuda")
    facts = result.facts() | result.clocks()
    assert facts == {
        "driver": "580.95",
        "power_limit_watts": 700.0,
        "max_sm_clock_mhz": 1980,
        "max_memory_clock_mhz": 2619,
        "sm_clock_mhz": 1755,  # and no memory clock, which this GPU does not tell
    }


@pytest.mark.parametrize(
    ("visible", "order", "found"),
    [
        (f"GPU-{UUID}", None, True),
        ("1,0", "PCI_BUS_ID", True),
        ("1", None, "CUDA_DEVICE_ORDER"),  # CUDA counts the fastest first, NVML by bus
        ("MIG-1", "PCI_BUS_ID", "cannot tell which"),
        ("", "PCI_BUS_ID", "cannot tell which"),
    ],
)
def test_without_torchs_uuid_the_visible_devices_tell_which_gpu_it_is(visible, order, found, gpu, monkeypatch):
    gpu(uuid=None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    if order:
        monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    counter = open_gpu("cuda")
    if found is True:
        assert counter.joules() == 5000
    else:
        assert not counter.readable and counter.joules() is None and found in counter.source


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"driver": False}, "Library Not Found"),
        ({"mig": 1}, "MIG"),
        ({"counter": False}, "no energy counter"),
        ({"uuid": "another"}, "Not Found"),
    ],
)
def test_where_there_is_no_counter_the_reason_is_said(how, words, gpu):
    gpu(**how)
    result = open_gpu("cuda")
    assert not result.readable and words in result.source and result.joules() is None


def test_a_gpu_without_counter_has_its_driver_all_the_same(gpu):
    gpu(counter=False)
    assert open_gpu("cuda").facts()["driver"] == "580.95"


def test_other_accelerators_and_a_missing_package(gpu, monkeypatch):
    gpu(mig=0)
    assert open_gpu("cuda").readable
    assert "mps" in open_gpu("mps").source
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_gpu("cuda").source == "nvidia-ml-py is not installed"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in open_gpu("cuda").source


# --- RAPL ---


def test_packages_are_added_up_and_nothing_else_is(powercap):
    root = powercap(
        **{
            "intel-rapl_0": ("package-0", 100),
            "intel-rapl_0_0": ("core", 40),
            "intel-rapl_1": ("package-1", 200),
            "intel-rapl_2": ("psys", 900),
            "intel-rapl-mmio_0": ("package-0", 100),
        }
    )
    result = open_cpu()
    assert result.source == "RAPL, 2 CPU packages"
    assert result.joules() == 0
    for name, now in {"intel-rapl:0": 1100, "intel-rapl:0:0": 900, "intel-rapl:1": 700, "intel-rapl:2": 9999}.items():
        set_zone(root, name, now)
    assert result.joules() == pytest.approx((1000 + 500) / 1e6)


@given(st.lists(st.integers(0, 999), min_size=1, max_size=30), st.integers(0, 999))
def test_a_register_that_wraps_around_loses_nothing(tmp_path_factory, used, first):
    zone = tmp_path_factory.mktemp("zone")
    (zone / "max_energy_range_uj").write_text("1000")
    (zone / "energy_uj").write_text(str(first))
    counter = RaplCounter([zone])
    total = 0
    for item in used:
        total += item
        (zone / "energy_uj").write_text(str((first + total) % 1000))
        assert counter.joules() == pytest.approx(total / 1e6)


def test_a_register_is_read_between_the_moments_that_ask(powercap, monkeypatch):
    root = powercap(size=1000, **{"intel-rapl_0": ("package-0", 900)})
    monkeypatch.setattr(energy, "_LOOK_EVERY_SECONDS", 0.01)
    counter = open_cpu()
    counter.watch()
    for now in (400, 950, 450, 100):  # three times around
        set_zone(root, "intel-rapl:0", now)
        time.sleep(0.15)
    assert counter.joules() == pytest.approx((500 + 550 + 500 + 650) / 1e6)


def test_what_could_not_be_read_once_is_never_a_number_again(powercap):
    root = powercap(**{"intel-rapl_0": ("package-0", 100)})
    counter = open_cpu()
    (root / "intel-rapl:0" / "energy_uj").write_text("")
    assert counter.joules() is None
    set_zone(root, "intel-rapl:0", 500)
    assert counter.joules() is None


def test_cpus_that_cannot_be_read(powercap, tmp_path, monkeypatch):
    assert "no CPU package" in open_cpu(tmp_path / "nowhere").source
    root = powercap(**{"intel-rapl_0": ("package-0", 100), "intel-rapl_1": ("package-1", 100)})
    (root / "intel-rapl:1" / "energy_uj").unlink()
    assert not open_cpu().readable  # the sum of some of the packages is no sum

    def refused(path: Path) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(energy, "_number", refused)
    assert "only root can read" in open_cpu().source


# --- stretches ---


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.booleans()), min_size=1, max_size=30),
)
def test_joules_are_additive(parts):
    """What is counted and what is left out are together what was used."""
    counter = Said()
    counted, left_out = Stretch(counter), Stretch(counter)
    for joules, counts in parts:
        stretch = counted if counts else left_out
        stretch.start()
        counter.now += joules
        stretch.stop()
    assert (counted.joules or 0) + (left_out.joules or 0) == pytest.approx(counter.now)
    assert (counted.joules is None) == (not any(counts for _, counts in parts))


def test_a_stretch_of_few_updates_has_no_joules(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(energy.time, "perf_counter", lambda: now[0])
    counter = Said(updates_every_seconds=0.1)
    stretch = Stretch(counter)
    stretch.start()
    now[0], counter.now = 0.9, 300.0
    assert stretch.joules is None  # still running
    stretch.stop()
    assert stretch.joules is None
    stretch.start()
    now[0], counter.now = 1.4, 600.0
    stretch.stop()
    assert stretch.joules is None  # two readings more want the square root of two times the time
    stretch.start()
    now[0], counter.now = 4.0, 1200.0
    stretch.stop()
    assert (stretch.joules, stretch.seconds) == (1200, 4.0)


def test_a_counter_that_fails_in_between_has_no_joules():
    counter = Said()
    result = Energy({"": counter})
    result.start()
    counter.now = None
    result.stop()
    counter.now = 8.0
    result.start()
    result.stop()
    assert result.of_steps(tokens=10) == {} and result.of_cell() == {"cell_joules": 8.0}
    counter.now = None
    assert result.of_cell() == {}


# --- the cell ---


class TellsTokens(Said):
    """A counter that moves by a joule for every token trained on, and by a million for whatever else is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        take, save = Meter.step, energy_of_saving()

        def step(meter: Meter, step: Step, **extra: float) -> None:
            self.now += step.tokens
            take(meter, step, **extra)

        def saving(*arguments: Any) -> None:
            self.now += 1e6
            save(*arguments)

        monkeypatch.setattr(Meter, "step", step)
        monkeypatch.setattr("left_bench.training.checkpoint.Checkpoint._save", saving)
        monkeypatch.setattr(energy, "open_counters", lambda *_, **__: (NoCounter("none"), {"": self, "cpu_": Said()}))


def energy_of_saving() -> Any:
    from left_bench.training.checkpoint import Checkpoint

    return Checkpoint._save


def step_events(run_dir: Path) -> list[dict[str, Any]]:
    events = map(json.loads, (run_dir / EVENTS_NAME).read_text().splitlines())
    return [event for event in events if event["event"] == "step"]


CELL = ["eval.generate=false", "training.steps=7", "training.measure_after=2"]


def test_joules_are_those_of_the_steps_that_count_for_speed(tiny_cell, work_in_process, monkeypatch):
    counter = TellsTokens(monkeypatch)
    result = work_in_process(tiny_cell(*CELL, "training.checkpoint_every=3"))
    tokens = [event["tokens"] for event in step_events(result["run_dir"])]
    metrics = result["metrics"]
    assert len(tokens) == 7
    assert metrics["train_joules"] == sum(tokens[2:])
    assert metrics["joules_per_1000_tokens"] == 1000
    assert metrics["cell_joules"] == counter.now == sum(tokens) + 2e6  # saving is the cell's, and no step's
    assert metrics["train_watts"] > 0
    assert metrics["cpu_train_joules"] == metrics["cpu_cell_joules"] == metrics["cpu_train_watts"] == 0
    assert result["environment"]["effective"]["energy"] == "told; told"


def test_training_before_preference_tuning_is_the_cells_alone(tiny_cell, work_in_process, monkeypatch):
    counter = TellsTokens(monkeypatch)
    pairs = ["training=dpo", "training.sft_steps=2", "data.pairs=true", "training.measure_after=0"]
    result = work_in_process(tiny_cell(*pairs, "training.steps=3", "eval.generate=false"))
    tokens = sum(event["tokens"] for event in step_events(result["run_dir"]))
    assert result["metrics"]["train_joules"] == tokens
    assert result["metrics"]["cell_joules"] == counter.now > tokens


def test_nothing_is_counted_where_nothing_can_be_read(tiny_cell, work_in_process, monkeypatch):
    monkeypatch.setattr(energy, "open_counters", lambda *_, **__: (NoCounter("none"), {"": NoCounter("none")}))
    result = work_in_process(tiny_cell(*CELL))
    assert not [name for name in result["metrics"] if "joules" in name or "watts" in name]
    assert "energy" not in result["environment"]["effective"]
    assert "gpu" not in result["environment"]["machine"]


def test_a_cpu_cell_counts_the_kernels_packages(powercap, tiny_cell, work_in_process):
    powercap(**{"intel-rapl_0": ("package-0", 100)})
    result = work_in_process(tiny_cell(*CELL))
    assert result["metrics"]["cell_joules"] == 0  # the register stands still
    assert result["environment"]["effective"]["energy"] == "RAPL, 1 CPU package"
    assert "cpu_cell_joules" not in result["metrics"]


def test_the_gpus_facts_and_its_clocks_after_training_are_the_machines(tiny_cell, work_in_process, gpu, monkeypatch):
    nvml = gpu()
    found_gpu = NvmlGpu(nvml, "second")
    clocks = iter([{"sm_clock_mhz": 1755}])
    monkeypatch.setattr(found_gpu, "clocks", lambda: next(clocks))
    monkeypatch.setattr(energy, "open_counters", lambda *_, **__: (found_gpu, {}))
    result = work_in_process(tiny_cell(*CELL))
    machine = result["environment"]["machine"]
    assert machine["gpu"]["driver"] == "580.95" and machine["gpu"]["sm_clock_mhz"] == 1755
    assert UUID not in json.dumps(result["environment"])


def test_a_run_that_diverges_has_no_joules(tmp_path, monkeypatch):
    meter = Meter(CpuDevice(), EventWriter(tmp_path / "events.jsonl"), energy=Energy({"": Said()}))
    meter.begin_measured()
    meter.step(Step(seconds=1.0, tokens=5, answer_tokens=1, rows=1, loss=1.0))
    assert "train_joules" not in meter.finish(measure_after=0)


def test_a_resumed_attempt_invents_nothing(tmp_path):
    counter = Said()
    meter = Meter(CpuDevice(), EventWriter(tmp_path / "events.jsonl"), energy=Energy({"": counter, "cpu_": counter}))
    step = Step(seconds=1.0, tokens=100, answer_tokens=1, rows=1, loss=1.0)
    earlier = {"event": "step", "step": 1, "seconds": 1.0, "tokens": 999, "answer_tokens": 1, "rows": 1, "loss": 1.0}
    meter.take_over([earlier], starts=[0], memory_breakdown={})
    meter.step(step)  # warm-up
    meter.begin_measured()
    counter.now += 50
    meter.step(step)
    meter.end_measured()
    metrics = meter.finish(measure_after=1)
    meter.finish_cell()
    assert metrics["joules_per_1000_tokens"] == metrics["cpu_joules_per_1000_tokens"] == 500
    assert not {"train_joules", "cpu_train_joules", "cell_joules", "cpu_cell_joules"} & metrics.keys()
    assert metrics["train_watts"] > 0


# --- several ranks, several cells ---


class Gpu(CpuDevice):
    kind = "cuda"


def rank_meter(folder: Path, joules: float, *, readable: bool = True) -> Meter:
    counter = Said()
    meter = Meter(Gpu(), EventWriter(folder / "events.jsonl"), energy=Energy({"": counter} if readable else {}))
    counter.now += 1  # loading
    meter.begin_measured()
    counter.now += joules
    meter.step(Step(seconds=1.0, tokens=2000, answer_tokens=1, rows=1, loss=1.0))
    meter.end_measured()
    meter.finish(measure_after=0)
    return meter


def together(*meters: Meter) -> None:
    """Let every meter take in the others', as ranks do: all of them ask at once."""
    names = ("train_joules", "joules_per_1000_tokens", "train_watts")
    told = [
        (*(m.metrics.get(n, math.nan) for n in names), m.energy.of_cell().get("cell_joules", math.nan)) for m in meters
    ]
    for rank, meter in enumerate(meters):
        meter.take_in_energy(SimpleNamespace(gather=lambda *_: told, rank=rank))


def test_ranks_are_summed_each_its_own_gpu(tmp_path):
    first, second = rank_meter(tmp_path, 30), rank_meter(tmp_path, 50)
    watts = first.metrics["train_watts"] + second.metrics["train_watts"]
    together(first, second)
    assert first.metrics["train_joules"] == 80
    assert first.metrics["joules_per_1000_tokens"] == 40  # the step's tokens are those of both
    assert first.metrics["train_watts"] == pytest.approx(watts)
    first.finish_cell()
    assert first.metrics["cell_joules"] == 31 + 51


def test_a_rank_that_cannot_be_read_leaves_no_sum(tmp_path):
    first, second = rank_meter(tmp_path, 30), rank_meter(tmp_path, 50, readable=False)
    together(first, second)
    first.finish_cell()
    assert not [name for name in first.metrics if "joules" in name or "watts" in name]


def test_ranks_on_the_cpu_count_the_machines_packages_once(tmp_path, powercap):
    powercap(**{"intel-rapl_0": ("package-0", 100)})
    assert set(open_counters("cpu", {}, first=True)[1]) == {""}
    assert open_counters("cpu", {}, first=False)[1] == {}
    meter = Meter(CpuDevice(), EventWriter(tmp_path / "events.jsonl"))
    meter.metrics["train_joules"] = 5.0
    meter.take_in_energy(SimpleNamespace(gather=lambda *_: pytest.fail("nothing is exchanged"), rank=0))
    assert meter.metrics["train_joules"] == 5.0


def test_what_cells_share_is_not_counted(gpu, powercap):
    gpu()
    powercap(**{"intel-rapl_0": ("package-0", 100)})
    assert set(open_counters("cuda", {})[1]) == {"", "cpu_"}
    assert set(open_counters("cuda", {AT_ONCE: "2"})[1]) == {""}
    assert open_counters("cpu", {AT_ONCE: "2"})[1] == {}
    shared = Seat(at_once=2, shared=True).environment("cuda")
    assert SHARED in shared and open_counters("cuda", shared)[1] == {}
    assert SHARED not in Seat(at_once=2).environment("cuda") | Seat(shared=True).environment("cuda")


# --- the doctor ---


def test_the_doctor_says_what_can_be_read_and_why_not(powercap, capsys, monkeypatch):
    monkeypatch.setattr("left_bench.cli.doctor._CHECKS", {})
    monkeypatch.setenv("COLUMNS", "400")
    powercap(**{"intel-rapl_0": ("package-0", 100)})
    assert doctor(["--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["healthy"] is True and {"machine", "versions", "wandb", "CPU energy"} <= set(told)
    assert doctor([]) == 0
    told = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "RAPL, 1 CPU package" in told["CPU energy"]
    assert "not read: device cpu has no supported energy counter" in told["GPU energy"]


# --- reports ---

JOULES = {"cell_joules": 7.2e6, "train_joules": 3.6e6, "joules_per_1000_tokens": 0.42, "train_watts": 612.3}
COUNTED = {"energy": "NVML total energy counter; RAPL, 2 CPU packages"}


def records(**more: Any) -> list[Any]:
    own = {"metrics": JOULES | {"cpu_cell_joules": 3.6e6}, "effective": COUNTED, "wall": 1800} | more
    lora = own | {"metrics": {name: value / 2 for name, value in own["metrics"].items()}}
    return [make_record(**own), make_record(changes=peft("lora"), **lora)]


def test_the_report_has_joules_and_no_money_without_a_price(tmp_path):
    write_sweep(tmp_path, "s", write_runs(tmp_path, records()))
    path = write_report(tmp_path, name="s", out=tmp_path)
    text = path.read_text()
    assert "\n## Energy\n" in text and "NVML total energy counter; RAPL, 2 CPU packages" in text
    for told in ("7.20 MJ", "**3.60 MJ** (0.50×)", "0.420 J", "612 W", "CPUs' energy"):
        assert told in text, told
    assert "## Cost" not in text and "cell_cost" not in text + path.with_suffix(".html").read_text()
    assert "joules_per_1000_tokens" in path.with_suffix(".html").read_text()


def test_records_without_joules_show_no_new_column(tmp_path):
    plain = [make_record(), make_record(changes=peft("lora"))]
    write_sweep(tmp_path, "s", write_runs(tmp_path, plain))
    path = write_report(tmp_path, name="s", out=tmp_path, prices=Prices(per_kwh=0.3))
    assert "## Energy" not in path.read_text() and "## Cost" not in path.read_text()


def test_prices_turn_joules_and_seconds_into_money(tmp_path, capsys):
    write_runs(tmp_path / "runs", records())
    arguments = [str(tmp_path / "runs"), "--out", str(tmp_path), "--format", "md,csv", "--max-cell-cost", "2"]
    assert main([*arguments, "--price-per-kwh", "0.30", "--price-per-hour", "2.5"]) == 0
    text = (tmp_path / "cells.md").read_text()
    assert "## Cost" in text and "0.30 per kWh" in text.replace("0.300", "0.30")
    frame = pandas.read_csv(tmp_path / "cells.csv").set_index("choices.peft")
    assert frame.loc["full", "cell_energy_cost"] == pytest.approx(0.9)  # 3 kWh, the CPUs' one among them
    assert frame.loc["full", "cell_hours_cost"] == pytest.approx(1.25)
    assert frame.loc["full", "cell_cost"] == pytest.approx(2.15)
    assert frame.loc["lora", "cell_cost"] == pytest.approx(0.45 + 1.25)
    assert "lora" in capsys.readouterr().out  # the one within the budget
    assert "cell_cost" not in load_records(tmp_path / "runs").columns


def test_one_price_is_the_cost_of_a_cell_and_of_a_point():
    [full, _] = records()
    points = 100 * (0.5 - 0.0625)  # of exact match, gained over the base model
    assert Prices(per_kwh=0.3).of(full) == pytest.approx({"cell_cost": 0.9, "cost_per_point": 0.9 / points})
    assert Prices(per_hour=2.0).of(full) == pytest.approx({"cell_cost": 1.0, "cost_per_point": 1.0 / points})
    assert Prices().of(full) == {}


def test_a_cost_that_lacks_a_part_is_none():
    assert Prices(per_kwh=0.3).of(make_record()) == {}
    assert Prices(per_kwh=0.3, per_hour=2.0).of(make_record(wall=1800)) == {"cell_hours_cost": 1.0}


def test_hours_are_those_of_every_accelerator():
    on_gpus = make_record(wall=1800, changes={"hardware.device": "cuda", "hardware.processes": 4})
    assert Prices(per_hour=2.0).of(on_gpus)["cell_cost"] == 4.0
    on_cpu = make_record(wall=1800, changes={"hardware.processes": 4})
    assert Prices(per_hour=2.0).of(on_cpu)["cell_cost"] == 1.0


def test_a_cell_that_gained_nothing_has_no_cost_of_a_point():
    worse = make_record(exact_match=0.03, wall=1800)
    assert Prices(per_hour=2.0).of(worse) == {"cell_cost": 1.0}


@pytest.mark.parametrize("price", ["free", "-1", "nan", "inf", ""])
def test_what_is_no_price_is_refused(price, tmp_path, capsys):
    write_runs(tmp_path, records())
    assert main([str(tmp_path), "--out", str(tmp_path), f"--price-per-kwh={price}"]) == 2
    assert f"--price-per-kwh {price}: not a price" in capsys.readouterr().err


def test_energy_of_different_machines_is_not_ranked():
    here, there = records()[0], records(machine=LAPTOP | {"id": "another"})[1]
    rows = [row_of(here), row_of(there)]
    assert not rankable(rows, "train_joules")
    assert rankable([row_of(record) for record in records()], "train_joules")


def test_another_power_limit_confounds_speed_and_energy():
    machines = [LAPTOP | {"gpu": {"power_limit_watts": watts, "driver": "580"}} for watts in (350.0, 700.0)]
    rows = [row_of(make_record(changes=peft(name), machine=m)) for name, m in zip("ab", machines, strict=True)]
    results = dict(confounders(rows, {id(row): row.cell_id[:3] for row in rows}))
    assert "350" in results["power limit (W)"] and "700" in results["power limit (W)"]
    assert touching([*results.items()], "energy") and not touching([("power limit (W)", "")], "quality")
    alike = [row_of(make_record(changes=peft(name), machine=machines[0])) for name in "ab"]
    assert "power limit (W)" not in dict(confounders(alike, {id(row): "x" for row in alike}))


# --- settings ---


def test_prices_are_settings_and_no_part_of_a_cell(composed):
    from left_bench.grid.compose import compose

    plain, priced = (composed(*given) for given in ((), ("price_per_kwh=0.3", "price_per_hour=2")))
    (cell, without), (same, settings) = (compose(item, item.hydra) for item in (plain, priced))
    assert cell.id == same.id
    assert (without.price_per_kwh, without.price_per_hour) == (None, None)
    assert (settings.price_per_kwh, settings.price_per_hour) == (0.3, 2.0)


@pytest.mark.parametrize("given", ["price_per_kwh=-1", "price_per_hour=cheap", "price_per_hour=nan"])
def test_a_price_that_is_none_is_refused_before_anything_runs(given, left_bench, tmp_path):
    answer = left_bench(given, "tracker=none", f"runs_dir={tmp_path}")
    assert answer.code == 2
    assert answer.err.count("\n") == 1 and given.partition("=")[0] in answer.err

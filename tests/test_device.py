from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from left_bench.core.errors import UserError
from left_bench.core.units import parse_bytes
from left_bench.measure import device as devices
from left_bench.measure.device import AcceleratorDevice, CpuDevice, describe_machine, find_device, open_device

MB = 10**6
linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark")


# --- sizes ---


@given(st.integers(1, 10**6), st.sampled_from(["", "K", "M", "G", "T"]), st.booleans(), st.booleans(), st.booleans())
def test_sizes(number, unit, binary, spaced, lower):
    text = f"{number}{' ' if spaced else ''}{unit}{'i' if unit and binary else ''}B"
    expected = number * (1024 if unit and binary else 1000) ** " KMGT".index(unit or " ")
    assert parse_bytes(text.lower() if lower else text, key="k") == expected


@given(st.integers(1, 2**50))
def test_a_number_is_bytes(number):
    assert parse_bytes(number, key="k") == parse_bytes(str(number), key="k") == number


def test_fractions():
    assert parse_bytes("1.5GiB", key="k") == 3 * 2**29
    assert parse_bytes("6G", key="k") == 6 * 10**9


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GB", "0", "0.0GB", "6 GiBs", "6PB", "six", "1e9", "6,5GB", "nan", True, "0.1B"]
)
def test_what_is_no_size_names_the_key(text):
    with pytest.raises(UserError, match=r"hardware\.memory_limit=.*6GiB"):
        parse_bytes(text, key="hardware.memory_limit")


# --- which device ---


@pytest.mark.parametrize("asked", ["cpu", "cuda", "mps", "xpu"])
def test_what_is_asked_for_is_taken(asked):
    assert find_device(asked) == asked


@pytest.mark.parametrize(
    ("driver", "visible", "found"),
    [
        ("/proc/driver/nvidia/gpus", None, "cuda"),
        ("/proc/driver/nvidia/gpus", "0", "cuda"),
        ("/proc/driver/nvidia/gpus", "", "cpu"),
        ("/proc/driver/nvidia/gpus", "-1", "cpu"),
        ("/dev/kfd", None, "cuda"),
        ("/dev/kfd", "", "cpu"),
        ("/usr/lib/wsl/lib/libcuda.so.1", None, "cuda"),
        ("/usr/lib/wsl/lib/libcuda.so.1", "-1", "cpu"),
        ("/dev/nvhost-gpu", None, "cuda"),
        ("/dev/nvgpu/igpu0", None, "cuda"),
        ("/dev/dxg", None, "cpu"),  # WSL2 over a card that is no NVIDIA's
        (None, None, "cpu"),
        (None, "0", "cpu"),
    ],
)
def test_auto(driver, visible, found, monkeypatch):
    class Drivers(type(Path())):
        def is_dir(self, **_):
            return str(self) == driver

        exists = is_dir

    monkeypatch.setattr("left_bench.spec.device.Path", Drivers)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_device("auto") == found


def test_auto_on_a_mac(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_device("auto") == "mps"


def test_a_device_that_is_not_there():
    import torch

    assert isinstance(open_device("cpu"), CpuDevice)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"hardware\.device=cuda: torch .* sees no such device"):
            open_device("cuda")


# --- peaks on the CPU ---


def held(size: int) -> bytearray:
    return bytearray(b"x") * size  # written to, or the kernel would not count it


@linux
def test_a_peak_is_seen_once_and_forgotten_at_the_reset():
    device = CpuDevice()
    device.set_baseline()
    device.reset_peak()
    block = held(200 * MB)
    del block
    assert device.peak_bytes() == pytest.approx(200 * MB, abs=20 * MB)
    device.reset_peak()
    assert device.peak_bytes() < 20 * MB
    assert device.peak_reserved_bytes() is None


@linux
def test_the_baseline_is_zero():
    before = held(100 * MB)
    device = CpuDevice()
    baseline = device.set_baseline()
    device.reset_peak()
    assert baseline > len(before)
    assert device.peak_bytes() < 20 * MB


@linux
def test_where_the_mark_cannot_be_reset_memory_is_sampled(monkeypatch):
    import time

    monkeypatch.setattr(devices, "_reset_high_water_mark", lambda: False)
    device = CpuDevice()
    assert "sampled" in device.peak_source
    device.set_baseline()
    device.reset_peak()
    block = held(200 * MB)
    time.sleep(0.05)
    del block
    assert device.peak_bytes() == pytest.approx(200 * MB, abs=20 * MB)
    time.sleep(0.05)  # on a busy machine the sampler may still hold what it read before the block was freed
    device.reset_peak()
    time.sleep(0.05)
    assert device.peak_bytes() < 20 * MB


@linux
def test_the_limit_is_over_the_baseline(tmp_path):
    program = """
import json, sys
from pathlib import Path
from left_bench.measure.device import CpuDevice
first = bytearray(b"x" * 100_000_000)
device = CpuDevice(); device.set_baseline(); device.limit(200_000_000, run_dir=Path(sys.argv[1]), exceeded=print)
held = bytearray(150_000_000)
try:
    more = bytearray(100_000_000)
    print(json.dumps("no limit"))
except MemoryError:
    print(json.dumps("limited"))
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == "limited"


# --- an accelerator, as far as it can be seen without one ---


class Cuda:
    """The functions of torch.cuda that are used, over numbers."""

    def __init__(self):
        self.allocated, self.peak, self.fraction = 100, 0, None

    def is_available(self):
        return True

    def synchronize(self):
        self.synchronized = True

    def empty_cache(self):
        pass

    def memory_allocated(self):
        return self.allocated

    def max_memory_allocated(self):
        return self.peak

    def max_memory_reserved(self):
        return self.peak + 11

    def reset_peak_memory_stats(self):
        self.peak = self.allocated

    def get_device_properties(self, _):
        return type("Properties", (), {"total_memory": 1000})()

    def set_per_process_memory_fraction(self, fraction):
        self.fraction = fraction

    def get_device_name(self, _):
        return "H1"


def test_an_allocators_peak_is_over_the_baseline(monkeypatch):
    import torch

    cuda = Cuda()
    monkeypatch.setattr(torch, "cuda", cuda)
    # a CUDA build names CUDA as its accelerator even where there is no GPU
    monkeypatch.setattr("left_bench.measure.device._neutral_interface", lambda kind: [])
    device = AcceleratorDevice("cuda")
    assert device.set_baseline() == 100
    cuda.peak = 900
    assert (device.peak_bytes(), device.peak_reserved_bytes()) == (800, 911)
    cuda.allocated = 300
    device.reset_peak()
    assert device.peak_bytes() == 200
    assert "allocator" in device.limit(400, run_dir=Path(), exceeded=print)
    assert cuda.fraction == pytest.approx(0.5)
    device.limit(4000, run_dir=Path(), exceeded=print)
    assert cuda.fraction == 1.0
    assert device.name() == "H1"


class Neutral(Cuda):
    """The functions of torch.accelerator: the same for every kind of device."""

    __name__ = "torch.accelerator"

    def __init__(self, kind, *, counts):
        super().__init__()
        self.kind, self.counts = kind, counts

    def current_accelerator(self):
        return type("Kind", (), {"type": self.kind})()

    def memory_stats(self):
        return {"allocated_bytes.all.peak": self.peak} if self.counts else {}


class Mps:
    """The functions of torch.mps: no peak, other names."""

    def is_available(self):
        return True

    def synchronize(self):
        pass

    def empty_cache(self):
        pass

    def current_allocated_memory(self):
        return 70

    def recommended_max_memory(self):
        return 1000

    def set_per_process_memory_fraction(self, fraction):
        self.fraction = fraction


@pytest.fixture
def fake_torch(monkeypatch):
    """`fake_torch(kind, module, neutral)`: torch with that device."""
    import torch

    def fake_torch(kind, module, neutral):
        monkeypatch.setattr(torch, kind, module)
        monkeypatch.setattr(torch, "accelerator", neutral)
        monkeypatch.setattr(torch, "empty", lambda *_, **__: None)

    return fake_torch


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_the_neutral_interface_is_asked_where_it_counts(kind, fake_torch):
    module, neutral = Cuda(), Neutral(kind, counts=True)
    fake_torch(kind, module, neutral)
    device = AcceleratorDevice(kind)
    neutral.allocated, neutral.peak = 10, 500
    assert device.set_baseline() == 10
    assert (device.peak_bytes(), device.peak_reserved_bytes()) == (490, 511)
    assert device.peak_source == "torch.accelerator allocator peak"
    device.limit(490, run_dir=Path(), exceeded=print)
    assert module.fraction == 0.5
    assert device.name() == "H1"


@pytest.mark.parametrize("neutral", [Neutral("cuda", counts=False), Neutral("xpu", counts=True), object()])
def test_elsewhere_the_kinds_own_module_is_asked(neutral, fake_torch):
    module = Cuda()
    fake_torch("cuda", module, neutral)
    device = AcceleratorDevice("cuda")
    module.peak = 900
    assert (device.set_baseline(), device.peak_bytes()) == (100, 800)
    assert device.peak_source == "torch.cuda allocator peak"


def test_mps_has_no_peak_and_says_so(fake_torch):
    module = Mps()
    fake_torch("mps", module, Neutral("mps", counts=False))
    device = AcceleratorDevice("mps")
    neutral_peak = device.peak_bytes(), device.peak_reserved_bytes()
    assert (device.set_baseline(), neutral_peak, device.name()) == (70, (None, None), "mps")
    device.reset_peak()
    device.limit(430, run_dir=Path(), exceeded=print)
    assert module.fraction == 0.5


# --- the machine ---


def test_the_machine_is_described_without_names_or_paths():
    facts = describe_machine(CpuDevice())
    text = json.dumps(facts)
    assert facts["device"] == "cpu"
    assert facts["cores"] >= 1
    assert facts["memory_bytes"] > 2**28
    for private in (platform.node(), str(Path.home()), str(Path.cwd())):
        assert private not in text or len(private) < 3
    assert facts["id"] == describe_machine(CpuDevice())["id"]

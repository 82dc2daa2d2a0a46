"""The interface to the hardware: synchronization, memory peaks, limits. Everything else is device-neutral.

`find_device` is for the parent and imports no torch; the classes are for the worker.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import platform
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from left_bench.core.extensions import named
from left_bench.measure.energy import is_divided
from left_bench.measure.instruction_sets import cpu_model, instruction_sets
from left_bench.processes import memory_limit
from left_bench.spec.device import DEVICES


def find_device(requested: str) -> str:
    """The device a cell will run on: `requested`, or for `auto` the accelerator whose driver this machine has."""
    if requested != "auto":
        return requested
    return next((name for name, kind in DEVICES.items() if kind.is_here()), "cpu")


def gpu_memory_bytes() -> int | None:
    """Memory of the largest NVIDIA GPU here, told by its driver and without torch; None where it does not say."""
    try:
        import pynvml as nvml
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        if any(is_divided(nvml, handle) for handle in handles):  # a slice has a part of it
            return None
        return max((int(nvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in handles), default=None)
    except nvml.NVMLError:
        return None


class Device(Protocol):
    """What a run needs from the hardware. Bytes are above the baseline taken after imports."""

    kind: str
    peak_source: str
    """How the peak is measured, in words."""

    def synchronize(self) -> None:
        """Wait for queued work, so that a clock read afterwards is correct."""

    def set_baseline(self) -> int:
        """Take the current use as the baseline; returns it in bytes."""

    def reset_peak(self) -> None:
        """Forget earlier peaks."""

    def forget_peak(self) -> None:
        """The same during work: freed memory that the allocator keeps is not returned first."""

    def peak_bytes(self) -> int | None:
        """Highest use since `reset_peak`, above the baseline."""

    def peak_reserved_bytes(self) -> int | None:
        """The allocator's own peak, if the device has one."""

    def limit(self, limit_bytes: int, *, run_dir: Path, exceeded: Callable[[int], None]) -> str:
        """Make use beyond the baseline plus `limit_bytes` fail as out-of-memory; returns the mechanism, in words.

        Where use can only be observed, `exceeded` is called with the bytes in use, from another thread.
        """

    def name(self) -> str | None:
        """The accelerator's name."""


def open_device(name: str) -> Device:
    """The device that `hardware.device` names.

    Raises:
        RuntimeError: torch cannot see such a device.
    """
    kind = DEVICES[name]
    opened: Device = named(kind.opened_by)(kind.type)
    return opened


def open_cpu(kind: str) -> Device:
    return CpuDevice()


def open_accelerator(kind: str) -> Device:
    """The torch device of this type, as an `AcceleratorDevice`."""
    return AcceleratorDevice(kind)


class CpuDevice:
    """Memory of this process as the kernel counts it: the resident set's high-water mark, reset at each phase."""

    kind = "cpu"

    def __init__(self) -> None:
        self._baseline = 0
        self._sampler: _PeakSampler | None = None
        self.peak_source = "kernel high-water mark of the resident set (VmHWM)"
        if not _reset_high_water_mark():
            self._sampler = _PeakSampler()
            self.peak_source = "resident set sampled every 5 ms"

    def synchronize(self) -> None:
        return None

    def set_baseline(self) -> int:
        _give_back_freed_memory()
        self._baseline = _resident_bytes()
        return self._baseline

    def reset_peak(self) -> None:
        _give_back_freed_memory()  # freed heap that glibc keeps would count as use in the next phase
        self.forget_peak()

    def forget_peak(self) -> None:
        if self._sampler is None:
            _reset_high_water_mark()
        else:
            self._sampler.reset()

    def peak_bytes(self) -> int | None:
        peak = _status_bytes("VmHWM") if self._sampler is None else self._sampler.peak
        return max(0, peak - self._baseline)

    def peak_reserved_bytes(self) -> int | None:
        return None

    def limit(self, limit_bytes: int, *, run_dir: Path, exceeded: Callable[[int], None]) -> str:
        grouped = memory_limit.enter_group(run_dir, limit_bytes)
        limited = memory_limit.limit_data(limit_bytes)
        memory_limit.watch(limit_bytes, baseline_bytes=self._baseline, exceeded=exceeded)
        nets = {"RLIMIT_DATA": limited, "control group": grouped, "watchdog": True}
        return ", ".join(name for name, there in nets.items() if there)

    def name(self) -> str | None:
        return None


class AcceleratorDevice:
    """CUDA (ROCm too), XPU or MPS; peaks are the caching allocator's.

    It uses `torch.accelerator`, which is the same for every kind, where that knows this device's allocator; otherwise
    the kind's own module (torch before 2.9; MPS, whose allocator keeps no peak).
    """

    def __init__(self, kind: str) -> None:
        import torch

        self.kind = kind
        self._module: Any = getattr(torch, kind)
        if not self._module.is_available():
            raise RuntimeError(f"hardware.device={kind}: torch {torch.__version__} sees no such device here")
        self._places: list[Any] = [*_neutral_interface(kind), self._module]
        self.peak_source = f"{getattr(self._places[0], '__name__', f'torch.{kind}')} allocator peak"
        self._baseline = 0

    def synchronize(self) -> None:
        self._call("synchronize")

    def set_baseline(self) -> int:
        gc.collect()
        self._call("empty_cache")
        self._baseline = int(self._call("memory_allocated", "current_allocated_memory") or 0)
        return self._baseline

    def reset_peak(self) -> None:
        gc.collect()
        self._call("empty_cache")  # memory that an earlier phase left reserved would count as this one's
        self.forget_peak()

    def forget_peak(self) -> None:
        self._call("reset_peak_memory_stats")  # MPS keeps no peak

    def peak_bytes(self) -> int | None:
        peak = self._call("max_memory_allocated")
        return None if peak is None else int(peak) - self._baseline

    def peak_reserved_bytes(self) -> int | None:
        peak = self._call("max_memory_reserved")
        return None if peak is None else int(peak)

    def limit(self, limit_bytes: int, *, run_dir: Path, exceeded: Callable[[int], None]) -> str:
        if hasattr(self._module, "get_device_properties"):
            total = self._module.get_device_properties(0).total_memory
        else:
            total = self._module.recommended_max_memory()
        self._module.set_per_process_memory_fraction(min(1.0, (self._baseline + limit_bytes) / total))
        return f"torch.{self.kind} allocator fraction, which counts reserved but unused blocks too"

    def name(self) -> str | None:
        return str(self._module.get_device_name(0)) if hasattr(self._module, "get_device_name") else self.kind

    def _call(self, *names: str) -> Any:
        """Call the first of the functions that one of the interfaces has; None if there is none."""
        for place in self._places:
            for name in names:
                if hasattr(place, name):
                    return getattr(place, name)()
        return None


def _neutral_interface(kind: str) -> list[Any]:
    """`torch.accelerator` if it handles this kind and counts its memory; for other allocators it returns 0."""
    import torch

    neutral = getattr(torch, "accelerator", None)
    if neutral is None or not hasattr(neutral, "memory_stats"):
        return []
    current = neutral.current_accelerator()
    if current is None or current.type != kind:
        return []
    torch.empty(1, device=kind)  # statistics start with the first allocation
    return [neutral] if neutral.memory_stats() else []


def describe_machine(device: Device) -> dict[str, Any]:
    """The machine, from an allow-list of facts, without user, host name, paths or environment variables."""
    import psutil

    facts: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "device": device.kind,
        "device_name": device.name(),
    }
    sets = instruction_sets()
    if sets is not None:
        facts["instruction_sets"] = list(sets)
    # the same machine must keep its id, while the kernel's version and the exact memory size may change;
    # instruction sets are included because virtual machines of one name may or may not have them, a factor of 50 in
    # speed
    stable = [facts["cpu"], facts["cores"], round(facts["memory_bytes"] / 2**30), facts["device_name"], sets]
    facts["id"] = hashlib.sha256(repr(stable).encode()).hexdigest()[:8]
    return facts


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # 5: reset VmHWM only (proc(5))
    except OSError:
        return False
    return True


def _give_back_freed_memory() -> None:
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # not glibc
        return


class _PeakSampler:
    """For kernels without a resettable high-water mark: a thread that samples every 5 ms and may miss short peaks."""

    def __init__(self) -> None:
        self.peak = _resident_bytes()
        threading.Thread(target=self._watch, daemon=True).start()

    def reset(self) -> None:
        self.peak = _resident_bytes()

    def _watch(self) -> None:
        pause = threading.Event()
        while not pause.wait(0.005):
            self.peak = max(self.peak, _resident_bytes())


def matrix_product_peak(kind: str, dtype: str, *, largest: int | None = None, seconds: float = 0.25) -> float:
    """FLOP/s of square matrix products: the best of repeated runs at growing sizes, about `seconds` at each.

    The sizes end at `largest`; None: 2048 on a CPU, and 8192 on an accelerator, where a product of 2048 ends before the
    next can be launched. A dtype without fast kernels (float16 on most CPUs) stays at a small size, because a large one
    would take minutes. float32 is rounded according to the process's setting (TF32).
    """
    import time

    import torch

    largest = largest or (2048 if kind == "cpu" else 8192)
    # one product is too short compared with launch overhead and clock resolution; on a CPU single products are timed
    together = 1 if kind == "cpu" else 10
    device, best, size = open_device(kind), 0.0, min(256, largest)
    while True:
        left, right = (torch.randn(size, size, device=kind, dtype=getattr(torch, dtype)) for _ in range(2))
        product = left @ right  # the first call chooses kernels
        device.synchronize()
        end, took = time.perf_counter() + seconds, float("inf")
        while time.perf_counter() < end:
            took = min(took, _seconds_of(partial(torch.mm, left, right, out=product), kind, times=together) / together)
        best = max(best, 2 * size**3 / took)
        size *= 2
        if size > largest or took * 8 * together > max(seconds, 1.0 if kind != "cpu" else 0.0):
            return best


def _seconds_of(work: Callable[[], object], kind: str, *, times: int) -> float:
    """Seconds for `times` successive calls; on CUDA by its own events, which exclude launch overhead."""
    import time

    import torch

    if kind == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000
    device = open_device(kind)
    began = time.perf_counter()
    for _ in range(times):
        work()
    device.synchronize()
    return time.perf_counter() - began

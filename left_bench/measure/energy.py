"""Energy in joules from hardware counters: NVML's for a GPU, RAPL's for the CPU packages; and the metrics made of it.

A counter is read only a few times, between steps and never within one. If this process can read none, no metric is
produced, and `source` says why.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from left_bench.processes.resources import concurrent_cells, devices_are_shared, visible_devices

POWERCAP = Path("/sys/class/powercap")
UPDATES_WANTED = 10
"""An interval with fewer counter updates than this gives no joules: the lag of one update would be too large a part."""
_LOOK_EVERY_SECONDS = 30.0
"""How often RAPL's registers are read during a cell: they wrap around, some after a minute at a kilowatt."""


class Counter(Protocol):
    """An energy counter."""

    readable: bool
    source: str
    """A description of the counter; if it is not readable, the reason."""
    updates_every_seconds: float

    def joules(self) -> float | None:
        """Joules used since some past moment; None: it cannot be read."""


class NoCounter:
    """A null object for devices without a readable counter."""

    readable = False
    updates_every_seconds = 0.0

    def __init__(self, why: str) -> None:
        self.source = why

    def joules(self) -> float | None:
        return None

    def facts(self) -> dict[str, Any]:
        return {}

    def clocks(self) -> dict[str, Any]:
        return {}


class NvmlGpu:
    """A GPU as NVML sees it: its energy counter (Volta and later), driver, power limit and clocks.

    NVIDIA does not document how often the counter is updated; 20 to 100 ms have been measured, depending on the model.
    """

    updates_every_seconds = 0.1

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self.readable = True
        self.source = "NVML total energy counter"
        try:
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except nvml.NVMLError as error:
            self.readable, self.source = False, f"NVML: this GPU has no energy counter ({error})"

    def joules(self) -> float | None:
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000
        except self._nvml.NVMLError:
            return None

    def facts(self) -> dict[str, Any]:
        """Driver, power limit and highest clocks: an allow-list, without serial number or UUID."""
        nvml, handle = self._nvml, self._handle
        return self._known(
            driver=nvml.nvmlSystemGetDriverVersion,
            power_limit_watts=lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
            max_sm_clock_mhz=lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
            max_memory_clock_mhz=lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM),
        )

    def clocks(self) -> dict[str, Any]:
        """The current clocks."""
        nvml, handle = self._nvml, self._handle
        return self._known(
            sm_clock_mhz=lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            memory_clock_mhz=lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        )

    def _known(self, **queries: Any) -> dict[str, Any]:
        """The values that NVML returns; no GPU supports all of them."""
        results = {}
        for name, query in queries.items():
            try:
                results[name] = query()
            except self._nvml.NVMLError:
                continue
        return results


class RaplCounter:
    """All CPU packages of the machine together, whatever runs on them; memory outside a package is not counted."""

    readable = True
    updates_every_seconds = 0.001

    def __init__(self, zones: list[Path]) -> None:
        """Start counting from the zones' current values.

        Raises:
            OSError: a zone cannot be read.
            ValueError: a zone holds no number.
        """
        self.source = f"RAPL, {len(zones)} CPU package{'s' if len(zones) > 1 else ''}"
        self._registers = [zone / "energy_uj" for zone in zones]
        self._ranges = [_number(zone / "max_energy_range_uj") for zone in zones]
        self._last = [_number(register) for register in self._registers]
        self._microjoules = 0
        self._lost = False
        self._reading = threading.Lock()

    def joules(self) -> float | None:
        with self._reading:
            try:
                now = [_number(register) for register in self._registers]
            except (OSError, ValueError):
                self._lost = True  # a register may have wrapped around meanwhile
            if self._lost:
                return None
            for before, after, size in zip(self._last, now, self._ranges, strict=True):
                self._microjoules += after - before if after >= before else after - before + size
            self._last = now
            return self._microjoules / 1e6

    def watch(self) -> None:
        """Read the registers regularly from a thread, so that none wraps around twice unnoticed."""

        def look() -> None:
            pause = threading.Event()
            while not pause.wait(_LOOK_EVERY_SECONDS):
                self.joules()

        threading.Thread(target=look, name="RAPL", daemon=True).start()


def open_gpu(kind: str) -> NvmlGpu | NoCounter:
    """The GPU that torch uses in this process, if it is an NVIDIA GPU that NVML supports."""
    if kind != "cuda":
        return NoCounter(f"device {kind} has no supported energy counter")
    import torch

    if torch.version.hip is not None:
        return NoCounter("ROCm has no supported energy counter")
    try:
        import pynvml as nvml
    except ImportError:
        return NoCounter("nvidia-ml-py is not installed")
    try:
        nvml.nvmlInit()
        handle = _handle(nvml)
        if is_divided(nvml, handle):
            return NoCounter("MIG: the counter covers the whole GPU, not the slice")
        return NvmlGpu(nvml, handle)
    except (nvml.NVMLError, LookupError) as error:
        return NoCounter(f"NVML: {error}")


def open_cpu(root: Path = POWERCAP) -> RaplCounter | NoCounter:
    """The machine's CPU packages; AMD's also appear under Intel's name."""
    # a second colon marks a part of a package; intel-rapl-mmio repeats the same package
    zones = [zone for zone in sorted(root.glob("intel-rapl:*")) if zone.name.count(":") == 1]
    try:
        packages = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
        if not packages:
            return NoCounter(f"the kernel shows no CPU package in {root}")
        return RaplCounter(packages)
    except PermissionError as error:
        return NoCounter(f"only root can read {error.filename}; `sudo chmod a+r` on it allows it until the next boot")
    except (OSError, ValueError) as error:
        return NoCounter(f"RAPL cannot be read ({error})")


def open_counters(
    kind: str, environment: Mapping[str, str], *, first: bool = True
) -> tuple[NvmlGpu | NoCounter, dict[str, Counter]]:
    """This rank's GPU, and the counters of its cell: for the device that trains, and for the CPUs next to a GPU.

    Counters that other cells use at the same time are left out, because their joules could not be told apart.

    Args:
        first: whether this is the first rank, which counts the CPU packages for all.
    """
    gpu = open_gpu(kind)
    counters: dict[str, Counter] = {}
    if gpu.readable and not devices_are_shared(environment):
        counters[""] = gpu
    if first and concurrent_cells(environment) == 1 and isinstance(cpu := open_cpu(), RaplCounter):
        cpu.watch()
        counters["" if kind == "cpu" else "cpu_"] = cpu
    return gpu, counters


def _handle(nvml: Any) -> Any:
    """NVML's handle of torch's current device, by UUID, because the two number devices differently.

    Raises:
        LookupError: the device cannot be identified.
    """
    import torch

    index = torch.cuda.current_device()
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    if uuid is not None:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    count = nvml.nvmlDeviceGetCount()
    named = visible_devices("cuda", os.environ, present=count)
    name = named[index] if index < len(named) else ""
    if name.startswith("GPU-"):
        return nvml.nvmlDeviceGetHandleByUUID(name)
    if name.isdigit() and (count == 1 or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"):
        return nvml.nvmlDeviceGetHandleByIndex(int(name))
    raise LookupError(f"cannot tell which of its {count} GPUs is CUDA's '{name}'; set CUDA_DEVICE_ORDER=PCI_BUS_ID")


def is_divided(nvml: Any, handle: Any) -> bool:
    """Whether a GPU is divided into slices (MIG)."""
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except nvml.NVMLError:  # a GPU without MIG
        return False


def _number(path: Path) -> int:
    return int(path.read_text())


class Stretch:
    """Joules and seconds between `start` and `stop`, summed over all such intervals."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._since: tuple[float, float | None] | None = None
        self._joules: float | None = 0.0
        self._times = 0
        self.seconds = 0.0

    def start(self) -> None:
        self._since = time.perf_counter(), self._counter.joules()

    def stop(self) -> None:
        """End the running interval, if there is one."""
        if self._since is None:
            return
        (began, before), after = self._since, self._counter.joules()
        self._since = None
        self._times += 1
        self.seconds += time.perf_counter() - began
        if before is None or after is None or self._joules is None:
            self._joules = None
        else:
            self._joules += after - before

    @property
    def running(self) -> bool:
        return self._since is not None

    @property
    def joules(self) -> float | None:
        """Joules; None: nothing was counted, a reading failed, or there were too few updates of the counter."""
        # the counter's lag differs from interval to interval, so the errors of several grow with the square root
        shortest = UPDATES_WANTED * self._counter.updates_every_seconds * math.sqrt(self._times)
        return None if self.running or not self._times or self.seconds < shortest else self._joules


class Energy:
    """The energy of one cell: in total, of its training, and of its measured steps."""

    def __init__(self, counters: Mapping[str, Counter] | None = None) -> None:
        """Start counting.

        Args:
            counters: prefix of the metrics' names -> counter: "" for the device that trains, `cpu_` for the CPU
                packages next to it. Unreadable counters are ignored.
        """
        readable = {prefix: counter for prefix, counter in (counters or {}).items() if counter.readable}
        self._cell = {prefix: Stretch(counter) for prefix, counter in readable.items()}
        self._steps = {prefix: Stretch(counter) for prefix, counter in readable.items()}
        self._training = {prefix: Stretch(counter) for prefix, counter in readable.items()}
        self.sources = "; ".join(counter.source for counter in readable.values())
        for stretch in self._cell.values():
            stretch.start()

    def start_training(self) -> None:
        """Call when the first step begins, warm-up included."""
        for stretch in self._training.values():
            stretch.start()

    def of_training(self) -> float | None:
        """Joules of the device that trains over all steps so far; call it only within `paused`. None: unknown."""
        stretch = self._training.get("")
        return None if stretch is None else stretch.joules

    def start(self) -> None:
        """Call when the first measured step begins."""
        for stretch in self._steps.values():
            stretch.start()

    def stop(self) -> None:
        """Call when the last measured step has ended and the device is idle."""
        for stretch in self._steps.values():
            stretch.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the context, energy is not counted as the steps'."""
        both = [*self._steps.values(), *self._training.values()]
        running = [stretch for stretch in both if stretch.running]
        for stretch in running:
            stretch.stop()
        try:
            yield
        finally:
            for stretch in running:
                stretch.start()

    def of_cell(self) -> dict[str, float]:
        """`cell_joules` and `cpu_cell_joules` so far, where readable."""
        for stretch in self._cell.values():
            stretch.stop()
        results = {f"{prefix}cell_joules": stretch.joules for prefix, stretch in self._cell.items()}
        for stretch in self._cell.values():
            stretch.start()
        return {name: joules for name, joules in results.items() if joules is not None}

    def of_steps(self, *, tokens: int) -> dict[str, float]:
        """The energy metrics of the measured steps, which processed `tokens` tokens; `Meter.take_in_energy` adds ranks
        up."""
        result: dict[str, float] = {}
        for prefix, stretch in self._steps.items():
            if stretch.joules is not None and tokens:
                result |= {
                    f"{prefix}train_joules": stretch.joules,
                    f"{prefix}joules_per_1000_tokens": 1000 * stretch.joules / tokens,
                    f"{prefix}train_watts": stretch.joules / stretch.seconds,
                }
        return result

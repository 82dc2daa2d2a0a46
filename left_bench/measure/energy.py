"""Joules as the hardware's own counters tell them: NVML's of a GPU, RAPL's of the CPU packages.

A counter is read at a few moments, between steps and never within one. Where there is none that this process may read,
nothing is counted and no metric comes of it; `source` then says why.
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
"""A stretch with fewer updates of the counter than this has no joules: one update's lag is too much of it."""
_LOOK_EVERY_SECONDS = 30.0
"""How often RAPL's registers are read while a cell runs: they wrap around, some after a minute at a kilowatt."""


class Counter(Protocol):
    """Something that counts joules upwards."""

    readable: bool
    source: str
    """The counter in words; why there is none, where it is not readable."""
    updates_every_seconds: float

    def joules(self) -> float | None:
        """Joules used since some moment in the past; None: it cannot be read."""


class NoCounter:
    """Stands where nothing can be read."""

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

    NVIDIA says nothing of how often the counter is updated; 20 to 100 ms have been measured, by model.
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
        """The clocks of this moment."""
        nvml, handle = self._nvml, self._handle
        return self._known(
            sm_clock_mhz=lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            memory_clock_mhz=lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        )

    def _known(self, **questions: Any) -> dict[str, Any]:
        """What NVML answers; no GPU knows everything."""
        results = {}
        for name, ask in questions.items():
            try:
                results[name] = ask()
            except self._nvml.NVMLError:
                continue
        return results


class RaplCounter:
    """The CPU packages of the machine, all together, whatever runs on them; memory outside a package is not counted."""

    readable = True
    updates_every_seconds = 0.001

    def __init__(self, zones: list[Path]) -> None:
        """Take in the zones as they are now.

        Raises:
            OSError: one cannot be read.
            ValueError: one holds no number.
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
        """Read the registers now and then from a thread, so that none wraps around twice unseen."""

        def look() -> None:
            pause = threading.Event()
            while not pause.wait(_LOOK_EVERY_SECONDS):
                self.joules()

        threading.Thread(target=look, name="RAPL", daemon=True).start()


def open_gpu(kind: str) -> NvmlGpu | NoCounter:
    """The GPU that torch computes on in this process, if it is one of NVIDIA's that NVML tells of."""
    if kind != "cuda":
        return NoCounter(f"device {kind} has no counter that is read here")
    import torch

    if torch.version.hip is not None:
        return NoCounter("ROCm has no counter that is read here")
    try:
        import pynvml as nvml
    except ImportError:
        return NoCounter("nvidia-ml-py is not installed")
    try:
        nvml.nvmlInit()
        handle = _handle(nvml)
        if is_divided(nvml, handle):
            return NoCounter("MIG: the counter is of the whole GPU, not of the slice")
        return NvmlGpu(nvml, handle)
    except (nvml.NVMLError, LookupError) as error:
        return NoCounter(f"NVML: {error}")


def open_cpu(root: Path = POWERCAP) -> RaplCounter | NoCounter:
    """The machine's CPU packages; AMD's are found under Intel's name too."""
    # a second colon is a part of a package; intel-rapl-mmio is the same package again
    zones = [zone for zone in sorted(root.glob("intel-rapl:*")) if zone.name.count(":") == 1]
    try:
        packages = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
        if not packages:
            return NoCounter(f"the kernel shows no CPU package in {root}")
        return RaplCounter(packages)
    except PermissionError as error:
        return NoCounter(f"{error.filename} may be read by root alone; `sudo chmod a+r` on it, until the next boot")
    except (OSError, ValueError) as error:
        return NoCounter(f"RAPL cannot be read ({error})")


def open_counters(
    kind: str, environment: Mapping[str, str], *, first: bool = True
) -> tuple[NvmlGpu | NoCounter, dict[str, Counter]]:
    """The GPU of this rank, and the counters of its cell: of the device that trains, and of the CPUs beside a GPU.

    What other cells use at the same time is left out, for a counter does not know whose a joule is.

    Args:
        first: whether this rank counts the CPU packages, which all ranks share.
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
    """NVML's handle of torch's present device: by its UUID, for the two count devices in different orders.

    Raises:
        LookupError: which one it is cannot be known.
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
    raise LookupError(f"which of its {count} GPUs is CUDA's '{name}' cannot be told; set CUDA_DEVICE_ORDER=PCI_BUS_ID")


def is_divided(nvml: Any, handle: Any) -> bool:
    """Whether a GPU is divided into slices (MIG)."""
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except nvml.NVMLError:  # a GPU that knows no MIG
        return False


def _number(path: Path) -> int:
    return int(path.read_text())


class Stretch:
    """Joules and seconds between `start` and `stop`, summed over as often as that happens."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._since: tuple[float, float | None] | None = None
        self._joules: float | None = 0.0
        self._times = 0
        self.seconds = 0.0

    def start(self) -> None:
        self._since = time.perf_counter(), self._counter.joules()

    def stop(self) -> None:
        """End what `start` began, if it did."""
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
        """None: nothing was counted, something could not be read, or too few updates of the counter fell into it."""
        # how far the counter lags at either end is one stretch's own: over several the errors add up as their root
        shortest = UPDATES_WANTED * self._counter.updates_every_seconds * math.sqrt(self._times)
        return None if self.running or not self._times or self.seconds < shortest else self._joules


class Energy:
    """What the counters tell of one cell: from its beginning, and over its measured steps."""

    def __init__(self, counters: Mapping[str, Counter] | None = None) -> None:
        """Begin to count.

        Args:
            counters: the beginning of a metric's name -> the counter: "" of the device that trains, `cpu_` of the CPU
                packages beside it. Those that cannot be read are left out.
        """
        readable = {prefix: counter for prefix, counter in (counters or {}).items() if counter.readable}
        self._cell = {prefix: Stretch(counter) for prefix, counter in readable.items()}
        self._steps = {prefix: Stretch(counter) for prefix, counter in readable.items()}
        self._training = {prefix: Stretch(counter) for prefix, counter in readable.items()}
        self.sources = "; ".join(counter.source for counter in readable.values())
        for stretch in self._cell.values():
            stretch.start()

    def start_training(self) -> None:
        """The first step begins, warm-up included."""
        for stretch in self._training.values():
            stretch.start()

    def of_training(self) -> float | None:
        """Joules of the device that trains over all steps so far; within `paused` alone. None: not known."""
        stretch = self._training.get("")
        return None if stretch is None else stretch.joules

    def start(self) -> None:
        """The first measured step begins."""
        for stretch in self._steps.values():
            stretch.start()

    def stop(self) -> None:
        """The last measured step has ended; the device is idle."""
        for stretch in self._steps.values():
            stretch.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside is no step's work."""
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
        """`cell_joules`, `cpu_cell_joules` so far, as far as they were read."""
        for stretch in self._cell.values():
            stretch.stop()
        results = {f"{prefix}cell_joules": stretch.joules for prefix, stretch in self._cell.items()}
        for stretch in self._cell.values():
            stretch.start()
        return {name: joules for name, joules in results.items() if joules is not None}

    def of_steps(self, *, tokens: int) -> dict[str, float]:
        """The metrics of the measured steps, which went over so many tokens."""
        result: dict[str, float] = {}
        for prefix, stretch in self._steps.items():
            if stretch.joules is not None and tokens:
                result |= {
                    f"{prefix}train_joules": stretch.joules,
                    f"{prefix}joules_per_1000_tokens": 1000 * stretch.joules / tokens,
                    f"{prefix}train_watts": stretch.joules / stretch.seconds,
                }
        return result

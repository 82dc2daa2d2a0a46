"""Devices: what must be known about each before torch is imported. `measure.device` does the measuring."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from left_bench.core.extensions import added, load

# Files that exist on machines where torch can use the device name cuda.
_CUDA_SIGNS = (
    "/proc/driver/nvidia/gpus",
    "/usr/lib/wsl/lib/libcuda.so.1",  # WSL2; its /dev/dxg exists for Intel and AMD cards as well
    "/dev/nvhost-gpu",  # Jetson up to JetPack 5; 6 and later have the first
    "/dev/nvgpu/igpu0",
    "/dev/kfd",  # ROCm
)


@dataclass(frozen=True, kw_only=True)
class DeviceKind:
    """A kind of device that `hardware.device` may name."""

    type: str
    """Its torch device type."""
    is_here: Callable[[], bool] = lambda: False
    """Whether `hardware.device=auto` chooses it on this machine; decided without torch, from the driver's files."""
    visible: tuple[str, ...] = ()
    """Environment variables that list the devices a process may see; the first one that is set counts, else the first.
    Cells that run at the same time then get one device each."""
    count: Callable[[], int] = lambda: 1
    """Number of devices according to the drivers, without torch; 1 if unknown."""
    one_for_all: bool = False
    """A machine has only one, so several processes for one cell are useless."""
    has_triton: bool = False
    """Whether Triton's kernels run on it."""
    opened_by: str = "left_bench.measure.device:open_accelerator"
    """`module:name` of a function that takes the device type and returns a `measure.device.Device`."""


def _is_cuda_here() -> bool:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and any(Path(path).exists() for path in _CUDA_SIGNS)


def _count_cuda() -> int:
    if result := len(list(Path("/proc/driver/nvidia/gpus").glob("*"))):
        return result
    # ROCm: the nodes of the kernel driver that have compute units are GPUs, the others CPUs
    nodes = Path("/sys/class/kfd/kfd/topology/nodes").glob("*/properties")
    return sum("simd_count 0" not in text and "simd_count" in text for text in map(_text, nodes)) or 1


def _count_xpu() -> int:
    return len([path for path in Path("/sys/class/drm").glob("renderD*/device/driver") if _is_intel(path)]) or 1


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _is_intel(driver: Path) -> bool:
    return driver.resolve().name in ("i915", "xe")


DEVICES: dict[str, DeviceKind] = {
    "cpu": DeviceKind(type="cpu", opened_by="left_bench.measure.device:open_cpu"),
    "cuda": DeviceKind(
        type="cuda",
        is_here=_is_cuda_here,
        visible=("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"),
        count=_count_cuda,
        has_triton=True,
    ),
    "mps": DeviceKind(
        type="mps", is_here=lambda: sys.platform == "darwin" and platform.machine() == "arm64", one_for_all=True
    ),
    "xpu": DeviceKind(type="xpu", visible=("ZE_AFFINITY_MASK",), count=_count_xpu, has_triton=True),
}
"""`hardware.device` -> its kind; `auto` chooses the first that is present, else the CPU."""
for _name, _point in added("left_bench.devices").items():
    DEVICES.setdefault(_name, load(_point))

"""Devices: what must be known of each before torch is imported. `measure.device` measures on them."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from left_bench.core.extensions import added, load

# What a machine has whose torch answers to the name cuda.
_CUDA_SIGNS = (
    "/proc/driver/nvidia/gpus",
    "/usr/lib/wsl/lib/libcuda.so.1",  # WSL2 shows the card through /dev/dxg, which an Intel or AMD card has too
    "/dev/nvhost-gpu",  # Jetson up to JetPack 5; 6 and later have the first
    "/dev/nvgpu/igpu0",
    "/dev/kfd",  # ROCm
)


@dataclass(frozen=True, kw_only=True)
class DeviceKind:
    """A kind of device that `hardware.device` may name."""

    type: str
    """What torch calls it."""
    is_here: Callable[[], bool] = lambda: False
    """Whether `hardware.device=auto` takes it on this machine: told without torch, by its driver's files."""
    visible: tuple[str, ...] = ()
    """Variables that name the devices a process may see: the first that is set, else the first. Cells that run at the
    same time then get one device each."""
    count: Callable[[], int] = lambda: 1
    """Devices that the drivers show, without torch; 1 where they do not say."""
    one_for_all: bool = False
    """A machine has one, so several processes for one cell have no use for it."""
    has_triton: bool = False
    """Whether Triton's kernels run on it."""
    opened_by: str = "left_bench.measure.device:open_accelerator"
    """`module:name` of what is called with its type and returns its `measure.device.Device`."""


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
"""`hardware.device` -> what it is; `auto` takes the first that is here, else the CPU."""
for _name, _point in added("left_bench.devices").items():
    DEVICES.setdefault(_name, load(_point))

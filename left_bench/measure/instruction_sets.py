"""What makes a machine fast, read without torch: the processor's instruction sets, a GPU's compute capability."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

FLAGS_VARIABLE = "LEFT_BENCH_CPU_FLAGS"
"""Flags to use instead of the processor's own, `avx2` or `avx2 avx512f`, to try what another machine would get."""
# Instruction sets used by matrix products, by their names in Linux's /proc/cpuinfo; x86's, then ARM's.
_RELEVANT = (
    *("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx_ne_convert", "amx_bf16", "amx_fp16"),
    *("asimd", "asimdhp", "sve", "sve2", "bf16"),
)
# The same on macOS.
_MACOS_NAMES = {
    "hw.optional.avx2_0": "avx2",
    "hw.optional.avx512f": "avx512f",
    "hw.optional.neon": "asimd",
    "hw.optional.arm.AdvSIMD": "asimd",
    "hw.optional.arm.FEAT_FP16": "asimdhp",
    "hw.optional.arm.FEAT_BF16": "bf16",
}
# Sets with which oneDNN multiplies half-precision formats in hardware (from its guide to data types); otherwise it
# emulates.
_NATIVE = {
    "bfloat16": {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"},
    "float16": {"avx512_fp16", "amx_fp16", "avx_ne_convert", "asimdhp"},
}
_NVML = {"win32": "nvml.dll"}.get(sys.platform, "libnvidia-ml.so.1")


def instruction_sets() -> tuple[str, ...] | None:
    """The processor's instruction sets used by matrix products; None if the system does not report them."""
    override = os.environ.get(FLAGS_VARIABLE)
    flags = frozenset(override.replace(",", " ").split()) if override else _cpu_flags()
    return None if flags is None else tuple(name for name in _RELEVANT if name in flags)


def native_sets(dtype: str, sets: Iterable[str] | None) -> list[str]:
    """The sets that multiply this half-precision format in hardware; empty: it is emulated."""
    return [name for name in sets or () if name in _NATIVE[dtype]]


@lru_cache(maxsize=1)
def _cpu_flags() -> frozenset[str] | None:
    if sys.platform == "darwin":
        return _macos_flags(_output_of(["sysctl", "hw.optional"]))
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
            return flags_of(lines)  # only of the first core: a large machine's file has a megabyte
    except OSError:
        return None


def flags_of(lines: Iterable[str]) -> frozenset[str] | None:
    """The first core's flags in /proc/cpuinfo: `flags` on x86, `Features` on ARM."""
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return None


def _macos_flags(output: str | None) -> frozenset[str] | None:
    if output is None:
        return None
    pairs = (line.partition(":")[::2] for line in output.splitlines())
    return frozenset(_MACOS_NAMES[name] for name, value in pairs if name in _MACOS_NAMES and value.strip() == "1")


def is_rocm() -> bool:
    """Whether the accelerator with the torch name cuda is an AMD GPU."""
    return Path("/dev/kfd").exists() and not Path("/proc/driver/nvidia/gpus").is_dir()


def cuda_capability() -> tuple[int, int] | None:
    """The lowest compute capability of the usable GPUs; None if this machine has none.

    Numbers in CUDA_VISIBLE_DEVICES are taken as the driver's, which CUDA uses with CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    result = _capabilities()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        chosen = [
            result[int(name)] for name in visible.split(",") if name.strip().isdigit() and int(name) < len(result)
        ]
        result = tuple(chosen) or result  # other kinds of names (GPU-..., MIG-...): any of them
    return min(result, default=None)


@lru_cache(maxsize=1)
def _capabilities() -> tuple[tuple[int, int], ...]:
    """The capabilities of all GPUs in the driver's order: from its library, else from nvidia-smi."""
    with contextlib.suppress(OSError, AttributeError):  # no driver, or one without these functions
        result = _from_nvml(ctypes.CDLL(_NVML))
        if result:
            return result
    return capabilities_in(_output_of(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]) or "")


def _from_nvml(library: ctypes.CDLL) -> tuple[tuple[int, int], ...]:
    if library.nvmlInit_v2() != 0:
        return ()
    try:
        count = ctypes.c_uint()
        if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return ()
        results = []
        for index in range(count.value):
            device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
            if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) != 0:
                return ()
            numbers = ctypes.byref(major), ctypes.byref(minor)
            if library.nvmlDeviceGetCudaComputeCapability(device, *numbers) != 0:
                return ()
            results.append((major.value, minor.value))
        return tuple(results)
    finally:
        library.nvmlShutdown()


def capabilities_in(output: str) -> tuple[tuple[int, int], ...]:
    """nvidia-smi's output, one `8.0` per line, as pairs of numbers."""
    pairs = (line.strip().partition(".")[::2] for line in output.splitlines())
    return tuple((int(major), int(minor)) for major, minor in pairs if major.isdigit() and minor.isdigit())


def _output_of(command: Sequence[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_model() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()

"""Turns the exception that ended a run into its status and reason."""

from __future__ import annotations

import errno
import gc
import re
from contextlib import suppress
from typing import Any

from left_bench.core.errors import Unsupported, UserError
from left_bench.spec.record import Status

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch's CPU allocator raises a plain RuntimeError with a system-dependent message. On accelerators only torch's own
# allocator raises OutOfMemoryError; CUDA itself, cuBLAS, NCCL and bitsandbytes only say it in their messages.
_NO_MEMORY = re.compile(
    r"not enough memory|can't allocate memory|Cannot allocate memory"
    r"|(CUDA|HIP|XPU|MPS backend) out of memory|(CUDA|HIP|XPU) error: out of memory"
    r"|[Cc]uda failure \d* ?'out of memory'"
    r"|CU\w+_STATUS_ALLOC_FAILED|HIPBLAS_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation"
    r"|^Error out of memory at line \d+ in file",  # bitsandbytes, which then exits
    re.MULTILINE,
)
# cuBLAS's message when the device has no memory for its handle
_NO_HANDLE = "CUBLAS_STATUS_NOT_INITIALIZED"
_ROOM_FOR_HANDLE = 256 * 2**20


class NoRoomToCheck(RuntimeError):
    """A check's second model did not fit in memory next to the first: the check's result is unknown."""


def says_out_of_memory(text: str) -> bool:
    """Whether a message or the end of a log reports a failed allocation."""
    return _NO_MEMORY.search(text) is not None


def status_of(error: Exception, *, limit_bytes: int | None = None, device: str = "cpu") -> tuple[Status, str]:
    """The status and the one-line reason for a run on `device` that ended with `error`."""
    import torch

    from left_bench.training.loop import Diverged

    text = " ".join(str(error).split())
    if isinstance(error, Diverged):
        return "diverged", text
    no_handle = _NO_HANDLE in text and (_free_bytes(device) or _ROOM_FOR_HANDLE) < _ROOM_FOR_HANDLE
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or says_out_of_memory(text) or no_handle:
        return "oom", out_of_memory_reason(text or type(error).__name__, limit_bytes=limit_bytes, device=device)
    if disk_full(error):
        return "failed", f"disk full: {text[:300]}"
    if isinstance(error, UserError):
        return "failed", text
    if isinstance(error, Unsupported):
        return "unsupported", text
    return "failed", f"{type(error).__name__}: {text[:500]}"


def disk_full(error: Exception) -> bool:
    """Whether writing failed because the disk is full; safetensors only says so in its message."""
    return getattr(error, "errno", None) in _NO_ROOM or "No space left on device" in str(error)


def out_of_memory_reason(text: str, *, limit_bytes: int | None, device: str = "cpu") -> str:
    """The allocator's message, with the machine's memory, or the accelerator's if the run was on one."""
    import psutil

    memory = _on_accelerator(device)
    if memory is None:
        memory = f"machine memory {psutil.virtual_memory().total / 2**30:.1f} GiB"
    gc.collect()
    if limit_bytes is not None:
        memory = f"hardware.memory_limit={limit_bytes / 2**20:.0f}MiB, {memory}"
    return f"{text[:300]} ({memory})"


def _on_accelerator(device: str) -> str | None:
    """The device's memory and this run's highest use; None for a CPU or a device that no longer responds."""
    import torch

    module: Any = getattr(torch, device, None)
    if device == "cpu" or not hasattr(module, "mem_get_info"):
        return None
    with suppress(RuntimeError):  # after some errors every further call fails
        _, total = module.mem_get_info()
        held, reserved = module.max_memory_allocated(), module.max_memory_reserved()
        gibibytes = f"{held / 2**30:.1f} GiB of it allocated by this run at most, {reserved / 2**30:.1f} GiB reserved"
        return f"device memory {total / 2**30:.1f} GiB, {gibibytes}"
    return None


def _free_bytes(device: str) -> int | None:
    import torch

    module: Any = getattr(torch, device, None)
    if device != "cpu" and hasattr(module, "mem_get_info"):
        with suppress(RuntimeError):
            return int(module.mem_get_info()[0])
    return None

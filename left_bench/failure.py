"""What an exception makes of a run: its status and its reason."""

from __future__ import annotations

import errno
import gc

from left_bench.errors import UserError
from left_bench.record import Status

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch's CPU allocator raises a plain RuntimeError; its words differ between systems
_NO_MEMORY = ("not enough memory", "can't allocate memory", "Cannot allocate memory")


def status_of(error: Exception, *, limit_bytes: int | None = None) -> tuple[Status, str]:
    """The status and the one-line reason of a run that ended in `error`."""
    import torch

    from left_bench.train import Diverged

    text = " ".join(str(error).split())
    if isinstance(error, Diverged):
        return "diverged", text
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in text for words in _NO_MEMORY):
        return "oom", out_of_memory_reason(text or type(error).__name__, limit_bytes=limit_bytes)
    if disk_full(error):
        return "failed", f"disk full: {text[:300]}"
    if isinstance(error, UserError):
        return "failed", text
    return "failed", f"{type(error).__name__}: {text[:500]}"


def disk_full(error: Exception) -> bool:
    """Whether writing failed for want of room; safetensors says so in words alone."""
    return getattr(error, "errno", None) in _NO_ROOM or "No space left on device" in str(error)


def out_of_memory_reason(text: str, *, limit_bytes: int | None) -> str:
    """The allocator's words, with how much memory there was."""
    import psutil

    gc.collect()
    there_was = f"machine memory {psutil.virtual_memory().total / 2**30:.1f} GiB"
    if limit_bytes is not None:
        there_was = f"hardware.memory_limit={limit_bytes / 2**20:.0f}MiB, {there_was}"
    return f"{text[:300]} ({there_was})"

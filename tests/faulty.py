"""Faults for tests: a worker whose events strike. The package itself has no switch for any of this.

`LEFT_BENCH_TEST_FAULT=segfault@step2` strikes when the second step has been told; `hang@train`, when the phase begins;
`kill@step2#1` strikes the other ranks of a cell of several processes, in the place of the first.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FAULT = "LEFT_BENCH_TEST_FAULT"
IDLE_PARAMETER = "idle_parameter"


def arm() -> None:
    """Make the worker of this process strike as the environment says."""
    from left_bench.spec import events
    from left_bench.worker import run

    wanted, _, place = os.environ[FAULT].partition("@")
    where, _, others = place.partition("#")
    struck = events.NullEventWriter if others else events.EventWriter
    write = struck.write

    def strike_after(self: Any, event: str, **fields: Any) -> None:
        write(self, event, **fields)
        here = f"step{fields['step']}" if event == "step" else fields.get("name")
        if event in ("step", "phase") and here == where:
            strike(wanted, self)

    struck.write = strike_after  # type: ignore[method-assign]
    run.EventWriter = events.EventWriter


def strike(wanted: str, writer: Any) -> None:
    """Do what the fault's name says."""
    if wanted == "exception":
        raise ValueError("a fault\nof two lines")
    if wanted == "memory_error":
        raise MemoryError
    if wanted == "cuda_oom":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if wanted == "segfault":
        ctypes.string_at(0)
    if wanted == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if wanted == "hang":
        hang_for_ever()
    if wanted == "exit":
        os._exit(3)
    if wanted == "disk_full_once":  # room for the outcome, none for what is written now
        raise OSError(errno.ENOSPC, "No space left on device", str(writer.path))
    if wanted == "disk_full":
        from left_bench.worker import run

        def no_room(path: Path, text: str) -> Path:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        run.write_atomically = no_room
        raise OSError(errno.ENOSPC, "No space left on device", str(writer.path))


def hang_for_ever() -> None:
    """Neither an event nor an end."""
    while True:
        time.sleep(60)


def add_an_idle_parameter() -> None:
    """Give the method of this process's worker a parameter that takes no part in the loss."""
    import torch

    from left_bench.methods import attach as adapter

    attach = adapter.attach_adapter

    def attach_and_add(*arguments: Any, **named: Any) -> Any:
        model = attach(*arguments, **named)
        model.register_parameter("idle", torch.nn.Parameter(torch.zeros(3)))
        return model

    adapter.attach_adapter = attach_and_add


def main(argv: Sequence[str], *, forked: bool = False) -> int:
    """`left_bench.worker.run.main` with the fault; what is started in its place."""
    from left_bench.worker import run

    if os.environ[FAULT] == IDLE_PARAMETER:
        add_an_idle_parameter()
    else:
        arm()
    return run.main(list(argv), forked=forked)


if __name__ == "__main__":
    main(sys.argv[1:])

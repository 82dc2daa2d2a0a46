"""`hardware.memory_limit` on CPU: three mechanisms, each of which catches what the previous one misses.

- `RLIMIT_DATA`: an allocation of private memory beyond the limit fails, and the run survives to report where;
- a control group, if this process may create one: the kernel limits all of the run's memory;
- a watchdog on the resident set: pages of mapped files count towards the peak but towards no rlimit.

Outside Linux only the watchdog works: macOS has RLIMIT_DATA but does not apply it to mapped memory, and Windows has
neither.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

_LOOK_EVERY_SECONDS = 0.02
_CGROUPS = Path("/sys/fs/cgroup")


def limit_data(limit_bytes: int) -> bool:
    """Let private writable memory grow by at most `limit_bytes` from now on; False if the system has no such limit.

    RLIMIT_AS would also count every mapped library and file. Only the soft limit is set, so that `lift` can give a run
    that has ended the memory to report it.
    """
    if sys.platform != "linux":
        return False
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_status_bytes("VmData") + limit_bytes, hard))
    return True


def lift() -> None:
    """Remove the limit on private memory."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def watch(limit_bytes: int, *, baseline_bytes: int, exceeded: Callable[[int], None]) -> None:
    """Call `exceeded` once, from a thread, with the resident bytes above the baseline when they exceed the limit."""

    def look() -> None:
        pause = threading.Event()
        with _resident() as resident:
            while not pause.wait(_LOOK_EVERY_SECONDS):
                used = resident() - baseline_bytes
                if used > limit_bytes:
                    exceeded(used)
                    return

    threading.Thread(target=look, name="memory watchdog", daemon=True).start()


@contextlib.contextmanager
def _resident() -> Iterator[Callable[[], int]]:
    """A function that returns this process's resident bytes, cheap enough to be called fifty times a second."""
    if sys.platform != "linux":
        import psutil

        process = psutil.Process()
        yield lambda: int(process.memory_info().rss)
        return
    with Path("/proc/self/statm").open("rb", buffering=0) as statm:
        page = os.sysconf("SC_PAGE_SIZE")

        def resident() -> int:
            statm.seek(0)
            return int(statm.read().split()[1]) * page

        yield resident


def enter_group(run_dir: Path, limit_bytes: int, *, root: Path = _CGROUPS) -> bool:
    """Move this process into its own control group, limited to `limit_bytes`; False where not permitted.

    Memory allocated before stays charged to the previous group, so the limit applies above the baseline. Version 2
    needs the memory controller to be delegated to this user; version 1 is used where version 2 is not available.
    """
    for parent, version in _memory_groups(root):
        group = parent / _group_name(run_dir)
        try:
            group.mkdir(exist_ok=True)
            if version == 2:
                (group / "memory.max").write_text(str(limit_bytes))
                with contextlib.suppress(OSError):  # no swap control
                    (group / "memory.swap.max").write_text("0")
            else:
                (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
                with contextlib.suppress(OSError):  # swap is not accounted for
                    (group / "memory.memsw.limit_in_bytes").write_text(str(limit_bytes))
            (group / "cgroup.procs").write_text(str(os.getpid()))
        except OSError:
            with contextlib.suppress(OSError):
                group.rmdir()
            continue
        return True
    return False


def remove_group(run_dir: Path, *, root: Path = _CGROUPS) -> None:
    """Remove the group that `enter_group` created, from outside, after its process has ended."""
    for parent, _ in _memory_groups(root):
        with contextlib.suppress(OSError):
            (parent / _group_name(run_dir)).rmdir()


def _memory_groups(root: Path) -> list[tuple[Path, int]]:
    """The control group that accounts for this process's memory, with the version of its interface."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    results = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        inside = path.lstrip("/")
        if "memory" in controllers.split(","):
            results.append((root / "memory" / inside, 1))
        elif not controllers:
            results.append((root / inside, 2))
    return [(group, version) for group, version in results if group.is_dir()]


def _group_name(run_dir: Path) -> str:
    return f"left_bench-{hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]}"


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)

"""Assigning resources: cells on one machine get separate accelerators and CPU cores.

Before its worker starts, a cell takes a seat: lock files in a local folder, which are released when their process ends.
The worker reads its seat from environment variables. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from left_bench.core import interrupt
from left_bench.core.errors import UserError
from left_bench.spec.device import DEVICES

CORES, AT_ONCE, SHARED = "LEFT_BENCH_CORES", "LEFT_BENCH_AT_ONCE", "LEFT_BENCH_SHARED_DEVICES"
# Launchers whose scheduler assigns devices to each job, so that no lock is needed.
SCHEDULERS = ("submitit_slurm", "ray", "ray_aws")
_LOOK_EVERY_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Seat:
    """The part of a machine that one cell may use."""

    devices: tuple[str, ...] = ()
    """Names of accelerators as in the visibility variable; empty: all visible ones."""
    cores: tuple[int, ...] = ()
    """CPU cores; empty: all that this process may use."""
    at_once: int = 1
    """Number of cells that share the machine's cores, including this one."""
    shared: bool = False
    """Whether those cells may use the same accelerator."""

    def environment(self, kind: str) -> dict[str, str]:
        """The environment variables that describe the seat to a worker."""
        results = {}
        if self.devices:
            results[_variable(kind, os.environ)] = ",".join(self.devices)
        if self.at_once > 1:
            results |= {CORES: ",".join(map(str, self.cores)), AT_ONCE: str(self.at_once)}
            results |= {SHARED: "1"} if self.shared else {}
        return results


@contextlib.contextmanager
def seated(
    kind: str, *, at_once: int, devices: int = 1, share: bool = False, scheduled: bool = False
) -> Iterator[Seat]:
    """Wait for a free seat, hold it, and describe it in this process's environment.

    Args:
        kind: the device kind of the cell.
        at_once: cells that may run at the same time on this machine.
        devices: number of accelerators that the cell needs.
        share: do not reserve an accelerator.
        scheduled: a scheduler has assigned this process its devices; use them all.

    Raises:
        UserError: the machine has fewer accelerators than the cell needs.
    """
    with contextlib.ExitStack() as held:
        mine: tuple[str, ...] = ()
        if DEVICES[kind].visible and not share and not scheduled:
            names = visible_devices(kind, os.environ, present=DEVICES[kind].count())
            if len(names) < devices:
                raise UserError(
                    f"hardware.device={kind}: the cell needs {devices} of them and {len(names)} are visible here; "
                    f"set {_variable(kind, os.environ)} or choose hardware=cpu"
                )
            at_once = min(at_once, len(names) // devices)
            mine = tuple(_wait_for(names, devices, held, prefix=f"{kind}-"))
        cores = available_cores()
        at_once = min(at_once, len(cores))
        part: tuple[int, ...] = ()
        if at_once > 1:
            places = [f"{at_once}-{number}" for number in range(at_once)]
            [place] = _wait_for(places, 1, held, prefix="cores-")
            part = share_of(cores, at_once, number=places.index(place))
        seat = Seat(devices=mine, cores=part, at_once=at_once, shared=share)
        held.enter_context(_variables_set(seat.environment(kind)))
        yield seat


def cells_at_once(launcher: Mapping[str, Any], name: str, *, cores: int) -> int:
    """How many cells a launcher's settings allow to run at the same time on a machine with `cores` cores.

    submitit_local starts all jobs at once; they wait for each other unless `at_once` allows more.
    """
    if name == "joblib":
        jobs = launcher.get("n_jobs")
        jobs = 1 if jobs is None else int(jobs)
        return max(1, jobs if jobs > 0 else cores + 1 + jobs)
    if name == "ray":
        cores_per_job = ((launcher.get("ray") or {}).get("remote") or {}).get("num_cpus")
        return max(1, int(cores / float(cores_per_job or 1)))
    return 1


def visible_devices(kind: str, environment: Mapping[str, str], *, present: int) -> list[str]:
    """The accelerators that this process may use, by their names in the visibility variable."""
    value = environment.get(_variable(kind, environment))
    if value is None:
        return [str(index) for index in range(present)]
    names = [name.strip() for name in value.split(",") if name.strip()]
    return names[: names.index("-1")] if "-1" in names else names  # CUDA stops reading at the first invalid name


def share_of(cores: Sequence[int], parts: int, *, number: int) -> tuple[int, ...]:
    """The `number`-th (from 0) of `parts` equal parts of the cores; remaining cores stay idle."""
    each = max(1, len(cores) // parts)
    start = number * each % len(cores)
    return tuple(cores[start : start + each])


def take(names: Sequence[str], count: int, try_lock: Callable[[str], Any | None]) -> dict[str, Any] | None:
    """Lock `count` of the names, or none: holding some while waiting for more would block others."""
    taken: dict[str, Any] = {}
    for name in names:
        lock = try_lock(name)
        if lock is not None:
            taken[name] = lock
        if len(taken) == count:
            return taken
    for lock in taken.values():
        lock.close()
    return None


def assigned_cores(environment: Mapping[str, str]) -> list[int]:
    """The cores of the worker's seat; empty: all."""
    return [int(core) for core in environment.get(CORES, "").split(",") if core]


def concurrent_cells(environment: Mapping[str, str]) -> int:
    """The number of cells that share this machine's cores; the launcher passes it to the worker."""
    return int(environment.get(AT_ONCE, "1"))


def devices_are_shared(environment: Mapping[str, str]) -> bool:
    """Whether other cells may use this cell's accelerator at the same time; the launcher passes it to the worker."""
    return SHARED in environment


def available_cores() -> list[int]:
    """The CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _wait_for(names: Sequence[str], count: int, held: contextlib.ExitStack, *, prefix: str) -> list[str]:
    folder = _folder()
    while (taken := take(names, count, lambda name: _try_lock(folder / f"{prefix}{_file_name(name)}"))) is None:
        interrupt.check()
        time.sleep(_LOOK_EVERY_SECONDS)
    for lock in taken.values():
        held.callback(lock.close)
    return list(taken)


def _try_lock(path: Path) -> Any | None:
    """The open, locked file, or None; the kernel releases the lock when the process ends."""
    file = path.open("w")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows has no such locks: cells share
        return file
    except OSError:
        file.close()
        return None
    return file


def _folder() -> Path:
    """The folder of this user's lock files; not in the home or cache folder, which several machines may share."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"left_bench-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if hasattr(os, "getuid") and folder.stat().st_uid != user:
        raise UserError(f"{folder} belongs to another user; remove it or set TMPDIR=")
    return folder


def _file_name(name: str) -> str:
    # device 0 of one Slurm job is not device 0 of another
    return f"{os.environ.get('SLURM_JOB_ID', '')}{name}.lock".replace(os.sep, "_")


def _variable(kind: str, environment: Mapping[str, str]) -> str:
    variables = DEVICES[kind].visible
    return next((variable for variable in variables if variable in environment), variables[0])


@contextlib.contextmanager
def _variables_set(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

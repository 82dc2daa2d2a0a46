"""Runs a cell in a fresh process: starts it, watches it, ends it if necessary, and always produces a record."""

from __future__ import annotations

import errno
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from left_bench.core import interrupt
from left_bench.core.clock import utc_now
from left_bench.core.files import write_atomically
from left_bench.processes import memory_limit as limits
from left_bench.processes import start_process as processes
from left_bench.processes.ranks import Team, folder_of
from left_bench.spec.cell import Cell
from left_bench.spec.events import EVENTS_NAME, EventReader
from left_bench.spec.record import CurvePoint, Phase, Record, Status, ended_without_outcome
from left_bench.spec.run_files import ADAPTER_NAME, CELL_NAME, ROWS_NAME
from left_bench.training.checkpoint import forget_checkpoints
from left_bench.worker.classify_error import says_out_of_memory
from left_bench.worker.run import NO_OUTCOME, OUTCOME_NAME

LOG_NAME = "worker.log"
_LOOK_EVERY_SECONDS = 0.25
_TAIL_CHARACTERS = 4000
_SPINS = "10000"
"""How often a torch thread polls for work before it sleeps, tens of microseconds. OpenMP's default of 300,000 keeps
cores busy waiting; if another program needs a core, each piece of work waits for the thread without one. With one busy
process, a LoRA step of the default model took 11 to 15 s, and with this setting 5.0 to 6.4; undisturbed 2.2 to 2.9 and
2.2 to 2.6 (two cores, AVX-512, float32)."""
# Errors of starting a process if the system has none available, or the fork server has died.
_NO_PROCESS = (None, errno.EAGAIN, errno.ENOMEM, errno.EPIPE, errno.ECONNRESET, errno.ECONNREFUSED, errno.ENOENT)


def run_isolated(
    cell: Cell, run_dir: Path, *, on_event: Callable[[dict[str, Any]], None], command: list[str] | None = None
) -> Record:
    """Run the cell's worker and wait for it, sleeping except for reading its events four times a second.

    The worker's process group is always ended, also if this process is interrupted. The record has what was measured by
    then: finished phases, steps, losses, the memory peak so far.

    Args:
        on_event: called with every event of `events.jsonl` as it appears.
        command: a replacement for the worker, for tests; the run's folder is its argument.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in (OUTCOME_NAME, EVENTS_NAME, ROWS_NAME):
        (run_dir / name).unlink(missing_ok=True)
    shutil.rmtree(run_dir / ADAPTER_NAME, ignore_errors=True)  # left by an earlier attempt
    if cell.training.checkpoint_every is None:
        forget_checkpoints(run_dir)
    write_atomically(run_dir / CELL_NAME, cell.model_dump_json(by_alias=True, indent=1))
    reader = EventReader(run_dir / EVENTS_NAME)
    killed_before = _kernel_kills()
    started_at, start = utc_now(), time.monotonic()
    too_long: str | None = None
    seen: list[dict[str, Any]] = []
    last_sign = start

    def look() -> None:
        nonlocal last_sign
        for event in reader.new():
            last_sign = time.monotonic()
            if event["event"] != "progress":  # shows that the worker is alive, but is not a result
                seen.append(event)
            on_event(event)

    try:
        process = processes.start(
            run_dir,
            log=run_dir / LOG_NAME,
            environment=worker_environment(cell),
            command=command,
            fork=cell.device_type == "cpu",
        )
    except (OSError, EOFError) as error:
        interrupt.check()  # a terminal's Ctrl-C ends a fork server that is still importing
        if isinstance(error, OSError) and error.errno not in _NO_PROCESS:  # a problem of the folder, or a bug
            raise
        return _never_started(cell, error, started_at=started_at, kernel_kills=_kernel_kills() - killed_before)
    try:
        while process.wait(_LOOK_EVERY_SECONDS) is None:
            interrupt.check()
            look()
            too_long = _too_long(cell, running=time.monotonic() - start, silent=time.monotonic() - last_sign)
            if too_long is not None:
                if process.wait(0) is None:
                    process.show_stack()  # shows in the log where it hangs
                else:
                    too_long = None
                break
    finally:
        code = process.end()
        for rank in range(cell.hardware.processes):
            limits.remove_group(folder_of(run_dir, rank))
        Team(run_dir, size=cell.hardware.processes).sweep()
    look()
    wall = time.monotonic() - start

    tail = log_tail(run_dir / LOG_NAME)
    outcome = _read_outcome(run_dir / OUTCOME_NAME)
    if outcome is None:
        kernel_kills = _kernel_kills() - killed_before
        status, reason = _why_no_outcome(code, too_long, cell, kernel_kills, seen, run_dir, log_tail=tail)
        phases = _finished_phases(seen)
        outcome = ended_without_outcome(cell, status, reason, started_at=started_at, phases=phases)
        outcome = outcome.model_copy(update={"curve": _curve_so_far(seen)})
    provenance = dict(outcome.provenance)
    if outcome.status != "ok":
        provenance["log_tail"] = tail
    metrics = dict(outcome.metrics)
    if outcome.status == "ok":
        forget_checkpoints(run_dir)
    else:
        metrics = _measured_so_far(seen, cell) | metrics
    metrics["wall_seconds"] = wall
    metrics["overhead_seconds"] = wall - sum(phase.seconds for phase in outcome.phases)
    (run_dir / OUTCOME_NAME).unlink(missing_ok=True)
    return outcome.model_copy(update={"metrics": metrics, "provenance": provenance, "started_at": started_at})


def _never_started(cell: Cell, error: Exception, *, started_at: str, kernel_kills: int) -> Record:
    """The record of a cell whose process could not be started; the next cell gets a new fork server."""
    message = " ".join(str(error).split()) or type(error).__name__
    status: Status = "oom" if kernel_kills > 0 or getattr(error, "errno", None) == errno.ENOMEM else "crashed"
    reason = f"the worker's process could not be started ({message})"
    if kernel_kills > 0:
        reason = "the kernel killed the worker's process while it was being started, because memory ran out"
    return ended_without_outcome(cell, status, reason, started_at=started_at)


def worker_environment(cell: Cell) -> dict[str, str]:
    """The parent's environment, with what a measured run needs."""
    environment = os.environ | {
        "TOKENIZERS_PARALLELISM": "false",  # the tokenizer's threads would compete with the measured ones
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": os.environ.get("TRANSFORMERS_VERBOSITY", "error"),
        "PYTHONUNBUFFERED": "1",
    }
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", _SPINS)
    if cell.hardware.threads is not None:
        environment["OMP_NUM_THREADS"] = str(cell.hardware.threads)
    if cell.device_type == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # libraries must not find a GPU
    return environment


def log_tail(path: Path) -> str:
    """The end of a log, without the list of imported modules that follows the stack of a segmentation fault."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 16 * _TAIL_CHARACTERS))
        end = file.read().decode("utf-8", errors="replace")
    lines = [line for line in end.splitlines(keepends=True) if not line.startswith("Extension modules: ")]
    return "".join(lines)[-_TAIL_CHARACTERS:]


def _too_long(cell: Cell, *, running: float, silent: float) -> str | None:
    """Why the worker exceeds a time limit, or None; seconds since its start, and since its last event."""
    limits = cell.hardware
    if limits.timeout is not None and running > limits.timeout:
        return f"ended after hardware.timeout={limits.timeout:g} s"
    if limits.phase_timeout is not None and silent > limits.phase_timeout:
        return f"no progress for hardware.phase_timeout={limits.phase_timeout:g} s"
    return None


def _why_no_outcome(
    code: int | None,
    too_long: str | None,
    cell: Cell,
    kernel_kills: int,
    seen: list[dict[str, Any]],
    run_dir: Path,
    *,
    log_tail: str,
) -> tuple[Status, str]:
    where = next((f" in phase {event['name']}" for event in reversed(seen) if event["event"] == "phase"), "")
    where += next((f" after step {event['step']}" for event in reversed(seen) if event["event"] == "step"), "")
    if too_long is not None:
        return "timeout", too_long + where
    if code == NO_OUTCOME:
        free = shutil.disk_usage(run_dir).free
        return "failed", f"the worker could not write its outcome, {free / 2**20:.0f} MiB are free there now{where}"
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        if -code == signal.SIGKILL and kernel_kills > 0:
            limit = cell.hardware.memory_limit
            limited = f" (hardware.memory_limit={limit / 2**20:.0f}MiB)" if limit is not None else ""
            return "oom", f"the kernel killed the worker because memory ran out{where}{limited}"
        return "crashed", f"the worker was ended by {name}{where}"
    if says_out_of_memory(log_tail):  # bitsandbytes exits the process if one of its own allocations fails
        last = log_tail.strip().splitlines()[-1]
        return "oom", f"the worker exited with code {code}{where}; its last output: {last[:200]}"
    return "crashed", f"the worker exited with code {code} without an outcome{where}"


def _read_outcome(path: Path) -> Record | None:
    if not path.exists():
        return None
    try:
        return Record.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError:  # not written by this package, which writes atomically
        return None


def _finished_phases(seen: list[dict[str, Any]]) -> list[Phase]:
    return [
        Phase.model_validate({key: value for key, value in event.items() if key in Phase.model_fields})
        for event in seen
        if event["event"] == "phase_end"
    ]


def _curve_so_far(seen: list[dict[str, Any]]) -> list[CurvePoint]:
    points = [event for event in seen if event["event"] == "curve"]
    return [
        CurvePoint.model_validate({k: v for k, v in point.items() if k in CurvePoint.model_fields}) for point in points
    ]


def _measured_so_far(seen: list[dict[str, Any]], cell: Cell) -> dict[str, float]:
    """The metrics of the completed steps, with the same definitions as for a finished run."""
    from left_bench.measure.meter import step_of_event, summarize_steps

    events = [event for event in seen if event["event"] == "step"]
    steps = [step for event in events if (step := step_of_event(event)) is not None]
    result: dict[str, float | None] = dict(summarize_steps(steps, measure_after=cell.training.measure_after))
    peaks = [event["peak_memory_bytes"] for event in events if event.get("peak_memory_bytes") is not None]
    if peaks:
        result["peak_memory_bytes"] = max(peaks)
    return {name: value for name, value in result.items() if value is not None and math.isfinite(value)}


def _kernel_kills() -> int:
    """How many processes the kernel has killed for lack of memory since boot (Linux), else 0."""
    try:
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except OSError:
        pass
    return 0

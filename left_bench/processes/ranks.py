"""One cell on several processes: how the ranks start, connect, share a step's rows and end together.

The worker is rank 0. Before it loads anything it starts the other ranks, which run the same `worker.work` to the end of
training and then exit; only rank 0 evaluates, saves and writes files that outlive the cell. All ranks are in one
process group, die with rank 0, and end the cell when one of them dies. Nothing here imports torch before `meet`.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from left_bench.core.errors import UserError
from left_bench.processes.resources import share_of
from left_bench.processes.start_process import LAUNCHER_PID, end_alone
from left_bench.spec.record import Record, Status

OUTCOME_NAME = "outcome.json"
_MOMENT_SECONDS = 5.0
"""Time for rank 0 to report itself why the cell ends, after another rank has ended."""
# collectives also wait for rank 0's evaluations; a hanging cell is ended from outside, by hardware.phase_timeout
_PATIENCE = datetime.timedelta(days=7)
# parts of a collective's error message when the rank at the other end has ended
_CONNECTION = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe")
Item = TypeVar("Item")


def folder_of(run_dir: Path, rank: int) -> Path:
    """Where a rank writes its outcome: rank 0 in the cell's folder, the others in subfolders while the cell runs."""
    return run_dir if rank == 0 else run_dir / f"rank-{rank}"


class RankLost(RuntimeError):
    """Ranks that should do the same have diverged."""


class Team:
    """The ranks of one cell, from the point of view of one of them; for a single process it does nothing.

    Attributes:
        rank: this process's rank, from 0.
        size: the number of ranks.
    """

    def __init__(self, run_dir: Path | None = None, *, rank: int = 0, size: int = 1) -> None:
        self.run_dir, self.rank, self.size = run_dir, rank, size
        self.pids: list[int] = []
        self._ends: dict[int, Callable[[], int]] = {}
        self._lost: tuple[Status, str] | None = None
        self._someone_lost = threading.Event()

    @property
    def first(self) -> bool:
        """Whether this rank evaluates, saves and writes."""
        return self.rank == 0

    # --- starting and ending ---

    def start(self, main: Callable[[list[str]], Any] | None) -> None:
        """Rank 0: start the others.

        Args:
            main: the worker's main function, for ranks forked from this process, which must have done only its imports;
                None: start new interpreters.
        """
        if self.size == 1 or not self.first:
            return
        self.sweep()  # files of a killed attempt
        arguments = [str(self.run_dir)]
        os.environ[LAUNCHER_PID] = str(os.getpid())  # rank 0 may end while they start
        for rank in range(1, self.size):
            if main is None:
                command = [sys.executable, "-m", "left_bench.worker.run", *arguments, str(rank)]
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
                self._ends[rank] = process.wait
                self.pids.append(process.pid)
                continue
            pid = os.fork()
            if pid == 0:
                try:
                    main([*arguments, str(rank)])
                finally:
                    os._exit(1)
            self._ends[rank] = lambda pid=pid: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])  # type: ignore[misc]
            self.pids.append(pid)
        os.environ.pop(LAUNCHER_PID)

    def watch(self, lost: Callable[[Status, str], None]) -> None:
        """Rank 0: call `lost` from another thread when another rank fails and this one does not."""

        def wait(rank: int, end: Callable[[], int]) -> None:
            why = self._why(rank, end())
            if why is None:
                return
            self._lost = self._lost or why
            self._someone_lost.set()
            # rank 0 may be about to fail for the same reason, and can report better where
            threading.Event().wait(_MOMENT_SECONDS)
            lost(*self._lost)

        for rank, end in self._ends.items():
            threading.Thread(target=wait, args=(rank, end), name=f"rank {rank}", daemon=True).start()

    def why_lost(self, error: Exception) -> tuple[Status, str] | None:
        """Status and reason of the rank whose end made a collective fail here with `error`, if that was the cause."""
        message = str(error)
        if not self.pids or not any(words in message for words in _CONNECTION):
            return None
        self._someone_lost.wait(_MOMENT_SECONDS)
        return self._lost

    def dismiss(self) -> None:
        """Rank 0: end the other ranks if they are still running, and remove their files."""
        if not self.pids:
            return
        for pid in self.pids:
            end_alone(pid)
        self.sweep()

    def sweep(self) -> None:
        """Remove the ranks' temporary files from the cell's folder."""
        assert self.run_dir is not None
        self._store.unlink(missing_ok=True)
        for rank in range(1, self.size):
            shutil.rmtree(folder_of(self.run_dir, rank), ignore_errors=True)

    def _why(self, rank: int, code: int) -> tuple[Status, str] | None:
        assert self.run_dir is not None
        try:
            text = (folder_of(self.run_dir, rank) / OUTCOME_NAME).read_text(encoding="utf-8")
            outcome = Record.model_validate_json(text)
        except (OSError, ValueError):
            named = -code in set(signal.Signals)
            how = f"was ended by {signal.Signals(-code).name}" if named else f"left with exit code {code}"
            return "crashed", f"rank {rank} of {self.size} {how}"
        if outcome.status == "ok":
            return None
        return outcome.status, f"rank {rank} of {self.size}: {outcome.reason}"

    # --- together ---

    @property
    def _store(self) -> Path:
        assert self.run_dir is not None
        return self.run_dir / ".ranks.store"

    def meet(self, kind: str) -> None:
        """Select this rank's accelerator and wait until all ranks have connected.

        The ranks connect through a file in the cell's folder, which needs no free port.

        Raises:
            UserError: fewer accelerators than ranks.
        """
        if self.size == 1:
            return
        import torch
        from torch import distributed

        if kind == "cpu":
            backend = "gloo"
            if sys.platform == "linux":
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a container's host name may not resolve
        else:
            module: Any = getattr(torch, kind)
            if module.device_count() < self.size:
                raise UserError(
                    f"hardware.processes={self.size}: {module.device_count()} {kind} devices are visible here, and "
                    "each process needs its own; lower hardware.processes or make more of them visible"
                )
            module.set_device(self.rank)
            # also for host tensors, with which ranks exchange the numbers of a step
            backend = f"cpu:gloo,{kind}:{distributed.get_default_backend_for_device(kind)}"
        numbers = {"RANK": self.rank, "LOCAL_RANK": self.rank, "WORLD_SIZE": self.size, "LOCAL_WORLD_SIZE": self.size}
        os.environ.update({name: str(number) for name, number in numbers.items()})  # accelerate reads them
        store = distributed.FileStore(str(self._store), self.size)
        distributed.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=_PATIENCE)

    def place(self, kind: str) -> str:
        """The torch device for this rank's weights."""
        return kind if self.size == 1 or kind == "cpu" else f"{kind}:{self.rank}"

    def cores(self, cores: Sequence[int]) -> Sequence[int]:
        """This rank's part of a seat's cores; empty if the seat names none."""
        return share_of(cores, self.size, number=self.rank) if cores and self.size > 1 else cores

    def share(self, rows: Sequence[Item]) -> list[Item]:
        """This rank's part of a pass's rows: every `size`-th, so that rows sorted by length are divided evenly.

        Raises:
            UserError: some ranks would have more rows than others.
        """
        if len(rows) % self.size:
            raise UserError(
                f"training.batch_size={len(rows)}: the rows of a pass are divided over hardware.processes={self.size}; "
                "choose a multiple of it"
            )
        return list(rows[self.rank :: self.size])

    def gather(self, *numbers: float) -> list[tuple[float, ...]]:
        """The numbers given by each rank, in order of rank; all ranks must call it at the same point."""
        if self.size == 1:
            return [numbers]
        import torch
        from torch import distributed

        mine = torch.tensor(numbers, dtype=torch.float64)
        results = [torch.empty_like(mine) for _ in range(self.size)]
        distributed.all_gather(results, mine)
        return [tuple(item.tolist()) for item in results]

    def check_alike(self, what: str, numbers: Sequence[float]) -> None:
        """Refuse numbers that differ between ranks although they must be equal.

        Raises:
            RankLost: names them.
        """
        if any(number != numbers[0] and number == number for number in numbers):  # NaN is reported elsewhere
            listed = ", ".join(f"{number:.9g}" for number in numbers)
            raise RankLost(f"{what} differs between the ranks ({listed}); they no longer train the same model")

    @contextlib.contextmanager
    def own_draws(self, kind: str, *, seed: int, step: int) -> Iterator[None]:
        """Inside the context, random numbers (dropout, noise) are this rank's own; outside, all ranks draw the same.

        They depend only on seed and step, so that a checkpoint need not store every rank's generator.
        """
        if self.size == 1:
            yield
            return
        import torch

        devices = [] if kind == "cpu" else [self.rank]
        with torch.random.fork_rng(devices, device_type="cuda" if kind == "cpu" else kind):
            torch.manual_seed(random.Random(f"{seed} {step} {self.rank}").getrandbits(63))
            yield


ALONE = Team()

"""One cell on several processes: who they are, how they start, meet, share a step's rows and end together.

The worker is rank 0. Before it loads anything it starts the other ranks, which run the same `worker.work` to the end of
training and then leave: rank 0 alone evaluates, saves and writes what outlives the cell. All of them are in one process
group, die with rank 0, and take the cell with them when one of them dies. Nothing here imports torch before `meet`.
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
"""What rank 0 is given to say itself why the cell ends, once another rank has."""
# collectives wait for rank 0's evaluations too; what hangs is ended from outside, by hardware.phase_timeout
_PATIENCE = datetime.timedelta(days=7)
# what a collective says when the rank at its other end is gone
_CONNECTION = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe")
Item = TypeVar("Item")


def folder_of(run_dir: Path, rank: int) -> Path:
    """Where a rank leaves its outcome: rank 0 in the cell's folder, the others below it while the cell runs."""
    return run_dir if rank == 0 else run_dir / f"rank-{rank}"


class RankLost(RuntimeError):
    """Ranks that should be doing the same are not."""


class Team:
    """The ranks of one cell as one of them sees them; of a single process, it does nothing.

    Attributes:
        rank: which one this process is, from 0.
        size: how many there are.
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
            main: the worker's, for ranks that are forks of this process, which then has done nothing but its imports;
                None: they are new interpreters.
        """
        if self.size == 1 or not self.first:
            return
        self.sweep()  # what a killed attempt left
        arguments = [str(self.run_dir)]
        os.environ[LAUNCHER_PID] = str(os.getpid())  # whose they are: rank 0 may end while they begin
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
        """Rank 0: call `lost`, from another thread, when a rank ends otherwise than well and this one does not."""

        def wait(rank: int, end: Callable[[], int]) -> None:
            why = self._why(rank, end())
            if why is None:
                return
            self._lost = self._lost or why
            self._someone_lost.set()
            threading.Event().wait(_MOMENT_SECONDS)  # it may be about to fail of the same, and knows better where
            lost(*self._lost)

        for rank, end in self._ends.items():
            threading.Thread(target=wait, args=(rank, end), name=f"rank {rank}", daemon=True).start()

    def why_lost(self, error: Exception) -> tuple[Status, str] | None:
        """Status and reason of the rank whose end made a collective fail with `error` here, if that is what it was."""
        told = str(error)
        if not self.pids or not any(words in told for words in _CONNECTION):
            return None
        self._someone_lost.wait(_MOMENT_SECONDS)
        return self._lost

    def dismiss(self) -> None:
        """Rank 0: end the others, if they have not ended, and remove what they left."""
        if not self.pids:
            return
        for pid in self.pids:
            end_alone(pid)
        self.sweep()

    def sweep(self) -> None:
        """Remove what ranks leave in the cell's folder while it runs."""
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
        """Take this rank's accelerator and wait until every rank is there.

        The ranks find each other through a file in the cell's folder: no port that something else might take.

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
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a container's host name may lead nowhere
        else:
            module: Any = getattr(torch, kind)
            if module.device_count() < self.size:
                raise UserError(
                    f"hardware.processes={self.size}: {module.device_count()} {kind} devices are visible here, and "
                    "each process wants its own; lower hardware.processes or make more of them visible"
                )
            module.set_device(self.rank)
            # tensors on the host, too: what ranks tell each other of a step
            backend = f"cpu:gloo,{kind}:{distributed.get_default_backend_for_device(kind)}"
        numbers = {"RANK": self.rank, "LOCAL_RANK": self.rank, "WORLD_SIZE": self.size, "LOCAL_WORLD_SIZE": self.size}
        os.environ.update({name: str(number) for name, number in numbers.items()})  # accelerate reads them
        store = distributed.FileStore(str(self._store), self.size)
        distributed.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=_PATIENCE)

    def place(self, kind: str) -> str:
        """The device that this rank's weights go to, as torch names it."""
        return kind if self.size == 1 or kind == "cpu" else f"{kind}:{self.rank}"

    def cores(self, cores: Sequence[int]) -> Sequence[int]:
        """This rank's part of a seat's cores; none where the seat names none."""
        return share_of(cores, self.size, number=self.rank) if cores and self.size > 1 else cores

    def share(self, rows: Sequence[Item]) -> list[Item]:
        """This rank's part of a pass's rows: every `size`-th, so that rows in order of length are shared evenly.

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
        """The numbers that each rank gives, in the ranks' order; every rank must ask at the same point."""
        if self.size == 1:
            return [numbers]
        import torch
        from torch import distributed

        mine = torch.tensor(numbers, dtype=torch.float64)
        results = [torch.empty_like(mine) for _ in range(self.size)]
        distributed.all_gather(results, mine)
        return [tuple(item.tolist()) for item in results]

    def check_alike(self, what: str, numbers: Sequence[float]) -> None:
        """Refuse numbers that must be the same on every rank and are not.

        Raises:
            RankLost: naming them.
        """
        if any(number != numbers[0] and number == number for number in numbers):  # NaN is the same on all, or told
            told = ", ".join(f"{number:.9g}" for number in numbers)
            raise RankLost(f"{what} differs between the ranks ({told}); they no longer train one model")

    @contextlib.contextmanager
    def own_draws(self, kind: str, *, seed: int, step: int) -> Iterator[None]:
        """Inside, random numbers are this rank's own (dropout, noise); outside, every rank draws the same ones.

        Of the seed and the step alone, so that a checkpoint need not hold every rank's generator.
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

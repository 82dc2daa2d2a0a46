"""Launches that are told to end at a moment drawn at random: `python interrupted_launches.py COUNT SEED FOLDER`.

Each is the command line as it is, in a fork of this process, with a short program in place of the measured run. The
first is left alone, to learn how long one takes; the others are struck somewhere within that time, from the moment on
at which the command listens. Writes one JSON object per launch: signal, seconds from signal to end, exit code, what was
printed, and whether a worker was left.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

# unused here: what a launch imports, so that the forks begin with it
import matplotlib.pyplot  # noqa: F401
from hydra.core.plugins import Plugins

import left_bench.report.plots  # noqa: F401
from left_bench.cli.main import main as command
from left_bench.core import interrupt
from left_bench.launch import launching, run_cell
from left_bench.launch.supervise import run_isolated

AT_ONCE = 2
QUICK = ["model=tiny_llama", "precision=fp32", "hardware=cpu", "tracker=none", "data.train_rows=8", "training.steps=1"]
WORKER = """
import ctypes, json, os, pathlib, signal, sys, time
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
folder = pathlib.Path(sys.argv[1])
(folder / "pid").write_text(str(os.getpid()))
cell = json.loads((folder / "cell.json").read_text())
time.sleep(0.05)
record = {"schema_version": 1, "cell_id": folder.name, "status": "ok", "started_at": "", "finished_at": "",
          "choices": cell["choices"], "config": {"seed": cell["seed"]}}
(folder / ".outcome").write_text(json.dumps(record))
os.replace(folder / ".outcome", folder / "outcome.json")
"""


Plugins.instance()  # imports them all


class Launch:
    """A launch in a fork and process group of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        listening, self._listens = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            self._run()
        os.close(self._listens)
        self.began = time.monotonic()
        if os.read(listening, 1):
            self.began = time.monotonic()
        os.close(listening)
        self.struck_at: float | None = None

    def _run(self) -> None:
        code = 99
        try:
            os.setpgid(0, 0)
            os.chdir(self.folder)
            for stream, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), stream)
            run_cell._fetch_model = lambda cell: None
            launching.say_estimate = lambda planned, runs_dir, **_: (
                None
            )  # what it imports first is not what is tried here
            run_cell.run_isolated = partial(run_isolated, command=[sys.executable, "-I", "-S", "-c", WORKER])
            noted = interrupt.noted

            @contextlib.contextmanager
            def noted_and_said() -> Iterator[None]:
                with noted():
                    os.write(self._listens, b"!")
                    yield

            interrupt.noted = noted_and_said
            code = command(["-m", *QUICK, "seed=0,1,2"])
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 98
        except BaseException as error:
            print(f"Traceback: {error!r}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def strike(self, number: int) -> None:
        self.struck_at = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def ended(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def told(self, **more: Any) -> dict[str, Any]:
        workers = [int(path.read_text() or 0) for path in self.folder.glob("runs/*/pid")]
        return more | {
            "out": (self.folder / "out").read_text(),
            "err": (self.folder / "err").read_text(),
            "workers_left": sum(alive(pid) for pid in workers),
            "records": len(list(self.folder.glob("runs/*/record.json"))),
            "half_written": [path.name for path in self.folder.glob("runs/*/.*.*")],
        }


def alive(pid: int) -> bool:
    """Whether that process is there and no zombie; waits a moment, for the kernel ends a worker after its launch."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return False
        except OSError:
            return False
        time.sleep(0.02)
    return True


def main(count: int, seed: int, folder: Path) -> None:
    draw = random.Random(seed)
    untouched = Launch(folder / "untouched")
    while (code := untouched.ended()) is None:
        time.sleep(0.01)
    whole = time.monotonic() - untouched.began
    print(json.dumps(untouched.told(code=code, seconds=whole)), flush=True)
    moments = [whole * (i + draw.random()) / count for i in range(count)]
    waiting = [(moment, draw.choice([signal.SIGINT, signal.SIGINT, signal.SIGTERM])) for moment in moments]
    running: list[tuple[Launch, float, int]] = []
    number = 0
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            running.append((Launch(folder / str(number)), *waiting.pop()))
            number += 1
        for item in list(running):
            begun, moment, asked = item
            now = time.monotonic()
            if begun.struck_at is None and now - begun.began >= moment:
                begun.strike(asked)
            if begun.struck_at is not None and now - begun.struck_at > 60:
                os.killpg(begun.pid, signal.SIGKILL)
            code = begun.ended()
            if code is not None:
                running.remove(item)
                since = None if begun.struck_at is None else time.monotonic() - begun.struck_at
                print(json.dumps(begun.told(code=code, signal=asked, moment=moment, seconds=since)), flush=True)
        time.sleep(0.002)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

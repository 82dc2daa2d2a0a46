"""A soak: many launches over one runs folder, launches and workers killed at random, and nothing lost, doubled or torn.

    python benchmarks/soak.py [--cells 200] [--launches 20] [--kills 150] [--seed 0] [--out reports/soak.md]
    python benchmarks/soak.py --break claims|writes|records     a promise broken on purpose: the soak has to notice

Everything is the package's own (claims, isolation, records) but for the measured run: a small program in its place
writes an outcome within a tenth of a second, watches for a second one of the same cell, and notes that it ran.
Signals are real ones. The last launch is left alone, as a person would start the command again.

A soak that counts nothing may be blind. `--break` takes one promise away in the soak's own launches (the claim of a
cell, the whole writing of a record, its being written at all); the package has no such switch.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from left_bench.core import interrupt
from left_bench.grid.compose import Settings
from left_bench.launch import run_cell as run
from left_bench.launch.cell_lock import until_done
from left_bench.launch.supervise import run_isolated
from left_bench.spec import record as records
from left_bench.spec.cell import GROUPS, Cell
from left_bench.spec.record import RECORD_NAME, read_record

JOURNAL = "journal"
STEP_SECONDS = 0.02
BROKEN = ("claims", "writes", "records")
WORKER = """
import ctypes, fcntl, json, os, pathlib, signal, sys, time
launcher = int(os.environ["LEFT_BENCH_LAUNCHER_PID"])
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != launcher:
    os._exit(1)
step_seconds, folder = float(sys.argv[1]), pathlib.Path(sys.argv[2])
def note(what):
    handle = os.open(folder.parent / "journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, f"{what} {folder.name} {os.getpid()}\\\\n".encode())
running = open(folder / ".running", "w")
try:
    fcntl.flock(running, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    note("twice_at_once")
if any('"status": "ok"' in path.read_text() for path in folder.glob("record*.json")):
    note("after_its_record")
note("start")
cell = json.loads((folder / "cell.json").read_text())
with open(folder / "events.jsonl", "a") as events:
    for step in range(1, 4):
        events.write(json.dumps({"event": "step", "time": 0, "step": step, "loss": 1 / step, "seconds": 0.01,
                                 "tokens": 8, "answer_tokens": 2, "rows": 1, "tokens_per_second": 800}) + "\\\\n")
        events.flush()
        time.sleep(step_seconds)
record = {"schema_version": 1, "cell_id": folder.name, "status": "ok", "started_at": "", "finished_at": "",
          "choices": cell["choices"], "config": {"seed": cell["seed"]}, "metrics": {"eval_loss": float(cell["seed"])}}
(folder / ".outcome").write_text(json.dumps(record))
os.replace(folder / ".outcome", folder / "outcome.json")
note("end")
""".replace("\\\\n", "\\n")


@dataclass
class Figures:
    """What a soak counted."""

    cells: int
    launches: int = 0
    launches_killed: int = 0
    workers_killed: int = 0
    attempts: int = 0
    reads: int = 0
    lost: int = 0
    """Cells without an `ok` record at the end."""
    doubled: int = 0
    """Runs of a cell beside another of the same cell, or when it had its record."""
    torn: int = 0
    """Records that could not be read whole, at any time."""
    left_running: int = 0
    """Workers that outlived their launch."""
    seconds: float = 0
    by_signal: dict[str, int] = field(default_factory=dict)

    @property
    def kills(self) -> int:
        return self.launches_killed + self.workers_killed


def main(argv: list[str] | None = None) -> int:
    """Run a soak and write its page; 1 when anything was lost, doubled or torn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=200)
    parser.add_argument("--launches", type=int, default=20)
    parser.add_argument("--kills", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--break", choices=BROKEN, dest="broken", help="take a promise away, to see that it is noticed")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        figures = soak(
            Path(folder),
            cells=options.cells,
            launches=options.launches,
            kills=options.kills,
            seed=options.seed,
            broken=options.broken,
        )
    text = page(figures, options)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    print(text)
    return int(bool(figures.lost or figures.doubled or figures.torn or figures.left_running))


def soak(folder: Path, *, cells: int, launches: int, kills: int, seed: int = 0, broken: str | None = None) -> Figures:
    """Run `cells` cells by `launches` launches at once; `kills` signals go to launches and workers drawn at random."""
    draw = random.Random(seed)
    figures = Figures(cells=cells)
    wanted = [tiny_cell(number) for number in range(cells)]
    runs = folder / "runs"
    runs.mkdir()
    start = time.monotonic()
    alive: set[int] = set()
    while True:
        for pid in [pid for pid in alive if os.waitpid(pid, os.WNOHANG)[0]]:
            alive.discard(pid)
        if figures.launches and figures.kills >= kills:
            break
        while len(alive) < launches:  # whoever was killed, or is done, starts the same command again
            alive.add(start_launch(wanted, runs, broken=broken))
            figures.launches += 1
            if broken == "claims":  # two that begin a cell in the same millisecond stop at each other's files instead
                time.sleep(5 * STEP_SECONDS)
        time.sleep(draw.uniform(0.0, 0.04))
        for _ in range(min(draw.randint(1, 8), kills - figures.kills)):  # several at once as well
            strike(draw, alive, runs, figures)
        look(draw.sample(wanted, min(10, cells)), runs, figures)
        if all((runs / cell.id / RECORD_NAME).exists() for cell in wanted):
            break
    while alive:
        look(draw.sample(wanted, min(10, cells)), runs, figures)
        for pid in [pid for pid in alive if os.waitpid(pid, os.WNOHANG)[0]]:
            alive.discard(pid)
        time.sleep(0.02)
    last = start_launch(wanted, runs, broken=broken)
    os.waitpid(last, 0)
    figures.launches += 1
    look(wanted, runs, figures)
    figures.seconds = time.monotonic() - start
    count(wanted, runs, figures)
    return figures


def count(cells: list[Cell], runs: Path, figures: Figures) -> None:
    """What the journal and the records say when all is over."""
    journal = [line.split() for line in (runs / JOURNAL).read_text().splitlines()]
    figures.doubled = sum(what in ("twice_at_once", "after_its_record") for what, *_ in journal)
    figures.attempts = sum(what == "start" for what, *_ in journal)
    figures.left_running = sum(is_worker(int(pid)) for what, _, pid in journal if what == "start")
    for cell in cells:
        try:
            record = read_record(runs / cell.id / RECORD_NAME)
        except ValueError:
            figures.lost += 1
            continue
        figures.lost += record.status != "ok" or record.metrics["eval_loss"] != cell.seed


def start_launch(cells: list[Cell], runs: Path, *, broken: str | None = None) -> int:
    """A launch in a process of its own, as `left-bench` runs a sweep; its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        if broken is not None:
            break_promise(broken)
        # with claims broken, long enough to meet another launch's run of the same cell
        command = [sys.executable, "-I", "-S", "-c", WORKER, str(STEP_SECONDS * (5 if broken == "claims" else 1))]
        run.run_isolated = partial(run_isolated, command=command)
        run._fetch_model = lambda cell: None
        settings = Settings(
            runs_dir=runs,
            reports_dir=runs,
            force=False,
            force_unsupported=True,
            tracker={},
        )
        with interrupt.noted():
            recorded, _ = run.note_records([cell.id for cell in cells], runs, keep=())
            attempts = [
                partial(run.run_cell, cell, settings, overrides=[], command="", recorded_before=recorded[cell.id])
                for cell in cells
            ]
            until_done([attempt for attempt in attempts if attempt() is None])
        code = 0
    finally:
        os._exit(code)


def break_promise(which: str) -> None:
    """Take away, in this process, what keeps a cell from being doubled, torn or lost."""

    @contextlib.contextmanager
    def claimed_by_all(run_dir: Path) -> Iterator[bool]:
        run_dir.mkdir(parents=True, exist_ok=True)
        yield True

    def write_piecemeal(path: Path, text: str) -> Path:
        with path.open("w", encoding="utf-8") as file:
            file.write(text[: len(text) // 2])
            file.flush()
            time.sleep(0.2)
            file.write(text[len(text) // 2 :])
        return path

    def write_some(path: Path, text: str) -> Path:
        return path if json.loads(text)["config"]["seed"] % 3 == 0 else records_write(path, text)

    records_write = records.write_atomically
    if which == "claims":
        run.claim = claimed_by_all
    else:
        records.write_atomically = write_piecemeal if which == "writes" else write_some


def strike(draw: random.Random, alive: set[int], runs: Path, figures: Figures) -> None:
    """One signal, to a launch or to a worker."""
    number = draw.choices([signal.SIGKILL, signal.SIGTERM, signal.SIGINT], weights=[6, 2, 1])[0]
    if draw.random() < 0.5 or not (runs / JOURNAL).exists():
        living = [pid for pid in sorted(alive) if command_of(pid)]  # one that is dead already is not killed again
        if not living:
            return
        target = draw.choice(living)
        figures.launches_killed += 1
    else:
        recent = [line.split() for line in (runs / JOURNAL).read_text().splitlines()[-40:]]
        ended = {pid for what, _, pid in recent if what == "end"}
        running = [int(pid) for what, _, pid in recent if what == "start" and pid not in ended and is_worker(int(pid))]
        if not running:
            return
        target, number = draw.choice(running), signal.SIGKILL
        figures.workers_killed += 1
    os.kill(target, number)
    name = signal.Signals(number).name
    figures.by_signal[name] = figures.by_signal.get(name, 0) + 1


def look(cells: list[Cell], runs: Path, figures: Figures) -> None:
    """Read those cells' records, as a report might at any time."""
    for cell in cells:
        path = runs / cell.id / RECORD_NAME
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        figures.reads += 1
        try:
            json.loads(text)
        except ValueError:
            figures.torn += 1


def is_worker(pid: int) -> bool:
    """Whether that process is alive and one of the soak's workers."""
    return b"after_its_record" in command_of(pid)


def command_of(pid: int) -> bytes:
    """A living process's command line; nothing for one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def tiny_cell(seed: int) -> Cell:
    """A cell; nothing of it is ever loaded."""
    sections = {
        "model": {"name": "tiny", "name_or_path": "tiny", "weights": "random", "config": {"model_type": "llama"}},
        "quantization": {"name": "none"},
        "peft": {"name": "lora", "_target_": "peft.LoraConfig", "learning_rate": 1e-3},
        "precision": {"name": "fp32", "weights_dtype": "float32", "compute_dtype": "float32"},
        "optimizer": {"name": "adamw", "_target_": "torch.optim.AdamW"},
        "training": {"name": "default", "steps": 3, "batch_size": 1},
        "data": {"name": "sums", "source": "reasoning_gym", "task": "chain_sum"},
        "eval": {"name": "default"},
        "hardware": {"name": "cpu", "device": "cpu"},
    }
    return Cell.from_config(
        sections | {"seed": seed}, choices={group: str(sections[group]["name"]) for group in GROUPS}
    )


def page(figures: Figures, options: argparse.Namespace) -> str:
    """The figures as Markdown."""
    signals = ", ".join(f"{name} {count}" for name, count in sorted(figures.by_signal.items()))
    rows = [
        ("cells", figures.cells),
        ("launches at once", options.launches),
        ("launches started in all", figures.launches),
        ("kills", figures.kills),
        ("… of launches", figures.launches_killed),
        ("… of workers", figures.workers_killed),
        ("signals", signals),
        ("attempts begun", figures.attempts),
        ("records read meanwhile", figures.reads),
        ("cells lost", figures.lost),
        ("cells doubled", figures.doubled),
        ("records torn", figures.torn),
        ("workers that outlived their launch", figures.left_running),
        ("seconds", f"{figures.seconds:.1f}"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    today = datetime.datetime.now(datetime.timezone.utc).date()
    return f"""# Soak

Many launches share one runs folder while launches and workers are killed at random. Everything is left_bench's own but
the measured run, for which a small program stands in that writes an outcome within a tenth of a second and notes what
it sees. "Doubled" counts a cell that ran twice at once, or again when it had its record; "lost" a cell without an `ok`
record after the last launch, which nothing disturbed. Workers are sent SIGKILL alone, launches any of the three.

| | |
| --- | --- |
{table}

Made on {today} by `python benchmarks/soak.py --cells {options.cells} --launches {options.launches} --kills \
{options.kills} --seed {options.seed}` on {os.cpu_count()} cores ({platform.system()} {platform.machine()}, Python
{platform.python_version()}).
"""


if __name__ == "__main__":
    sys.exit(main())

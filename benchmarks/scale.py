"""The harness without its load: sweeps of 100, 1,000 and 10,000 cells whose worker writes an outcome at once.

    python benchmarks/scale.py [--cells 100 1000 10000] [--out reports/benchmarks]

Each size runs in a process of its own, first through a new runs folder, then again over the finished one (resume),
then through `left-bench report` alone. Measured in that process: wall seconds of each phase, and the highest resident
set at the phase's end. Writes `scale.json` and the Markdown section `scale.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES = (100, 1_000, 10_000)
# options and values in one grid: 10 x 5 x 2 compositions of options, and seeds
METHODS = ("lora", "dora", "ia3", "vera", "loha", "lokr", "oft", "boft", "ln_tuning", "rslora")
QUANTIZATIONS = ("none", "nf4", "nf4_dq", "nf5", "int5")
PRECISIONS = ("fp32", "bf16")
PHASES = ("compose", "launch", "finish", "resume", "report")


def overrides(cells: int, folder: Path) -> list[str]:
    """A grid of so many cells."""
    per_seed = len(METHODS) * len(QUANTIZATIONS) * len(PRECISIONS)
    seeds, left = divmod(cells, per_seed)
    assert left == 0, f"a multiple of {per_seed}"
    return [
        *("-m", "model=tiny_llama", "hardware=cpu", "tracker=none", f"runs_dir={folder}/runs"),
        f"reports_dir={folder}/reports",
        *(f"peft={','.join(METHODS)}", f"quantization={','.join(QUANTIZATIONS)}", f"precision={','.join(PRECISIONS)}"),
        f"seed={','.join(map(str, range(seeds)))}",
    ]


def run(cells: int, folder: Path) -> dict[str, Any]:
    """One size, in this process."""
    from left_bench.cli.main import main
    from left_bench.launch import run_cell as one_cell
    from left_bench.launch.launching import Launch
    from left_bench.report import main as report
    from left_bench.spec.record import Record

    def stand_in(cell: Any, run_dir: Path, *, on_event: Any) -> Record:
        """A worker that is done at once, with the numbers that a report needs."""
        run_dir.mkdir(parents=True, exist_ok=True)
        number = cell.seed + 1
        return Record(
            cell_id=cell.id,
            status="ok",
            started_at="2026-01-01T00:00:00+00:00",
            finished_at="2026-01-01T00:00:01+00:00",
            choices=cell.choices,
            config=cell.sections(),
            metrics={
                "train_tokens_per_second": 1000.0 + number,
                "peak_memory_bytes": 50e6 + number,
                "trainable_params": 32768,
                "wall_seconds": 1.0,
            },
            environment={"machine": {"id": "fake", "device": "cpu"}, "effective": {}, "versions": {}},
        )

    clock: dict[str, float] = {}
    cpu: dict[str, float] = {}
    peaks: dict[str, int] = {}
    marks: dict[str, float] = {}

    def done(phase: str, since: float) -> float:
        now = time.perf_counter()
        clock[phase], peaks[phase] = now - since, _peak_bytes()
        cpu[phase] = time.process_time() - marks["cpu"]
        marks["cpu"] = time.process_time()
        return now

    opened, closed = Launch._open_manifest, Launch._close_manifest

    def open_manifest(self: Launch, config: Any) -> None:
        opened(self, config)
        marks["composed"] = done("compose", marks["start"])

    def close_manifest(self: Launch) -> None:
        marks["launched"] = done("launch", marks["composed"])
        closed(self)

    Launch._open_manifest, Launch._close_manifest = open_manifest, close_manifest  # type: ignore[method-assign]
    one_cell.run_isolated = stand_in
    one_cell._fetch_model = lambda cell: None
    arguments = overrides(cells, folder)
    with _quiet(folder / "out.log"):
        marks |= {"start": time.perf_counter(), "cpu": time.process_time()}
        _code(main, arguments)
        done("finish", marks["launched"])
        records = len(list((folder / "runs").glob("*/record.json")))
        first, first_cpu, first_peaks = dict(clock), dict(cpu), dict(peaks)
        again, cpu_again = time.perf_counter(), time.process_time()
        marks |= {"start": again, "cpu": cpu_again}
        _code(main, arguments)
        done("resume", again)
        cpu["resume"] = time.process_time() - cpu_again
        clock, cpu, peaks = clock | first, cpu | first_cpu, peaks | first_peaks
        start = time.perf_counter()
        report([str(folder / "runs"), "--out", str(folder / "reports")])
        done("report", start)
    assert records == cells, f"{records} records of {cells} cells"
    return {"cells": cells, "seconds": clock, "cpu_seconds": cpu, "peak_bytes": peaks}


def _code(main: Any, arguments: list[str]) -> None:
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    try:
        code = main(arguments)
    except SystemExit as leaving:
        code = leaving.code
    assert not code, f"exit code {code}"


class _quiet:
    """Standard output to a file: ten thousand lines on a terminal would be what is measured."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        sys.stdout.flush()
        self._kept = os.dup(1)
        with self._path.open("w") as file:
            os.dup2(file.fileno(), 1)

    def __exit__(self, *_: object) -> None:
        sys.stdout.flush()
        os.dup2(self._kept, 1)
        os.close(self._kept)


def _peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this needs Linux")


def section(rows: list[dict[str, Any]]) -> str:
    """The Markdown section `Scale` of reports/benchmarks.md."""
    heads = [f"{row['cells']:,}" for row in rows]
    lines = [
        "## Scale",
        "",
        "The harness alone: a sweep whose cells have a stand-in for the measured run, which answers at once "
        f"({len(METHODS)} methods x {len(QUANTIZATIONS)} quantizations x {len(PRECISIONS)} precisions x seeds; "
        "`python benchmarks/scale.py`). "
        "CPU milliseconds of the launching process per cell, and its highest resident memory at the end of each phase; "
        "growth is the ratio of milliseconds per cell, largest size to smallest: 1 is linear, the ratio of the sizes "
        f"({rows[-1]['cells'] // rows[0]['cells']}) would be quadratic.",
        "",
        f"| phase | {' | '.join(f'{head} cells, ms each' for head in heads)} | growth | "
        f"{' | '.join(f'{head} cells, MiB' for head in heads)} |",
        f"| --- |{' ---: |' * (2 * len(rows) + 1)}",
    ]
    for phase in PHASES:
        each = [1000 * row["cpu_seconds"][phase] / row["cells"] for row in rows]
        peaks = [row["peak_bytes"][phase] / 2**20 for row in rows]
        lines.append(
            f"| {phase} | {' | '.join(f'{item:.2f}' for item in each)} | {each[-1] / each[0]:.2f} | "
            f"{' | '.join(f'{peak:,.0f}' for peak in peaks)} |"
        )
    lines += [
        "",
        "compose: every cell composed and checked before the first starts. launch: carried by Hydra's launcher, run, "
        "recorded. finish: summary, report, manifest. resume: the whole command again over finished "
        "cells. report: `left-bench report` alone.",
        "",
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cells", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--out", type=Path, default=Path("reports/benchmarks"))
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        with tempfile.TemporaryDirectory() as folder:
            result = run(options.one, Path(folder))
        print(json.dumps(result))
        return 0
    rows = []
    for cells in options.cells:
        command = [sys.executable, __file__, "--one", str(cells)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "scale.json").write_text(json.dumps(rows, indent=1) + "\n")
    (options.out / "scale.md").write_text(section(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

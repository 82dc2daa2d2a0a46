"""What left_bench itself costs around the measured runs: `python benchmarks/overhead.py [--out reports/benchmarks]`.

Times the command's answer to `--help`; what a cell costs beside loading, training and evaluating, once a sweep's first
cell is done; going over a finished grid of 100 cells again; a report and a page over 10,000 records. The models are
two-layer ones with random weights, that need no download; a further cell's cost is taken with the default model as
well.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TINY = [
    *("model=tiny_llama", "precision=fp32", "hardware=cpu", "tracker=none", "training.steps=2", "eval.generate=false"),
    *("data.train_rows=16", "data.test_rows=4", "eval.forgetting=false"),
]
DEFAULT_MODEL = [
    *("precision=bf16", "hardware=cpu", "tracker=none", "training.steps=2", "training.batching=packed"),
    *("data.train_rows=16", "data.test_rows=4", "eval.generate=false", "eval.forgetting=false"),
]
GRID = {  # 100 cells, 50 combinations of options: composing those is most of what going over them costs
    "quantization": ["none", "int8", "nf4", "nf4_dq", "nf5"],
    "peft": ["lora", "dora", "ia3", "vera", "rslora", "adalora", "bitfit", "houlsby", "prompt_tuning", "prefix_tuning"],
    "seed": ["0", "1"],
}
MEASURED = {"load", "train", "evaluate"}


def run(arguments: list[str], folder: Path) -> float:
    """Seconds of one command."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "left_bench", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise SystemExit(f"left-bench {' '.join(arguments)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return seconds


def help_seconds(folder: Path) -> float:
    return statistics.median(run(["--help"], folder) for _ in range(7))


def cell_overhead(folder: Path, cells: int, options: list[str]) -> tuple[float, float, dict[str, float]]:
    """Seconds per cell beside load, train and evaluate: (the first cell's, the mean of all later ones', its phases).

    The first cell's is the whole launch less its measured phases; a later one's is what the launch takes longer for it.
    Of the later ones' the phases that are not among the three are told apart, the mean over all cells.
    """
    walls, measured = {}, {}
    phases: dict[str, float] = {}
    for count in (1, cells):
        runs = folder / f"runs{count}"
        seeds = ",".join(map(str, range(count)))
        walls[count] = run(["-m", *options, f"seed={seeds}", f"runs_dir={runs}"], folder)
        records = [json.loads(path.read_text()) for path in runs.glob("*/record.json")]
        assert len(records) == count
        measured[count] = sum(p["seconds"] for r in records for p in r["phases"] if p["name"] in MEASURED)
        phases = {}
        for phase in (p for r in records for p in r["phases"] if p["name"] not in MEASURED):
            phases[phase["name"]] = phases.get(phase["name"], 0.0) + phase["seconds"] / count
        shutil.rmtree(runs)
    first = walls[1] - measured[1]
    return first, (walls[cells] - measured[cells] - first) / (cells - 1), phases


def import_seconds(folder: Path) -> float:
    """What every launch pays once: the libraries, imported by the server that cells are forked from."""
    command = [sys.executable, "-c", "import left_bench.worker.preload"]
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def resume_seconds(folder: Path) -> float:
    """Going over a grid of 100 cells that are all done; their records are one real run's, under the ids of the grid."""
    runs = folder / "resume"
    run([*TINY, "seed=0", f"runs_dir={runs}"], folder)
    record = json.loads(next(runs.glob("*/record.json")).read_text())
    for cell in _cells(runs):
        (runs / cell.id).mkdir(exist_ok=True)
        copy = record | {"cell_id": cell.id, "choices": cell.choices, "config": cell.sections()}
        (runs / cell.id / "record.json").write_text(json.dumps(copy))
    axes = [f"{key}={','.join(values)}" for key, values in GRID.items()]
    seconds = run(["-m", *TINY, *axes, f"runs_dir={runs}"], folder)
    begun = len(list(runs.glob("*/events.jsonl")))
    assert begun == 1, f"{begun - 1} cells were run again"
    return seconds


def _cells(runs: Path) -> list[Any]:
    import hydra

    from left_bench.core.paths import config_root
    from left_bench.grid.command_line import open_section, register_resolvers, register_sweeps
    from left_bench.grid.compose import compose

    register_resolvers()
    register_sweeps()
    cells = []
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(config_root() / "conf")):
        for values in itertools.product(*GRID.values()):
            job = [f"{key}={value}" for key, value in zip(GRID, values, strict=True)]
            overrides = [open_section(item) for item in (*TINY, *job, f"runs_dir={runs}")]
            config = hydra.compose("config", overrides=overrides, return_hydra_config=True)
            cells.append(compose(config, config.hydra)[0])
    return cells


def write_many(folder: Path, records: int) -> Path:
    """A runs folder of so many records: one real run's under other seeds, methods and figures."""
    runs = folder / "many"
    run([*TINY, "seed=0", f"runs_dir={runs}"], folder)
    path = next(runs.glob("*/record.json"))
    record = json.loads(path.read_text())
    for index in range(records):
        cell_id = f"tiny-{index:06d}"
        choices = record["choices"] | {"peft": f"method_{index % 50}", "quantization": f"kind_{index % 8}"}
        metrics = {name: value * (1 + (index * 7919 % 1000) / 5000) for name, value in record["metrics"].items()}
        config = record["config"] | {"seed": index // 400}
        (runs / cell_id).mkdir()
        copy = record | {"cell_id": cell_id, "choices": choices, "metrics": metrics, "config": config}
        (runs / cell_id / "record.json").write_text(json.dumps(copy))
    return runs


def report_cost(runs: Path, name: str) -> tuple[float, float, float]:
    """Seconds, peak MiB and the file's MiB of a report in one format."""
    out = runs.parent / f"out_{name}"
    start = time.perf_counter()
    command = [sys.executable, "-m", "left_bench", "report", str(runs), "--out", str(out), "--format", name]
    child = subprocess.Popen(command, cwd=runs.parent, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)  # this child's own peak, not that of the largest child so far
    child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if child.returncode != 0:
        raise SystemExit(f"left-bench report: exit code {child.returncode}")
    return seconds, used.ru_maxrss / 1024, (out / f"cells.{name}").stat().st_size / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=8, help="of the sweep that per-cell overhead is taken from")
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--out", type=Path, help="write overhead.json and overhead.md into this folder")
    arguments = parser.parse_args()
    os.environ.setdefault("WANDB_MODE", "offline")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures: dict[str, float] = {"help_seconds": help_seconds(folder)}
        first, later, _ = cell_overhead(folder, arguments.cells, TINY)
        figures |= {"first_cell_overhead_seconds": first, "cell_overhead_seconds": later}
        figures["import_seconds"] = import_seconds(folder)
        run([*DEFAULT_MODEL, f"runs_dir={folder / 'made'}"], folder)  # its files are made, or fetched, but once
        _, later, phases = cell_overhead(folder, arguments.cells, DEFAULT_MODEL)
        figures["default_model_cell_overhead_seconds"] = later
        figures |= {f"default_model_{phase}_seconds": seconds for phase, seconds in phases.items()}
        figures["resume_100_cells_seconds"] = resume_seconds(folder)
        runs = write_many(folder, arguments.records)
        for what, name in (("report", "md"), ("page", "html")):
            keys = (f"{what}_seconds", f"{what}_peak_mib", f"{what}_mib")
            figures |= dict(zip(keys, report_cost(runs, name), strict=True))
    text = markdown(figures, arguments)
    print(text)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "overhead.json").write_text(json.dumps(figures, indent=1) + "\n")
        (arguments.out / "overhead.md").write_text(text)


def default_model(figures: dict[str, float]) -> str:
    """The whole and where it goes, largest first."""
    named = {
        key.removeprefix("default_model_").removesuffix("_seconds").replace("_", " "): seconds
        for key, seconds in figures.items()
        if key.startswith("default_model_")
    }
    whole = named.pop("cell overhead")
    named["outside the phases"] = whole - sum(named.values())
    parts = sorted(named.items(), key=lambda part: -part[1])
    return f"{whole:.2f} s: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in parts if seconds >= 0.005)


def markdown(figures: dict[str, float], arguments: argparse.Namespace) -> str:
    from left_bench.measure.device import describe_machine, open_device
    from left_bench.report.markdown import table

    machine = describe_machine(open_device("cpu"))
    rows = [
        ["`left-bench --help`", f"{figures['help_seconds']:.2f} s"],
        [
            "the first cell of a launch, beside load, train and evaluate",
            f"{figures['first_cell_overhead_seconds']:.1f} s",
        ],
        ["of that, importing torch, transformers, peft and datasets", f"{figures['import_seconds']:.1f} s"],
        ["every further cell, beside load, train and evaluate", f"{figures['cell_overhead_seconds']:.2f} s"],
        ["the same with the default model", default_model(figures)],
        ["a finished grid of 100 cells launched again", f"{figures['resume_100_cells_seconds']:.1f} s"],
        *(
            [
                f"{told} over {arguments.records:,} records",
                f"{figures[f'{what}_seconds']:.1f} s, {figures[f'{what}_peak_mib']:.0f} MiB of memory, "
                f"a file of {figures[f'{what}_mib']:.1f} MiB",
            ]
            for what, told in (("report", "a Markdown report with plots"), ("page", "an HTML page"))
        ),
    ]
    return "\n".join(
        [
            "## Overhead",
            "",
            f"Two-layer models with random weights on {machine['cpu']}, {machine['cores']} cores. The grid is 5 "
            "quantizations × 10 methods × 2 seeds. `merge` is a measurement too: the adapter is folded into the "
            "weights and the logits of both are compared. Outside the phases: the process itself, tokenizer and rows, "
            "the passes over a few tokens that see what the output head does, count FLOPs and try packed rows.",
            "",
            table(["what", "cost"], rows),
            "",
        ]
    )


if __name__ == "__main__":
    main()

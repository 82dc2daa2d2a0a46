"""Shared by all tests: one cache of tiny models, cells composed as the command line composes them, rows to train on."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: threads cost more than they bring, and CI runs tests beside others

import functools
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import pytest

from left_bench.spec.cell import Cell

# setuptools' import hook for old pips trips over pytest-xdist's frames, which have no file
sys.meta_path = [finder for finder in sys.meta_path if type(finder).__name__ != "DistutilsMetaFinder"]

# a shell's background job ignores Ctrl-C and nohup's a hang-up, and so would every launch that a test interrupts
for number, default in {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}.items():
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, default)

# CI runs tests side by side: how long an example takes says nothing
hypothesis.settings.register_profile("left_bench", deadline=None)
hypothesis.settings.load_profile("left_bench")

TINY = [
    *("model=tiny_llama", "precision=fp32", "hardware=cpu", "hardware.threads=1", "hardware.timeout=120"),
    *("training.steps=2", "training.batch_size=4", "training.warmup_ratio=0", "tracker=none"),
    *("data.train_rows=8", "data.test_rows=4", "eval.forgetting=false", "eval.max_new_tokens=3"),
]


# Files of few tests that take long, for they start launches, services or installations: were they the last, one of them
# would keep a single processor busy and leave the others idle.
LONG = {
    *("test_launchers.py", "test_end_to_end.py", "test_soak.py", "test_slurm.py", "test_liger.py"),
    *("test_package.py", "test_page_browser.py", "test_tracker_online.py", "test_search.py"),
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process more than there are processors: a third of the tests' time is waiting for launches and services."""
    return len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)) + 1


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # pytest-xdist would begin with the files of most tests


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Beside each other, the long files come first, then those of most tests."""
    if hasattr(config, "workerinput"):
        tests = Counter(item.path for item in items)
        items.sort(key=lambda item: (item.path.name not in LONG, -tests[item.path], item.path))


class Answer(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache for the session; random weights are made in this process, which has torch in it already."""
    from left_bench import pretrained

    def in_this_process(order: dict[str, Any], folder: Path) -> None:
        from left_bench.pretrained.make import save_random

        save_random(order["config"], folder, dtype=order["dtype"], task=order["task"])

    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("LEFT_BENCH_CACHE")
    os.environ["LEFT_BENCH_CACHE"] = str(folder)
    fresh, pretrained.in_fresh_process = pretrained.in_fresh_process, in_this_process
    yield folder
    pretrained.in_fresh_process = fresh
    os.environ.pop("LEFT_BENCH_CACHE")
    if before is not None:
        os.environ["LEFT_BENCH_CACHE"] = before


@pytest.fixture(scope="session")
def composed() -> Callable[..., Any]:
    """`composed(*overrides)`: Hydra's whole configuration, `hydra` included, as `left-bench [-m] OVERRIDES` has it."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    from left_bench.core.paths import config_root
    from left_bench.grid.command_line import launch_name, open_section, register_resolvers, register_sweeps
    from left_bench.grid.read_once import reading_once

    opened: list[Any] = []

    def composed(*overrides: str) -> Any:
        # opened again only after a command has opened another: half of a composition's time is reading the same files
        if not opened or GlobalHydra.instance().hydra is not opened[0]:
            register_resolvers()
            register_sweeps()
            GlobalHydra.instance().clear()
            # stays open: a sweep's jobs are composed by the same loader
            folder = str(config_root() / "conf")
            hydra.initialize_config_dir(version_base="1.3", config_dir=folder, job_name="left_bench")
            opened[:] = [GlobalHydra.instance().hydra, reading_once(GlobalHydra.instance().config_loader())]
        multirun = "-m" in overrides or any(override.startswith("+sweep=") for override in overrides)
        overrides = tuple(override for override in overrides if override != "-m")
        named = [f"hydra.job.name={launch_name(list(overrides))}"] if multirun else []
        return opened[1].load_configuration(
            "config",
            [*(open_section(override) for override in overrides), *named],
            run_mode=RunMode.MULTIRUN if multirun else RunMode.RUN,
            from_shell=False,
        )

    return composed


@pytest.fixture(scope="session")
def compose_cell(composed: Callable[..., Any]) -> Callable[..., Cell]:
    """`compose_cell(*overrides)` is the cell of `left-bench OVERRIDES`, composed as a sweep's jobs are."""
    from hydra.core.global_hydra import GlobalHydra

    from left_bench.grid.command_line import open_section
    from left_bench.grid.compose import compose
    from left_bench.grid.job_composer import JobComposer

    config = composed("-m")
    jobs = JobComposer(GlobalHydra.instance().config_loader(), config)

    @functools.cache  # cells are frozen
    def compose_cell(*overrides: str) -> Cell:
        job = jobs.compose([open_section(override) for override in overrides])
        return compose(job, job.hydra)[0]

    return compose_cell


@pytest.fixture(scope="session")
def tiny_cell(compose_cell: Callable[..., Cell]) -> Callable[..., Cell]:
    """`tiny_cell(*overrides)`: two steps of a two-layer model in float32."""

    def tiny_cell(*overrides: str) -> Cell:
        named = {override.partition("=")[0] for override in overrides}
        return compose_cell(*(item for item in TINY if item.partition("=")[0] not in named), *overrides)

    return tiny_cell


@pytest.fixture(scope="session")
def load_tiny() -> Callable[[Cell], tuple[Any, Any]]:
    """`load_tiny(cell)`: a fresh base model and its tokenizer."""

    def load_tiny(cell: Cell) -> tuple[Any, Any]:
        from left_bench.model import load as models

        folder, tokenizer = models.open_pretrained(cell)
        return models.load_model(cell, folder=folder, device="cpu")[0], tokenizer

    return load_tiny


@pytest.fixture(scope="session")
def work_in_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Cell], dict[str, Any]]:
    """`work_in_process(cell)`: the worker's run without its process; what it found, or its exception."""

    def work_in_process(cell: Cell) -> dict[str, Any]:
        from left_bench.spec.events import EVENTS_NAME, EventWriter
        from left_bench.worker.run import work

        run_dir = tmp_path_factory.mktemp("run") / "cell"
        run_dir.mkdir()
        result: dict[str, Any] = {"provenance": {}}
        with pytest.MonkeyPatch.context() as patch:
            # half a second for each phase in a process of pytest's size; peaks are tested elsewhere
            patch.setattr("left_bench.measure.device._give_back_freed_memory", lambda: None)
            work(cell, run_dir=run_dir, draft=result, events=EventWriter(run_dir / EVENTS_NAME))
        return result | {"run_dir": run_dir}

    return work_in_process


@pytest.fixture(scope="session")
def finished(work_in_process: Callable[[Cell], dict[str, Any]]) -> Callable[[Cell], tuple[Path, dict[str, Any]]]:
    """`finished(cell)`: its run folder with a record, as a launch leaves it, and what was measured."""
    from left_bench.spec.record import Record, outcome_of
    from left_bench.spec.run_files import CELL_NAME

    def finished(cell: Cell) -> tuple[Path, dict[str, Any]]:
        measured = work_in_process(cell)
        run_dir = measured.pop("run_dir")
        (run_dir / CELL_NAME).write_text(cell.model_dump_json(by_alias=True), encoding="utf-8")
        known = {name: value for name, value in measured.items() if name in Record.model_fields}
        outcome_of(cell, "ok", None, started_at="2026-01-01T00:00:00+00:00", measured=known).write(run_dir)
        return run_dir, measured

    return finished


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Each kind of device whose kernels are ours to answer for; skipped where this machine has none."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return str(request.param)


@pytest.fixture
def left_bench(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """`left_bench(*arguments)`: the command in this process, with its exit code and what it printed."""
    from hydra.core.global_hydra import GlobalHydra

    from left_bench.cli.main import main

    monkeypatch.setattr(sys, "argv", ["left-bench"])
    monkeypatch.setattr(
        "left_bench.launch.launching.rehearse", lambda cells, **_: None
    )  # a process of its own, see test_rehearse.py
    monkeypatch.setattr(
        "left_bench.launch.launching.say_estimate", lambda planned, runs_dir, **_: None
    )  # see test_estimate.py

    def left_bench(*arguments: str) -> Answer:
        GlobalHydra.instance().clear()
        capsys.readouterr()
        try:
            code = main(list(arguments))
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
        finally:
            GlobalHydra.instance().clear()
        out, err = capsys.readouterr()
        return Answer(code, out, err)

    return left_bench


@pytest.fixture(scope="session")
def addition_rows() -> list[Any]:
    """Eight rows of unlike lengths for the byte-level tokenizer of the tiny models."""
    from left_bench.data import Example

    def ids(text: str) -> list[int]:
        return [2 + byte for byte in text.encode()]

    pairs = [(3, 4), (17, 5), (128, 1), (9, 90), (1, 1), (40, 2), (1000, 24), (6, 6)]
    return [
        Example(
            prompt_ids=ids(f"What is {a} + {b}?\n"),
            answer_ids=[*ids(str(a + b)), 1],
            prompt=f"What is {a} + {b}?",
            reference=str(a + b),
        )
        for a, b in pairs
    ]

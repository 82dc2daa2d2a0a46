"""One cell on two processes: the same losses as on one, and what happens when a rank does not come to the end."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from faulty import FAULT, IDLE_PARAMETER
from hypothesis import given
from hypothesis import strategies as st
from recorded.build import make_record

from left_bench.core.errors import UserError
from left_bench.data import load_data, split_passes, step_rows
from left_bench.grid.rules import why_unsupported
from left_bench.launch import supervise
from left_bench.launch.supervise import run_isolated
from left_bench.measure.cpu_contention import _own_seconds
from left_bench.processes import start_process as process
from left_bench.processes.ranks import ALONE, RankLost, Team
from left_bench.report.cells import row_of
from left_bench.report.confounders import confounders, touching
from left_bench.report.ranking import rankable
from left_bench.spec.cell import Cell
from left_bench.spec.events import EVENTS_NAME
from left_bench.spec.record import Record
from left_bench.training.loop import some_get_no_gradient

linux = pytest.mark.skipif(sys.platform != "linux", reason="workers and their ranks are forked on Linux")
STEPS = ["training.steps=3", "training.measure_after=0", "eval.generate=false", "data.train_rows=24"]
TWO = "hardware.processes=2"


@pytest.fixture(scope="module")
def unlike(tmp_path_factory) -> list[str]:
    """Three steps on rows whose answers have 1 to 24 tokens."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"prompt": f"Row {i}" + "?" * (i * 7 % 11), "answer": "7" * (1 + i * 5 % 23)} for i in range(28)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [*STEPS, "data=jsonl", f"data.path={path}"]


def run(cell: Cell, run_dir: Path) -> tuple[Record, list[dict[str, Any]]]:
    """The record of a cell in processes of its own, and its steps."""
    seen: list[dict[str, Any]] = []
    record = run_isolated(cell, run_dir, on_event=seen.append)
    return record, [event for event in seen if event["event"] == "step"]


def steps_in_process(found: dict[str, Any]) -> list[dict[str, Any]]:
    lines = (found["run_dir"] / EVENTS_NAME).read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "step"]


def held_out(run_dir: Path) -> list[float]:
    return [json.loads(line)["nll"] for line in (run_dir / "rows.jsonl").read_text().splitlines()]


# --- the same losses ---

CELLS = {
    "lora": ["peft=lora"],
    "full, accumulated": ["peft=full", "training.batch_size=4", "training.gradient_accumulation=2"],
    "full, packed, all logits": ["peft=full", "training.batching=packed", "training.output_head=all"],
    "lora, packed, accumulated": ["training.batching=packed", "training.gradient_accumulation=3"],
    "adalora, grouped": ["peft=adalora", "training.batching=grouped", "training.gradient_accumulation=2"],
    "over nf4, 8-bit states": ["peft=lora", "quantization=nf4", "optimizer=adamw_8bit"],
    "dpo after sft": ["peft=lora", "training=dpo", "training.sft_steps=2", "data.pairs=true"],
    "kto": ["peft=lora", "training=kto", "training.sft_steps=0", "data.pairs=true"],
    "orpo, accumulated": ["peft=lora", "training=orpo", "data.pairs=true", "training.gradient_accumulation=2"],
    "fsdp2, dpo after sft": [
        *("peft=lora", "training=dpo", "training.sft_steps=2", "data.pairs=true", "hardware.sharding=fsdp2"),
    ],
    "fsdp2, full, accumulated": ["peft=full", "training.gradient_accumulation=2", "hardware.sharding=fsdp2"],
    "fsdp2, lora, packed": ["peft=lora", "training.batching=packed", "hardware.sharding=fsdp2"],
}


@linux
@pytest.mark.parametrize("overrides", CELLS.values(), ids=CELLS)
def test_two_processes_lose_what_one_loses(overrides, unlike, tiny_cell, work_in_process, tmp_path):
    alone = work_in_process(tiny_cell(*unlike, *(one for one in overrides if "sharding" not in one)))
    record, steps = run(tiny_cell(*unlike, *overrides, TWO), tmp_path / "run")
    assert record.status == "ok", (record.reason, record.provenance["log_tail"])
    expected = steps_in_process(alone)
    assert len(steps) == len(expected) == 3
    for step, other in zip(steps, expected, strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=2e-6)
        assert step["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=2e-5)
        # of all ranks, exactly
        assert [step[key] for key in ("tokens", "answer_tokens", "rows", "pairs")] == [
            other[key] for key in ("tokens", "answer_tokens", "rows", "pairs")
        ]
    for name in ("train_tokens", "train_answer_tokens", "train_steps", "trainable_params", "adapter_file_bytes"):
        assert record.metrics[name] == alone["metrics"][name]
    seconds = sum(step["seconds"] for step in steps)
    assert record.metrics["train_tokens_per_second"] == pytest.approx(record.metrics["train_tokens"] / seconds)
    # what rank 0 evaluates is what all have trained
    assert held_out(tmp_path / "run") == pytest.approx(held_out(alone["run_dir"]), rel=1e-5)
    effective = record.environment["effective"]
    assert effective["processes"] == 2
    assert effective["threads"] == 2  # one was asked for, and none can have less than one
    assert effective.get("batching") == alone["environment"]["effective"].get("batching")
    # sharded twice, by two trainings, it holds more than a half
    if (
        "hardware.sharding=fsdp2" in overrides and "training=dpo" not in overrides
    ):  # a half of each, but for what does not divide
        parts = (record.memory_breakdown, alone["memory_breakdown"])
        for name in ("weights", "gradients", "optimizer"):
            assert parts[0][name] == pytest.approx(parts[1][name] / 2, rel=0.05), name
    peaks = effective["rank_peak_memory_bytes"]
    assert len(peaks) == 2
    assert record.metrics["peak_memory_bytes"] == max(peaks) > 0
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"cell.json", "events.jsonl", "worker.log", "rows.jsonl", "adapter"}


@linux
@pytest.mark.parametrize("sharding", [None, "fsdp2"])
def test_two_processes_have_the_validation_losses_of_one(sharding, tiny_cell, work_in_process, tmp_path):
    # five rows: one more than the ranks can share evenly
    asked = [*STEPS, "eval.every=1", "data.validation_rows=5"]
    sharded = [] if sharding is None else [f"hardware.sharding={sharding}"]
    record, _ = run(tiny_cell(*asked, TWO, *sharded), tmp_path / "run")
    assert record.status == "ok", record.provenance
    alone = work_in_process(tiny_cell(*asked))["curve"]
    assert [point.step for point in record.curve] == [point.step for point in alone] == [1, 2, 3]
    assert [point.tokens for point in record.curve] == [point.tokens for point in alone]
    losses = [point.validation_loss for point in alone]
    assert [point.validation_loss for point in record.curve] == pytest.approx(losses, rel=1e-5)


@linux
def test_ranks_stop_together_by_time_and_by_validation_loss(tiny_cell, tmp_path):
    asked = [*STEPS, "training.steps=100000", "data.validation_rows=5", TWO]
    timed, steps = run(tiny_cell(*asked, "training.max_seconds=0.5"), tmp_path / "timed")
    assert timed.status == "ok", timed.provenance
    assert timed.provenance["training_ended"]["by"] == "max_seconds"
    assert timed.curve[-1].step == len(steps) < 100000
    rising = ["peft=full", "training.learning_rate=0.05", "eval.every=1", "training.stop_patience=2"]
    stopped, steps = run(tiny_cell(*asked, "training.steps=50", *rising), tmp_path / "stopped")
    assert stopped.status == "ok", stopped.provenance
    ended = stopped.provenance["training_ended"]
    assert ended["by"] == "stop_patience" and ended["weights_of_step"] == len(steps) - 2
    assert not (tmp_path / "stopped" / "checkpoints").exists()


def test_the_ranks_of_these_cells_have_unlike_answers(unlike, tiny_cell):
    """Else a mean of the ranks' means would pass for the mean over all answer tokens."""
    from left_bench.model.load import open_pretrained

    cell = tiny_cell(*unlike)
    rows = load_data(cell.data, open_pretrained(cell)[1], max_length=cell.training.max_length).train
    for indices in step_rows(len(rows), rows_per_step=4, steps=3, seed=cell.seed):
        shares = [Team(rank=rank, size=2).share([rows[index] for index in indices]) for rank in (0, 1)]
        tokens = [sum(row.labels for row in share) for share in shares]
        assert tokens[0] != tokens[1]


@linux
def test_dropout_and_noise_differ_between_ranks_and_a_killed_cell_goes_on(tiny_cell, tmp_path, monkeypatch):
    """Random numbers are each rank's own, and of the step: a checkpoint by rank 0 is enough, bit for bit."""
    cell = tiny_cell(
        *STEPS, TWO, "peft.config.lora_dropout=0.5", "training.neftune_alpha=5", "training.checkpoint_every=1"
    )
    whole, expected = run(cell, tmp_path / "whole")
    assert whole.status == "ok", whole.provenance
    monkeypatch.setenv(FAULT, "kill@step2")
    with monkeypatch.context() as patch:
        patch.setattr(process, "start", partial(process.start, program="faulty"))
        killed, _ = run(cell, tmp_path / "cell")
    assert killed.status == "crashed"
    resumed, steps = run(cell, tmp_path / "cell")
    assert resumed.status == "ok", resumed.provenance
    assert resumed.provenance["resumed_after_steps"] == [1]
    assert [step["loss"] for step in steps] == [step["loss"] for step in expected]
    draws = []
    for rank in (0, 1):
        torch.manual_seed(0)
        with Team(rank=rank, size=2).own_draws("cpu", seed=1, step=2):
            draws.append(torch.rand(4).tolist())
        draws.append(torch.rand(4).tolist())
    assert draws[0] != draws[2]
    assert draws[1] == draws[3]  # outside, as if nothing had been drawn


@linux
def test_nobody_waits_for_a_parameter_without_a_gradient(unlike, tiny_cell, work_in_process, tmp_path, monkeypatch):
    cell = tiny_cell(*unlike, "training.gradient_accumulation=2")
    alone = steps_in_process(work_in_process(cell))
    monkeypatch.setenv(FAULT, IDLE_PARAMETER)
    monkeypatch.setattr(process, "start", partial(process.start, program="faulty"))
    record, steps = run(tiny_cell(*unlike, "training.gradient_accumulation=2", TWO), tmp_path / "run")
    assert record.status == "ok", record.provenance["log_tail"]
    assert record.metrics["trainable_params"] % 2 == 1  # it is there: LoRA's own are even
    assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in alone], rel=2e-6)


def test_some_get_no_gradient(tiny_cell, load_tiny, addition_rows):
    from left_bench.methods.attach import attach_adapter, trainable_parameters
    from left_bench.training.loss import AnswerLoss
    from left_bench.training.objective import RightAnswers

    cell = tiny_cell("peft=lora")
    model, tokenizer = load_tiny(cell)
    model = attach_adapter(model, cell, tokenizer=tokenizer, rows=addition_rows)
    arguments = {"objective": RightAnswers(loss=AnswerLoss(model), pad_id=0), "device": "cpu"}
    assert not some_get_no_gradient(model, addition_rows, cell, **arguments)
    model.register_parameter("idle", torch.nn.Parameter(torch.zeros(3)))
    assert some_get_no_gradient(model, addition_rows, cell, **arguments)
    assert all(parameter.grad is None for parameter in trainable_parameters(model))


# --- a rank that does not come to the end ---


@pytest.fixture
def strike(monkeypatch, tiny_cell, tmp_path):
    def strike(fault: str, *overrides: str) -> Record:
        monkeypatch.setenv(FAULT, fault)
        monkeypatch.setattr(process, "start", partial(process.start, program="faulty"))
        return run(tiny_cell(*STEPS, TWO, *overrides), tmp_path / "run")[0]

    return strike


def family() -> list[psutil.Process]:
    """Workers of this process that are alive, and their ranks."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.status() != psutil.STATUS_ZOMBIE and child.ppid() != os.getpid()]


@linux
@pytest.mark.parametrize(
    ("fault", "status", "reason"),
    [
        ("kill@step2#1", "crashed", "rank 1 of 2 was ended by SIGKILL"),
        ("exception@step2#1", "failed", "rank 1 of 2: ValueError: a fault of two lines"),
        ("memory_error@load#1", "oom", "rank 1 of 2: MemoryError"),
        ("exception@step2", "failed", "ValueError: a fault of two lines"),
    ],
)
def test_a_rank_that_dies_ends_the_cell(fault, status, reason, strike, monkeypatch, tmp_path):
    monkeypatch.setattr(supervise, "_kernel_kills", lambda: 0)
    monkeypatch.setattr("left_bench.processes.ranks._MOMENT_SECONDS", 1.0)
    start = time.monotonic()
    record = strike(fault)
    assert time.monotonic() - start < 60
    assert (record.status, record.reason[: len(reason)]) == (status, reason), record.provenance["log_tail"]
    assert not family()
    assert not [path.name for path in (tmp_path / "run").iterdir() if "rank" in path.name]


@linux
def test_a_hanging_rank_is_ended_with_its_cell(strike):
    record = strike("hang@step1#1", "hardware.phase_timeout=3")
    assert record.status == "timeout"
    assert not family()


@linux
def test_a_killed_worker_takes_its_ranks_along(tiny_cell, tmp_path):
    """Rank 0 alone is killed, not its group: as the kernel does when memory is short."""
    cell = tiny_cell("training.steps=1000000", TWO)
    (tmp_path / "cell.json").write_text(cell.model_dump_json(by_alias=True))
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-m", "left_bench.worker.run", str(tmp_path)]  # a new interpreter, as on a GPU
        worker = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        end = time.monotonic() + 120
        while not ((tmp_path / EVENTS_NAME).exists() and '"step"' in (tmp_path / EVENTS_NAME).read_text()):
            assert time.monotonic() < end and worker.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
        ranks = psutil.Process(worker.pid).children(recursive=True)
        assert [rank.cmdline()[-1] for rank in ranks] == ["1"]
        assert os.getpgid(ranks[0].pid) == worker.pid  # what ends the worker's group ends it
    finally:
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
    _, alive = psutil.wait_procs(ranks, timeout=5)
    assert not alive


# --- what is shared, and what is refused ---


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from(["padded", "grouped", "packed"]), st.randoms())
def test_every_row_is_one_ranks(size, each, batching, random):
    from left_bench.data import Example

    lengths = [random.randint(1, 30) for _ in range(size * each * 2)]
    rows = [Example(prompt_ids=[1] * n, answer_ids=[i, 1], prompt="", reference="") for i, n in enumerate(lengths)]
    for examples in split_passes(rows, batch_size=size * each, batching=batching):
        shares = [Team(rank=rank, size=size).share(examples) for rank in range(size)]
        assert {len(share) for share in shares} == {each}
        assert sorted(row.answer_ids[0] for share in shares for row in share) == sorted(
            row.answer_ids[0] for row in examples
        )


def test_a_batch_that_cannot_be_divided_is_refused(tiny_cell):
    reason = why_unsupported(tiny_cell("training.batch_size=3", TWO))
    assert "training.batch_size counts the rows of all hardware.processes" in str(reason)
    with pytest.raises(UserError, match=r"training\.batch_size=3: .* hardware\.processes=2; choose a multiple"):
        Team(size=2).share([1, 2, 3])


def test_ranks_that_no_longer_do_the_same_are_refused():
    Team(size=2).check_alike("the norm", [0.5, 0.5])
    Team(size=2).check_alike("the norm", [math.nan, math.nan])  # diverged, which is told elsewhere
    with pytest.raises(RankLost, match=r"the norm differs between the ranks \(0\.5, 0\.25\)"):
        Team(size=2).check_alike("the norm", [0.5, 0.25])


def test_one_process_is_a_team_that_does_nothing():
    ALONE.start(None)
    ALONE.meet("cpu")
    ALONE.dismiss()
    assert ALONE.first
    assert ALONE.gather(1.0, 2.0) == [(1.0, 2.0)]
    assert ALONE.share([1, 2, 3]) == [1, 2, 3]
    assert ALONE.why_lost(RuntimeError("gloo: Connection closed by peer")) is None
    assert not torch.distributed.is_initialized()


def test_the_other_ranks_are_no_neighbours():
    burn = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", burn], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        assert _own_seconds([process.pid]) - _own_seconds([]) > 0.25
    finally:
        process.kill()
        process.wait()
    assert _own_seconds([process.pid]) >= 0  # ended


def test_processes_are_of_the_cells_identity(tiny_cell):
    assert tiny_cell("hardware.processes=1").id == tiny_cell().id
    assert tiny_cell(TWO).id != tiny_cell().id


def test_a_report_does_not_rank_the_speed_and_memory_of_other_processes():
    told = [{"processes": 1}, {"processes": 2}, {}]  # the last is of before there could be several
    rows = [row_of(make_record(effective=effective)) for effective in told]
    names = {id(row): name for row, name in zip(rows, ("one", "two", "before"), strict=True)}
    result = confounders(rows, names)
    assert ("processes", "1: one, before; 2: two") in result
    assert ("processes", "1: one, before; 2: two") not in touching(result, "quality")
    for metric in ("train_tokens_per_second", "peak_memory_bytes"):
        assert not rankable(rows, metric)
        assert rankable([rows[0], rows[2]], metric)
    assert rankable(rows, "eval_loss")

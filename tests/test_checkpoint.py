"""A killed cell goes on from its checkpoint and ends with the losses of one that was never killed, bit for bit."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from left_bench.measure.cpu_contention import Quiet
from left_bench.measure.energy import NoCounter
from left_bench.measure.meter import Meter, Step
from left_bench.spec.cell import Cell
from left_bench.spec.events import EVENTS_NAME, EventWriter
from left_bench.spec.record import read_record
from left_bench.training import checkpoint as checkpoints
from left_bench.training.checkpoint import CHECKPOINTS_NAME

STEPS = 8


class Killed(BaseException):
    """Stands for SIGKILL where the process must go on: nothing of the package may catch it."""


@pytest.fixture
def losses_of(tmp_path):
    """`losses_of(cell, folder, kill_after=3)`: the worker's run in `folder`, ended after that step.

    Gives the loss and the gradient's norm of each step, and what the run found.
    """
    from left_bench.worker.run import work

    def losses_of(
        cell: Cell, folder: str, *, kill_after: int | None = None
    ) -> tuple[list[tuple[float, float]], dict[str, Any]]:
        run_dir = tmp_path / folder / "cell"
        run_dir.mkdir(exist_ok=True, parents=True)

        class Events(EventWriter):
            def write(self, event: str, **fields: Any) -> None:
                super().write(event, **fields)
                if event == "step" and fields["step"] == kill_after and "time" not in fields:
                    raise Killed

        result: dict[str, Any] = {"provenance": {}}
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr("left_bench.measure.device._give_back_freed_memory", lambda: None)
            work(cell, run_dir=run_dir, draft=result, events=Events(run_dir / EVENTS_NAME))
        steps = step_events(run_dir)
        assert [event["step"] for event in steps] == list(range(1, len(steps) + 1))
        return [(event["loss"], event["gradient_norm"]) for event in steps], result

    return losses_of


def step_events(run_dir: Path) -> list[dict[str, Any]]:
    events = map(json.loads, (run_dir / EVENTS_NAME).read_text().splitlines())
    return [event for event in events if event["event"] == "step"]


CELLS = {
    "lora": ["peft=lora", "peft.config.lora_dropout=0.5"],  # dropout: torch's random state
    "full": ["peft=full", "training.schedule=linear"],
    "adalora": ["peft=adalora", f"training.steps={STEPS}"],  # importance scores and rank budget
    "noise": ["peft=ia3", "training.neftune_alpha=5"],
    "sgd": ["peft=lora", "optimizer=sgd", "training.gradient_accumulation=2", "training.batching=grouped"],
    "adafactor": ["peft=lora", "optimizer=adafactor"],
    "loraplus": ["peft=lora", "optimizer=loraplus"],
    "lion_8bit": ["peft=full", "optimizer=lion_8bit"],
    # what it samples, and the reference, which is the model after the supervised step and not the resumed one
    "policy": ["peft=lora", "training=grpo", "training.sft_steps=1", "training.group_size=2", "eval.max_new_tokens=4"],
    "mixed": ["peft=lora", "precision=fp16_mixed", "peft.config.lora_dropout=0.1"],  # loss scaling
}


QUICK = ["eval.generate=false", "training.measure_after=0", f"training.steps={STEPS}"]


@pytest.mark.parametrize("name", CELLS)
def test_losses_are_bit_identical(name, tiny_cell, losses_of):
    cell = tiny_cell(*QUICK, "training.checkpoint_every=2", *CELLS[name])
    whole, _ = losses_of(cell, "whole")
    losses_of(cell, "killed", kill_after=3)
    losses_of(cell, "killed", kill_after=5)
    resumed, result = losses_of(cell, "killed")
    assert len(whole) == STEPS
    assert resumed == whole
    assert result["provenance"]["resumed_after_steps"] == [2, 4]
    assert result["metrics"]["train_steps"] == STEPS


def test_the_curve_goes_on_where_it_was(tiny_cell, losses_of):
    early = ["peft=full", "training.learning_rate=0.02", "training.schedule=constant", "training.stop_patience=7"]
    cell = tiny_cell(*QUICK, *early, "training.checkpoint_every=3", "eval.every=1", "data.validation_rows=6")
    _, whole = losses_of(cell, "whole")
    losses_of(cell, "killed", kill_after=5)
    _, resumed = losses_of(cell, "killed")

    def told(found: dict[str, Any]) -> list[tuple[int, int, float]]:
        return [(point.step, point.tokens, point.validation_loss) for point in found["curve"]]

    assert told(resumed) == told(whole) and len(told(whole)) == STEPS
    assert resumed["provenance"]["training_ended"] == whole["provenance"]["training_ended"]
    for name in ("validation_loss", "eval_loss"):
        assert resumed["metrics"].get(name) == whole["metrics"].get(name)


def test_what_one_run_draws_before_training_changes_no_loss(tiny_cell, losses_of, monkeypatch):
    """A sweep's first cell measures the machine's peak, on random matrices and for as long as it takes."""
    cell = tiny_cell(*QUICK, *CELLS["noise"])

    def peak(*_args, **_how):
        return Quiet(float(torch.rand(3).numel()), None)

    first, _ = losses_of(cell, "first")
    monkeypatch.setattr("left_bench.evaluation.shared_baseline.shared_peak", peak)
    assert losses_of(cell, "another")[0] == first


def test_repeated_steps_count_once(tiny_cell, losses_of, tmp_path):
    cell = tiny_cell(*QUICK[:1], f"training.steps={STEPS}", "training.checkpoint_every=2", "training.measure_after=1")
    losses_of(cell, "run", kill_after=5)
    torn = [event["seconds"] for event in step_events(tmp_path / "run" / "cell")]
    _, result = losses_of(cell, "run")
    steps = step_events(tmp_path / "run" / "cell")
    assert [event["seconds"] for event in steps[:4]] == torn[:4]
    assert steps[4]["seconds"] != torn[4]  # the fifth was taken anew
    # warm-up is left out wherever a process began: steps 1 and 5
    counted = steps[1:4] + steps[5:]
    rate = sum(event["tokens"] for event in counted) / sum(event["seconds"] for event in counted)
    assert result["metrics"]["train_tokens_per_second"] == pytest.approx(rate)
    [phase] = [phase for phase in result["phases"] if phase.name == "train"]
    assert phase.steps == 4  # what this attempt did
    assert result["metrics"]["train_seconds"] == pytest.approx(phase.seconds + sum(torn[:4]))
    assert result["memory_breakdown"]["gradients"] > 0


def test_joules_of_earlier_attempts_are_neither_counted_nor_invented(tiny_cell, losses_of, tmp_path, monkeypatch):
    """A counter that moves by a joule for every token."""

    class Counter(NoCounter):
        readable, now = True, 0.0

        def joules(self) -> float:
            return self.now

    counter, take = Counter("told"), Meter.step

    def step(meter: Meter, step: Step, **extra: float) -> None:
        counter.now += step.tokens
        take(meter, step, **extra)

    monkeypatch.setattr(Meter, "step", step)
    monkeypatch.setattr("left_bench.measure.energy.open_counters", lambda *_, **__: (NoCounter("none"), {"": counter}))
    cell = tiny_cell(*QUICK[:1], f"training.steps={STEPS}", "training.checkpoint_every=2", "training.measure_after=1")
    _, killed = losses_of(cell, "run", kill_after=5)
    assert not [name for name in killed["metrics"] if "joules" in name]
    _, resumed = losses_of(cell, "run")
    assert resumed["provenance"]["resumed_after_steps"] == [4]
    assert resumed["metrics"]["joules_per_1000_tokens"] == pytest.approx(1000)  # of the steps that this attempt took
    assert not {"train_joules", "cell_joules"} & resumed["metrics"].keys()


def test_one_checkpoint_is_kept_and_nothing_is_pickled(tiny_cell, losses_of, tmp_path):
    losses_of(tiny_cell(*QUICK, "training.checkpoint_every=3"), "run")
    [folder] = (tmp_path / "run" / "cell" / CHECKPOINTS_NAME).iterdir()
    assert folder.name == "step-000000006"
    assert {path.name for path in folder.iterdir()} == {"state.json", "steps.jsonl", "tensors.safetensors"}
    json.loads((folder / "state.json").read_text())


def test_without_the_setting_nothing_is_written_or_read(tiny_cell, losses_of, tmp_path):
    losses_of(tiny_cell(*QUICK, "training.checkpoint_every=2"), "run")
    _, result = losses_of(tiny_cell(*QUICK), "run")
    assert "resumed_after_steps" not in result["provenance"]
    losses_of(tiny_cell(*QUICK), "other")
    assert not (tmp_path / "other" / "cell" / CHECKPOINTS_NAME).exists()


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "versions"])
def test_a_checkpoint_that_cannot_be_gone_on_from_is_passed_over(damage, tiny_cell, losses_of, tmp_path, monkeypatch):
    cell = tiny_cell(*QUICK, "training.checkpoint_every=2")
    whole, _ = losses_of(cell, "run")
    [folder] = (tmp_path / "run" / "cell" / CHECKPOINTS_NAME).iterdir()
    tensors = folder / "tensors.safetensors"
    if damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-9])
    elif damage == "empty":
        (folder / "state.json").write_text("")
    elif damage == "missing":
        tensors.unlink()
    else:
        monkeypatch.setattr(checkpoints, "versions_of", lambda packages: {"torch": "another"})
    again, result = losses_of(cell, "run")
    assert "resumed_after_steps" not in result["provenance"]
    assert again == whole


@pytest.mark.parametrize("failing", ["fsync", "rename", "save_file"])
def test_a_failing_write_leaves_the_earlier_checkpoint(failing, tiny_cell, losses_of, tmp_path, monkeypatch):
    cell = tiny_cell(*QUICK, "training.checkpoint_every=1")
    losses_of(cell, "run", kill_after=3)  # struck before the third checkpoint

    def fail(*arguments: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if failing == "rename":
            patch.setattr(Path, "rename", fail)
        elif failing == "fsync":
            patch.setattr(checkpoints.os, "fsync", fail)
        else:
            patch.setattr("safetensors.torch.save_file", fail)
        with pytest.raises(OSError, match="No space"):
            losses_of(cell, "run")
    assert [path.name for path in (tmp_path / "run" / "cell" / CHECKPOINTS_NAME).iterdir()] == ["step-000000002"]


@pytest.mark.skipif(importlib.util.find_spec("galore_torch") is None, reason="extra galore")
def test_a_state_that_only_pickle_could_hold_is_said(tiny_cell, losses_of):
    from left_bench.core.errors import UserError

    cell = tiny_cell("peft=full", "optimizer=galore", "optimizer.matrices.rank=4", "training.checkpoint_every=1")
    with pytest.raises(UserError, match=r"training\.checkpoint_every=1: the state of optimizer=galore .* pickle"):
        losses_of(cell, "run")


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.integers() | st.text(), inner),
    max_leaves=20,
)


@given(tree=TREES)
def test_plain_data_comes_back_as_it_was(tree):
    text = json.dumps(checkpoints._plain(tree, {}, {}))
    again = checkpoints._restored(json.loads(text), {})
    assert again == tree
    assert repr(again) == repr(tree)  # 1 and 1.0 and True, a list and a tuple


def test_tensors_come_back_as_they_were(tmp_path):
    shared, whole = torch.arange(4.0, dtype=torch.bfloat16), torch.arange(10)
    tree = {"a": shared, 3: [shared, whole[2:4], whole[5:]], "t": torch.ones(3, 2).T, "s": torch.tensor(7)}
    checkpoints._write(tmp_path / "step-1", tree, steps=['{"event": "step"}'])
    again = checkpoints._read(tmp_path / "step-1")
    assert again["a"] is again[3][0]  # one tensor stays one
    assert again["a"].dtype == torch.bfloat16
    for before, after in [(tree["a"], again["a"]), (tree["t"], again["t"]), (tree["s"], again["s"])]:
        assert torch.equal(before, after)
    assert torch.equal(again[3][1], torch.tensor([2, 3]))
    assert torch.equal(again[3][2], torch.arange(5, 10))
    assert again["steps"] == [{"event": "step"}]


def test_the_state_of_the_random_generators():
    import random

    import numpy as np

    tensors: dict[str, torch.Tensor] = {}
    saved = json.dumps(checkpoints._plain(checkpoints._random_state(), tensors, {}))
    first = [random.random(), np.random.rand(), torch.rand(1).item()]
    checkpoints._restore_random(checkpoints._restored(json.loads(saved), tensors))
    assert [random.random(), np.random.rand(), torch.rand(1).item()] == first


# --- by a real SIGKILL ---

RUN = [
    *("model=tiny_llama", "precision=fp32", "hardware=cpu", "hardware.threads=1", "tracker=none", "peft=lora"),
    *("data.train_rows=8", "data.test_rows=4", "eval.generate=false", "eval.forgetting=false", "training.batch_size=4"),
    *("peft.config.lora_dropout=0.1", "training.steps=240"),
]


@pytest.mark.skipif(sys.platform != "linux", reason="kills")
def test_a_killed_cell_goes_on(tmp_path):
    def losses(runs: str) -> list[float]:
        [path] = tmp_path.glob(f"{runs}/*/{EVENTS_NAME}")
        events = [json.loads(line) for line in path.read_text().splitlines()]
        return [event["loss"] for event in events if event["event"] == "step"]

    def start(*more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "left_bench", *RUN, "training.checkpoint_every=10", *more]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    killed = start("runs_dir=killed")
    end = time.monotonic() + 180
    while not list(tmp_path.glob(f"killed/*/{CHECKPOINTS_NAME}/step-*")):
        assert killed.poll() is None and time.monotonic() < end, killed.communicate()[0]
        time.sleep(0.02)
    workers = [child for child in psutil.Process(killed.pid).children(recursive=True) if child.ppid() != killed.pid]
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)
    killed.communicate(timeout=60)
    assert killed.returncode == 1
    [path] = tmp_path.glob("killed/*/record.json")
    assert read_record(path).status == "crashed"

    again = start("runs_dir=killed")
    whole = start("runs_dir=whole")
    out = again.communicate(timeout=120)[0] + whole.communicate(timeout=120)[0]
    assert (again.returncode, whole.returncode) == (0, 0), out
    resumed, unbroken = (read_record(next(tmp_path.glob(f"{runs}/*/record.json"))) for runs in ("killed", "whole"))
    assert (resumed.attempt, unbroken.attempt) == (2, 1)
    assert resumed.cell_id == unbroken.cell_id
    assert resumed.provenance["resumed_after_steps"][0] >= 10
    assert "resumed_after_steps" not in unbroken.provenance
    assert len(losses("whole")) == 240
    assert losses("killed") == losses("whole")
    assert resumed.metrics["train_tokens"] == unbroken.metrics["train_tokens"]
    assert resumed.metrics["train_loss"] == unbroken.metrics["train_loss"]
    assert not list(tmp_path.glob(f"*/*/{CHECKPOINTS_NAME}"))  # done with

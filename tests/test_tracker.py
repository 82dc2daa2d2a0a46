from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from left_bench.record import METRICS, Phase, Record, Sample
from left_bench.tracker import NoTracker, Shielded, WandbTracker, feed, known_metric, open_tracker


def made(cell: Any, **changes: Any) -> Record:
    plain = {
        "cell_id": cell.id,
        "status": "ok",
        "started_at": "a",
        "finished_at": "b",
        "choices": cell.choices,
        "config": cell.sections(),
        "metrics": {"eval_loss": 0.5, "peak_memory_bytes": 7.0},
        "phases": [Phase(name="train", seconds=2.5)],
        "memory_breakdown": {"weights": 11},
        "samples": [Sample(prompt="1 + 1?", reference="2", prediction="3", base_prediction="x")],
        "environment": {"machine": {"cores": 2}},
    }
    return Record.model_validate(plain | changes)


def stored(path: Path) -> list[bytes]:
    """The records of wandb's file: LevelDB's log, blocks of 32 KiB with pieces of 7 bytes of header, after 7 bytes."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    records, whole, at = [], b"", 7
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, or the last of its pieces
            records.append(whole)
            whole = b""
    return records


def contents(runs_dir: Path) -> dict[str, Any]:
    """What the one offline file under `wandb/` holds."""
    from wandb.proto.wandb_internal_pb2 import Record as Stored

    def plain(items: Any) -> dict[str, Any]:
        return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}

    [path] = runs_dir.glob("wandb/offline-run-*/*.wandb")
    settled = b""
    while not settled or settled != path.read_bytes():  # wandb's own process may write on for a moment
        settled = path.read_bytes()
        time.sleep(0.5)
    found: dict[str, Any] = {"history": [], "summary": {}, "config": {}, "run": None, "exit": None}
    for data in stored(path):
        one = Stored.FromString(data)
        match one.WhichOneof("record_type"):
            case "run":
                found["run"] = one.run
                found["config"] |= plain(one.run.config.update)
            case "config":
                found["config"] |= plain(one.config.update)
            case "history":
                found["history"].append(plain(one.history.item))
            case "summary":
                found["summary"] |= plain(one.summary.update)
            case "exit":
                found["exit"] = one.exit.exit_code
    return found


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No login and no settings of this user's."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "home").mkdir()
    runs = tmp_path / "runs"
    runs.mkdir()
    return runs


def test_a_run_is_all_in_the_offline_file(tiny_cell, offline):
    cell = tiny_cell()
    tracker = WandbTracker(project="left_bench", entity=None)
    tracker.start(cell, attempt=2, sweep="smoke", runs_dir=offline)
    for step, loss in enumerate([3.0, 1.0, 2.0], start=1):
        tracker.log(step, loss=loss, learning_rate=0.1)
    tracker.finish(made(cell))

    found = contents(offline)
    run = found["run"]
    assert (run.project, run.run_group, run.display_name) == ("left_bench", "smoke", cell.id)
    assert run.run_id == f"{cell.id}-2"
    assert {"lora", "tiny_llama", "none"} <= set(run.tags)
    assert [(row["train/step"], row["train/loss"]) for row in found["history"] if "train/step" in row] == [
        (1, 3.0),
        (2, 1.0),
        (3, 2.0),
    ]
    assert found["config"]["training"]["steps"] == 2
    assert found["config"]["axis.peft"] == "lora"
    assert found["config"]["cell_id"] == cell.id
    assert found["config"]["environment"] == {"machine": {"cores": 2}}
    summary = found["summary"]
    assert (summary["status"], summary["eval_loss"], summary["seconds/train"]) == ("ok", 0.5, 2.5)
    assert summary["memory/weights_bytes"] == 11
    assert found["exit"] == 0
    assert list(offline.glob("wandb/offline-run-*/files/media/table/*.json"))


@pytest.mark.parametrize(("status", "code"), [("unsupported", 0), ("oom", 1), ("crashed", 1)])
def test_how_a_cell_ended_is_how_its_run_ends(status, code, tiny_cell, offline):
    cell = tiny_cell()
    tracker = WandbTracker(project="p", entity=None)
    tracker.start(cell, attempt=1, sweep=None, runs_dir=offline)
    tracker.finish(made(cell, status=status, reason="because", samples=[]))
    found = contents(offline)
    assert (found["exit"], found["summary"]["status"], found["summary"]["reason"]) == (code, status, "because")


def test_nothing_of_the_machines_user_is_written(tiny_cell, offline):
    import platform

    cell = tiny_cell()
    tracker = WandbTracker(project="p", entity=None)
    tracker.start(cell, attempt=1, sweep=None, runs_dir=offline)
    tracker.finish(made(cell))
    [folder] = offline.glob("wandb/offline-run-*")
    files = {path.name for path in folder.rglob("*") if path.is_file()}
    assert not files & {"requirements.txt", "wandb-metadata.json", "conda-environment.yaml", "diff.patch", "code"}
    data = next(folder.glob("*.wandb")).read_bytes()
    assert len(platform.node()) < 3 or platform.node().encode() not in data


@pytest.mark.parametrize("name", ["m" * 300, "a/b:c#d?e%f", "ß" * 100])
def test_weird_names_are_tracked_too(name, compose_cell, offline, capsys):
    cell = compose_cell(f"model.name_or_path='{name}'", "hardware=cpu")
    tracker = open_tracker({"name": "wandb", "project": "p"})
    tracker.start(cell, attempt=1, sweep=None, runs_dir=offline)
    tracker.log(1, loss=1.0)
    tracker.finish(made(cell))
    assert "warning" not in capsys.readouterr().err
    assert contents(offline)["summary"]["status"] == "ok"


def test_without_a_login_nothing_is_asked(tmp_path, tiny_cell, offline):
    """In a process of its own: no environment says offline, and standard input is closed."""
    program = (
        "import pathlib, sys; from left_bench.cell import Cell; from left_bench.tracker import WandbTracker\n"
        "cell = Cell.model_validate_json(pathlib.Path(sys.argv[1]).read_text())\n"
        "tracker = WandbTracker(project='p', entity=None)\n"
        "tracker.start(cell, attempt=1, sweep=None, runs_dir=pathlib.Path(sys.argv[2]))\n"
        "tracker.log(1, loss=2.0)\n"
        "tracker._run.finish()\n"
    )
    (tmp_path / "cell.json").write_text(tiny_cell().model_dump_json(by_alias=True))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "cell.json"), str(offline)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    assert "Enter" not in done.stdout + done.stderr
    assert "choice" not in done.stdout + done.stderr
    assert [row["train/loss"] for row in contents(offline)["history"]] == [2.0]


# --- the null object, the shield ---


def test_no_tracker_does_nothing(tiny_cell, tmp_path):
    cell = tiny_cell()
    tracker = open_tracker({"name": "none"})
    assert isinstance(tracker, NoTracker)
    tracker.start(cell, attempt=1, sweep=None, runs_dir=tmp_path)
    tracker.log(1, loss=1)
    tracker.finish(made(cell))
    assert list(tmp_path.iterdir()) == []


class Broken:
    """Fails in one method and remembers every call."""

    def __init__(self, failing: str) -> None:
        self.failing, self.calls = failing, []

    def _do(self, name: str) -> None:
        self.calls.append(name)
        if name == self.failing:
            raise ConnectionError("no route")

    def start(self, cell, *, attempt, sweep, runs_dir):
        self._do("start")

    def log(self, step, **metrics):
        self._do("log")

    def finish(self, record):
        self._do("finish")


@pytest.mark.parametrize(
    ("failing", "calls"),
    [
        ("start", ["start"]),
        ("log", ["start", "log"]),
        ("finish", ["start", "log", "log", "finish"]),
        ("nothing", ["start", "log", "log", "finish"]),
    ],
)
def test_a_failing_tracker_is_said_once_and_left_alone(failing, calls, tiny_cell, tmp_path, capsys):
    cell, inner = tiny_cell(), Broken(failing)
    tracker = Shielded(inner, "mine")
    tracker.start(cell, attempt=1, sweep=None, runs_dir=tmp_path)
    tracker.log(1, loss=1)
    tracker.log(2, loss=1)
    tracker.finish(made(cell))
    assert inner.calls == calls
    said = capsys.readouterr().err.splitlines()
    assert len(said) == (failing != "nothing")
    if said:
        assert "tracker=mine" in said[0]
        assert "no route" in said[0]


def test_the_next_cell_is_tried_again(tiny_cell, tmp_path):
    inner = Broken("log")
    tracker = Shielded(inner, "mine")
    for attempt in (1, 2):
        tracker.start(tiny_cell(), attempt=attempt, sweep=None, runs_dir=tmp_path)
        tracker.log(1, loss=1)
    assert inner.calls == ["start", "log"] * 2


def test_an_interrupt_is_not_swallowed():
    class Interrupted(Broken):
        def log(self, step, **metrics):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Shielded(Interrupted("x"), "x").log(1)


def test_only_steps_are_fed_and_only_known_numbers():
    seen = []

    class Keep(NoTracker):
        def log(self, step, **metrics):
            seen.append((step, metrics))

    feed(Keep(), {"event": "phase", "name": "train"})
    feed(Keep(), {"event": "step", "time": 1, "step": 3, "loss": 0.5, "tokens": 7})
    assert seen == [(3, {"loss": 0.5, "tokens": 7})]


def test_known_metrics():
    assert all(known_metric(name) and known_metric(f"base_{name}") for name in METRICS)
    assert not known_metric("nope")

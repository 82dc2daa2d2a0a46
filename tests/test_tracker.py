"""What trackers are told, the shield around them, which there are, and Weights & Biases' own offline files."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from left_bench.core.errors import UserError
from left_bench.grid.compose import compose
from left_bench.spec.record import Phase, Record, Sample, Score
from left_bench.tracker import (
    TRACKERS,
    Attempt,
    Feed,
    NoTracker,
    Shielded,
    Together,
    check_trackers,
    launch_id,
    open_tracker,
)
from left_bench.tracker.base import markdown_table, summary_of
from left_bench.tracker.choose import defaults_of
from left_bench.tracker.kinds.wandb import WandbTracker

LAUNCH = "20260101T120000"
MLFLOW = {"project": "left_bench", "tracking_uri": None, "artifacts": False}


def made(cell: Any, **changes: Any) -> Record:
    plain = {
        "cell_id": cell.id,
        "status": "ok",
        "started_at": "2026-01-01T12:00:00+00:00",
        "finished_at": "2026-01-01T12:00:09+00:00",
        "choices": cell.choices,
        "config": cell.sections(),
        "metrics": {"eval_loss": 0.5, "peak_memory_bytes": 7.0},
        "phases": [Phase(name="train", seconds=2.5, peak_memory_bytes=7)],
        "memory_breakdown": {"weights": 11},
        "scores": [Score(task="sums", metric="exact_match", value=0.25, n=4, base_value=0.0)],
        "samples": [Sample(prompt="1 + 1?", reference="2", prediction="3", base_prediction="x")],
        "environment": {"machine": {"cores": 2}},
    }
    return Record.model_validate(plain | changes)


def attempt_of(cell: Any, *, folder: Path, number: int = 1, sweep: str | None = None, launch: str | None = LAUNCH):
    return Attempt(
        cell_id=cell.id,
        number=number,
        choices=cell.choices,
        config=cell.sections(),
        sweep=sweep,
        launch=launch,
        run_dir=folder / cell.id,
    )


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


def contents(path: Path) -> dict[str, Any]:
    """What one `.wandb` file holds."""
    from wandb.proto.wandb_internal_pb2 import Record as Stored

    def plain(items: Any) -> dict[str, Any]:
        return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}

    settled = b""
    while not settled or settled != path.read_bytes():  # wandb's own process may write on for a moment
        settled = path.read_bytes()
        time.sleep(0.3)
    result: dict[str, Any] = {"history": [], "summary": {}, "config": {}, "run": None, "exit": None, "artifacts": []}
    result["metrics"] = {}
    for data in stored(path):
        entry = Stored.FromString(data)
        match entry.WhichOneof("record_type"):
            case "run":
                result["run"] = entry.run
                result["config"] |= plain(entry.run.config.update)
            case "config":
                result["config"] |= plain(entry.config.update)
            case "history":
                result["history"].append(plain(entry.history.item))
            case "summary":
                result["summary"] |= plain(entry.summary.update)
            case "metric":
                result["metrics"][entry.metric.name or entry.metric.glob_name] = entry.metric
            case "artifact":
                result["artifacts"].append((entry.artifact.type, entry.artifact.name))
            case "request" if entry.request.HasField("log_artifact"):
                result["artifacts"].append(
                    (entry.request.log_artifact.artifact.type, entry.request.log_artifact.artifact.name)
                )
            case "exit":
                result["exit"] = entry.exit.exit_code
    return result


def only(runs_dir: Path) -> dict[str, Any]:
    [path] = runs_dir.glob("wandb/offline-run-*/*.wandb")
    return contents(path)


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


def wandb_tracker(store: Path, *, artifacts: bool = False) -> WandbTracker:
    return WandbTracker(store=store, project="left_bench", entity=None, artifacts=artifacts)


def test_a_run_is_all_in_the_offline_file(tiny_cell, offline):
    cell = tiny_cell()
    tracker = wandb_tracker(offline)
    tracker.start(attempt_of(cell, folder=offline, number=2, sweep="smoke"))
    for step, loss in enumerate([3.0, 1.0, 2.0], start=1):
        tracker.log(step, time=100.0 + step, loss=loss, learning_rate=0.1, memory_gib=5.0 - step, tokens=10.0 * step)
    tracker.finish(made(cell))

    result = only(offline)
    run, identity = result["run"], cell.id.rpartition("-")[2]
    assert (run.project, run.run_group, run.job_type) == ("left_bench", f"smoke-{LAUNCH}", "train")
    assert run.display_name == "lora · s0"
    assert run.run_id == f"{identity}-2-{LAUNCH}"
    assert {"peft:lora", "model:tiny_llama", "quantization:none"} <= set(run.tags)
    rows = [row for row in result["history"] if "train/step" in row]
    assert [(row["train/step"], row["train/loss"]) for row in rows] == [(1, 3.0), (2, 1.0), (3, 2.0)]
    assert [row["_timestamp"] for row in rows] == [101.0, 102.0, 103.0]
    assert result["config"]["training"]["steps"] == 2
    assert result["config"]["axis.peft"] == "lora"
    assert (result["config"]["cell_id"], result["config"]["sweep_name"]) == (cell.id, "smoke")
    assert result["config"]["environment.machine.cores"] == 2
    summary = result["summary"]
    assert (summary["status"], summary["eval_loss"], summary["seconds/train"]) == ("ok", 0.5, 2.5)
    assert (summary["memory_gib/weights"], summary["score/sums/exact_match/value"]) == (11 / 2**30, 0.25)
    assert result["exit"] == 0
    [table] = offline.glob("wandb/offline-run-*/files/media/table/*.json")
    assert json.loads(table.read_text())["data"] == [["1 + 1?", "2", "3", "x"]]
    # both axes, the least loss and the most memory
    metrics = result["metrics"]
    assert {"train/step", "train/tokens"} <= set(metrics)
    assert (metrics["train/loss"].step_metric, metrics["train/loss"].summary.min) == ("train/tokens", True)
    assert (metrics["train/memory_gib"].step_metric, metrics["train/memory_gib"].summary.max) == (
        "train/step",
        True,
    )
    assert metrics["train/*"].step_metric == "train/step"


@pytest.mark.parametrize("artifacts", [True, False])
def test_artifacts_can_be_switched_off(artifacts, tiny_cell, offline):
    cell = tiny_cell()
    attempt = attempt_of(cell, folder=offline)
    (attempt.run_dir / "adapter").mkdir(parents=True)
    (attempt.run_dir / "adapter" / "adapter_model.safetensors").write_bytes(b"12345")
    record = made(cell)
    record.write(attempt.run_dir)
    tracker = wandb_tracker(offline, artifacts=artifacts)
    tracker.start(attempt)
    tracker.finish(record)
    kinds = {kind for kind, name in only(offline)["artifacts"] if cell.id in name}
    assert kinds == ({"record", "adapter"} if artifacts else set())


@pytest.mark.parametrize(("status", "code"), [("unsupported", 0), ("oom", 1)])
def test_how_a_cell_ended_is_how_its_run_ends(status, code, tiny_cell, offline):
    cell = tiny_cell()
    tracker = wandb_tracker(offline)
    tracker.start(attempt_of(cell, folder=offline))
    tracker.finish(made(cell, status=status, reason="because", samples=[]))
    result = only(offline)
    assert (result["exit"], result["summary"]["status"], result["summary"]["reason"]) == (code, status, "because")


def test_nothing_of_the_machines_user_is_written(tiny_cell, offline):
    import platform

    cell = tiny_cell()
    tracker = wandb_tracker(offline)
    tracker.start(attempt_of(cell, folder=offline))
    tracker.finish(made(cell))
    [folder] = offline.glob("wandb/offline-run-*")
    files = {path.name for path in folder.rglob("*") if path.is_file()}
    assert not files & {"requirements.txt", "wandb-metadata.json", "conda-environment.yaml", "diff.patch", "code"}
    data = next(folder.glob("*.wandb")).read_bytes()
    assert len(platform.node()) < 3 or platform.node().encode() not in data


@pytest.mark.parametrize("name", ["m" * 300, "a/b:c#d?e%f", "ß" * 100])
def test_weird_names_are_tracked_too(name, compose_cell, offline, capsys):
    cell = compose_cell(f"model.name_or_path='{name}'", "hardware=cpu")
    tracker = open_tracker({"wandb": {"project": "p"}}, store=offline)
    tracker.start(attempt_of(cell, folder=offline))
    tracker.log(1, time=1.0, loss=1.0)
    tracker.finish(made(cell))
    assert "warning" not in capsys.readouterr().err
    assert only(offline)["summary"]["status"] == "ok"


def test_without_a_login_nothing_is_asked(tmp_path, tiny_cell, offline):
    """In a process of its own: no environment says offline, and standard input is closed."""
    program = (
        "import pathlib, sys; from left_bench.spec.record import Record; from left_bench.tracker import Attempt\n"
        "from left_bench.tracker.kinds.wandb import WandbTracker\n"
        "record = Record.model_validate_json(pathlib.Path(sys.argv[1]).read_text())\n"
        "store = pathlib.Path(sys.argv[2])\n"
        "tracker = WandbTracker(store=store, project='p', entity=None, artifacts=False)\n"
        "tracker.start(Attempt.of(record, run_dir=store / 'x'))\n"
        "tracker.log(1, time=1.0, loss=2.0)\n"
        "tracker.finish(record)\n"
    )
    (tmp_path / "record.json").write_text(made(tiny_cell(), samples=[]).model_dump_json())
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "record.json"), str(offline)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    assert "Enter" not in done.stdout + done.stderr
    assert "choice" not in done.stdout + done.stderr
    assert [row["train/loss"] for row in only(offline)["history"] if "train/loss" in row] == [2.0]


# --- what trackers are told ---


def test_a_record_tells_the_same_attempt_as_the_cell(tiny_cell, tmp_path):
    cell = tiny_cell()
    live = attempt_of(cell, folder=tmp_path, number=3, sweep="smoke")
    record = made(cell, attempt=3, provenance={"sweep": "smoke", "launch": LAUNCH})
    again = Attempt.of(Record.model_validate_json(record.model_dump_json()), run_dir=tmp_path / cell.id)
    assert (again.id, again.name, again.group, again.tags) == (live.id, live.name, live.group, live.tags)
    assert again.configuration() == live.configuration()


def test_ids_tell_cells_attempts_and_launches_apart(tiny_cell, tmp_path):
    attempts = [
        attempt_of(tiny_cell(f"seed={seed}"), folder=tmp_path, number=number, launch=launch)
        for seed in (0, 1)
        for number in (1, 2)
        for launch in (None, LAUNCH, "20260101T120001")
    ]
    assert len({attempt.id for attempt in attempts}) == len(attempts)
    assert all(len(attempt.id) <= 64 and not set(attempt.id) & set(":;,#?/'\\%") for attempt in attempts)


def test_a_run_has_a_short_name(tiny_cell, tmp_path):
    attempt = attempt_of(tiny_cell("seed=2"), folder=tmp_path)
    assert attempt.name == "lora · s2"
    assert replace(attempt, choices={"peft": "dora", "quantization": "nf4"}).name == "dora · nf4 · s2"


def test_a_launch_is_named_by_its_start():
    assert launch_id("2026-11-23T20:31:25+00:00") == "20261123T203125"


def test_only_steps_are_fed_and_tokens_are_added_up():
    seen = []

    class Keep(NoTracker):
        def log(self, step, *, time, **metrics):
            seen.append((step, time, metrics))

    feed = Feed(Keep())
    feed.event({"event": "phase", "name": "train"})
    feed.event({"event": "step", "time": 9.0, "step": 1, "loss": 0.5, "tokens": 7, "other": 1})
    feed.event({"event": "step", "time": 9.5, "step": 2, "loss": 0.25, "tokens": 5, "peak_memory_bytes": 3 * 2**29})
    assert seen == [(1, 9.0, {"loss": 0.5, "tokens": 7}), (2, 9.5, {"loss": 0.25, "tokens": 12, "memory_gib": 1.5})]


def test_a_point_of_the_curve_is_fed_with_what_it_had_taken():
    seen = []

    class Keep(NoTracker):
        def log_validation(self, step, *, time, **metrics):
            seen.append((step, time, metrics))

    point = {"step": 5, "seconds": 2.0, "tokens": 90, "validation_loss": 0.5}
    feed = Feed(Keep())
    feed.event({"event": "curve", "time": 9.0, **point})
    feed.event({"event": "curve", "time": 9.5, **point, "joules": 3.0, "scores": {"exact_match": 0.25}})
    spent = {"seconds": 2.0, "tokens": 90}
    assert seen == [
        (5, 9.0, {"validation_loss": 0.5, **spent}),
        (5, 9.5, {"validation_loss": 0.5, **spent, "joules": 3.0, "exact_match": 0.25}),
    ]


def test_the_summary_has_every_number_of_a_record(tiny_cell):
    summary = summary_of(made(tiny_cell()))
    assert summary == {
        "status": "ok",
        "reason": "",
        "eval_loss": 0.5,
        "peak_memory_bytes": 7.0,
        "seconds/train": 2.5,
        "peak_memory_gib": 7 / 2**30,
        "peak_memory_gib/train": 7 / 2**30,
        "memory_gib/weights": 11 / 2**30,
        "score/sums/exact_match/value": 0.25,
        "score/sums/exact_match/base": 0.0,
        "score/sums/exact_match/n": 4,
    }


def test_a_table_keeps_to_its_cells():
    table = markdown_table(["a", "b"], [["x|y\nz", None], ["<script>", 1.5]])
    assert table.splitlines() == ["| a | b |", "| --- | --- |", "| x\\|y z |  |", "| &lt;script> | 1.5 |"]


# --- which there are ---


def test_the_files_and_the_code_name_the_same_settings(composed):
    section = compose(*[(config := composed(f"tracker=[{','.join(TRACKERS)}]")), config.hydra])[1].tracker
    assert section == {name: defaults_of(name) for name in TRACKERS}


@pytest.mark.parametrize(
    ("overrides", "section"),
    [
        (["tracker=none"], {}),
        (["tracker=jsonl"], {"jsonl": {"folder": None}}),
        (["tracker=[jsonl,mlflow]", "tracker.jsonl.folder=x"], {"jsonl": {"folder": "x"}, "mlflow": MLFLOW}),
        (["tracker.wandb.project=mine"], {"wandb": {"project": "mine", "entity": None, "artifacts": True}}),
    ],
)  # fmt: skip
def test_one_or_several(overrides, section, composed):
    config = composed(*overrides)
    assert compose(config, config.hydra)[1].tracker == section


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"wandbb": {}}, ["tracker.wandbb", "did you mean 'wandb'?"]),
        ({"wandb": {"projekt": 1}}, ["tracker.wandb.projekt", "did you mean 'project'?"]),
        ({"project": "x"}, ["tracker.project", "tracker.NAME.KEY=VALUE"]),
        ({"jsonl": "x"}, ["tracker.jsonl='x'"]),
    ],
)
def test_what_no_tracker_knows_is_refused(section, words, tmp_path):
    with pytest.raises(UserError) as caught:
        open_tracker(section, store=tmp_path)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_package_is_said_before_the_sweep_starts(left_bench, tmp_path, monkeypatch):
    import importlib.util

    result = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "mlflow" else result(name, *a))
    monkeypatch.setattr("left_bench.launch.job.run_cell", None)
    monkeypatch.chdir(tmp_path)
    answer = left_bench("+sweep=smoke", "tracker=[jsonl,mlflow]")
    assert answer.code == 2, answer
    assert "the package mlflow is not installed; pip install 'left-bench[mlflow]'" in answer.err
    assert len(answer.err.splitlines()) == 1
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tracker=wandb,mlflow"], ["'tracker=[wandb,mlflow]'"]),
        (["tracker=[wandb,mlfow]"], ["unknown tracker 'mlfow'", "did you mean 'mlflow'?"]),
    ],
)
def test_several_are_a_list(arguments, words, left_bench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = left_bench("-m", *arguments)
    assert answer.code == 2, answer
    for word in words:
        assert word in answer.err


def test_checking_imports_no_tracker():
    program = (
        "import sys; from left_bench.tracker import check_trackers, open_tracker, TRACKERS\n"
        "import pathlib; open_tracker({'wandb': {}, 'jsonl': {}}, store=pathlib.Path('x'))\n"
        "sys.exit(bool({'wandb', 'mlflow', 'trackio', 'tensorboard', 'torch', 'pandas'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# --- the null object, the shield ---


def test_no_tracker_does_nothing(tiny_cell, tmp_path):
    cell = tiny_cell()
    tracker = open_tracker({}, store=tmp_path)
    assert isinstance(tracker, NoTracker)
    tracker.start(attempt_of(cell, folder=tmp_path))
    tracker.log(1, time=1.0, loss=1)
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

    def start(self, attempt):
        self._do("start")

    def log(self, step, *, time, **metrics):
        self._do("log")

    def log_validation(self, step, *, time, **metrics):
        self._do("log_validation")

    def finish(self, record):
        self._do("finish")

    def report(self, comparison):
        self._do("report")


def told(tracker: Any, cell: Any, folder: Path) -> None:
    tracker.start(attempt_of(cell, folder=folder))
    tracker.log(1, time=1.0, loss=1)
    tracker.log(2, time=2.0, loss=1)
    tracker.finish(made(cell))
    tracker.report(None)


@pytest.mark.parametrize(
    ("failing", "calls"),
    [
        ("start", ["start", "report"]),
        ("log", ["start", "log", "report"]),
        ("finish", ["start", "log", "log", "finish", "report"]),
        ("report", ["start", "log", "log", "finish", "report"]),
        ("nothing", ["start", "log", "log", "finish", "report"]),
    ],
)
def test_a_failing_tracker_is_said_once_and_left_alone(failing, calls, tiny_cell, tmp_path, capsys):
    inner = Broken(failing)
    tracker = Shielded(inner, "mine")
    told(tracker, tiny_cell(), tmp_path)
    assert inner.calls == calls
    said = capsys.readouterr().err.splitlines()
    assert len(said) == tracker.failures == (failing != "nothing")
    if said:
        assert "tracker=mine" in said[0]
        assert "no route" in said[0]
        assert "left-bench track" in said[0]


def test_one_that_fails_costs_the_others_nothing(tiny_cell, tmp_path, capsys):
    broken, whole = Broken("start"), Broken("nothing")
    told(Together([Shielded(broken, "a"), Shielded(whole, "b")]), tiny_cell(), tmp_path)
    assert whole.calls == ["start", "log", "log", "finish", "report"]
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_next_cell_is_tried_again(tiny_cell, tmp_path):
    inner = Broken("log")
    tracker = Shielded(inner, "mine")
    for number in (1, 2):
        tracker.start(attempt_of(tiny_cell(), folder=tmp_path, number=number))
        tracker.log(1, time=1.0, loss=1)
    assert inner.calls == ["start", "log"] * 2


def test_an_interrupt_is_not_swallowed():
    class Interrupted(Broken):
        def log(self, step, *, time, **metrics):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Shielded(Interrupted("x"), "x").log(1, time=1.0)


def test_a_full_disk_costs_a_warning(tiny_cell, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    tracker = open_tracker({"jsonl": {"folder": str(tmp_path / "file" / "below")}}, store=tmp_path)
    told(tracker, tiny_cell(), tmp_path)
    assert (
        capsys.readouterr().err.count("tracker=jsonl failed") == 2
    )  # the cell, and the report that is a run of its own


def test_all_defaults_are_settings():
    check_trackers({"jsonl": defaults_of("jsonl"), "wandb": defaults_of("wandb")})

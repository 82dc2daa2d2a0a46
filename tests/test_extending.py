"""docs/extending.md, built as it says: its package is written from the page's code, and each of its commands is run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from left_bench.spec.record import Record

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
CHAPTER = PAGE.partition("\n## Code in a package of your own\n")[2]
COMMANDS = {
    title: re.findall(r"```bash\n(.+?)\n```", section, re.DOTALL)
    for title, _, section in (part.partition("\n") for part in CHAPTER.split("\n### ")[1:])
}
TINY = [
    *("precision=fp32", "hardware.threads=1", "training.steps=2", "training.batch_size=4", "eval.forgetting=false"),
    *("data.train_rows=12", "data.test_rows=6", "eval.max_new_tokens=3", "hardware.timeout=120"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory, compose_cell) -> Path:
    """The package of the page as pip leaves it (modules and metadata), its options, and a tiny base model."""
    from left_bench.pretrained import model_folder

    place = tmp_path_factory.mktemp("extending")
    for path, text in re.findall(r"```\w+\n# ((?:left_mine|options|pyproject)[\w./]*)\n(.+?)```", CHAPTER, re.DOTALL):
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_text(text, encoding="utf-8")
    project = tomllib.loads((place / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    metadata = place / f"left_mine-{project['version']}.dist-info"
    metadata.mkdir()
    described = {"Metadata-Version": "2.1", "Name": project["name"], "Version": project["version"]}
    (metadata / "METADATA").write_text("".join(f"{key}: {value}\n" for key, value in described.items()))
    groups = (
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in points.items())
        for group, points in project["entry-points"].items()
    )
    (metadata / "entry_points.txt").write_text("\n".join(groups))
    tiny = compose_cell("model=tiny_llama", "precision=fp32", "tracker=none")
    (place / "base").symlink_to(model_folder(tiny.model, dtype="float32"))
    return place


def left_bench(place: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(place), *sys.path])}
    command = [sys.executable, "-m", "left_bench", *arguments]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run(place: Path, title: str, *more: str) -> tuple[Record, str]:
    """The record and the Markdown report of the command that the page gives for an extension."""
    (command,) = COMMANDS[title]
    program, *arguments = shlex.split(command)
    assert program == "left-bench"
    name = title.split()[-1]
    given = {argument.partition("=")[0] for argument in arguments}
    settings = ["model.name_or_path=base", *TINY, "hardware=cpu", "tracker=none"]
    settings = [setting for setting in settings if setting.partition("=")[0] not in given]
    left_bench(place, *arguments, *settings, *more, f"runs_dir={name}/runs", f"reports_dir={name}/reports")
    (path,) = (place / name / "runs").glob("*/record.json")
    record = Record.model_validate_json(path.read_text(encoding="utf-8"))
    assert record.status == "ok", record.reason
    left_bench(place, "report", f"{name}/runs", "--out", f"{name}/out")
    (report,) = (place / name / "out").glob("*.md")
    return record, report.read_text(encoding="utf-8")


def test_the_page_shows_a_command_for_each_extension():
    assert [title for title, commands in COMMANDS.items() if len(commands) == 1] == list(COMMANDS)
    assert list(COMMANDS) == ["A metric", "A tracker", "A device", "A quantization", "A task"]


@pytest.mark.slow
def test_a_metric_added_as_the_page_says_is_in_record_and_report(place):
    record, report = run(place, "A metric")
    assert 0 <= record.metrics["first_word"] <= 1
    assert 0 <= record.metrics["base_first_word"] <= 1
    assert "| first word |" in report or "first_word" in report


@pytest.mark.slow
def test_a_tracker_added_as_the_page_says_is_told_of_the_cell(place):
    record, report = run(place, "A tracker")
    name, loss = (place / "tracker" / "runs" / "losses.txt").read_text(encoding="utf-8").rsplit(maxsplit=1)
    assert float(loss) == record.metrics["train_loss"]
    assert name and record.choices["peft"] in report


@pytest.mark.slow
def test_a_device_added_as_the_page_says_measures_the_cell(place):
    record, report = run(place, "A device")
    assert record.environment["effective"]["peak_memory"] == "unshared memory at a phase's end (USS)"
    assert record.environment["machine"]["device"] == "cpu"
    assert record.metrics["peak_memory_bytes"] > 0
    assert "peak memory" in report


@pytest.mark.slow
def test_a_quantization_added_as_the_page_says_is_measured_planned_and_kept_whole(place):
    record, report = run(place, "A quantization")
    assert record.metrics["quantized_modules"] == 14
    assert 8 < record.metrics["quantized_bits_per_param"] < 8.6
    assert 0 < record.metrics["quantization_error"] < 0.01
    assert "rows8" in report
    command = shlex.split(COMMANDS["A quantization"][0])[1:]
    out = left_bench(place, "plan", *command, "model.name_or_path=base", *TINY, "hardware=cpu", "--json")
    (planned,) = json.loads(out)
    assert planned["weights_bytes"] == record.memory_breakdown["weights"]


@pytest.mark.slow
def test_a_task_added_as_the_page_says_trains_and_scores_its_rows(place):
    record, report = run(place, "A task")
    assert record.environment["effective"]["architecture"] == "LlamaForSequenceClassification"
    assert 0 <= record.metrics["accuracy"] <= 1
    assert record.metrics["train_answer_tokens"] == 8  # one class for each row
    assert "accuracy" in report
    answers = [
        json.loads(line)["prediction"]
        for line in (place / "task" / "runs" / record.cell_id / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert all(answer and " " not in answer for answer in answers)


@pytest.mark.slow
def test_an_extension_that_cannot_be_imported_is_named_with_its_package(place, tmp_path):
    broken = tmp_path / "left_broken-1.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: left-broken\nVersion: 1\n")
    (broken / "entry_points.txt").write_text("[left_bench.trackers]\nnone_such = left_broken.gone:TRACKER\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", "left_bench", "peft=lora", "tracker=none", "+tracker.none_such={}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "the package left-broken adds 'none_such' to left_bench.trackers" in done.stderr

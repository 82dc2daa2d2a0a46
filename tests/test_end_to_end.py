"""Two real cells through the whole path, and their records against computations that share no code with them."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from left_bench import load_records
from left_bench.data import load_rows
from left_bench.pretrained import model_folder
from left_bench.spec.cell import Cell, Model
from left_bench.spec.record import METRICS, read_record

STEPS, ROWS = 3, 4
LAYERS, HIDDEN, INNER, KEYS, VOCABULARY = 2, 64, 128, 32, 512  # conf/model/tiny_llama.yaml


def left_bench(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    # a wandb service that another test of this process started is not this command's
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"WANDB_MODE": "offline", **variables}
    return subprocess.run(
        [sys.executable, "-m", "left_bench", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("end_to_end")


@pytest.fixture(scope="module")
def base_folder(place: Path) -> Path:
    """tiny_llama's weights as a local folder: quality is scored for pretrained models alone."""
    made = model_folder(tiny_model(), dtype="float32")
    folder = place / "tiny model"
    model = AutoModelForCausalLM.from_pretrained(made)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(made).save_pretrained(folder)
    return folder


def tiny_model() -> Model:
    import yaml

    root = Path(__file__).resolve().parents[1]
    return Model.model_validate(yaml.safe_load((root / "conf/model/tiny_llama.yaml").read_text()))


@pytest.fixture(scope="module")
def sweep(place: Path, base_folder: Path) -> dict[str, Any]:
    arguments = [
        "+sweep=smoke",
        f"model.name_or_path={base_folder}",
        "precision=fp32",
        f"training.steps={STEPS}",
        f"training.batch_size={ROWS}",
        "data.train_rows=24",
        "data.test_rows=8",
    ]
    done = left_bench(*arguments, cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    records = {record.choices["peft"]: record for record in map(read_record, place.glob("runs/*/record.json"))}
    return {"arguments": arguments, "done": done, "records": records}


def test_each_cell_has_an_ok_record_and_a_place_in_the_summary(sweep: dict[str, Any], place: Path) -> None:
    assert {name: record.status for name, record in sweep["records"].items()} == {"lora": "ok", "ia3": "ok"}
    for record in sweep["records"].values():
        assert (place / "runs" / record.cell_id / "record.json").is_file()
        assert record.cell_id in sweep["done"].stdout
        assert set(record.metrics) <= set(METRICS) | {f"base_{name}" for name in METRICS}
        names = [phase.name for phase in record.phases if phase.name != "peak"]  # the first cell alone measures it
        assert names[-6:] == ["attach", "train", "validate", "evaluate", "save", "merge"]
    assert (place / "reports" / "smoke.md").is_file()


def test_trainable_parameters_by_hand(sweep: dict[str, Any]) -> None:
    shapes = [(HIDDEN, HIDDEN), (HIDDEN, KEYS), (HIDDEN, KEYS), (HIDDEN, HIDDEN)]  # q, k, v, o
    shapes += [(HIDDEN, INNER), (HIDDEN, INNER), (INNER, HIDDEN)]  # gate, up, down
    lora = LAYERS * sum(16 * (inputs + outputs) for inputs, outputs in shapes)
    ia3 = LAYERS * (KEYS + KEYS + INNER)  # scales on keys, values and the down projection's input
    assert sweep["records"]["lora"].metrics["trainable_params"] == lora
    assert sweep["records"]["ia3"].metrics["trainable_params"] == ia3
    norms = HIDDEN * (2 * LAYERS + 1)
    base = 2 * VOCABULARY * HIDDEN + LAYERS * sum(inputs * outputs for inputs, outputs in shapes) + norms
    for record in sweep["records"].values():
        assert record.metrics["total_params"] == base
        assert record.metrics["weights_bytes"] == pytest.approx(4 * base, abs=4096)  # rotary buffers beside it


def test_tokens_by_tokenizing_again(sweep: dict[str, Any], base_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    record = sweep["records"]["lora"]
    cell = Cell.model_validate(record.config | {"choices": record.choices})
    rows, _ = load_rows(cell.data)
    order = random.Random(cell.seed).sample(range(len(rows)), len(rows))[: STEPS * ROWS]
    tokens = answers = 0
    for index in order:
        row = rows[index]
        answers += len(tokenizer(row.answer)["input_ids"]) + 1
        tokens += len(tokenizer(f"{cell.data.instruction}\n{row.prompt}\n{row.answer}")["input_ids"]) + 1
    for each in sweep["records"].values():
        assert each.metrics["train_answer_tokens"] == answers
        assert each.metrics["train_tokens"] == tokens
        assert each.metrics["train_steps"] == STEPS


def test_adapter_file_size_and_contents_on_disk(sweep: dict[str, Any], place: Path) -> None:
    for record in sweep["records"].values():
        files = list((place / "runs" / record.cell_id / "adapter").rglob("*.safetensors"))
        assert record.metrics["adapter_file_bytes"] == sum(file.stat().st_size for file in files)
        with safe_open(files[0], "pt") as saved:
            stored = sum(math.prod(saved.get_slice(key).get_shape()) for key in saved.keys())  # noqa: SIM118
        assert stored == record.metrics["trainable_params"]


def test_scores_follow_from_the_rows_on_disk(sweep: dict[str, Any], place: Path, base_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    for record in sweep["records"].values():
        lines = (place / "runs" / record.cell_id / "rows.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert len(rows) == 8
        tokens = sum(row["answer_tokens"] for row in rows)
        assert record.metrics["eval_loss"] == pytest.approx(sum(row["nll"] for row in rows) / tokens)
        assert record.metrics["base_eval_loss"] == pytest.approx(sum(row["base_nll"] for row in rows) / tokens)
        hits = [row["prediction"].strip() == row["reference"].strip() for row in rows]
        assert record.metrics["exact_match"] == sum(hits) / len(hits)
    # one row's base loss from transformers' own loss
    record = sweep["records"]["lora"]
    cell = Cell.model_validate(record.config | {"choices": record.choices})
    _, test = load_rows(cell.data)
    prompt = tokenizer(f"{cell.data.instruction}\n{test[0].prompt}\n")["input_ids"]
    answer = [*tokenizer(test[0].answer)["input_ids"], tokenizer.eos_token_id]
    labels = torch.tensor([[-100] * len(prompt) + answer])
    with torch.no_grad():
        loss = model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss.item()
    assert rows[0]["base_nll"] == pytest.approx(loss * len(answer), rel=1e-4)


def test_speed_follows_from_the_events(sweep: dict[str, Any], place: Path) -> None:
    record = sweep["records"]["lora"]
    events = [json.loads(line) for line in (place / "runs" / record.cell_id / "events.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"][1:]  # sweeps/smoke.yaml leaves out one
    rate = sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps)
    assert record.metrics["train_tokens_per_second"] == pytest.approx(rate)
    assert record.metrics["train_seconds"] >= sum(step["seconds"] for step in steps)
    assert record.metrics["wall_seconds"] > sum(phase.seconds for phase in record.phases)


def test_wandb_left_one_offline_run_for_each_cell(sweep: dict[str, Any], place: Path) -> None:
    runs = sorted((place / "runs" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == len(sweep["records"]) + 1  # and the sweep's own
    for record in sweep["records"].values():
        (run,) = [run for run in runs if f"{record.cell_id.rpartition('-')[2]}-1-" in run.name]
        content = run.read_bytes()
        assert b"train_tokens_per_second" in content
        assert b"learning_rate" in content


def test_running_again_keeps_what_is_done(sweep: dict[str, Any], place: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in place.glob("runs/*/record.json")}
    done = left_bench(*sweep["arguments"], cwd=place)
    assert done.returncode == 0
    assert done.stdout.count("kept from an earlier run") == 2
    assert {path: path.stat().st_mtime_ns for path in place.glob("runs/*/record.json")} == before


def test_the_report_is_made_again_from_records_alone(sweep: dict[str, Any], place: Path) -> None:
    done = left_bench("report", "runs", "--out", "again", cwd=place)
    assert done.returncode == 0, done.stderr
    assert (place / "again" / "smoke.md").read_text() == (place / "reports" / "smoke.md").read_text()
    frame = load_records(place / "runs")
    assert sorted(frame["choices.peft"]) == ["ia3", "lora"]
    text = (place / "again" / "smoke.md").read_text()
    for record in sweep["records"].values():
        assert record.cell_id in text


@pytest.fixture(scope="module")
def over_quantized(place: Path) -> dict[str, Any]:
    """A method that runs over quantized weights, and one that cannot, of random weights; by method."""
    done = left_bench(
        *("-m", "model=tiny_llama", "quantization=nf4_dq", "peft=lora,full", "training.steps=2", "tracker=none"),
        *("data.train_rows=16", "data.test_rows=4", "runs_dir=random", "reports_dir=random_reports"),
        cwd=place,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {record.choices["peft"]: record for record in map(read_record, place.glob("random/*/record.json"))}


def test_random_weights_are_measured_but_not_scored(over_quantized: dict[str, Any]) -> None:
    record = over_quantized["lora"]
    assert record.scores == []
    assert "eval_loss" not in record.metrics
    assert "exact_match" not in record.metrics
    assert record.metrics["quantized_modules"] == LAYERS * 7
    # half a byte a weight, a byte a block of 64, 4 bytes for 256 of those; both codebooks and the offset each time
    sizes = [HIDDEN * HIDDEN, HIDDEN * KEYS, HIDDEN * KEYS, HIDDEN * HIDDEN, *[HIDDEN * INNER] * 3]
    stored = sum(size / 2 + size / 64 + 4 * math.ceil(size / 64 / 256) + 4 * (16 + 256 + 1) for size in sizes)
    assert record.metrics["quantized_bits_per_param"] == pytest.approx(8 * stored / sum(sizes))
    assert record.metrics["train_tokens_per_second"] > 0


def test_an_unsupported_cell_is_a_row_and_no_failure(over_quantized: dict[str, Any], place: Path) -> None:
    assert {name: record.status for name, record in over_quantized.items()} == {"lora": "ok", "full": "unsupported"}
    (report,) = place.glob("random_reports/*.md")
    assert "full fine-tuning needs unquantized weights" in report.read_text()


@pytest.mark.slow
def test_the_default_model_learns(place: Path) -> None:
    """Packed, in bfloat16 where the machine has it: one attention kernel's rounding moves a loss by 0.2 nats there."""
    done = left_bench(
        *("peft=lora", "training=packed", "training.steps=20", "data.test_rows=32", "data.train_rows=256"),
        "runs_dir=real",
        cwd=place,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = place.glob("real/*/record.json")
    record = read_record(path)
    assert record.metrics["exact_match"] > record.metrics["base_exact_match"] + 0.15
    assert record.metrics["eval_loss"] < 0.5 * record.metrics["base_eval_loss"]
    assert record.metrics["trainable_params"] == 4_884_480  # 30 layers, r = 16, all seven linear layers
    assert record.metrics["total_params"] == 134_515_008
    assert record.environment["effective"]["batching"] == "packed", record.environment["effective"]


def test_a_model_of_the_hub_from_its_local_copy(place: Path, base_folder: Path) -> None:
    """No network: the hub's own cache layout, as a download leaves it."""
    commit, home = "b" * 40, place / "hub home"
    copy = home / "hub" / "models--someone--tiny"
    (copy / "refs").mkdir(parents=True)
    (copy / "refs" / "main").write_text(commit)
    (copy / "snapshots").mkdir()
    shutil.copytree(base_folder, copy / "snapshots" / commit)
    arguments = [
        *("model.name_or_path=someone/tiny", "quantization=int8", "peft=lora", "precision=fp32", "tracker=none"),
        *("training.steps=1", "data.train_rows=8", "data.test_rows=4", "runs_dir=of_the_hub"),
    ]
    done = left_bench(*arguments, cwd=place, HF_HOME=str(home), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = place.glob("of_the_hub/*/record.json")
    record = read_record(path)
    assert record.environment["effective"]["revision"] == commit
    assert record.config["model"]["name_or_path"] == "someone/tiny"
    assert 0 < record.metrics["quantization_error"] < 0.05  # against the copy's own weights

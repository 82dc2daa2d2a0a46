"""A real sweep of three cells (one ok, one failing, one unsupported), read back from every tracker's own store.

The sweep runs once, with every tracker that is installed at once and with secrets in its environment; then its records
are told again, into the same stores.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from recorded.build import make_record, write_runs
from test_tracker import contents

from left_bench.spec.record import Record, read_record
from left_bench.tracker import TRACKERS, Attempt, replay

PACKAGES = {"mlflow": ("mlflow", "sqlalchemy", "alembic"), "jsonl": ()}
INSTALLED = [
    name for name in TRACKERS if all(importlib.util.find_spec(item) for item in PACKAGES.get(name, (name,)))
]  # fmt: skip
SECRETS = {"WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567", "HF_TOKEN": "hf_secretsecretsecretsecretsecret"}
BROKEN = """# A start that looks for more directions than the training rows have.
name: broken
_target_: peft.LoraConfig
learning_rate: 1e-3
init_text: null
config:
  r: 4096
  target_modules: [q_proj]
  init_lora_weights: eva
  eva_config: {_target_: peft.EvaConfig, rho: 1.0}
"""


class Swept(NamedTuple):
    place: Path
    attempts: dict[str, Attempt]
    records: dict[str, Record]
    before: dict[str, Any]
    after: dict[str, Any]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "MLFLOW_"))}
    environment |= SECRETS | {"WANDB_MODE": "offline", "TRACKIO_DIR": str(cwd / "trackio")}
    command = [sys.executable, "-m", "left_bench", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    place = tmp_path_factory.mktemp("tracked")
    (place / "mine" / "peft").mkdir(parents=True)
    (place / "mine" / "peft" / "broken.yaml").write_text(BROKEN)
    done = run(
        *("--config-dir=mine", "-m", "model=tiny_llama", "quantization=nf4", "precision=fp32", "hardware=cpu"),
        *("peft=lora,broken,full", "training.steps=3", "training.batch_size=4", "data.train_rows=12"),
        *(
            "data.test_rows=4",
            "eval.points=3",
            "eval.forgetting=false",
            "eval.max_new_tokens=3",
            "hydra.job.name=three",
        ),
        f"tracker=[{','.join(INSTALLED)}]",
        cwd=place,
    )
    assert done.returncode == 1, done.stdout + done.stderr  # one cell failed
    assert "warning: tracker" not in done.stderr, done.stderr
    records = {item.choices["peft"]: item for item in map(read_record, place.glob("runs/*/record.json"))}
    assert {name: record.status for name, record in records.items()} == {
        "lora": "ok",
        "broken": "failed",
        "full": "unsupported",
    }
    before = {name: READERS[name](place) for name in INSTALLED}
    again = run("track", "runs", "--tracker", ",".join(INSTALLED), cwd=place)
    assert again.returncode == 0, again.stdout + again.stderr
    after = {name: READERS[name](place) for name in INSTALLED}
    attempts = {name: Attempt.of(record, run_dir=place) for name, record in records.items()}
    return Swept(place, attempts, records, before, after)


# What a store holds, run by run, in one shape: id -> status, losses by step, eval loss or None, kind of run.


def read_wandb(place: Path) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = {}
    for path in place.glob("runs/wandb/offline-run-*/*.wandb"):
        item = contents(path)
        assert item["run"].run_id not in result, "the same run twice"
        result[item["run"].run_id] = {
            "kind": item["run"].job_type,
            "group": item["run"].run_group,
            "status": item["summary"].get("status"),
            "losses": {row["train/step"]: row["train/loss"] for row in item["history"] if "train/loss" in row},
            "curve": {
                row["eval/step"]: row["eval/validation_loss"]
                for row in item["history"]
                if "eval/validation_loss" in row
            },
            "metrics": {key: value for key, value in item["summary"].items() if isinstance(value, (int, float))},
            "method": item["config"].get("axis.peft"),
            "whole": item,
        }
    return result


def read_jsonl(place: Path) -> dict[str, dict[str, Any]]:
    results = {}
    for path in place.glob("runs/jsonl/*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        if lines[0]["kind"] == "report":
            [report] = lines
            results[path.stem] = {"kind": "report", "group": report["group"], "whole": report}
            continue
        start, *steps, finish = lines
        results[path.stem] = {
            "kind": "train",
            "group": start["group"],
            "status": finish["summary"]["status"],
            "losses": {line["step"]: line["loss"] for line in steps if line["kind"] == "step"},
            "curve": {line["step"]: line["validation_loss"] for line in steps if line["kind"] == "validation"},
            "metrics": finish["summary"],
            "method": start["config"]["axis.peft"],
        }
    return results


def read_tensorboard(place: Path) -> dict[str, dict[str, Any]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    results = {}
    for folder in place.glob("runs/tensorboard/*/*"):
        [path] = folder.iterdir()
        events = EventAccumulator(str(path))
        events.Reload()
        tags = events.Tags()
        if folder.name.startswith("report"):
            text = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in tags["tensors"]}
            results[folder.name] = {
                "kind": "report",
                "group": folder.parent.name,
                "whole": {"images": tags["images"], **text},
            }
            continue
        data = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
        axes = HParamsPluginData.FromString(data).session_start_info.hparams
        scalars = {tag: events.Scalars(tag) for tag in tags["scalars"]}
        slug = next(part for part in ("_s0-",) if part in folder.name)
        results[folder.name.partition(slug)[2]] = {
            "kind": "train",
            "group": folder.parent.name,
            "status": axes["status"].string_value,
            "losses": {item.step: item.value for item in scalars.get("train/loss", [])},
            "curve": {item.step: item.value for item in scalars.get("eval/validation_loss", [])},
            "metrics": {tag.removeprefix("record/"): values[-1].value for tag, values in scalars.items()},
            "method": axes["axis.peft"].string_value,
        }
    return results


def read_mlflow(place: Path) -> dict[str, dict[str, Any]]:
    database = sqlite3.connect(place / "runs" / "mlflow" / "mlflow.db")
    result: dict[str, dict[str, Any]] = {}
    runs = "SELECT run_uuid, status FROM runs WHERE lifecycle_stage = 'active'"
    for key, ended in database.execute(runs).fetchall():
        tags = dict(database.execute("SELECT key, value FROM tags WHERE run_uuid = ?", [key]).fetchall())
        params = dict(database.execute("SELECT key, value FROM params WHERE run_uuid = ?", [key]).fetchall())
        rows = database.execute("SELECT key, value, step FROM metrics WHERE run_uuid = ?", [key]).fetchall()
        assert tags["left_bench.id"] not in result, "the same run twice"
        result[tags["left_bench.id"]] = {
            "kind": tags["left_bench.job_type"],
            "group": tags["left_bench.group"],
            "status": tags.get("left_bench.status"),
            "ended": ended,
            "losses": {step: value for name, value, step in rows if name == "train/loss"},
            "curve": {step: value for name, value, step in rows if name == "eval/validation_loss"},
            "metrics": {name: value for name, value, _ in rows},
            "method": params.get("axis.peft"),
            "files": sorted(path.name for path in place.glob(f"runs/mlflow/artifacts/{key}/artifacts/*")),
        }
    return result


def read_trackio(place: Path) -> dict[str, dict[str, Any]]:
    database = sqlite3.connect(place / "trackio" / "left_bench.db")
    result: dict[str, dict[str, Any]] = {}
    for key, text in database.execute("SELECT run_id, config FROM configs").fetchall():
        rows = [
            (step, json.loads(metrics))
            for step, metrics in database.execute("SELECT step, metrics FROM metrics WHERE run_id = ?", [key])
        ]
        config = json.loads(text)
        result[key] = {
            "kind": "report" if key.startswith("report") else "train",
            "group": config["_Group"],
            "status": config.get("status"),
            "losses": {step: row["train/loss"] for step, row in rows if "train/loss" in row},
            "curve": {step: row["eval/validation_loss"] for step, row in rows if "eval/validation_loss" in row},
            "metrics": {name: value for _, row in rows for name, value in row.items()},
            "rows": len(rows),
            "method": config.get("axis.peft"),
        }
    return result


READERS = {
    "wandb": read_wandb,
    "trackio": read_trackio,
    "mlflow": read_mlflow,
    "tensorboard": read_tensorboard,
    "jsonl": read_jsonl,
}
EVERY = [
    pytest.param(
        name, marks=pytest.mark.skipif(name not in INSTALLED, reason=f"pip install 'left-bench[{name}]' for this store")
    )
    for name in TRACKERS
]


@pytest.mark.parametrize("told", ["before", "after"])
@pytest.mark.parametrize("name", EVERY)
def test_the_store_holds_the_three_cells_and_the_report(name: str, told: str, swept: Swept) -> None:
    runs = getattr(swept, told)[name]
    cells = {key: run for key, run in runs.items() if run["kind"] == "train"}
    assert set(cells) == {attempt.id for attempt in swept.attempts.values()}
    assert len(runs) == 4  # and the sweep's own: telling it twice made no other
    groups = {run["group"] for run in runs.values()}
    assert len(groups) == 1 and groups.pop().startswith("three-20")
    for method, attempt in swept.attempts.items():
        run, record = cells[attempt.id], swept.records[method]
        assert (run["method"], run["status"]) == (method, record.status)
        for metric, value in record.metrics.items():
            assert run["metrics"][metric] == pytest.approx(value, rel=1e-6), metric
    events = (swept.place / "runs" / swept.records["lora"].cell_id / "events.jsonl").read_text().splitlines()
    losses = {item["step"]: item["loss"] for item in map(json.loads, events) if item["event"] == "step"}
    assert len(losses) == 3
    assert cells[swept.attempts["lora"].id]["losses"] == pytest.approx(losses, rel=1e-6)
    assert cells[swept.attempts["full"].id]["losses"] == {}
    curve = {point.step: point.validation_loss for point in swept.records["lora"].curve}
    assert len(curve) == 3
    assert cells[swept.attempts["lora"].id]["curve"] == pytest.approx(curve, rel=1e-6)


def test_wandb_ends_the_runs_as_the_cells_ended(swept: Swept) -> None:
    ends = {run["method"]: run["whole"]["exit"] for run in swept.before["wandb"].values() if run["kind"] == "train"}
    assert ends == {"lora": 0, "broken": 1, "full": 0}
    wholes = {run["method"]: run["whole"] for run in swept.before["wandb"].values()}
    assert "EVA looks for 4096 directions" in wholes["broken"]["summary"]["reason"]
    assert "unquantized" in wholes["full"]["summary"]["reason"]
    assert wholes["lora"]["config"]["environment.machine.cores"] >= 1
    assert {kind for kind, _ in wholes["lora"]["artifacts"]} == {"record", "adapter"}
    steps = [row for row in wholes["lora"]["history"] if "train/step" in row]
    tokens = [row["train/tokens"] for row in steps]
    assert tokens == sorted(tokens) and len(set(tokens)) == 3
    assert all({"train/learning_rate", "train/gradient_norm", "train/tokens_per_second"} <= set(row) for row in steps)
    assert max(row["train/memory_gib"] for row in steps) <= swept.records["lora"].metrics["peak_memory_bytes"] / 2**30


def test_wandbs_report_run_has_table_page_and_plots(swept: Swept) -> None:
    [run] = [run for run in swept.before["wandb"].values() if run["kind"] == "report"]
    [row] = [row for row in run["whole"]["history"] if "comparison/nrows" in row]
    assert (row["comparison/nrows"], row["report/_type"]) == (3, "html-file")
    plots = {value for key, value in row.items() if key.startswith("plot/") and key.endswith("/_type")}
    assert plots == {"image-file"}
    [table] = swept.place.glob(f"runs/wandb/*{run['whole']['run'].run_id}/files/media/table/comparison*.json")
    told = json.loads(table.read_text())
    methods = [line[told["columns"].index("axis.peft")] for line in told["data"]]
    assert methods == ["lora", "broken", "full"]
    assert [line[told["columns"].index("status")] for line in told["data"]] == ["ok", "failed", "unsupported"]
    [page] = swept.place.glob(f"runs/wandb/*{run['whole']['run'].run_id}/files/media/html/*.html")
    assert "unquantized" in page.read_text()
    assert ("report", "report-three") in [(kind, name) for kind, name in run["whole"]["artifacts"]]


@pytest.mark.skipif("mlflow" not in INSTALLED, reason="pip install 'left-bench[mlflow]' for this store")
def test_mlflow_ends_runs_and_keeps_tables(swept: Swept) -> None:
    runs = {run["method"]: run for run in swept.after["mlflow"].values()}
    assert {name: run["ended"] for name, run in runs.items()} == {
        "lora": "FINISHED",
        "broken": "FAILED",
        "full": "FINISHED",
        None: "FINISHED",
    }
    assert {"comparison.json", "three.md"} <= set(runs[None]["files"])
    assert any(name.endswith(".png") for name in runs[None]["files"])


@pytest.mark.skipif("trackio" not in INSTALLED, reason="pip install 'left-bench[trackio]' for this store")
def test_trackios_rows_are_told_once(swept: Swept) -> None:
    rows = {run["method"]: run["rows"] for run in swept.after["trackio"].values()}
    assert rows == {"lora": 7, "broken": 1, "full": 1, None: 1}  # three steps, three points of the curve


@pytest.mark.skipif("tensorboard" not in INSTALLED, reason="pip install 'left-bench[tensorboard]' for this store")
def test_tensorboard_shows_the_report(swept: Swept) -> None:
    [report] = [run["whole"] for run in swept.after["tensorboard"].values() if run["kind"] == "report"]
    assert report["images"]
    assert "unquantized" in report["comparison/text_summary" if "comparison/text_summary" in report else "comparison"]


@pytest.mark.skipif("tensorboard" not in INSTALLED, reason="pip install 'left-bench[tensorboard]' for this store")
def test_tensorboards_table_opens_with_the_numbers_that_matter(swept: Swept) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    for path in swept.place.glob("runs/tensorboard/*/*_s0-*/events.*"):
        events = EventAccumulator(str(path))
        events.Reload()
        told = HParamsPluginData.FromString(events.PluginTagToContent("hparams")["_hparams_/experiment"]).experiment
        tags = [metric.name.tag for metric in told.metric_infos]
        assert tags[:3] == ["record/eval_loss", "record/exact_match", "record/peak_memory_gib"]
        assert {"axis.peft", "status"} <= {axis.name for axis in told.hparam_infos if axis.differs}
        assert ("record/peak_memory_bytes" in events.Tags()["scalars"]) == (path.parent.name.startswith("lora_"))


def test_no_secret_is_in_any_file(swept: Swept) -> None:
    searched = 0
    for path in swept.place.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            searched += 1
            for name, value in SECRETS.items():
                assert value.encode() not in data, f"{name} in {path}"
    assert searched > 20


def test_a_record_that_cannot_be_told_is_exit_code_1(swept: Swept) -> None:
    (swept.place / "file").write_text("")
    done = run("track", "runs", "--tracker", "jsonl", "--set", "folder=file/below", cwd=swept.place)
    assert done.returncode == 1
    assert "tracker=jsonl failed" in done.stderr
    assert "Traceback" not in done.stderr


def test_one_sweep_of_a_folder_is_told(swept: Swept, left_bench: Any, tmp_path: Path) -> None:
    runs = swept.place / "runs"
    manifest = json.loads((runs / "sweeps" / "three.json").read_text())
    part = tmp_path / "runs"
    (part / "sweeps").mkdir(parents=True)
    for cell in manifest["cells"]:
        (part / cell).symlink_to(runs / cell)
    (part / "sweeps" / "three.json").write_text(json.dumps(manifest | {"cells": manifest["cells"][:1]}))
    (part / "sweeps" / "all.json").write_text(json.dumps(manifest | {"name": "all"}))
    answer = left_bench("track", str(part), "--tracker", "jsonl", "--sweep", "three")
    assert answer.code == 0, answer
    assert len(list(part.glob("jsonl/*.jsonl"))) == 2  # the one cell and the report
    answer = left_bench("track", str(part), "--tracker", "jsonl", "--sweep", "thre")
    assert answer.code == 2 and "did you mean 'three'?" in answer.err


@pytest.mark.parametrize("tracker", ["tensorboard", "jsonl"])
def test_a_records_names_do_not_lead_out_of_the_store(tracker, tmp_path):
    """`left-bench track` replaces what is there of a run, and a record is text that nobody vouches for."""
    runs, precious = tmp_path / "runs", tmp_path / "victim" / "precious"
    precious.mkdir(parents=True)
    (precious / "file").write_text("kept")
    for launch in ("x/../../../../victim", "/../../../../victim", "../../victim/precious"):
        for sweep in (None, "..", "../.."):
            record = make_record(provenance={"launch": launch, "sweep": sweep})
            write_runs(runs, [record])
            replay.main([str(runs), "--tracker", tracker])
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "victim"}
    assert [path.name for path in precious.iterdir()] == ["file"]

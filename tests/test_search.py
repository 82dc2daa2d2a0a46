"""A search by Optuna: trials are cells, what has no value is a failed trial, the report has them all."""

from __future__ import annotations

import json

import pytest
import yaml

from left_bench.launch.job import Ended
from left_bench.launch.run_cell import store_received
from left_bench.spec.record import RECORD_NAME, Record, read_record

SEARCH = [
    *("+sweep=learning_rate", "model=tiny_llama", "precision=fp32", "hardware=cpu", "tracker=none"),
    *("objective=train_loss", "hydra.sweeper.n_trials=6", "hydra.sweeper.sampler.n_startup_trials=2"),
]


def ended(**changes) -> Record:
    fields = {
        "cell_id": "a-cell",
        "status": "ok",
        "started_at": "2026-01-01T00:00:00+00:00",
        "finished_at": "2026-01-01T00:00:01+00:00",
        "choices": {},
        "config": {},
        "metrics": {"eval_loss": 0.5},
    }
    return Record(**fields | changes)


@pytest.fixture
def runs(monkeypatch):
    """Learning rates that were tried; above 1e-2 a cell diverges, else its loss is least at 1e-3."""
    import math

    tried: list[float] = []

    def run_isolated(cell, run_dir, *, on_event):
        run_dir.mkdir(parents=True, exist_ok=True)
        tried.append(cell.learning_rate)
        diverged = cell.learning_rate > 1e-2
        return ended(
            cell_id=cell.id,
            status="diverged" if diverged else "ok",
            reason="the loss is not finite" if diverged else None,
            choices=cell.choices,
            config=cell.sections(),
            metrics={"train_loss": abs(math.log10(cell.learning_rate) + 3)},
        )

    monkeypatch.setattr("left_bench.launch.run_cell.run_isolated", run_isolated)
    return tried


def test_a_learning_rate_is_searched_for(runs, left_bench, tmp_path, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs left-bench[optuna]")
    monkeypatch.chdir(tmp_path)
    answer = left_bench(*SEARCH)
    assert len(runs) == 6, answer
    assert all(1e-5 <= rate <= 1e-1 for rate in runs)
    records = [read_record(path) for path in tmp_path.glob(f"runs/*/{RECORD_NAME}")]
    assert {record.status for record in records} == {"ok", "diverged"}
    assert answer.code == 1  # a diverged cell is said, and the search went on
    best = yaml.safe_load((tmp_path / "runs" / "sweeps" / "optimization_results.yaml").read_text())
    value = min(record.metrics["train_loss"] for record in records if record.status == "ok")
    assert best["best_value"] == pytest.approx(value)
    failed = sum(record.status == "diverged" for record in records)
    chosen = f"{best['best_params']['++training.learning_rate']}"
    said = f"best: training.learning_rate={chosen} (train_loss {value:.6g}); {failed} of 6 without a value"
    assert said in answer.out
    assert "A new study" not in answer.err
    manifest = json.loads((tmp_path / "runs" / "sweeps" / "learning_rate.json").read_text())
    assert sorted(manifest["cells"]) == sorted(record.cell_id for record in records)
    assert (tmp_path / "reports" / "learning_rate.md").is_file()
    left_bench(*SEARCH)  # the same seed tries the same rates: what is `ok` is kept
    assert len(runs) == 6 + sum(record.status == "diverged" for record in records)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("objective=eval_loss", "random weights are not scored"),
        ("objective=eval_los", "did you mean 'eval_loss'"),
        ("objective=exact_match", "set hydra.sweeper.direction=maximize"),
    ],
)
def test_a_search_for_what_there_is_not(override, said, runs, left_bench, tmp_path, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs left-bench[optuna]")
    monkeypatch.chdir(tmp_path)
    answer = left_bench(*(item for item in SEARCH if not item.startswith("objective")), override)
    assert answer.code == 2
    assert said in answer.err
    assert runs == []


def test_a_missing_plugin_names_its_extra(left_bench, monkeypatch):
    monkeypatch.setattr("left_bench.grid.command_line.is_installed", lambda module: False)
    for arguments, extra in [
        (["+sweep=learning_rate"], "optuna"),
        (["-m", "seed=0,1", "hydra/launcher=joblib"], "joblib"),
        (["-m", "seed=0,1", "hydra/launcher=submitit_slurm"], "slurm"),
        (["-m", "seed=0,1", "hydra/launcher=ray"], "ray"),
    ]:
        answer = left_bench(*arguments)
        assert answer.code == 2
        assert f"pip install 'left-bench[{extra}]'" in answer.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["hydra/launcher=submitit_slurm"], "name the device with hardware=cpu"),
        (["hydra/launcher=ray", "+hydra.launcher.ray.init.address=auto"], "name the device with hardware=cpu"),
        (["hydra/launcher=ray", "hardware=cuda"], r"+hydra.launcher.ray.remote.num_gpus=1"),
    ],
)
def test_what_a_launcher_must_be_told(arguments, said, left_bench, tmp_path, monkeypatch):
    plugin = "ray" if "ray" in arguments[0] else "submitit"
    pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher", reason="needs the launcher's extra")
    monkeypatch.chdir(tmp_path)
    answer = left_bench("-m", "seed=0,1", "model=tiny_llama", "tracker=none", *arguments)
    assert answer.code == 2, answer
    assert said in answer.err


def test_a_job_is_a_number_or_fails():
    assert float(Ended.of(ended(), objective="eval_loss", sent_back=False)) == 0.5
    for record, objective in [(ended(status="diverged"), "eval_loss"), (ended(), "bleu")]:
        with pytest.raises(ValueError, match="has no value"):
            float(Ended.of(record, objective=objective, sent_back=False))


def test_records_come_back_where_no_storage_is_shared(tmp_path):
    record = ended()
    sent = Ended.of(record, objective="eval_loss", sent_back=True)
    assert sent.cell_id == "a-cell"
    assert Ended.of(ended(cell_id="b"), objective="eval_loss", sent_back=False).record is None
    store_received(sent.record, tmp_path)
    assert read_record(tmp_path / "a-cell" / RECORD_NAME) == record
    assert [path.name for path in tmp_path.iterdir()] == ["a-cell"]
    store_received(ended(metrics={}, finished_at="2025-01-01").model_dump_json(), tmp_path)
    assert read_record(tmp_path / "a-cell" / RECORD_NAME) == record  # an older one does not take its place

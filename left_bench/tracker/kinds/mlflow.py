"""MLflow: a local sqlite file unless a server is named; runs carry the tag `left_bench.id`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from left_bench.spec.record import RECORD_NAME, Record
from left_bench.spec.run_files import ADAPTER_NAME
from left_bench.tracker.base import (
    SAMPLE_COLUMNS,
    Attempt,
    Comparison,
    TrackerKind,
    curve_copies,
    ended_well,
    flat_environment,
    numbers_of,
    sample_rows,
)

_ID_TAG = "left_bench.id"
_LONGEST_PARAM, _LONGEST_TAG, _PARAMS_AT_ONCE = 6000, 5000, 100


class MlflowTracker:
    """Runs of the experiment `project`, each with steps as metrics, the cell as parameters and tables as artifacts."""

    def __init__(self, *, store: Path, project: str, tracking_uri: str | None, artifacts: bool) -> None:
        self._store, self._project, self._uri, self._artifacts = store, project, tracking_uri, artifacts
        self._client: Any = None
        self._run_id = ""
        self._attempt: Attempt | None = None

    def start(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._open(attempt.id, name=attempt.name, group=attempt.group, job_type="train", tags=attempt.tags)
        self._params(_flat_params(attempt.configuration()))

    def log(self, step: int, *, time: float, **metrics: float) -> None:
        self._metrics({f"train/{name}": value for name, value in metrics.items()} | {"train/step": step}, step, time)

    def log_validation(self, step: int, *, time: float, **metrics: float) -> None:
        self._metrics({f"eval/{name}": value for name, value in metrics.items()} | {"eval/step": step}, step, time)
        # a chart of MLflow has steps or the clock below it: these have tokens and seconds of training
        for name, value, axis in curve_copies(metrics):
            self._metrics({f"eval/{name}": value}, int(metrics[axis]), time)

    def finish(self, record: Record) -> None:
        assert self._attempt is not None
        self._params(flat_environment(record).items())
        finished = datetime.fromisoformat(record.finished_at).timestamp() if "T" in record.finished_at else 0.0
        self._metrics(numbers_of(record), 0, finished)
        self._client.set_tag(self._run_id, "left_bench.status", record.status)
        if record.reason:
            self._client.set_tag(self._run_id, "left_bench.reason", record.reason[:_LONGEST_TAG])
        if record.samples:
            self._table("samples.json", list(SAMPLE_COLUMNS), sample_rows(record))
        if self._artifacts:
            self._keep(self._attempt.run_dir, record)
        self._client.set_terminated(self._run_id, "FINISHED" if ended_well(record) else "FAILED")

    def report(self, comparison: Comparison) -> None:
        self._open(comparison.id, name=comparison.name, group=comparison.group, job_type="report", tags=["report"])
        self._params([("sweep_name", comparison.sweep), ("launch", comparison.launch), ("command", comparison.command)])
        self._table("comparison.json", comparison.columns, comparison.rows)
        for path in (comparison.markdown, *comparison.plots):
            self._client.log_artifact(self._run_id, str(path))
        self._client.set_terminated(self._run_id, "FINISHED")

    def _open(self, run_id: str, *, name: str, group: str | None, job_type: str, tags: list[str]) -> None:
        experiment = self._experiment()
        # mlflow gives ids itself: what has ours already is replaced
        for run in self._client.search_runs([experiment], f"tags.`{_ID_TAG}` = '{run_id}'"):
            self._client.delete_run(run.info.run_id)
        known = {_ID_TAG: run_id, "left_bench.group": group or "", "left_bench.job_type": job_type}
        known |= {f"left_bench.tag.{tag}"[:250]: "true" for tag in map(_safe, tags)}
        self._run_id = self._client.create_run(experiment, run_name=name, tags=known).info.run_id

    def _experiment(self) -> str:
        """The experiment's id; the client is opened with the first run, for importing mlflow takes seconds."""
        if self._client is None:
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a benchmark tells nobody but its user
            logging.getLogger("alembic").setLevel(logging.WARNING)
            from mlflow import MlflowClient

            logging.getLogger("mlflow").setLevel(logging.WARNING)
            self._client = MlflowClient(
                tracking_uri=self._uri or os.environ.get("MLFLOW_TRACKING_URI") or self._local()
            )
        experiment_by_name = self._client.get_experiment_by_name(self._project)
        if experiment_by_name is not None:
            return str(experiment_by_name.experiment_id)
        local = None if self._uri or os.environ.get("MLFLOW_TRACKING_URI") else self._folder() / "artifacts"
        where = local.as_uri() if local else None
        return str(self._client.create_experiment(self._project, artifact_location=where))

    def _folder(self) -> Path:
        return (self._store / "mlflow").resolve()

    def _local(self) -> str:
        self._folder().mkdir(parents=True, exist_ok=True)
        return f"sqlite:///{self._folder() / 'mlflow.db'}"

    def _params(self, items: Iterable[tuple[str, Any]]) -> None:
        from mlflow.entities import Param

        params = [Param(_safe(key)[:250], _text(value)[:_LONGEST_PARAM]) for key, value in items]
        for at in range(0, len(params), _PARAMS_AT_ONCE):
            self._client.log_batch(self._run_id, params=params[at : at + _PARAMS_AT_ONCE])

    def _metrics(self, values: dict[str, float], step: int, time: float) -> None:
        from mlflow.entities import Metric

        self._client.log_batch(
            self._run_id, metrics=[Metric(_safe(key), value, int(time * 1000), step) for key, value in values.items()]
        )

    def _table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """In the form of `mlflow.log_table`, which would want pandas for it."""
        self._client.log_dict(self._run_id, {"columns": columns, "data": rows}, name)
        self._client.set_tag(self._run_id, "mlflow.loggedArtifacts", json.dumps([{"path": name, "type": "table"}]))

    def _keep(self, run_dir: Path, record: Record) -> None:
        if (run_dir / RECORD_NAME).is_file():
            self._client.log_artifact(self._run_id, str(run_dir / RECORD_NAME))
        if record.status == "ok" and (run_dir / ADAPTER_NAME).is_dir():
            self._client.log_artifacts(self._run_id, str(run_dir / ADAPTER_NAME), ADAPTER_NAME)


TRACKER = TrackerKind(
    make=MlflowTracker,
    settings={"project": "left_bench", "tracking_uri": None, "artifacts": False},
    packages=("mlflow", "sqlalchemy", "alembic"),
    extra="mlflow",
)


def _flat_params(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    result: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            result += _flat_params(value, f"{prefix}{key}.")
        else:
            result.append((f"{prefix}{key}", value))
    return result


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _safe(name: str) -> str:
    """A name mlflow takes: letters, digits and `_-./: `."""
    return "".join(character if character.isalnum() or character in "_-./: " else "_" for character in name)

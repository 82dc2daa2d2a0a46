"""Weights & Biases: online when there is a login, offline otherwise; `WANDB_MODE` decides over both."""

from __future__ import annotations

import html
import os
import shutil
from pathlib import Path
from typing import Any

from left_bench.record import RECORD_NAME, Record
from left_bench.tracker.base import (
    SAMPLE_COLUMNS,
    Attempt,
    Comparison,
    ended_well,
    flat_environment,
    sample_rows,
    summary_of,
)

_LONGEST_TAG = 64
_ADAPTER_NAME = "adapter"


class WandbTracker:
    """Runs of the project `project`; offline ones lie in `<store>/wandb`, and `wandb sync` sends them later."""

    def __init__(self, *, store: Path, project: str, entity: str | None, artifacts: bool) -> None:
        self._store, self._project, self._entity, self._artifacts = store, project, entity, artifacts
        self._run: Any = None
        self._attempt: Attempt | None = None

    def start(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._run = self._open(
            run_id=attempt.id,
            name=attempt.name,
            group=attempt.group,
            job_type="train",
            tags=attempt.tags,
            config=attempt.configuration(),
        )
        for axis in ("train/step", "train/tokens"):
            self._run.define_metric(axis)
        self._run.define_metric("train/*", step_metric="train/step")
        self._run.define_metric("train/loss", step_metric="train/tokens", summary="min")
        self._run.define_metric("train/memory_bytes", step_metric="train/step", summary="max")

    def log(self, step: int, *, time: float, **metrics: float) -> None:
        row = {f"train/{name}": value for name, value in metrics.items()}
        self._run.log({"train/step": step, "_timestamp": time} | row)

    def finish(self, record: Record) -> None:
        import wandb

        assert self._attempt is not None
        self._run.summary.update(summary_of(record))
        self._run.config.update(flat_environment(record))
        self._run.tags = (*self._run.tags, record.status)
        rows: list[Any] = sample_rows(record)
        if rows:
            self._run.log({"samples": wandb.Table(columns=list(SAMPLE_COLUMNS), data=rows)})
        if self._artifacts:
            self._keep(record, self._attempt)
        self._close(failed=not ended_well(record))

    def report(self, comparison: Comparison) -> None:
        import wandb

        self._run = self._open(
            run_id=comparison.id,
            name=comparison.name,
            group=comparison.group,
            job_type="report",
            tags=["report"],
            config={"sweep_name": comparison.sweep, "launch": comparison.launch, "command": comparison.command},
        )
        text = comparison.markdown.read_text(encoding="utf-8")
        page = f"<pre style='white-space: pre-wrap'>{html.escape(text)}</pre>"
        rows: list[Any] = comparison.rows
        shown: dict[str, Any] = {
            "comparison": wandb.Table(columns=list(comparison.columns), data=rows, allow_mixed_types=True),
            "report": wandb.Html(page, inject=False),
        }
        shown |= {f"plot/{path.stem}": wandb.Image(str(path)) for path in comparison.plots}
        self._run.log(shown)
        if self._artifacts:
            artifact = wandb.Artifact(_artifact_name(f"report-{comparison.sweep}"), type="report")
            for path in (comparison.markdown, *comparison.plots):
                artifact.add_file(str(path))
            self._run.log_artifact(artifact)
        self._close(failed=False)

    def _open(self, *, run_id: str, tags: list[str], **named: Any) -> Any:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
        self._store.mkdir(parents=True, exist_ok=True)
        for folder in (self._store / "wandb").glob(f"offline-run-*-{run_id}"):
            shutil.rmtree(folder, ignore_errors=True)  # an earlier telling of this very run
        return wandb.init(
            project=self._project,
            entity=self._entity,
            dir=str(self._store),
            id=run_id,  # without `resume` a run that has the id already is written anew
            tags=[tag[:_LONGEST_TAG] for tag in tags],
            mode=mode,
            reinit="finish_previous",
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,  # host, user, command line: nothing a reader of the numbers needs
                x_save_requirements=False,
            ),
            **named,
        )

    def _keep(self, record: Record, attempt: Attempt) -> None:
        """The record and what training produced, as artifacts; files are not copied, so they must stay until synced."""
        import wandb

        path = attempt.run_dir / RECORD_NAME
        if path.is_file():
            self._run.log_artifact(_artifact_of(wandb, record, "record", path))
        folder = attempt.run_dir / _ADAPTER_NAME
        if record.status == "ok" and folder.is_dir():
            self._run.log_artifact(_artifact_of(wandb, record, "adapter", folder))

    def _close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)
        self._run = None


def logged_in() -> bool:
    """Whether wandb has credentials; nothing is asked and nothing sent."""
    import wandb

    return bool(wandb.login(prompt=False, verify=False))


def _artifact_of(wandb: Any, record: Record, kind: str, path: Path) -> Any:
    artifact = wandb.Artifact(
        _artifact_name(f"{kind}-{record.cell_id}"), type=kind, metadata={"cell_id": record.cell_id}
    )
    if path.is_dir():
        artifact.add_dir(str(path), policy="immutable")
    else:
        artifact.add_file(str(path), policy="immutable")
    return artifact


def _artifact_name(name: str) -> str:
    """A name W&B takes: at most 128 characters; the end of a cell's id is its hash."""
    return name if len(name) <= 128 else f"{name[:100]}{name[-28:]}"

"""Weights & Biases: online when there is a login, offline otherwise; `WANDB_MODE` and `wandb offline` decide over both.

A server that does not answer costs the wait once: this process's further runs are kept offline, for `wandb sync`.
"""

from __future__ import annotations

import contextlib
import html
import importlib.util
import io
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from left_bench.spec.record import RECORD_NAME, Record
from left_bench.spec.run_files import ADAPTER_NAME
from left_bench.tracker.base import (
    SAMPLE_COLUMNS,
    SPENT,
    Attempt,
    Comparison,
    TrackerKind,
    curve_copies,
    ended_well,
    flat_environment,
    sample_rows,
    summary_of,
)

_LONGEST_TAG = 64
_VIEWS = "left_bench_views.json"
"""Where the addresses of saved workspaces are kept, so that a sweep run again changes its view and adds none."""
# wandb waits for ever at a run's end, and then the sweep does; its own variables decide over these
_WAITS_SECONDS = {"init_timeout": 30.0, "finish_timeout": 300.0}

# trackers are made anew for each cell; these are of the process
_unreachable = False
_addresses_said: set[str] = set()


class WandbTracker:
    """Runs of the project `project`; offline ones lie in `<store>/wandb`, and `wandb sync` sends them later."""

    def __init__(self, *, store: Path, project: str, entity: str | None, artifacts: bool) -> None:
        self._store, self._project, self._entity, self._artifacts = store, project, entity, artifacts
        self._run: Any = None
        self._attempt: Attempt | None = None
        self._defined: set[str] = set()
        """Names of the curve whose axis the run was told."""

    def start(self, attempt: Attempt) -> None:
        self._attempt, self._defined = attempt, set()
        self._run = self._open(
            run_id=attempt.id,
            name=attempt.name,
            group=attempt.group,
            job_type="train",
            tags=attempt.tags,
            config=attempt.configuration(),
        )
        for axis in ("train/step", "train/tokens", "eval/step", *(f"eval/{axis}" for axis in (*SPENT, "joules"))):
            self._run.define_metric(axis, hidden=True)  # what is below a chart needs none of its own
        self._run.define_metric("eval/*", step_metric="eval/step")
        self._run.define_metric("eval/validation_loss", step_metric="eval/step", summary="min")
        self._run.define_metric("train/*", step_metric="train/step")
        self._run.define_metric("train/loss", step_metric="train/tokens", summary="min")
        self._run.define_metric("train/memory_gib", step_metric="train/step", summary="max")

    def log(self, step: int, *, time: float, **metrics: float) -> None:
        row = {f"train/{name}": value for name, value in metrics.items()}
        self._run.log({"train/step": step, "_timestamp": time} | row)

    def log_validation(self, step: int, *, time: float, **metrics: float) -> None:
        copies = curve_copies(metrics)
        for name, _, axis in copies:
            if name not in self._defined:
                self._run.define_metric(f"eval/{name}", step_metric=f"eval/{axis}")
                self._defined.add(name)
        row = {
            f"eval/{name}": value for name, value in (*metrics.items(), *((name, value) for name, value, _ in copies))
        }
        self._run.log({"eval/step": step, "_timestamp": time} | row)

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
        if not self._run.offline:
            self._save_workspace(comparison)
        self._close(failed=False)

    def _save_workspace(self, comparison: Comparison) -> None:
        """The sweep's panels as a saved view, where wandb-workspaces is installed; a view that cannot be saved is one
        warning, for the runs are there without it."""
        if importlib.util.find_spec("wandb_workspaces") is None:
            return
        from left_bench.tracker.dashboard import method_colors, quality_metric, save_workspace

        runs = [dict(zip(comparison.columns, row, strict=True)) for row in comparison.rows]
        methods = {str(run["run"]): str(run.get("axis.peft") or "") for run in runs}
        try:
            with _unsaid():
                address = save_workspace(
                    kept=self._store / "wandb" / _VIEWS,
                    entity=self._run.entity,
                    project=self._run.project,
                    sweep=comparison.sweep,
                    metric=quality_metric(comparison.columns),
                    colors=method_colors(methods),
                )
        except Exception as error:
            print(
                f"warning: tracker=wandb: the workspace of {comparison.sweep} was not saved "
                f"({type(error).__name__}: {error}); `left-bench dashboard --sweep {comparison.sweep}` tries again",
                file=sys.stderr,
            )
        else:
            _say_once(address)

    def _open(self, *, run_id: str, **named: Any) -> Any:
        """The run; offline where the server does not answer, in a new session where wandb's own process has died."""
        import wandb

        self._store.mkdir(parents=True, exist_ok=True)
        _forget(self._store, f"offline-run-*-{run_id}")  # an earlier telling of this very run
        try:
            run = self._begin("offline" if _unreachable else _mode(), run_id=run_id, **named)
        except Exception as error:
            with contextlib.suppress(Exception):
                wandb.teardown()
            if isinstance(error, wandb.errors.Error):  # else wandb's own process has died, with an earlier run
                _go_offline(self._store, error)
            _forget(self._store, f"*run-*-{run_id}")
            run = self._begin("offline" if _unreachable else _mode(), run_id=run_id, **named)
        if not run.offline and run.url:
            _say_once(f"{run.project_url}/groups/{run.group}" if run.group else run.url)
        return run

    def _begin(self, mode: Any, *, run_id: str, tags: list[str], **named: Any) -> Any:
        import wandb

        waits: dict[str, Any] = {
            name: seconds for name, seconds in _WAITS_SECONDS.items() if f"WANDB_{name.upper()}" not in os.environ
        }
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
                finish_timeout_raises=True,
                x_disable_meta=True,  # host, user, command line: nothing a reader of the numbers needs
                x_save_requirements=False,
                **waits,
            ),
            **named,
        )

    def _keep(self, record: Record, attempt: Attempt) -> None:
        """The record and what training produced, as artifacts; files are not copied, so they must stay until synced."""
        import wandb

        path = attempt.run_dir / RECORD_NAME
        if path.is_file():
            self._run.log_artifact(_artifact_of(wandb, record, "record", path))
        folder = attempt.run_dir / ADAPTER_NAME
        if record.status == "ok" and folder.is_dir():
            self._run.log_artifact(_artifact_of(wandb, record, "adapter", folder))

    def _close(self, *, failed: bool) -> None:
        run, self._run = self._run, None
        try:
            run.finish(exit_code=1 if failed else 0)
        except TimeoutError as error:
            _go_offline(self._store, error)
            raise


TRACKER = TrackerKind(
    make=WandbTracker,
    settings={"project": "left_bench", "entity": None, "artifacts": True},
    packages=("wandb",),
)


def logged_in() -> bool:
    """Whether wandb has credentials; nothing is asked and nothing sent."""
    import wandb

    with _unsaid():  # where it found them, again for every run
        return bool(wandb.login(prompt=False, verify=False))


def _mode() -> str | None:
    """What wandb was told (`WANDB_MODE`, `wandb offline`, `wandb disabled`), else by the login."""
    import wandb

    if told := os.environ.get("WANDB_MODE"):
        return told
    settings = wandb.setup().settings
    if settings.mode != "online":
        return settings.mode
    return "online" if logged_in() else "offline"


def _go_offline(store: Path, error: Exception) -> None:
    """This process has waited for the server in vain: once is enough."""
    global _unreachable
    if not _unreachable:
        reason = " ".join(str(error).split()).partition(" Consider ")[0][:200]
        print(
            f"warning: tracker=wandb: no answer from Weights & Biases ({type(error).__name__}: {reason}); further runs "
            f"are kept in {store / 'wandb'}, and `wandb sync` sends them",
            file=sys.stderr,
        )
    _unreachable = True


def _unsaid() -> contextlib.AbstractContextManager[Any]:
    """wandb's own lines on the terminal, which `silent` does not reach outside a run."""
    return contextlib.redirect_stderr(io.StringIO())


def _forget(store: Path, pattern: str) -> None:
    for folder in (store / "wandb").glob(pattern):
        shutil.rmtree(folder, ignore_errors=True)


def _say_once(address: str) -> None:
    if address not in _addresses_said:
        _addresses_said.add(address)
        print(f"wandb: {address}")


def _artifact_of(wandb: Any, record: Record, kind: str, path: Path) -> Any:
    artifact = wandb.Artifact(
        _artifact_name(f"{kind}-{record.cell_id}"), type=kind, metadata={"cell_id": record.cell_id}
    )
    with _unsaid():  # which folder it adds, for every cell
        if path.is_dir():
            artifact.add_dir(str(path), policy="immutable")
        else:
            artifact.add_file(str(path), policy="immutable")
    return artifact


def _artifact_name(name: str) -> str:
    """A name W&B takes: at most 128 characters; the end of a cell's id is its hash."""
    return name if len(name) <= 128 else f"{name[:100]}{name[-28:]}"

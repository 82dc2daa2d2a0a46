"""What comes back from a job: through its launcher where there is no shared storage, else through files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from left_bench.spec.record import RECORD_NAME, Record, read_record


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What a job returns to its launcher.

    A search takes it as a number, the objective; a cell that has none (diverged, out of memory, ...) is a failed trial.
    """

    cell_id: str
    status: str
    objective: float | None
    record: Record | None
    """Only where the runs folder is not shared: unpickled in the parent, it is kept for `store_received`."""

    @classmethod
    def of(cls, record: Record, *, objective: str, sent_back: bool) -> Ended:
        value = record.metrics.get(objective) if record.status == "ok" else None
        return cls(cell_id=record.cell_id, status=record.status, objective=value, record=record if sent_back else None)

    def __float__(self) -> float:
        if self.objective is None:
            raise ValueError(f"{self.cell_id} is {self.status} and has no value")
        return self.objective

    def __repr__(self) -> str:  # what Optuna's sweeper prints of a failed trial
        return f"{self.cell_id}: {self.status}"

    def __reduce__(self) -> tuple[Callable[..., Ended], tuple[Any, ...]]:
        sent = self.record.model_dump_json() if self.record else None
        return _receive, (self.cell_id, self.status, self.objective, sent)


_RECEIVED: dict[str, Record] = {}


def _receive(cell_id: str, status: str, objective: float | None, sent: str | None) -> Ended:
    # Hydra shows a sweep's returns to no callback: this is the one moment at which the parent has them
    record = Record.model_validate_json(sent) if sent else None
    if record is not None:
        _RECEIVED[cell_id] = record
    return Ended(cell_id=cell_id, status=status, objective=objective, record=record)


def store_received(runs_dir: Path) -> list[str]:
    """Write the records that were sent back, and return their cells' ids; a newer one that is there is kept."""
    for cell_id, record in _RECEIVED.items():
        run_dir = runs_dir / cell_id
        try:
            kept = read_record(run_dir / RECORD_NAME) if (run_dir / RECORD_NAME).exists() else None
        except ValueError:
            kept = None
        if kept is None or kept.finished_at < record.finished_at:
            record.write(run_dir)
    received = list(_RECEIVED)
    _RECEIVED.clear()
    return received


def note_job(path: Path, *, number: int, cell_id: str) -> None:
    """Note a cell that a search has chosen: the manifest cannot list it before."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"number": number, "cell": cell_id}) + "\n")


def noted_jobs(path: Path) -> list[str]:
    """The cells of a search in the order of its trials, each once."""
    if not path.exists():
        return []
    jobs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return list(dict.fromkeys(job["cell"] for job in sorted(jobs, key=lambda job: int(job["number"]))))

"""A finished cell's model, loaded again from its run folder, on whatever device is here."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from left_bench.core.errors import UserError
from left_bench.pretrained import with_content
from left_bench.report.load import find_runs
from left_bench.spec.cell import Cell
from left_bench.spec.record import Record
from left_bench.spec.run_files import ADAPTER_NAME
from left_bench.worker.load_trained import cell_of

if TYPE_CHECKING:
    pass

_COMPARED_ROWS = 8


class Finished(NamedTuple):
    """A cell that ended well, and where what it trained lies."""

    record: Record
    cell: Cell
    run_dir: Path

    @property
    def adapter(self) -> Path:
        """The adapter's folder; of full fine-tuning the model's."""
        return self.run_dir / ADAPTER_NAME


def find_finished(name: str, runs_dir: str, *, trust_remote_code: bool = False, weights: bool = True) -> Finished:
    """The cell of a run folder, of a record, or of `runs_dir` by its id or how that begins.

    Args:
        weights: whether what it trained must be there still.

    Raises:
        UserError: there is none, or several; it did not end well; its adapter or its base model is another or gone; it
            would run a model author's code, and the command line does not say so.
    """
    runs, _ = find_runs(name, runs_dir)
    if len(runs) != 1:
        told = f", {runs[0].record.cell_id} and {runs[1].record.cell_id} among them"
        raise UserError(f"{name}: these are {len(runs)} cells{told}; name one, by its folder or its id")
    record, run_dir = runs[0].record, runs[0].path.parent
    if record.status != "ok":
        raise UserError(f"{record.cell_id}: its status is {record.status} ({record.reason}); choose a cell that is ok")
    if weights and not any((run_dir / ADAPTER_NAME).rglob("*.safetensors")):
        raise UserError(
            f"{record.cell_id}: {run_dir / ADAPTER_NAME} holds no weights; run the cell again (force=true), or name "
            "the folder that it was run in"
        )
    cell = cell_of(run_dir)
    if cell.model.trust_remote_code and not trust_remote_code:
        raise UserError(
            f"{record.cell_id}: its model brings code of its author's, which runs only where the command line says so: "
            "give --trust-remote-code"
        )
    if cell.model.content is not None and with_content(cell.model).content != cell.model.content:
        raise UserError(
            f"{record.cell_id}: the files of model.name_or_path={cell.model.name_or_path} are others than those it was "
            "trained on; put those back, or run the cell again"
        )
    return Finished(record, cell, run_dir)


def quiet_libraries() -> None:
    """Keep bars, notes and warnings of transformers, peft and torch from standing between a command's own lines."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def on_this_machine(cell: Cell) -> Cell:
    """The cell with a device that is here: its own, else the CPU; and with the threads that torch chooses."""
    import torch

    asked, kind = cell.hardware.device, cell.device_type
    backend = getattr(torch, kind, None)
    here = asked if kind == "cpu" or (backend is not None and backend.is_available()) else "cpu"
    return cell.model_copy(update={"hardware": cell.hardware.model_copy(update={"device": here, "threads": None})})


def few_rows(cell: Cell, tokenizer: Any, *, folder: str) -> tuple[Sequence[Any], Sequence[str] | None, str]:
    """A few rows to compare two models on, the classes of pictures, and in words which rows they are.

    The cell's own, test rows where there are any; general text where its rows are gone or have changed.

    Raises:
        UserError: pictures that are gone: their classes are part of the model.
    """
    from left_bench.evaluation.evaluate import general_passages
    from left_bench.model import load as models

    try:
        splits = models.load_rows_of(cell, tokenizer, folder=folder)
    except UserError:
        if not cell.task.is_decoder:
            raise
        room = cell.training.max_length
        return general_passages(tokenizer, room=room)[:_COMPARED_ROWS], None, "passages of general text"
    rows = (splits.test or splits.train)[:_COMPARED_ROWS]
    return rows, splits.classes, f"{len(rows)} of its {'held-out' if splits.test else 'training'} rows"

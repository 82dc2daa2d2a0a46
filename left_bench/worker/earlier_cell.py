"""Another cell that one goes on from: found by its id or folder when a cell is composed, and again in the worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from left_bench.core.errors import UserError, nearest
from left_bench.core.paths import contents_of
from left_bench.spec.cell import Cell
from left_bench.spec.record import RECORD_NAME, Record, read_record
from left_bench.spec.run_files import ADAPTER_NAME, CELL_NAME
from left_bench.worker.load_trained import cell_of


class EarlierCell(NamedTuple):
    """A cell that ended well, and what it left."""

    cell: Cell
    record: Record
    run_dir: Path

    @property
    def adapter(self) -> Path:
        """The adapter's folder; of full fine-tuning the model's."""
        return self.run_dir / ADAPTER_NAME

    @property
    def content(self) -> str:
        """A fingerprint of the weights that it trained."""
        return contents_of(self.adapter.rglob("*.safetensors"), root=self.adapter)

    @property
    def chain(self) -> list[dict[str, Any]]:
        """The cells that this one went on from, the first of them first, and this one: `provenance.started_from`."""
        before: list[dict[str, Any]] = self.record.provenance.get("started_from", [])
        training = self.cell.training
        own = {"cell": self.record.cell_id, "objective": training.objective, "steps": training.steps}
        own |= {"sft_steps": training.sft_steps} if training.sft_steps else {}
        return [*before, own | {"content": self.content}]


def find_earlier(named: str, runs_dir: Path, *, key: str) -> EarlierCell:
    """The finished cell of a run folder, or of `runs_dir` by its id or how that begins.

    Args:
        key: what names it, for errors.

    Raises:
        UserError: there is none, or several; it did not end well, or its weights are gone.
    """
    given = Path(named).expanduser()
    folder = given if (given / CELL_NAME).is_file() else _by_id(named, runs_dir, key=key)
    try:
        record = read_record(folder / RECORD_NAME)
    except ValueError as error:
        raise UserError(f"{key}={named}: {folder} has no finished record ({error}); run that cell first") from error
    if record.status != "ok":
        raise UserError(f"{key}={named}: {record.cell_id} ended as {record.status}; name a cell that is ok")
    result = EarlierCell(cell_of(folder), record, folder.resolve())
    if not any(result.adapter.rglob("*.safetensors")):
        raise UserError(f"{key}={named}: {folder} holds no weights any more; run that cell again (force=true)")
    return result


def _by_id(named: str, runs_dir: Path, *, key: str) -> Path:
    there = sorted(path.parent for path in runs_dir.glob(f"*/{RECORD_NAME}"))
    fitting = [folder for folder in there if folder.name == named] or [
        folder for folder in there if folder.name.startswith(named)
    ]
    if not fitting:
        raise UserError(
            f"{key}={named}: no finished cell of {runs_dir} has an id that begins so"
            f"{nearest(named, [folder.name for folder in there])}; run it first, or name its folder"
        )
    if len(fitting) > 1:
        raise UserError(f"{key}={named}: {len(fitting)} cells of {runs_dir} begin so; give more of the id")
    return fitting[0]


def with_earlier(cell: Cell, runs_dir: Path) -> Cell:
    """The cell with the place and the content of those that it starts from and is rewarded by.

    Raises:
        UserError: as `find_earlier`; or the cells do not go together.
    """
    return _with_combined(_with_reward_model(_with_start(cell, runs_dir), runs_dir), runs_dir)


def _with_combined(cell: Cell, runs_dir: Path) -> Cell:
    settings = cell.training
    if settings.objective != "combine":
        return cell
    if len(settings.combine) < 2 or len(settings.combine_weights or settings.combine) != len(settings.combine):
        raise UserError(
            f"training.combine={settings.combine}: give two finished cells or more, as in training.combine=[A,B], and "
            "with training.combine_weights a number for each"
        )
    earlier = [find_earlier(named, runs_dir, key="training.combine") for named in settings.combine]
    for named, item in zip(settings.combine, earlier, strict=True):
        _check_alike(item, cell, key="training.combine", named=named)
    changed = {
        "combine": [str(item.run_dir) for item in earlier],
        "combine_content": [item.content for item in earlier],
    }
    return cell.model_copy(update={"training": settings.model_copy(update=changed)})


def _with_reward_model(cell: Cell, runs_dir: Path) -> Cell:
    named = cell.training.reward_model
    if named is None:
        return cell
    key = f"training.reward_model={named}"
    earlier = find_earlier(named, runs_dir, key="training.reward_model")
    if earlier.cell.training.objective != "reward":
        raise UserError(
            f"{key}: that cell's objective is {earlier.cell.training.objective}; name one of training=reward"
        )
    of_both = [item.identity["model"] | {"task": None} for item in (earlier.cell, cell)]
    if of_both[0] != of_both[1]:
        raise UserError(
            f"{key}: it was trained on model={earlier.cell.model.name}, and reads other tokens than this cell's "
            f"model={cell.model.name}; train a reward model on the same base model"
        )
    changed = {"reward_model": str(earlier.run_dir), "reward_model_content": earlier.content}
    return cell.model_copy(update={"training": cell.training.model_copy(update=changed)})


def _with_start(cell: Cell, runs_dir: Path) -> Cell:
    named = cell.training.start_from
    if named is None:
        return cell
    earlier = find_earlier(named, runs_dir, key="training.start_from")
    _check_alike(earlier, cell, key="training.start_from", named=named)
    changed = {"start_from": str(earlier.run_dir), "start_content": earlier.content}
    return cell.model_copy(update={"training": cell.training.model_copy(update=changed)})


def _check_alike(earlier: EarlierCell, cell: Cell, *, key: str, named: str) -> None:
    for group in ("model", "quantization", "peft"):
        if earlier.cell.identity.get(group) != cell.identity.get(group):
            there, here = (getattr(item, group).name for item in (earlier.cell, cell))
            told = f"{group}={there} and not {group}={here}" if there != here else f"other settings of {group}"
            raise UserError(
                f"{key}={named}: that cell was trained with {told}; model, quantization and method must be the same "
                "in each"
            )


def combined_cells(cell: Cell) -> list[EarlierCell]:
    """The cells whose adapters become this one's, in the worker; none where it trains one of its own.

    Raises:
        UserError: as `started_from`.
    """
    contents = cell.training.combine_content or []
    return [_unchanged(*pair, key="training.combine") for pair in zip(cell.training.combine, contents, strict=False)]


def started_from(cell: Cell) -> EarlierCell | None:
    """The cell that training goes on from, in the worker; None: there is none.

    Raises:
        UserError: it is gone, or has other weights than when the cell was composed.
    """
    if cell.training.start_from is None:
        return None
    return _unchanged(cell.training.start_from, cell.training.start_content, key="training.start_from")


def reward_cell(cell: Cell) -> EarlierCell | None:
    """The cell whose reward model says what sampled answers are worth, in the worker; None: there is none.

    Raises:
        UserError: as `started_from`.
    """
    if cell.training.reward_model is None:
        return None
    return _unchanged(cell.training.reward_model, cell.training.reward_model_content, key="training.reward_model")


def _unchanged(named: str, content: str | None, *, key: str) -> EarlierCell:
    earlier = find_earlier(named, Path(named).parent, key=key)
    if earlier.content != content:
        raise UserError(f"{key}={named}: its weights have changed since this cell was composed; start the cell again")
    return earlier

"""Scores as a model card's metadata, and records as a table for other tools; `cli.export` prints and writes them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from left_bench import __version__
from left_bench.core.errors import UserError, nearest
from left_bench.report.load import Run
from left_bench.report.values import format_setting, one_line
from left_bench.spec.record import Record
from left_bench.spec.task import DEFAULT_TASK, TASKS

if TYPE_CHECKING:
    import pandas

FORMATS = ("model-card", "csv", "parquet")
# The hub's own names of metrics, where it has others.
_HUB_METRICS = {"rouge_l": "rouge", "eval_perplexity": "perplexity", "eval_loss": "loss"}
_FORMULA = re.compile(r"[=@\t\r]|[+-](?!\d+(?:\.\d*)?(?:[eE][+-]?\d+)?$)")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def model_card(record: Record) -> str:
    """The metadata block that stands at the top of a model card, with the cell's scores as its `model-index`.

    Raises:
        UserError: the cell has no score.
    """
    model = _section(record, "model")
    if record.status != "ok" or not record.scores or model.get("weights") == "random":
        why = "random weights are not scored" if model.get("weights") == "random" else f"its status is {record.status}"
        raise UserError(
            f"{record.cell_id}: there is no score to put on a model card ({why}); choose a cell with scores"
        )
    return card_block(record)


def card_block(record: Record, *, whole: bool = False) -> str:
    """The same block of any cell; without results where it has no score.

    Args:
        whole: of a folder that holds a model, whatever the method was.
    """
    from huggingface_hub import EvalResult, ModelCardData

    model, data, method = (_section(record, name) for name in ("model", "data", "peft"))
    adapter = str(method.get("name") or record.choices.get("peft") or "full")
    base = str(model.get("name_or_path") or "")
    task, task_name = (
        TASKS[name].hub_task if (name := str(model.get("task"))) in TASKS else TASKS[DEFAULT_TASK].hub_task
    )
    results = [
        EvalResult(
            task_type=task,
            task_name=task_name,
            dataset_type=one_line(data.get("hub_id") or data.get("task") or score.task),
            dataset_name=one_line(score.task),
            dataset_split="test",
            dataset_args={"rows": score.n, "seed": data.get("seed", 0)},
            metric_type=_HUB_METRICS.get(score.metric, score.metric),
            metric_name=score.metric,
            metric_value=score.value,
            metric_args=_beside(score.base_value, score.stderr),
        )
        for score in (record.scores if model.get("weights") != "random" else [])
    ]
    card = ModelCardData(
        model_name=one_line(f"{model.get('name') or base}-{adapter}"),
        base_model=base if HUB_ID.fullmatch(base) and not Path(base).exists() else None,
        library_name="peft" if method.get("_target_") and not whole else "transformers",
        pipeline_tag=task,
        tags=["left_bench", adapter, *([q] if (q := record.choices.get("quantization", "none")) != "none" else [])],
        eval_results=results or None,
    )
    origin = f"# measured by left_bench {__version__}, cell {one_line(record.cell_id)}, {one_line(record.finished_at)}"
    return f"---\n{origin}\n{card.to_yaml(line_break=chr(10))}\n---\n"


def csv_text(frame: pandas.DataFrame) -> str:
    """A table of records as CSV. A text that a spreadsheet would compute (`=…`, `+…`, `-…`, `@…`) gets an apostrophe
    before it: records hold names that nobody vouches for. Numbers stay as they are.
    """

    from pandas.api.types import is_numeric_dtype

    def plain(value: Any) -> Any:
        return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value

    texts = [name for name in frame.columns if not is_numeric_dtype(frame[name])]
    frame = frame.assign(**{name: frame[name].map(plain) for name in texts})
    return frame.rename(columns=plain).to_csv(index=False)


def write_parquet(frame: pandas.DataFrame, path: Path) -> Path:
    """Write a table of records as Parquet; a column that mixes numbers, text and lists is written as text."""
    frame = frame.copy()
    for name in frame.select_dtypes(include="object").columns:
        kinds = {type(value) for value in frame[name] if value is not None and value == value}
        if kinds - {str} and kinds != {bool} and not kinds <= {int, float}:
            frame[name] = [None if value is None or value != value else format_setting(value) for value in frame[name]]
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(path, index=False)
    return path


def check_format(name: str, out: str | None) -> None:
    if name not in FORMATS:
        raise UserError(f"--format {name}: no such format{nearest(name, FORMATS)} (one of {', '.join(FORMATS)})")
    if name == "parquet" and out is None:
        raise UserError("--format parquet: it is no text; name a file with --out")


def only_run(runs: Sequence[Run], cell: str) -> Record:
    if len(runs) != 1:
        told = f", {runs[0].record.cell_id} and {runs[1].record.cell_id} too" if runs else ""
        raise UserError(f"{cell}: a model card is of one cell, and these are {len(runs)}{told}")
    return runs[0].record


def _section(record: Record, name: str) -> dict[str, object]:
    section = record.config.get(name)
    return section if isinstance(section, dict) else {}


def _beside(base: float | None, stderr: float | None) -> dict[str, float] | None:
    told = {"standard_error": stderr, "before_training": base}
    return {name: value for name, value in told.items() if value is not None} or None

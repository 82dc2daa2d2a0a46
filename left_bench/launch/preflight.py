"""Checks values that only peft, bitsandbytes, transformers or the model itself can judge, before a sweep begins.

A worker would also reject them, but maybe an hour later, in the sweep's last cell. So users' own values for other
packages' classes are tried first: the model and its adapter are created on the meta device (shapes without values), the
optimizer is created, and a row is passed through. Shipped options are checked by this package's tests instead.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from left_bench.core.errors import Unsupported, UserError, nearest
from left_bench.core.paths import config_root
from left_bench.launch.supervise import worker_environment
from left_bench.processes import start_process as processes
from left_bench.spec.cell import Cell, fingerprint

_QUESTION, _ANSWER = "cells.jsonl", "refusal.txt"
_JUDGED = ("model", "quantization", "peft", "optimizer")
_AT_MOST = 64
"""Maximum number of cells to try: each takes up to a second for a model of thirty layers."""
_PATIENCE_SECONDS = 120.0
_REFUSALS = (ValueError, TypeError, AttributeError, AssertionError, ArithmeticError, LookupError, RuntimeError)


def has_user_values(hydra: DictConfig) -> bool:
    """Whether a job passes the user's own values to other packages' classes, on the command line or in a file."""
    overrides = [str(item).lstrip("+~") for item in hydra.overrides.task]
    if any(override.startswith(tuple(f"{group}." for group in _JUDGED)) for override in overrides):
        return True
    root = config_root()
    chosen = {group: hydra.runtime.choices.get(group) for group in (*_JUDGED, "recipe", "sweep")}
    shipped = {group: root / ("sweeps" if group == "sweep" else f"conf/{group}") for group in chosen}
    return any(name is not None and not (shipped[group] / f"{name}.yaml").is_file() for group, name in chosen.items())


class Trial(NamedTuple):
    """A cell to try, and whether its values are the user's."""

    cell: Cell
    own_method: bool = True
    """Whether the method's arguments are the user's, so that a refusal is a mistake. Otherwise a shipped method does
    not fit the other options, which the cell's row will report."""

    @classmethod
    def of(cls, cell: Cell, hydra: DictConfig) -> Trial:
        overrides = [str(item).lstrip("+~") for item in hydra.overrides.task]
        chosen = [hydra.runtime.choices.get(group) for group in ("peft", "recipe")]
        folders = [config_root() / "conf" / group for group in ("peft", "recipe")]
        of_own_file = any(
            name is not None and not (folder / f"{name}.yaml").is_file()
            for name, folder in zip(chosen, folders, strict=True)
        )
        return cls(
            cell, of_own_file or any(override.startswith(("peft.config", "peft._target_")) for override in overrides)
        )


def rehearse(trials: Iterable[Trial], *, cells_follow: bool) -> None:
    """Try the distinct cells in a separate process; running out of time is not a refusal.

    Args:
        cells_follow: the cells are started from this process too, so they can use its fork server's imports.

    Raises:
        UserError: names what is refused, by which class, and the closest valid value if known.
    """
    distinct = list({trial_key(trial.cell): trial for trial in reversed(list(trials))}.values())[::-1][:_AT_MOST]
    if not distinct:
        return
    with contextlib.suppress(OSError, EOFError), tempfile.TemporaryDirectory() as name:  # no room, no process
        folder = Path(name)
        lines = [json.dumps([trial.cell.model_dump_json(by_alias=True), trial.own_method]) for trial in distinct]
        (folder / _QUESTION).write_text("\n".join(lines), encoding="utf-8")
        processes.run_within(
            _PATIENCE_SECONDS,
            folder,
            environment=worker_environment(distinct[0].cell),
            fork=cells_follow and all(trial.cell.device_type == "cpu" for trial in distinct),
            program="left_bench.launch.preflight",
        )
        if (folder / _ANSWER).exists():
            raise UserError((folder / _ANSWER).read_text(encoding="utf-8"))


def trial_key(cell: Cell) -> str:
    """Equal for cells that need only one trial."""
    sections = cell.sections()
    return fingerprint([sections[group] for group in (*_JUDGED, "precision")] + [cell.training.attention])


def main(argv: Sequence[str], *, forked: bool = False) -> int:
    """Try the cells listed in a folder, and write the first refusal there."""
    if forked:
        from left_bench.processes.start_process import die_with_parent

        die_with_parent()
    folder = Path(argv[0])
    for line in (folder / _QUESTION).read_text(encoding="utf-8").splitlines():
        cell, own_method = json.loads(line)
        refusal = refusal_of(Cell.model_validate_json(cell), own_method=own_method)
        if refusal is not None:
            (folder / _ANSWER).write_text(refusal, encoding="utf-8")
            break
    return 0


def refusal_of(cell: Cell, *, own_method: bool = True) -> str | None:
    """What is wrong with a cell's values, in one sentence; None if nothing is, or if shapes are not enough to tell."""
    try:
        _try(cell)
    except UserError as error:
        return str(error) if own_method or not isinstance(error.__cause__, Unsupported) else None
    except Exception:  # something that needs values: the worker will find out
        return None
    return None


def _try(cell: Cell) -> None:
    import torch

    from left_bench.methods import data_init
    from left_bench.plan.shapes import adapter_of_shapes, model_of_shapes
    from left_bench.pretrained import fetched, source
    from left_bench.quantization import backend_of
    from left_bench.spec.instantiate import instantiate
    from left_bench.training.loop import make_optimizer

    if cell.quantization.target is not None:
        with _refused("quantization.config", cell.quantization.target):
            instantiate(cell.quantization.target, cell.quantization.config, key="quantization")
        if (backend := backend_of(cell.quantization)) is not None:
            for key, attempt in backend.trials(cell.quantization.config):
                value, whose = cell.quantization.config[key], " and ".join(backend.packages)
                with _refused(f"quantization.config.{key}={value}", whose):
                    attempt()
    if fetched(cell.model, dtype=cell.precision.weights_dtype) is None and source(cell.model) == "hub":
        return  # its shapes are unknown here
    with _refused("model.config", cell.model.name):
        model = model_of_shapes(_in_plain_products(cell))
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if data_init.asks_for_rows(cell.peft.target, cell.peft.config):
        return
    with _refused("peft.config", cell.peft.target or "full fine-tuning", cell=cell, names=names):
        model = adapter_of_shapes(model, cell)
    with _refused("optimizer.config", cell.optimizer.target):
        make_optimizer(model, cell, device=cell.device_type)
    if cell.task.is_decoder:
        ids = torch.zeros((1, 8), dtype=torch.long, device="meta")
        with _refused("model.config", cell.model.name, by=(RuntimeError, ValueError)), torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


def _in_plain_products(cell: Cell) -> Cell:
    """The cell with attention as matrix products, which check shapes; kernels on the meta device do not."""
    return cell.model_copy(update={"training": cell.training.model_copy(update={"attention": "eager"})})


@contextlib.contextmanager
def _refused(
    key: str,
    whose: str,
    *,
    by: tuple[type[Exception], ...] = _REFUSALS,
    cell: Cell | None = None,
    names: Iterable[str] = (),
) -> Iterator[None]:
    """Turn a refusal of the values under `key` into one sentence; errors that only come from missing values are
    ignored."""
    try:
        yield
    except UserError:
        raise
    except by as error:
        cause = error.__cause__ if isinstance(error, Unsupported) and error.__cause__ is not None else error
        text = " ".join(str(cause).split())
        if "meta" in text or "aten::" in text:  # torch's messages for shapes that depend on values
            return
        targets: Any = cell.peft.config.get("target_modules") if cell is not None else None
        if "arget modules" in text and isinstance(targets, list):
            hint = next(
                (result for target in targets if (result := nearest(str(target).rpartition(".")[2], names))), ""
            )
            raise UserError(
                f"peft.config.target_modules={targets}: no layer of the model has this name{hint}"
            ) from error
        raise UserError(f"{key}: {whose} refuses it ({type(cause).__name__}: {text[:300]})") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

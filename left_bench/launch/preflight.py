"""Values that only peft, bitsandbytes, transformers or the loaded model can judge, judged before a sweep begins.

A worker would find them too, an hour later, in the sweep's last cell. So whoever gives values of their own to the
classes of other packages has them tried first: the model and its adapter are made on the meta device (shapes, no
numbers), the optimizer is made, and a row goes through. What ships is tried by this package's tests instead.
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
"""Cells of one sweep: each takes up to a second for a model of thirty layers."""
_PATIENCE_SECONDS = 120.0
_REFUSALS = (ValueError, TypeError, AttributeError, AssertionError, ArithmeticError, LookupError, RuntimeError)


def has_user_values(hydra: DictConfig) -> bool:
    """Whether a job gives values of its own to other packages' classes, on the command line or by a file."""
    given = [str(item).lstrip("+~") for item in hydra.overrides.task]
    if any(argument.startswith(tuple(f"{group}." for group in _JUDGED)) for argument in given):
        return True
    root = config_root()
    chosen = {group: hydra.runtime.choices.get(group) for group in (*_JUDGED, "recipe", "sweep")}
    shipped = {group: root / ("sweeps" if group == "sweep" else f"conf/{group}") for group in chosen}
    return any(name is not None and not (shipped[group] / f"{name}.yaml").is_file() for group, name in chosen.items())


class Trial(NamedTuple):
    """A cell to try, and whose values it has."""

    cell: Cell
    own_method: bool = True
    """Whether the method's arguments are the person's: a refusal is then a mistake; else the method that ships does not
    go with the rest, which is the cell's row to tell."""

    @classmethod
    def of(cls, cell: Cell, hydra: DictConfig) -> Trial:
        given = [str(item).lstrip("+~") for item in hydra.overrides.task]
        chosen = [hydra.runtime.choices.get(group) for group in ("peft", "recipe")]
        folders = [config_root() / "conf" / group for group in ("peft", "recipe")]
        of_own_file = any(
            name is not None and not (folder / f"{name}.yaml").is_file()
            for name, folder in zip(chosen, folders, strict=True)
        )
        return cls(
            cell, of_own_file or any(argument.startswith(("peft.config", "peft._target_")) for argument in given)
        )


def rehearse(trials: Iterable[Trial], *, cells_follow: bool) -> None:
    """Try what is unlike in the cells, in a process of its own; one that finds no answer in time is no refusal.

    Args:
        cells_follow: the cells are started from this process too, so the imports made for the trial are theirs as well.

    Raises:
        UserError: what is refused, by whom, and the nearest that is allowed where that is known.
    """
    unlike = list({trial_key(trial.cell): trial for trial in reversed(list(trials))}.values())[::-1][:_AT_MOST]
    if not unlike:
        return
    with contextlib.suppress(OSError, EOFError), tempfile.TemporaryDirectory() as name:  # no room, no process
        folder = Path(name)
        lines = [json.dumps([trial.cell.model_dump_json(by_alias=True), trial.own_method]) for trial in unlike]
        (folder / _QUESTION).write_text("\n".join(lines), encoding="utf-8")
        processes.run_within(
            _PATIENCE_SECONDS,
            folder,
            environment=worker_environment(unlike[0].cell),
            fork=cells_follow and all(trial.cell.device_type == "cpu" for trial in unlike),
            program="left_bench.launch.preflight",
        )
        if (folder / _ANSWER).exists():
            raise UserError((folder / _ANSWER).read_text(encoding="utf-8"))


def trial_key(cell: Cell) -> str:
    """The same for cells of which one trial tells for all."""
    sections = cell.sections()
    return fingerprint([sections[group] for group in (*_JUDGED, "precision")] + [cell.training.attention])


def main(argv: Sequence[str], *, forked: bool = False) -> int:
    """Try the cells that lie in a folder, and leave the first refusal there."""
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
    """What is wrong with a cell's values in one sentence; None when nothing is, or shapes alone cannot tell."""
    try:
        _try(cell)
    except UserError as error:
        return str(error) if own_method or not isinstance(error.__cause__, Unsupported) else None
    except Exception:  # something that wants numbers: the worker will see
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
        return  # its shapes are not here
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
    """With attention as matrix products, whose shapes must fit; kernels on the meta device do not look."""
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
    """What a class or a model makes of the values under `key` becomes one sentence; what needs numbers passes."""
    try:
        yield
    except UserError:
        raise
    except by as error:
        told = error.__cause__ if isinstance(error, Unsupported) and error.__cause__ is not None else error
        text = " ".join(str(told).split())
        if "meta" in text or "aten::" in text:  # torch's words for what has no shape without numbers
            return
        targets: Any = cell.peft.config.get("target_modules") if cell is not None else None
        if "arget modules" in text and isinstance(targets, list):
            hint = next(
                (result for target in targets if (result := nearest(str(target).rpartition(".")[2], names))), ""
            )
            raise UserError(
                f"peft.config.target_modules={targets}: no layer of the model is called so{hint}"
            ) from error
        raise UserError(f"{key}: {whose} refuses it ({type(told).__name__}: {text[:300]})") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

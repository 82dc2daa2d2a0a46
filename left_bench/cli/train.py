"""`left-bench train`: a finished cell's recipe once more, on all rows or for more steps, in a folder of its own."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from left_bench.core import interrupt
from left_bench.core.errors import UserError
from left_bench.result.trained import find_finished
from left_bench.spec.cell import Cell

# arguments of methods whose schedule follows the steps (AdaLoRA)
_OF_THE_STEPS = ("total_step", "tinit", "tfinal", "deltaT")


def main(argv: list[str]) -> int:
    """Train, and print where it lies; 1 where the cell does not end well, 2 when the input cannot be used."""
    parser = argparse.ArgumentParser(
        prog="left-bench train",
        allow_abbrev=False,
        description="Run a finished cell's recipe again. With --all-rows its test rows are trained on too: no held-out "
        "row remains, nothing is scored, and the record says so.",
    )
    parser.add_argument("cell", metavar="CELL", help="a cell's folder, its id, or how that begins")
    parser.add_argument("--all-rows", action="store_true", help="train on the test rows too")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps (default: the cell's own)")
    parser.add_argument("--out", default="trained", metavar="DIR", help="its runs folder (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="train again what is there already")
    parser.add_argument(
        "--runs", default="runs", metavar="DIR", help="where a cell id is looked up (default: %(default)s)"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that a model's author ships")
    options = parser.parse_args(argv)
    try:
        with interrupt.noted():
            return _train(options)
    except UserError as error:
        print(f"left-bench train: {error}", file=sys.stderr)
        return 2


def _train(options: Any) -> int:
    from left_bench.grid.compose import Settings, check_cell, check_folder
    from left_bench.launch.run_cell import run_cell

    if not options.all_rows and options.steps is None:
        raise UserError("give --all-rows, --steps N or both; without them it is the run that is there already")
    if options.steps is not None and options.steps < 1:
        raise UserError(f"--steps {options.steps}: give 1 or more")
    trust = options.trust_remote_code
    finished = find_finished(options.cell, options.runs, trust_remote_code=trust, weights=False)
    cell = recipe_of(finished.cell, all_rows=options.all_rows, steps=options.steps)
    if cell.data.content != finished.cell.data.content:
        print("note: the rows have changed since the cell was run; the rows of today are trained on", file=sys.stderr)
    out = Path(options.out)
    if finished.run_dir.parent.resolve() == out.resolve():
        raise UserError(f"--out {out}: the cells that are compared lie there; give another folder")
    check_folder("--out", out)
    check_cell(cell)
    settings = Settings(runs_dir=out, reports_dir=out, force=options.force, force_unsupported=False, tracker={})
    given = ["data.hold_out=false"] if options.all_rows else []
    given += [f"training.steps={options.steps}"] if options.steps is not None else []
    command = ["left-bench", "train", str(finished.run_dir), *(["--all-rows"] if options.all_rows else [])]
    command += ["--steps", str(options.steps)] if options.steps is not None else []
    record = run_cell(cell, settings, overrides=given, command=shlex.join(command))
    if record is None:
        print(f"left-bench train: {out / cell.id} is being trained by another process", file=sys.stderr)
        return 1
    if record.status != "ok":
        return 1
    folder = shlex.quote(str(out / cell.id))
    print(f"{out / cell.id / 'adapter'}\nnext:\n  left-bench chat {folder}")
    print(f"  left-bench export {folder} --to merged my_model")
    return 0


def recipe_of(cell: Cell, *, all_rows: bool, steps: int | None) -> Cell:
    """The cell with all its rows to train on, or with other steps, and its rows as they are today.

    Raises:
        UserError: the rows are gone.
    """
    from left_bench.data.files import with_content

    data = cell.data
    if data.path is not None or data.source == "hub":
        data = with_content(data)
    if all_rows:
        data = data.model_copy(update={"hold_out": False})
    training, peft = cell.training, cell.peft
    if steps is not None:
        share = steps / training.steps
        own = {name: max(1, round(share * peft.config[name])) for name in _OF_THE_STEPS if peft.config.get(name)}
        peft = peft.model_copy(update={"config": peft.config | own})
        training = training.model_copy(update={"steps": steps})
    return cell.model_copy(update={"data": data, "training": training, "peft": peft})

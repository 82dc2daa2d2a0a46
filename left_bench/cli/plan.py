"""`left-bench plan [overrides]`: cells composed as for a run, and a table of what each will need of memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from left_bench.cli.plan_tables import CARDS_GB, Answer, print_answers, print_cards, print_rows, verdict
from left_bench.core.errors import Unsupported, UserError, in_one_sentence
from left_bench.launch.progress import still_at_work
from left_bench.processes.start_process import output_discarded
from left_bench.spec.cell import Cell, fingerprint

if TYPE_CHECKING:
    from left_bench.plan.predict import Plan

_HELP = """left-bench plan [GROUP=OPTION | KEY=VALUE | +sweep=NAME ...] [--cards[=GB,GB,...] | --json | --csv]

Predicts the memory that each cell holds while it trains, from shapes alone: nothing is run, loaded or downloaded but
a hub model's small configuration. Takes the overrides of a run. Exit code 1 when a cell will not fit in
hardware.memory_limit, or in the machine where there is none; 3 when a peak could not be predicted.

--cards          a column for each size of GPU, 8 to 141 GB, or of those given as --cards=24,80
--json, --csv    the answers for a program, sizes in bytes"""


def main(argv: list[str]) -> int:
    """Print the table; 1 when a cell does not fit."""
    if argv and argv[0] in ("-h", "--help"):
        print(_HELP)
        return 0
    argv, form, cards = _own_options(argv)
    if cards and not any(one.startswith("hardware=") for one in argv):
        argv = [*argv, "hardware=cuda"]
    with still_at_work() as tell:
        tell("composing the cells")
        alike = {fingerprint(cell.identity | {"seed": None}): cell for cell in reversed(list(cells_of(argv)))}
        cells = list(reversed(alike.values()))  # seeds take the same memory: the first one stands for them
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        answers = list(answers_of(cells, tell=tell))
    if form is not None:
        return print_rows(answers, form=form)
    return print_cards(answers, cards) if cards else print_answers(answers)


def _own_options(argv: list[str]) -> tuple[list[str], str | None, tuple[float, ...]]:
    """What is left of the arguments for Hydra; `json` or `csv`; the cards that are asked about, in GB.

    Raises:
        UserError: sizes of cards that are no numbers above 0, or more than one form at once.
    """
    forms = [one for one in ("json", "csv") if f"--{one}" in argv]
    asked = [one for one in argv if one == "--cards" or one.startswith("--cards=")]
    if len(forms) + bool(asked) > 1:
        given = [*(f"--{one}" for one in forms), *asked]
        raise UserError(f"left-bench plan: {' and '.join(given)} at once; give one of them")
    cards: tuple[float, ...] = ()
    if asked:
        _, _, sizes = asked[-1].partition("=")
        try:
            cards = tuple(float(size) for size in sizes.split(",")) if sizes else CARDS_GB
        except ValueError:
            cards = (0.0,)
        if not all(0 < size < float("inf") for size in cards):
            raise UserError(f"--cards={sizes}: sizes are numbers of GB, such as --cards=24,80")
    return [one for one in argv if one not in ("--json", "--csv", *asked)], forms[0] if forms else None, cards


def cells_of(argv: list[str], *, command: str = "plan") -> Iterator[Cell]:
    """The cells of a command line, composed and checked as for a run; `command` is whose it is, for errors.

    Raises:
        UserError: a key or a value is not allowed.
    """
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException

    from left_bench.core.paths import config_root
    from left_bench.grid import command_line
    from left_bench.grid.compose import check_cell, compose
    from left_bench.grid.rules import why_unsupported
    from left_bench.grid.sweep import jobs_of
    from left_bench.launch.preflight import Trial, has_user_values, refusal_of

    folders = command_line.config_dirs(argv)
    for one in argv:
        if not (command_line.is_override(one) or one.startswith("-") or Path(one) in folders):
            raise UserError(
                f"left-bench {command}: '{one}' is no override; write GROUP=OPTION, KEY=VALUE or +sweep=NAME"
            )
    command_line.check_options(argv)
    command_line.check_choices(argv)
    command_line.register_resolvers()
    command_line.register_sweeps()
    GlobalHydra.instance().clear()
    initialize_config_dir(version_base="1.3", config_dir=str(config_root() / "conf"), job_name="plan")
    loader = GlobalHydra.instance().config_loader()
    typed = [command_line.open_section(one) for one in argv if command_line.is_override(one)]
    try:
        searched = [command_line.also_searched(folders)] if folders else []
        config = loader.load_configuration("config", [*searched, *typed], run_mode=RunMode.MULTIRUN)
        checked: set[str] = set()
        for _, job in jobs_of(config, loader):
            cell, settings = compose(job, job.hydra, typed=typed)
            trial = Trial.of(cell, job.hydra) if has_user_values(job.hydra) else None
            if trial is not None and (settings.force_unsupported or why_unsupported(cell) is None):
                with output_discarded():
                    refusal = refusal_of(cell, own_method=trial.own_method)
                if refusal is not None:
                    raise UserError(refusal)
            kind = fingerprint([cell.identity["model"], cell.identity["data"]])
            if kind not in checked:
                check_cell(cell)
                checked.add(kind)
            yield cell
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(in_one_sentence(error)) from error
    finally:
        GlobalHydra.instance().clear()


def answers_of(cells: list[Cell], *, tell: Callable[[str], None]) -> Iterator[Answer]:
    """Each cell's answer in turn; `tell` is told which is worked on.

    Raises:
        UserError: the only cell cannot run; one of several is `cannot run`.
    """
    from left_bench.grid.rules import why_unsupported

    followed: dict[str, Plan] = {}
    for number, (cell, name) in enumerate(zip(cells, _names(cells), strict=True), start=1):
        tell(f"planning {number} of {len(cells)}: {name}")
        if (refusal := why_unsupported(cell)) is not None:
            yield Answer(name, cell, refusal=refusal)
            continue
        try:
            plan = _predict(cell, followed=followed)
        except Unsupported as error:
            yield Answer(name, cell, refusal=str(error))
            continue
        except UserError as error:
            if len(cells) == 1:
                raise
            yield Answer(name, cell, fits="cannot run", refusal=str(error))
            continue
        limit = limit_of(cell)
        yield Answer(name, cell, plan, verdict(plan, limit, cell=cell), limit_bytes=limit)


def _names(cells: list[Cell]) -> list[str]:
    """What sets the cells apart, as the reports have it."""
    from left_bench.report.cells import find_axes, labels, row_of
    from left_bench.spec.record import not_started

    rows = [row_of(not_started(cell, "unsupported", "planned")) for cell in cells]
    return labels(rows, find_axes(rows))


def _predict(cell: Cell, *, followed: dict[str, Plan]) -> Plan:
    with output_discarded():  # what libraries say of a model that holds nothing
        from left_bench.plan.predict import predict

        return predict(cell, followed=followed)


def limit_of(cell: Cell) -> int | None:
    """Bytes there are: `hardware.memory_limit`, else the machine's memory or the first accelerator's."""
    if cell.hardware.memory_limit is not None:
        return cell.hardware.memory_limit
    if cell.device_type == "cpu":
        import psutil

        return int(psutil.virtual_memory().total)
    import torch

    module: Any = getattr(torch, cell.device_type, None)
    if module is None or not module.is_available() or not hasattr(module, "get_device_properties"):
        return None
    return int(module.get_device_properties(0).total_memory)

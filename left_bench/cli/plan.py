"""`left-bench plan [overrides]`: cells composed as for a run, and a table of what each will need of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from left_bench.cli.plan_tables import CARDS_GB, Answer, print_answers, print_cards, print_rows, verdict
from left_bench.core.errors import Unsupported, UserError, in_one_sentence
from left_bench.launch.planning import Question, get_ready, outcomes
from left_bench.launch.progress import still_at_work
from left_bench.processes.start_process import output_discarded
from left_bench.spec.cell import Cell, fingerprint

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
        get_ready()
        alike = {fingerprint(one.cell.identity | {"seed": None}): one for one in reversed(list(trials_of(argv)))}
        trials = list(reversed(alike.values()))  # seeds take the same memory: the first one stands for them
        answers = list(answers_of(trials, tell=tell))
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
    from left_bench.launch.preflight import refusal_of

    for trial in trials_of(argv, command=command):
        if trial.own_method is not None:
            with output_discarded():
                refusal = refusal_of(trial.cell, own_method=trial.own_method)
            if refusal is not None:
                raise UserError(refusal)
        yield trial.cell


def trials_of(argv: list[str], *, command: str = "plan") -> Iterator[Question]:
    """The cells of a command line, and whether there are values of a person's own in them to be tried.

    Raises:
        UserError: a key or a value is not allowed.
    """
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException

    from left_bench.core.paths import config_root
    from left_bench.grid import command_line
    from left_bench.grid.compose import check_cell, compose
    from left_bench.grid.loader import use_sweep_loader
    from left_bench.grid.rules import why_unsupported
    from left_bench.grid.sweep import jobs_of
    from left_bench.launch.preflight import Trial, has_user_values

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
    search: Any = create_config_search_path(str(config_root() / "conf"))
    for folder in folders:
        search.prepend("command-line", f"file://{folder.absolute()}", anchor="schema")  # Hydra wants that one last
    GlobalHydra.instance().clear()
    hydra = Hydra.create_main_hydra2("plan", search)
    try:
        overrides = [command_line.open_section(one) for one in argv if command_line.is_override(one)]
        config = hydra.config_loader.load_configuration("config", overrides, run_mode=RunMode.MULTIRUN)
        use_sweep_loader()
        checked: set[str] = set()
        for _, job in jobs_of(config):
            cell, settings = compose(job, job.hydra)
            own_method = None
            if has_user_values(job.hydra) and (settings.force_unsupported or why_unsupported(cell) is None):
                own_method = Trial.of(cell, job.hydra).own_method
            kind = fingerprint([cell.identity["model"], cell.identity["data"]])
            if kind not in checked:
                check_cell(cell)
                checked.add(kind)
            yield Question(cell, own_method=own_method)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(in_one_sentence(error)) from error
    finally:
        GlobalHydra.instance().clear()


def answers_of(questions: list[Question], *, tell: Callable[[str], None]) -> Iterator[Answer]:
    """Each cell's answer in turn; `tell` is told which are worked on.

    Raises:
        UserError: a value is mistaken, and with it the only cell, or one that was tried.
    """
    from left_bench.grid.rules import why_unsupported

    names = _names([one.cell for one in questions])
    refused = [why_unsupported(one.cell) for one in questions]
    asked = [number for number, refusal in enumerate(refused) if refusal is None]

    def tell_numbers(done: int, at_work: Sequence[int]) -> None:
        beside = f": {', '.join(names[asked[number]] for number in at_work)}" if at_work else ""
        tell(f"planned {done} of {len(asked)}{beside}")

    found = outcomes([questions[number] for number in asked], tell=tell_numbers)
    for question, name, refusal in zip(questions, names, refused, strict=True):
        cell = question.cell
        if refusal is not None:
            yield Answer(name, cell, refusal=refusal)
            continue
        outcome = next(found)
        if outcome.plan is None:
            if outcome.mistaken and (len(questions) == 1 or question.own_method is not None):
                raise UserError(str(outcome.refusal))
            fits = "cannot run" if outcome.mistaken else "unsupported"
            yield Answer(name, cell, fits=fits, refusal=outcome.refusal)
            continue
        limit = limit_of(cell)
        yield Answer(name, cell, outcome.plan, verdict(outcome.plan, limit, cell=cell), limit_bytes=limit)


def _names(cells: list[Cell]) -> list[str]:
    """What sets the cells apart, as the reports have it."""
    from left_bench.core.clock import utc_now
    from left_bench.report.cells import find_axes, labels, row_of
    from left_bench.spec.record import Record

    now = utc_now()
    rows = [
        row_of(
            Record(
                cell_id=cell.id,
                status="unsupported",
                reason="planned",
                started_at=now,
                finished_at=now,
                choices=cell.choices,
                config=cell.sections(),
            )
        )
        for cell in cells
    ]
    return labels(rows, find_axes(rows))


def limit_of(cell: Cell) -> int | None:
    """Bytes there are: `hardware.memory_limit`, else the machine's memory or the first accelerator's."""
    if cell.hardware.memory_limit is not None:
        return cell.hardware.memory_limit
    if cell.hardware.device == "cpu":
        import psutil

        return int(psutil.virtual_memory().total)
    import torch

    module: Any = getattr(torch, cell.hardware.device, None)
    if module is None or not module.is_available() or not hasattr(module, "get_device_properties"):
        return None
    return int(module.get_device_properties(0).total_memory)

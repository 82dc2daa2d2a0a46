"""`left-bench plan [overrides]`: cells composed as for a run, and a table of what each will need of memory."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from left_bench.cli.plan_tables import CARDS_GB, Answer, print_answers, print_cards, print_fits, print_rows
from left_bench.core.errors import UserError, in_one_sentence
from left_bench.launch import planning
from left_bench.launch.planning import Question, get_ready, outcomes
from left_bench.launch.progress import still_at_work
from left_bench.measure.device import find_device
from left_bench.model.positions import check_positions
from left_bench.plan.peak import verdict
from left_bench.plan.result import Rows
from left_bench.processes.start_process import output_discarded
from left_bench.spec.cell import Cell, Model, fingerprint, slugify

_HELP = """left-bench plan [GROUP=OPTION | KEY=VALUE | +sweep=NAME ...] [OPTION ...]

Predicts the memory that each cell holds while it trains, from shapes alone: nothing is run, loaded or downloaded but
a hub model's small configuration. Takes the overrides of a run. Exit code 1 when a cell will not fit in
hardware.memory_limit, or in the machine where there is none; 3 when a peak could not be predicted.

model=PATH             plans for any model by its configuration alone: a config.json, or a folder that holds one
--length N[,MEAN]      rows of at most N tokens (and MEAN on the average), in place of the data's
--mean                 also what a step of ordinary rows holds
--fit batch|length     the largest micro-batch, or length of rows, that fits
--remedies             what would make a cell fit that does not, from the cheapest change on
--cards[=GB,GB,...]    a column for each size of GPU, 8 to 141 GB, or of those given
--json, --csv          the answers for a program, sizes in bytes"""


@dataclass(frozen=True)
class _Options:
    """What is asked besides the cells."""

    rest: list[str]
    """The arguments that are Hydra's."""
    form: str | None = None
    """`json` or `csv`; None: a table."""
    cards_gb: tuple[float, ...] = ()
    rows: Rows = field(default_factory=Rows)
    fit: str | None = None
    remedies: bool = False


def main(argv: list[str]) -> int:
    """Print the table; 1 when a cell does not fit."""
    if argv and argv[0] in ("-h", "--help"):
        print(_HELP)
        return 0
    options = _own_options(argv)
    overrides, model = own_architecture(options.rest)
    if options.cards_gb and not any(override.startswith("hardware=") for override in overrides):
        overrides = [*overrides, "hardware=cuda"]
    if options.rows.longest is not None:
        overrides = [*overrides, f"training.max_length={options.rows.longest}"]
    with still_at_work() as tell:
        tell("composing the cells")
        get_ready()
        trials = (_with_model(trial, model) for trial in trials_of(overrides))
        alike = {fingerprint(trial.cell.identity | {"seed": None}): trial for trial in reversed(list(trials))}
        # seeds take the same memory: the first one stands for them
        questions = [_asked(item, options) for item in reversed(alike.values())]
        answers = list(answers_of(questions, tell=tell))
    if options.form is not None:
        return print_rows(answers, form=options.form)
    if options.fit is not None:
        return print_fits(answers, fit=options.fit, cards_gb=options.cards_gb)
    return print_cards(answers, options.cards_gb) if options.cards_gb else print_answers(answers)


def _asked(question: Question, options: _Options) -> Question:
    limits = [int(size * 10**9) for size in options.cards_gb]
    if not limits and (limit := limit_of(question.cell)) is not None:
        limits = [limit]
    own: Any = {"fit": options.fit, "remedies": options.remedies, "limits": tuple(limits), "rows": options.rows}
    return replace(question, **own)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"left-bench plan: {message}")


def _own_options(argv: list[str]) -> _Options:
    """What is asked, and what is left of the arguments for Hydra.

    Raises:
        UserError: sizes or lengths that are no numbers above 0, or options that exclude each other.
    """
    parser = _Parser(prog="left-bench plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--length")
    parser.add_argument("--mean", action="store_true")
    parser.add_argument("--fit", choices=("batch", "length"))
    for flag in ("remedies", "json", "csv"):
        parser.add_argument(f"--{flag}", action="store_true")
    asked = [argument for argument in argv if argument == "--cards" or argument.startswith("--cards=")]
    given, rest = parser.parse_known_args([argument for argument in argv if argument not in asked])
    forms = [item for item in ("json", "csv") if getattr(given, item)]
    if len(forms) + bool(asked and given.fit is None) > 1:
        together = [*(f"--{form}" for form in forms), *asked]
        raise UserError(f"left-bench plan: {' and '.join(together)} at once; give one of them")
    cards: tuple[float, ...] = ()
    if asked:
        _, _, sizes = asked[-1].partition("=")
        try:
            cards = tuple(float(size) for size in sizes.split(",")) if sizes else CARDS_GB
        except ValueError:
            cards = (0.0,)
        if not all(0 < size < float("inf") for size in cards):
            raise UserError(f"--cards={sizes}: sizes are numbers of GB, such as --cards=24,80")
    return _Options(rest, forms[0] if forms else None, cards, _rows(given), given.fit, given.remedies)


def _rows(given: argparse.Namespace) -> Rows:
    if given.length is None:
        return Rows(with_mean=given.mean)
    numbers = given.length.split(",")
    if not 1 <= len(numbers) <= 2 or not all(number.strip().isdigit() and int(number) >= 8 for number in numbers):
        raise UserError(
            f"--length={given.length}: tokens of the longest row and, after a comma, of an ordinary one, numbers from "
            "8, such as --length 768 or --length 768,210"
        )
    longest, mean = int(numbers[0]), int(numbers[-1])
    if mean > longest:
        raise UserError(f"--length={given.length}: the mean is larger than the longest; write the longest row first")
    return Rows(longest, mean, with_mean=given.mean or len(numbers) == 2)


def own_architecture(argv: list[str]) -> tuple[list[str], Model | None]:
    """The arguments without a model given as a path to its configuration, and that model; else None.

    `model=PATH` and `model.name_or_path=PATH` may be a configuration's file, or a folder in which it lies; beside
    weights a folder is a model like any other, and is left to Hydra.

    Raises:
        UserError: the path is none, or holds no configuration.
    """
    result, rest = None, []
    for argument in argv:
        key, _, value = argument.lstrip("+").partition("=")
        path = Path(value).expanduser()
        names_a_path = key == "model" and (value.startswith((".", "~")) or os.sep in value or value.endswith(".json"))
        if key not in ("model", "model.name_or_path") or not (names_a_path or key != "model"):
            rest.append(argument)
            continue
        if path.is_dir():
            if any(path.glob("*.safetensors")) or not (path / "config.json").is_file():
                rest.append(f"model.name_or_path={value}")  # refused there, in words of its own, or loaded
                continue
            path = path / "config.json"
        elif not names_a_path and not (value.endswith(".json") and path.is_file()):
            rest.append(argument)
            continue
        result = _architecture_in(path, given=argument)
    return rest, result


def _architecture_in(path: Path, *, given: str) -> Model:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or "no JSON"
        raise UserError(f"{given}: {path} cannot be read ({told}); give a model's config.json") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(f"{given}: {path} names no model_type; give a model's config.json")
    name = path.parent.absolute().name if path.name == "config.json" else path.stem
    return Model(name=slugify(name), name_or_path=str(path.absolute()), weights="random", config=config)


def _with_model(question: Question, model: Model | None) -> Question:
    if model is None:
        return question
    cell = question.cell.model_copy(update={"model": model, "choices": question.cell.choices | {"model": model.name}})
    check_positions(cell)
    return replace(question, cell=cell)


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
    from left_bench.launch.preflight import Trial, has_user_values

    folders = command_line.config_dirs(argv)
    for argument in argv:
        if not (command_line.is_override(argument) or argument.startswith("-") or Path(argument) in folders):
            raise UserError(
                f"left-bench {command}: '{argument}' is no override; write GROUP=OPTION, KEY=VALUE or +sweep=NAME"
            )
    command_line.check_options(argv)
    command_line.check_choices(argv)
    command_line.register_resolvers()
    command_line.register_sweeps()
    GlobalHydra.instance().clear()
    initialize_config_dir(version_base="1.3", config_dir=str(config_root() / "conf"), job_name="plan")
    loader = GlobalHydra.instance().config_loader()
    typed = [command_line.open_section(argument) for argument in argv if command_line.is_override(argument)]
    try:
        searched = [command_line.also_searched(folders)] if folders else []
        config = loader.load_configuration("config", [*searched, *typed], run_mode=RunMode.MULTIRUN)
        checked: set[str] = set()
        for _, job in jobs_of(config, loader):
            cell, settings = compose(job, job.hydra, typed=typed)
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

    names = _names([item.cell for item in questions])
    refused = [why_unsupported(item.cell) for item in questions]
    asked = [number for number, refusal in enumerate(refused) if refusal is None]

    def tell_numbers(done: int, at_work: Sequence[int]) -> None:
        beside = f": {', '.join(names[asked[number]] for number in at_work)}" if at_work else ""
        tell(f"planned {done} of {len(asked)}{beside}")

    result = outcomes([questions[number] for number in asked], tell=tell_numbers)
    for question, name, refusal in zip(questions, names, refused, strict=True):
        cell = question.cell
        if refusal is not None:
            yield Answer(name, cell, refusal=refusal)
            continue
        outcome = next(result)
        if outcome.plan is None:
            if outcome.mistaken and (len(questions) == 1 or question.own_method is not None):
                raise UserError(str(outcome.refusal))
            fits = "cannot run" if outcome.mistaken else "unsupported"
            yield Answer(name, cell, fits=fits, refusal=outcome.refusal)
            continue
        limit = limit_of(cell)
        fits = verdict(outcome.plan, limit, cell=cell)
        yield Answer(name, cell, outcome.plan, fits, None, limit, question.rows, outcome.fits, outcome.remedies)


def _names(cells: list[Cell]) -> list[str]:
    """What sets the cells apart, as the reports have it."""
    from left_bench.report.axes import find_axes, labels
    from left_bench.report.cells import row_of
    from left_bench.spec.record import not_started

    rows = [row_of(not_started(cell, "unsupported", "planned")) for cell in cells]
    return labels(rows, find_axes(rows))


def limit_of(cell: Cell) -> int | None:
    """Bytes there are: `hardware.memory_limit`, else the machine's memory or the first accelerator's."""
    known = planning.limit_of(cell)
    if known is not None or find_device("auto") == "cpu":  # asking torch takes seconds
        return known
    import torch

    module: Any = getattr(torch, cell.device_type, None)
    if module is None or not module.is_available() or not hasattr(module, "get_device_properties"):
        return None
    return int(module.get_device_properties(0).total_memory)

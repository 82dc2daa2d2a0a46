"""Cells planned side by side in processes of their own, which the asking process, free of torch, hears one by one.

A plan that was made before is taken from the cache. Where torch is imported already, the asking process plans itself.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from left_bench.core import interrupt
from left_bench.core.errors import Unsupported, UserError
from left_bench.launch.fit import Fit, Planner, Remedy, largest_batch, largest_length, remedies
from left_bench.launch.supervise import log_tail
from left_bench.measure.device import find_device, gpu_memory_bytes
from left_bench.plan.kept import keep, kept_plan
from left_bench.plan.peak import room_needed
from left_bench.plan.result import Plan, Rows
from left_bench.processes import start_process as processes
from left_bench.processes.resources import available_cores
from left_bench.spec.cell import Cell, fingerprint

if TYPE_CHECKING:
    from left_bench.plan.predict import Known

_PROGRAM = "left_bench.launch.planning"
_MOST_PROCESSES = 8
_LOOK_EVERY_SECONDS = 0.02


@dataclass(frozen=True)
class Question:
    """A cell to plan."""

    cell: Cell
    rows: Rows = field(default_factory=Rows)
    own_method: bool | None = None
    """None: nothing in the cell is a person's own value; else as `preflight.Trial.own_method`, and tried first."""
    fit: Literal["batch", "length"] | None = None
    """What is to be as large as fits each of the limits."""
    remedies: bool = False
    """Whether to look for what makes the cell fit the first limit."""
    limits: tuple[int, ...] = ()
    """In bytes."""


@dataclass(frozen=True)
class Outcome:
    """A plan, or why there is none."""

    plan: Plan | None = None
    refusal: str | None = None
    mistaken: bool = False
    """Whether the refusal is of something mistyped, and not of what does not go together."""
    fits: tuple[Fit, ...] = ()
    remedies: tuple[Remedy, ...] = ()


def limit_of(cell: Cell) -> int | None:
    """Bytes there are, told without torch: `hardware.memory_limit`, else the machine's memory or an NVIDIA GPU's."""
    if cell.hardware.memory_limit is not None:
        return cell.hardware.memory_limit
    if cell.device_type == "cpu":
        import psutil

        return int(psutil.virtual_memory().total)
    return gpu_memory_bytes() if cell.device_type == "cuda" else None


def get_ready() -> None:
    """Begin with the imports that planning needs, in another process, while cells are composed in this one."""
    if not _torch_is_here() and _may_fork():
        processes.serve_forks(dict(os.environ))


def outcomes(questions: Sequence[Question], *, tell: Callable[[int, Sequence[int]], None]) -> Iterator[Outcome]:
    """What is said of each cell, in their order.

    Args:
        tell: is given how many are done, and the numbers of those that are worked on.

    Raises:
        KeyboardInterrupt: the command was told to stop.
        RuntimeError: planning ended without an answer.
    """
    results = {
        number: Outcome(plan) for number, question in enumerate(questions) if (plan := _kept(question)) is not None
    }
    left = [number for number in range(len(questions)) if number not in results]
    if not left or _torch_is_here():
        yield from _in_this_process(questions, results, tell=tell)
        return
    groups: dict[str, list[int]] = {}
    for number in left:
        identity = questions[number].cell.identity | dict.fromkeys(("quantization", "eval", "seed"))
        groups.setdefault(fingerprint(identity), []).append(number)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for place, numbers in enumerate(groups.values()):
            (folder / f"{place}.json").write_text(json.dumps([_plain(n, questions[n]) for n in numbers]), "utf-8")
        yield from _heard(len(questions), folder, results, groups=list(groups.values()), tell=tell)


def _heard(
    total: int,
    folder: Path,
    found: dict[int, Outcome],
    *,
    groups: list[list[int]],
    tell: Callable[[int, Sequence[int]], None],
) -> Iterator[Outcome]:
    team: list[processes.Process] = []
    try:
        for _ in range(min(len(available_cores()), len(groups), _MOST_PROCESSES)):
            own = folder / f"process_{len(team)}"
            own.mkdir()
            environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
            log = own / "log"
            team.append(processes.start(own, log=log, environment=environment, fork=_may_fork(), program=_PROGRAM))
        told = 0
        while told < total:
            ended = [process.wait(0) is not None for process in team]
            for path in folder.glob("*.done"):
                found[int(path.stem)] = _outcome(json.loads(path.read_text(encoding="utf-8")))
                path.unlink()
            begun = [numbers for place, numbers in enumerate(groups) if (folder / f"{place}.taken").exists()]
            tell(len(found), [number for numbers in begun for number in numbers if number not in found])
            if told in found:
                yield found[told]
                told += 1
            elif all(ended):
                logs = (log_tail(folder / f"process_{number}" / "log") for number in range(len(team)))
                raise RuntimeError(f"planning ended without an answer: {' '.join(logs)}")
            else:
                interrupt.check()
                time.sleep(_LOOK_EVERY_SECONDS)
    finally:
        for process in team:
            process.end()


def _in_this_process(
    questions: Sequence[Question], found: dict[int, Outcome], *, tell: Callable[[int, Sequence[int]], None]
) -> Iterator[Outcome]:
    known: list[Known] = []
    for number, question in enumerate(questions):
        tell(number, [number])
        yield found[number] if number in found else answer(question, known=known)


def answer(question: Question, *, known: list[Known]) -> Outcome:
    """Plan one cell; `known`, empty at first, keeps what stands for the others as well."""
    with processes.output_discarded():  # what libraries say of a model that holds nothing
        from left_bench.launch.preflight import refusal_of
        from left_bench.plan.predict import Known, predict

        known.extend([] if known else [Known()])
        try:
            if question.own_method is not None:
                refusal = refusal_of(question.cell, own_method=question.own_method)
                if refusal is not None:
                    return Outcome(refusal=refusal, mistaken=True)

            def plan_of(cell: Cell, rows: Rows) -> Plan:
                plan = kept_plan(cell, rows)
                if plan is None:
                    plan = predict(cell, known=known[0], rows=rows)
                    keep(plan, cell, rows)
                return plan

            return _worked_out(question, plan_of)
        except Unsupported as error:
            return Outcome(refusal=str(error))
        except UserError as error:
            return Outcome(refusal=str(error), mistaken=True)


def _worked_out(question: Question, plan: Planner) -> Outcome:
    cell, rows = question.cell, question.rows
    result, fits, changes = plan(cell, rows), [], []  # type: Plan, list[Fit], list[Remedy]
    if question.fit is not None:
        search = largest_batch if question.fit == "batch" else largest_length
        fits = [search(cell, limit, rows=rows, plan=plan) for limit in question.limits]
    if question.remedies and question.limits:
        needed = room_needed(result, cell)
        if needed is not None and needed > question.limits[0]:
            changes = remedies(cell, question.limits[0], rows=rows, plan=plan)
    return Outcome(result, fits=tuple(fits), remedies=tuple(changes))


def main(argv: Sequence[str], *, forked: bool = False) -> int:
    """Answer the groups of questions in the folder above one's own that no other process has taken."""
    if forked:
        processes.die_with_parent()
    gc.freeze()  # what was imported stays, and is not to be gone through by every collection
    folder = Path(argv[0]).parent
    known: list[Known] = []
    for path in sorted(folder.glob("*.json"), key=lambda item: int(item.stem)):
        try:
            path.with_suffix(".taken").touch(exist_ok=False)
        except FileExistsError:
            continue
        for plain in json.loads(path.read_text(encoding="utf-8")):
            written = asdict(answer(_question(plain), known=known))
            begun = folder / f"{plain['number']}.begun"
            begun.write_text(json.dumps(written), encoding="utf-8")
            begun.rename(begun.with_suffix(".done"))
    return 0


def _kept(question: Question) -> Plan | None:
    """A plan that was made of the same before; what was planned then had also passed its trial."""
    alone = question.fit is None and not question.remedies
    return kept_plan(question.cell, question.rows) if alone else None


def _plain(number: int, question: Question) -> dict[str, Any]:
    plain = {name: getattr(question, name) for name in ("own_method", "fit", "remedies", "limits")}
    cell = question.cell.model_dump_json(by_alias=True)
    return plain | {"number": number, "cell": cell, "rows": asdict(question.rows)}


def _question(plain: dict[str, Any]) -> Question:
    given = {name: plain[name] for name in ("own_method", "fit", "remedies")}
    cell, rows = Cell.model_validate_json(plain["cell"]), Rows(**plain["rows"])
    return Question(cell, rows, limits=tuple(plain["limits"]), **given)


def _outcome(plain: dict[str, Any]) -> Outcome:
    plan = None if plain["plan"] is None else Plan.from_plain(plain["plan"])
    fits = tuple(Fit(**item) for item in plain["fits"])
    changes = tuple(Remedy(**item | {"overrides": tuple(item["overrides"])}) for item in plain["remedies"])
    return Outcome(plan, plain["refusal"], plain["mistaken"], fits, changes)


def _torch_is_here() -> bool:
    return "torch" in sys.modules


def _may_fork() -> bool:
    """Importing what a plan needs may open a CUDA context, which no fork survives."""
    return processes.may_fork() and find_device("auto") == "cpu"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

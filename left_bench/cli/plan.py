"""`left-bench plan [overrides]`: cells composed as for a run, and a table of what each will need of memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from left_bench.core.errors import Unsupported, UserError, in_one_sentence
from left_bench.processes.start_process import output_discarded
from left_bench.spec.cell import Cell, fingerprint

if TYPE_CHECKING:
    from left_bench.plan.predict import Plan

_PARTS = ("weights", "adapter", "gradients", "optimizer", "activations_and_workspace")
_HEADINGS = {"activations_and_workspace": "activations"}
BESIDE_TENSORS_BYTES = {"cpu": 512 * 2**20, "cuda": 1024 * 2**20, "xpu": 1024 * 2**20}
"""What a process may take beyond its tensors: kernels' code and workspaces, slack of the allocator. On the CPU 200 to
370 MiB were measured (docs/plan.md); on accelerators, where nothing was, a gibibyte is kept clear."""
NOT_KNOWN = 3
"""Exit code: a cell's peak is not known, and of the others none is too much."""
_HELP = """left-bench plan [GROUP=OPTION | KEY=VALUE | +sweep=NAME ...]

Predicts the memory that each cell holds while it trains, from shapes alone: nothing is run, loaded or downloaded but
a hub model's small configuration. Takes the overrides of a run. Exit code 1 when a cell will not fit in
hardware.memory_limit, or in the machine where there is none; 3 when a peak could not be predicted."""


def main(argv: list[str]) -> int:
    """Print the table; 1 when a cell does not fit."""
    if argv and argv[0] in ("-h", "--help"):
        print(_HELP)
        return 0
    alike = {fingerprint(cell.identity | {"seed": None}): cell for cell in reversed(list(cells_of(argv)))}
    cells = list(reversed(alike.values()))  # seeds take the same memory: the first one stands for them
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    return print_plans(cells)


def cells_of(argv: list[str], *, command: str = "plan") -> Iterator[Cell]:
    """The cells of a command line, composed and checked as for a run; `command` is whose it is, for errors.

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
            if has_user_values(job.hydra) and (settings.force_unsupported or why_unsupported(cell) is None):
                with output_discarded():
                    refusal = refusal_of(cell, own_method=Trial.of(cell, job.hydra).own_method)
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


def print_plans(cells: list[Cell]) -> int:
    """One line a cell, what could not be predicted beneath; 1 when one does not fit."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from left_bench.grid.rules import why_unsupported
    from left_bench.report.values import format_value

    def text(value: float | None) -> str:
        return format_value("peak_memory_bytes", value)

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("cell", overflow="fold")
    for heading in (*(_HEADINGS.get(part, part) for part in _PARTS), "peak", "limit"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    said: dict[str, None] = {}
    worst, unknown = 0, False
    for cell, name in zip(cells, _names(cells), strict=True):
        if (refusal := why_unsupported(cell)) is not None:
            table.add_row(Text(name), *[""] * (len(_PARTS) + 2), Text("unsupported", style="yellow"))
            said[f"{name}: {refusal}"] = None
            continue
        try:
            plan = _predict(cell)
        except Unsupported as error:
            table.add_row(Text(name), *[""] * (len(_PARTS) + 2), Text("unsupported", style="yellow"))
            said[f"{name}: {error}"] = None
            continue
        except UserError as error:
            if len(cells) == 1:
                raise
            table.add_row(Text(name), *[""] * (len(_PARTS) + 2), Text("cannot run", style="red"))
            said[f"{name}: {error}"], worst = None, 1
            continue
        limit = limit_of(cell)
        fits = verdict(plan, limit, device=cell.hardware.device)
        worst, unknown = max(worst, int(fits == "no")), unknown or (fits == "?" and plan.peak_bytes is None)
        style = {"yes": "green", "no": "red"}.get(fits, "yellow")
        parts = (text(plan.parts.get(part)) for part in _PARTS)
        table.add_row(Text(name), *parts, text(plan.peak_bytes), text(limit), Text(fits, style=style))
        said |= {f"{name}: not predicted: {one}": None for one in plan.unknown}
        if plan.paged_optimizer_bytes:
            paged = text(plan.paged_optimizer_bytes)
            said[f"{name}: {paged} of optimizer states beside the peak, in memory that CUDA pages to the host"] = None
        said[_pass_in_words(plan, cell)] = None
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console.width = 200
    console.print(table)
    said[
        "peak: what the tensors of a step hold at once; kernels and allocator take some more beside (docs/plan.md)"
    ] = None
    for line in said:
        console.print(Text(line), soft_wrap=True)
    return worst or (NOT_KNOWN if unknown else 0)


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


def _predict(cell: Cell) -> Plan:
    with output_discarded():  # what libraries say of a model that holds nothing
        from left_bench.plan.predict import predict

        return predict(cell)


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


def verdict(plan: Plan, limit: int | None, *, device: str) -> str:
    """`yes`, `no`, `perhaps` where it depends on what lies beside the tensors, `?` where peak or limit is not known.

    What is known can be too much already.
    """
    if limit is None:
        return "?"
    if sum(plan.parts.values()) > limit:
        return "no"
    if plan.peak_bytes is None:
        return "?"
    return "yes" if plan.peak_bytes + BESIDE_TENSORS_BYTES.get(device, 0) <= limit else "perhaps"


def _pass_in_words(plan: Plan, cell: Cell) -> str:
    one = plan.largest
    shape = f"{one.length} tokens end to end" if one.packed else f"{one.rows} rows of {one.length} tokens"
    rows = f"largest pass: {shape}, {one.answer_tokens} of them answers"
    return rows if one.measured else f"{rows} (the rows are not on this machine: training.max_length taken for each)"

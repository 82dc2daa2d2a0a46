"""`left-bench list`: every group's options, what each one is, and whether this machine can run it; which method serves
which task."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from left_bench.cli.method_table import as_lines, serving
from left_bench.core.errors import UserError, nearest
from left_bench.core.paths import config_root
from left_bench.grid import command_line
from left_bench.grid.compose import compose, compose_option
from left_bench.grid.options import OnlyHydraKnows
from left_bench.grid.rules import check_extras, why_unsupported
from left_bench.measure.auto_precision import AUTO, fast_precision
from left_bench.spec.cell import GROUPS, Cell

METHODS = "methods"
"""Asked for like a group: the table of methods and tasks."""


def main(argv: list[str]) -> int:
    """Print all groups and the table of methods and tasks, or those named; with `--json` for a program."""
    groups = (*command_line.PRESETS, *GROUPS, "tracker")
    if {"-h", "--help"} & set(argv):
        print(f"usage: left-bench list [GROUP...] [--json]\n\ngroups: {', '.join(groups)}")
        return 0
    as_json, argv = "--json" in argv, [name for name in argv if name != "--json"]
    for name in argv:
        if name not in (*groups, METHODS):
            hint = nearest(name, (*groups, METHODS))
            raise UserError(f"list: unknown group '{name}'{hint} (there are {', '.join(groups)} and {METHODS})")
    command_line.register_resolvers()
    if as_json:
        named = [group for group in argv or groups if group != METHODS]
        results: list[dict[str, object]] = [
            dict(_as_data(group, option)) for group in named for option in command_line.options(group)
        ]
        if METHODS in argv:
            results += [
                {"group": METHODS, "option": method, "tasks": verdicts} for method, verdicts in serving().items()
            ]
        print(json.dumps(results, indent=1))
        return 0
    console = Console()
    for group in argv or (*groups, METHODS):
        console.print(f"[bold]{group}[/]")
        if group == METHODS:
            for line in as_lines(serving()):
                console.print(escape(f"  {line}"), soft_wrap=True, highlight=False)
            continue
        for option in command_line.options(group):
            told = escape(summary_of(_file(group, option)) + _here(group, option))
            text = f"  {option:24}{_verdict(group, option)}{told}"
            console.print(text, soft_wrap=True, highlight=False)
    return 0


def _as_data(group: str, option: str) -> dict[str, str | bool | None]:
    """An option; `runs_here` is null where nothing is to be tried (sweeps, recipes, trackers)."""
    reason = _why_not(group, option) if group in GROUPS else None
    return {
        "group": group,
        "option": option,
        "summary": summary_of(_file(group, option)) + _here(group, option),
        "runs_here": reason is None if group in GROUPS else None,
        "reason": reason,
    }


def _here(group: str, option: str) -> str:
    """What an option that depends on the machine stands for on this one."""
    if (group, option) != ("precision", AUTO):
        return ""
    chosen = fast_precision("auto")
    return f" Here: {chosen.option} ({chosen.why})"


def summary_of(path: Path) -> str:
    """The first comment of a YAML file that is not Hydra's package line: what the option is."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and not line.startswith("# @"):
            return line.removeprefix("#").strip()
    return ""


def _file(group: str, option: str) -> Path:
    folder = config_root() / ("sweeps" if group == "sweep" else f"conf/{group}")
    return folder / f"{option}.yaml"


def _verdict(group: str, option: str) -> str:
    """`runs here`, or `not here` with the rule that refuses the default cell with this option."""
    if group not in GROUPS:
        return ""
    reason = _why_not(group, option)
    return "[green]runs here[/]  " if reason is None else f"[yellow]not here[/]   ({escape(reason)}) "


def _why_not(group: str, option: str) -> str | None:
    """Why the default cell with this option does not run here; None: it does."""
    try:
        try:
            cell = compose_option(group, option)
        except OnlyHydraKnows:
            cell = _composed_by_hydra(group, option)
        check_extras(cell)
    except UserError as error:
        return str(error)
    return why_unsupported(cell)


def _composed_by_hydra(group: str, option: str) -> Cell:
    from hydra import compose as compose_config
    from hydra import initialize_config_dir

    with initialize_config_dir(version_base="1.3", config_dir=str(config_root() / "conf")):
        config = compose_config("config", overrides=[f"{group}={option}"], return_hydra_config=True)
        return compose(config, config.hydra)[0]

"""`left-bench list`: every group's options, what each one is, and whether this machine can run it."""

from __future__ import annotations

from pathlib import Path

from hydra import compose as compose_config
from hydra import initialize_config_dir
from rich.console import Console
from rich.markup import escape

from left_bench import cli
from left_bench.cell import GROUPS
from left_bench.errors import UserError
from left_bench.launch import compose
from left_bench.paths import config_root
from left_bench.rules import why_unsupported


def main(argv: list[str]) -> int:
    """Print all groups, or the ones named."""
    groups = ("sweep", *GROUPS, "tracker")
    for name in argv:
        if name not in groups:
            raise UserError(f"unknown group '{name}'; groups are {', '.join(groups)}")
    cli.register_resolvers()
    console = Console()
    with initialize_config_dir(version_base="1.3", config_dir=str(config_root() / "conf")):
        for group in argv or groups:
            console.print(f"[bold]{group}[/]")
            for option in cli.options(group):
                text = f"  {option:22}{_verdict(group, option)}{escape(summary_of(_file(group, option)))}"
                console.print(text, soft_wrap=True, highlight=False)
    return 0


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
    try:
        config = compose_config("config", overrides=[f"{group}={option}"], return_hydra_config=True)
        cell, _ = compose(config, config.hydra)
    except UserError as error:
        return f"[yellow]not here[/]   ({escape(str(error))}) "
    reason = why_unsupported(cell)
    return "[green]runs here[/]  " if reason is None else f"[yellow]not here[/]   ({escape(reason)}) "

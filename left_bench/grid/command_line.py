"""The command line of `left-bench`: options, overrides and choices, checked before Hydra reads them.

Nothing here imports torch, so that a typo is reported at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from left_bench.core.errors import UserError, in_one_sentence, nearest
from left_bench.core.paths import config_root, is_installed

GROUPS = ("model", "quantization", "peft", "precision", "optimizer", "training", "data", "eval", "hardware", "tracker")


# chosen with a plus: a named set of cells, a named choice in several groups, what is tuned before a comparison
PRESETS = ("sweep", "recipe", "tune")


_HYDRA_OPTIONS = (
    *("-h", "--help", "--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r"),
    *("--multirun", "-m", "--shell-completion", "-sc", "--config-name", "-cn", "--config-dir", "-cd"),
    *("--experimental-rerun", "--info", "-i"),
)
"""Hydra's own options except `--config-path`; test_cli.py compares them with its parser."""

_ROOT_KEYS = (
    *(*PRESETS, "seed", "runs_dir", "reports_dir", "force", "force_unsupported"),
    *("objective", "at_once", "share_devices", "price_per_kwh", "price_per_hour", "hydra"),
)


def options(group: str, extra: list[Path] | None = None) -> list[str]:
    """The options of a group: files of conf/GROUP (or sweeps/), and of the user's --config-dir."""
    root = config_root()
    folders = [root / "sweeps" if group == "sweep" else root / "conf" / group]
    folders += [folder / group for folder in extra or []]
    return sorted({path.stem for folder in folders if folder.is_dir() for path in folder.glob("*.yaml")})


@contextlib.contextmanager
def hydra_errors() -> Iterator[None]:
    """Turn errors of Hydra and OmegaConf into one sentence.

    Raises:
        UserError: with their message.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints several lines and exits with 1
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(in_one_sentence(error)) from error
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def launch_name(argv: list[str]) -> str:
    """The sweep's name; for a multirun without one, a name derived from its overrides."""
    named = [argument.partition("=")[2] for argument in argv if argument.lstrip("+").startswith("sweep=")]
    if named:
        return named[-1]
    text = "\n".join(sorted(argument for argument in argv if "=" in argument))
    return f"multirun_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def is_override(argument: str) -> bool:
    """Whether an argument is Hydra's `key=value`, `+key=value` or `~key`, and not an option or an option's value."""
    return argument.startswith(("+", "~")) or ("=" in argument and not argument.startswith("-"))


def check_options(argv: list[str]) -> None:
    """Refuse unknown options, and folders of options that cannot be read.

    Raises:
        UserError: names the option and the fix.
    """
    for argument in argv:
        name = argument.partition("=")[0]
        if name.startswith("-") and name not in _HYDRA_OPTIONS:
            hint = nearest(name, _HYDRA_OPTIONS) or f"; options are {', '.join(_HYDRA_OPTIONS)}"
            raise UserError(f"{name}: no such option{hint}")
    for folder in config_dirs(argv):
        check_config_dir(folder)


def check_config_dir(folder: Path) -> None:
    """Refuse a `--config-dir` that is not a folder, or has a file that is not YAML: Hydra would print a traceback.

    Raises:
        UserError: names the file and the line.
    """
    import yaml

    if folder == Path() or is_override(str(folder)) or not folder.is_dir():
        what = "is a file, not a folder" if folder.is_file() else "is not a folder"
        raise UserError(f"--config-dir: '{folder}' {what}; give the folder that holds your groups, such as ./conf")
    for path in sorted(folder.rglob("*.yaml")):
        group = path.parent.relative_to(folder).as_posix()
        if group in (*GROUPS, *PRESETS) and path.stem in options(group):
            raise UserError(
                f"--config-dir: {path}: an option of this name ships with left_bench, and one of the two would be "
                "silently ignored; rename yours"
            )
        try:
            yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
            raise UserError(f"--config-dir: {path}{line} is not valid YAML ({error.problem}); fix the file") from error
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"--config-dir: {path} cannot be read ({error}); fix the file") from error


def check_choices(argv: list[str]) -> None:
    """Refuse unknown options, keys and malformed overrides, listing the valid ones and the closest.

    Raises:
        UserError: names group, option and the fix.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    extra = config_dirs(argv)
    swept = bool({"-m", "--multirun"} & set(argv)) or any(
        argument.lstrip("+").startswith(("sweep=", "hydra.mode=")) for argument in argv
    )
    for argument in filter(is_override, argv):
        key, separator, value = argument.partition("=")
        group = key.lstrip("+")
        root = re.split(r"[.@/]", group.lstrip("~"))[0]
        if root not in (*GROUPS, *_ROOT_KEYS):
            hint = nearest(root, (*GROUPS, *_ROOT_KEYS)) or f"; keys are {', '.join((*GROUPS, *_ROOT_KEYS))}"
            raise UserError(f"{root}: no such key{hint}")
        try:
            parsed = OverridesParser.create().parse_override(argument)
        except HydraException as error:
            raise UserError(f"{argument}: {str(error).splitlines()[0]}; quote special characters") from error
        if parsed.is_sweep_override() and not swept:
            raise UserError(f"{argument}: several values are a sweep; add -m, or write '{key}=[...]' for a list")
        if not separator or group not in (*GROUPS, *PRESETS):
            continue
        if group == "tune" and "," in value:
            raise UserError(f"tune={value}: a comparison is tuned once; choose one, such as +tune=rates")
        if group == "tracker" and "," in value and not value.startswith("["):
            raise UserError(f"tracker={value}: this would run every cell once per tracker; write 'tracker=[{value}]'")
        known = options(group, extra)
        for option in value.split(","):
            # several trackers are a list, `tracker=[a,b]`; any other list is left to Hydra
            name = option.strip(" []'\"") if group == "tracker" else option.strip().strip("'\"")
            if name not in known and not any(mark in name for mark in "()[]{}$*"):
                hint = nearest(name, known).removesuffix("?")
                valid = f"choose from {', '.join(known)}"
                raise UserError(f"unknown {group} '{name}'{f'{hint}?' if hint else ''} ({valid})")


# Hydra's plugins: option -> (module, extra)
_PLUGINS = {
    "hydra/launcher=joblib": ("hydra_joblib_launcher", "joblib"),
    "hydra/launcher=submitit_local": ("hydra_submitit_launcher", "slurm"),
    "hydra/launcher=submitit_slurm": ("hydra_submitit_launcher", "slurm"),
    "hydra/launcher=ray": ("hydra_ray_launcher", "ray"),
    "hydra/sweeper=optuna": ("hydra_optuna_sweeper", "optuna"),
}


def check_plugins(argv: list[str]) -> None:
    """Refuse a launcher or a search whose package is missing, named on the command line or in a sweep's file.

    Raises:
        UserError: names the extra.
    """
    import yaml

    if any(argument.startswith("+tune=") for argument in argv) and not is_installed("optuna"):
        raise UserError("+tune: its package is not installed; pip install 'left-bench[tune]'")
    wanted = [argument for argument in argv if argument in _PLUGINS]
    for name in (argument.partition("=")[2] for argument in argv if argument.startswith("+sweep=")):
        path = config_root() / "sweeps" / f"{name}.yaml"
        defaults = (
            (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("defaults", []) if path.is_file() else []
        )
        for entry in filter(lambda item: isinstance(item, dict), defaults):
            wanted += [f"{key.removeprefix('override /')}={value}" for key, value in entry.items()]
    for choice in wanted:
        module, extra = _PLUGINS.get(choice, ("", ""))
        if module and not is_installed(f"hydra_plugins.{module}"):
            raise UserError(f"{choice}: its package is not installed; pip install 'left-bench[{extra}]'")


def open_section(argument: str) -> str:
    """`peft.config.r=8` as `++peft.config.r=8`.

    A key may be valid without being in the option's file (an upstream class's argument, a field with a default); `Cell`
    knows the valid keys, and refuses others with the closest valid one.
    """
    group, dot, _ = argument.partition("=")[0].partition(".")
    return f"++{argument}" if dot and group in (*GROUPS, "tune") else argument


def register_resolvers() -> None:
    """Resolvers for YAML: `${share:40,0.2}` is 8 (at least 1), `${twice:8}` is 16; and that of `precision=auto`."""
    from omegaconf import OmegaConf

    from left_bench.measure.auto_precision import field_of

    OmegaConf.register_new_resolver("share", lambda total, part: max(1, round(total * part)), replace=True)
    OmegaConf.register_new_resolver("twice", lambda number: 2 * number, replace=True)
    OmegaConf.register_new_resolver("fast_precision", field_of, replace=True)


def register_sweeps() -> None:
    """Register every file of sweeps/, which is outside Hydra's search path, as the group `sweep`."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    for path in sorted((config_root() / "sweeps").glob("*.yaml")):
        node: Any = OmegaConf.load(path)
        parameters = OmegaConf.select(node, "hydra.sweeper.params")
        if parameters:  # spelled as on the command line, so that an override there replaces the sweep's value
            node.hydra.sweeper.params = {open_section(key): value for key, value in parameters.items()}
        ConfigStore.instance().store(group="sweep", name=path.stem, node=node, package="_global_", provider=str(path))


def also_searched(folders: Sequence[Path]) -> str:
    """The override that makes Hydra search these folders for options too, like `--config-dir`."""
    quoted = (str(folder.absolute()).replace("\\", "\\\\").replace("'", "\\'") for folder in folders)
    places = ",".join(f"'file://{path}'" for path in quoted)
    return f"hydra.searchpath=[{places}]"


def config_dirs(argv: list[str]) -> list[Path]:
    results = []
    for index, argument in enumerate(argv):
        if argument in ("--config-dir", "-cd"):
            results.append(Path(next(iter(argv[index + 1 :]), "")))
        elif argument.startswith("--config-dir="):
            results.append(Path(argument.partition("=")[2]))
    return results

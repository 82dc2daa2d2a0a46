"""The command line: `left-bench report|doctor|list …`, and anything else is a Hydra run.

Nothing here imports torch: `--help` and a mistyped sweep are answered at once.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from left_bench import __version__, interrupt
from left_bench.errors import UserError, in_one_sentence, nearest, user_errors
from left_bench.paths import config_root, is_installed

_GROUPS = ("model", "quantization", "peft", "precision", "optimizer", "training", "data", "eval", "hardware", "tracker")
# files with defaults of their own, package _global_: a named set of cells, a named choice in several groups
_PRESETS = ("sweep", "recipe")
_ROOT_KEYS = (
    *(*_PRESETS, "seed", "runs_dir", "reports_dir", "force", "force_unsupported"),
    *("objective", "at_once", "share_devices", "price_per_kwh", "price_per_hour", "hydra"),
)


def main(argv: list[str] | None = None) -> int:
    """The console script's entry; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if not argv or argv[0].startswith(("-", "+", "~")) or "=" in argv[0]:
            if argv and argv[0] in ("-h", "--help"):
                print(help_text())
                return 0
            if argv and argv[0] == "--version":
                print(f"left-bench {__version__}")
                return 0
            with interrupt.noted():
                return _run(argv)
        commands: dict[str, Callable[[list[str]], int]] = {
            "report": _report,
            "compare": _compare,
            "export": _export,
            "track": _track,
            "dashboard": _dashboard,
            "doctor": _doctor,
            "list": _list,
            "init": _init,
            "plan": _plan,
        }
        if argv[0] not in commands:
            hint = nearest(argv[0], commands) or f"; commands are {', '.join(commands)}"
            raise UserError(f"unknown command '{argv[0]}'{hint} (overrides are written key=value)")
        with _files_named(argv[0]):
            return commands[argv[0]](argv[1:])
    except UserError as error:
        print(f"left-bench: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `left-bench list | head`: whoever read is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter says so at its end
        return 128 + 13  # as by SIGPIPE
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT  # a Ctrl-C comes without
        print("\nleft-bench: interrupted; finished cells are kept, the same command goes on", file=sys.stderr)
        return 128 + int(number)


@contextlib.contextmanager
def _files_named(command: str) -> Iterator[None]:
    """A file that cannot be read or written becomes one sentence.

    Raises:
        UserError: naming it.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.filename is None:
            raise
        raise UserError(
            f"{command}: {error.filename}: {error.strerror}; give another path, or mend this one"
        ) from error


def help_text() -> str:
    """What `--help` prints."""
    lines = [
        f"left-bench {__version__}: fine-tune, measure and compare cells of model x quantization x peft x precision",
        "",
        "left-bench [GROUP=OPTION | KEY=VALUE ...]      run one cell",
        "left-bench +sweep=NAME [GROUP=A,B | KEY=VALUE ...]   run a sweep; report in reports/NAME.md",
        "left-bench report RUNS... [--out DIR]         make reports again from records",
        "left-bench compare A B [--fail-on 'METRIC<-5%']   what changed between two sets of records; a gate",
        "left-bench export CELL --format model-card    a record's scores as a model card's metadata",
        "left-bench track RUNS... --tracker NAME       tell finished records to a tracker",
        "left-bench dashboard --sweep NAME             a Weights & Biases workspace and report for a sweep",
        "left-bench init DIR                           a project of your own: options, a sweep, rows to start from",
        "left-bench plan [GROUP=OPTION | KEY=VALUE ...]   the memory a run or sweep will need; nothing is run",
        "left-bench list                               every group's options, one line each",
        "left-bench doctor                             what this machine has and can run",
        "",
        f"sweeps: {', '.join(options('sweep'))}",
    ]
    lines += [f"{group}: {', '.join(options(group))}" for group in _GROUPS]
    lines += [
        "",
        "Often set: runs_dir, reports_dir, seed, model.name_or_path, data.path, training.steps, training.batch_size,",
        "training.learning_rate, peft.config.NAME, eval.generate, hardware.memory_limit, force.",
        "`left-bench --cfg job` prints the composed configuration; `--hydra-help` Hydra's own options.",
    ]
    return "\n".join(lines)


def options(group: str, extra: list[Path] | None = None) -> list[str]:
    """The options of a group: files of conf/GROUP (or sweeps/), and of the user's --config-dir."""
    root = config_root()
    folders = [root / "sweeps" if group == "sweep" else root / "conf" / group]
    folders += [folder / group for folder in extra or []]
    return sorted({path.stem for folder in folders if folder.is_dir() for path in folder.glob("*.yaml")})


def _run(argv: list[str]) -> int:
    """Compose with Hydra and run; `sys.argv` is what Hydra reads."""
    if not {"-sc", "--shell-completion"} & set(argv):  # what is being typed is not whole yet
        check_options(argv)
        check_choices(argv)
        check_plugins(argv)
    import hydra

    from left_bench.compose import command_line
    from left_bench.launch import run_job

    # composing makes millions of objects; looking for cycles after every 700 of them takes a tenth of its time
    gc.set_threshold(50_000, 20, 50)

    register_resolvers()
    register_sweeps()
    overrides = [open_section(argument) for argument in argv if is_override(argument)]
    if not any(argument.startswith("hydra.job.name=") for argument in argv):
        overrides.append(f"hydra.job.name={launch_name(argv)}")
    # all overrides in one row at the end: Hydra's parser refuses them on both sides of an option
    sys.argv = ["left-bench", *(argument for argument in argv if not is_override(argument)), *overrides]

    def task(config: Any) -> Any:
        with user_errors():
            return run_job(config)

    with command_line(overrides), hydra_errors():
        hydra.main(version_base="1.3", config_path=str(config_root() / "conf"), config_name="config")(task)()
    return 0


@contextlib.contextmanager
def hydra_errors() -> Iterator[None]:
    """What Hydra and OmegaConf refuse becomes one sentence.

    Raises:
        UserError: with their words.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints several lines of its own and exits with 1
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(in_one_sentence(error)) from error
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def launch_name(argv: list[str]) -> str:
    """The sweep's name; for a multirun of one's own a name made of its overrides."""
    named = [argument.partition("=")[2] for argument in argv if argument.lstrip("+").startswith("sweep=")]
    if named:
        return named[-1]
    text = "\n".join(sorted(argument for argument in argv if "=" in argument))
    return f"multirun_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def is_override(argument: str) -> bool:
    """Whether an argument is Hydra's `key=value`, `+key=value` or `~key`, and not an option or an option's value."""
    return argument.startswith(("+", "~")) or ("=" in argument and not argument.startswith("-"))


def check_options(argv: list[str]) -> None:
    """Refuse what begins with a dash and is no option of Hydra's, and a folder of options that cannot be read.

    Raises:
        UserError: naming option and mend.
    """
    from hydra._internal.utils import get_args_parser

    known = [one for one in get_args_parser()._option_string_actions if one not in ("--config-path", "-cp")]
    for argument in argv:
        name = argument.partition("=")[0]
        if name.startswith("-") and name not in known:
            hint = nearest(name, known) or f"; options are {', '.join(known)}"
            raise UserError(f"{name}: no such option{hint}")
    for folder in config_dirs(argv):
        check_config_dir(folder)


def check_config_dir(folder: Path) -> None:
    """Refuse a `--config-dir` that is none, or holds a file that is no YAML: Hydra would show its own stack.

    Raises:
        UserError: naming the file and the line.
    """
    import yaml

    if folder == Path() or is_override(str(folder)) or not folder.is_dir():
        what = "is a file, not a folder" if folder.is_file() else "is no folder"
        raise UserError(f"--config-dir: '{folder}' {what}; give the folder that holds your groups, such as ./conf")
    for path in sorted(folder.rglob("*.yaml")):
        group = path.parent.relative_to(folder).as_posix()
        if group in (*_GROUPS, *_PRESETS) and path.stem in options(group):
            raise UserError(
                f"--config-dir: {path}: an option of this name ships with left_bench, and one of the two would be "
                "passed over in silence; give yours another name"
            )
        try:
            yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
            raise UserError(f"--config-dir: {path}{line} is no YAML ({error.problem}); mend the file") from error
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"--config-dir: {path} cannot be read ({error}); mend the file") from error


def check_choices(argv: list[str]) -> None:
    """Refuse an option that no group has, with the options there are and the nearest; likewise keys and spelling.

    Raises:
        UserError: naming group, option and mend.
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
        if root not in (*_GROUPS, *_ROOT_KEYS):
            hint = nearest(root, (*_GROUPS, *_ROOT_KEYS)) or f"; keys are {', '.join((*_GROUPS, *_ROOT_KEYS))}"
            raise UserError(f"{root}: no such key{hint}")
        try:
            parsed = OverridesParser.create().parse_override(argument)
        except HydraException as error:
            raise UserError(f"{argument}: {str(error).splitlines()[0]}; quote what is special to Hydra") from error
        if parsed.is_sweep_override() and not swept:
            raise UserError(f"{argument}: several values are a sweep; add -m, or write '{key}=[...]' for a list")
        if not separator or group not in (*_GROUPS, *_PRESETS):
            continue
        if group == "tracker" and "," in value and not value.startswith("["):
            raise UserError(f"tracker={value}: that would run every cell once for each; write 'tracker=[{value}]'")
        known = options(group, extra)
        for option in value.split(","):
            # several trackers are a list of one option, `tracker=[a,b]`; any other list is Hydra's business
            name = option.strip(" []'\"") if group == "tracker" else option.strip().strip("'\"")
            if name not in known and not any(mark in name for mark in "()[]{}$*"):
                hint = nearest(name, known).removesuffix("?")
                there_are = f"there are {', '.join(known)}"
                raise UserError(f"unknown {group} '{name}'{f'{hint}?' if hint else ''} ({there_are})")


# Hydra's plugins: option -> (module, extra)
_PLUGINS = {
    "hydra/launcher=joblib": ("hydra_joblib_launcher", "joblib"),
    "hydra/launcher=submitit_local": ("hydra_submitit_launcher", "slurm"),
    "hydra/launcher=submitit_slurm": ("hydra_submitit_launcher", "slurm"),
    "hydra/launcher=ray": ("hydra_ray_launcher", "ray"),
    "hydra/sweeper=optuna": ("hydra_optuna_sweeper", "optuna"),
}


def check_plugins(argv: list[str]) -> None:
    """Refuse a launcher or a search whose package is missing, whether the command line names it or a sweep's file.

    Raises:
        UserError: naming the extra.
    """
    import yaml

    wanted = [argument for argument in argv if argument in _PLUGINS]
    for name in (argument.partition("=")[2] for argument in argv if argument.startswith("+sweep=")):
        path = config_root() / "sweeps" / f"{name}.yaml"
        defaults = (
            (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("defaults", []) if path.is_file() else []
        )
        for entry in filter(lambda one: isinstance(one, dict), defaults):
            wanted += [f"{key.removeprefix('override /')}={value}" for key, value in entry.items()]
    for choice in wanted:
        module, extra = _PLUGINS.get(choice, ("", ""))
        if module and not is_installed(f"hydra_plugins.{module}"):
            raise UserError(f"{choice}: its package is not installed; pip install 'left-bench[{extra}]'")


def open_section(argument: str) -> str:
    """`peft.config.r=8` as `++peft.config.r=8`.

    A key may be allowed without standing in the option's file (an upstream class's argument, a field left at its
    default); `Cell` knows which are, and refuses the others with the nearest that is.
    """
    group, dot, _ = argument.partition("=")[0].partition(".")
    return f"++{argument}" if dot and group in _GROUPS else argument


def register_resolvers() -> None:
    """Arithmetic for YAML: `${share:40,0.2}` is 8 (at least 1), `${twice:8}` is 16; and what `precision=auto` asks."""
    from omegaconf import OmegaConf

    from left_bench.auto_precision import field_of

    OmegaConf.register_new_resolver("share", lambda total, part: max(1, round(total * part)), replace=True)
    OmegaConf.register_new_resolver("twice", lambda number: 2 * number, replace=True)
    OmegaConf.register_new_resolver("fast_precision", field_of, replace=True)


def register_sweeps() -> None:
    """Offer every file of sweeps/ to Hydra as the group `sweep`, which lies outside its search path."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    for path in sorted((config_root() / "sweeps").glob("*.yaml")):
        node: Any = OmegaConf.load(path)
        parameters = OmegaConf.select(node, "hydra.sweeper.params")
        if parameters:  # the same spelling as on the command line, so that an override there replaces the sweep's
            node.hydra.sweeper.params = {open_section(key): value for key, value in parameters.items()}
        ConfigStore.instance().store(group="sweep", name=path.stem, node=node, package="_global_", provider=str(path))


def config_dirs(argv: list[str]) -> list[Path]:
    found = []
    for index, argument in enumerate(argv):
        if argument in ("--config-dir", "-cd"):
            found.append(Path(next(iter(argv[index + 1 :]), "")))
        elif argument.startswith("--config-dir="):
            found.append(Path(argument.partition("=")[2]))
    return found


def _report(argv: list[str]) -> int:
    from left_bench.report import main as report

    return report(argv)


def _compare(argv: list[str]) -> int:
    from left_bench.report.compare import main as compare

    return compare(argv)


def _export(argv: list[str]) -> int:
    from left_bench.report.export import main as export

    return export(argv)


def _track(argv: list[str]) -> int:
    from left_bench.tracker.replay import main as track

    return track(argv)


def _dashboard(argv: list[str]) -> int:
    from left_bench.tracker.dashboard import main as dashboard

    return dashboard(argv)


def _doctor(argv: list[str]) -> int:
    from left_bench.doctor import main as doctor

    return doctor(argv)


def _list(argv: list[str]) -> int:
    from left_bench.listing import main as listing

    return listing(argv)


def _plan(argv: list[str]) -> int:
    from left_bench.plan import main as plan

    return plan(argv)


def _init(argv: list[str]) -> int:
    from left_bench.init import main as init

    return init(argv)

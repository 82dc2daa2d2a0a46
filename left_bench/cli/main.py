"""The command line: `left-bench report|doctor|list …`, and anything else is a Hydra run.

Nothing here imports torch: `--help` and a mistyped sweep are answered at once.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator

from left_bench import __version__
from left_bench.core import interrupt
from left_bench.core.errors import UserError, nearest
from left_bench.core.paths import config_root
from left_bench.grid.command_line import (
    GROUPS,
    check_choices,
    check_options,
    check_plugins,
    hydra_errors,
    is_override,
    launch_name,
    open_section,
    options,
    register_resolvers,
    register_sweeps,
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
            "best": _best,
            "compare": _compare,
            "chat": _chat,
            "train": _train,
            "export": _export,
            "track": _track,
            "dashboard": _dashboard,
            "doctor": _doctor,
            "list": _list,
            "init": _init,
            "plan": _plan,
            "data": _data,
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
        raise UserError(f"{command}: {error.filename}: {error.strerror}; give another path, or fix this one") from error


def help_text() -> str:
    """What `--help` prints."""
    lines = [
        f"left-bench {__version__}: fine-tune, measure and compare cells of model x quantization x peft x precision",
        "",
        "left-bench [GROUP=OPTION | KEY=VALUE ...]      run one cell",
        "left-bench +sweep=NAME [GROUP=A,B | KEY=VALUE ...]   run a sweep; report in reports/NAME.md",
        "left-bench +sweep=NAME +tune=rates            the same, each method's learning rate tuned first",
        "left-bench report RUNS... [--out DIR]         make reports again from records",
        "left-bench compare A B [--fail-on 'METRIC<-5%']   what changed between two sets of records; a gate",
        "left-bench best RUNS... [--budget-memory SIZE]   the cell to take, and what to type next",
        "left-bench chat CELL [--prompt TEXT]          ask its model, the base model beside it",
        "left-bench export CELL --to merged DIR        its model as a folder: adapter, merged or gguf",
        "left-bench export CELL --format model-card    a record's scores as a model card's metadata",
        "left-bench train CELL --all-rows              its recipe again, on all rows",
        "left-bench track RUNS... --tracker NAME       tell finished records to a tracker",
        "left-bench dashboard --sweep NAME             a Weights & Biases workspace and report for a sweep",
        "left-bench init DIR                           a project of your own: options, a sweep, rows to start from",
        "left-bench plan [GROUP=OPTION | KEY=VALUE ...]   the memory a run or sweep will need; nothing is run",
        "left-bench data [GROUP=OPTION | KEY=VALUE ...]   rows as the model will read them: tokens, loss, lengths",
        "left-bench list [GROUP...] [--json]           every group's options, one line each",
        "left-bench doctor [--json]                    what this machine has and can run",
        "",
        f"sweeps: {', '.join(options('sweep'))}",
        f"tune: {', '.join(options('tune'))}",
    ]
    lines += [f"{group}: {', '.join(options(group))}" for group in GROUPS]
    lines += [
        "",
        "Often set: runs_dir, reports_dir, seed, model.name_or_path, data.path, training.steps, training.batch_size,",
        "training.learning_rate, peft.config.NAME, eval.generate, hardware.memory_limit, force.",
        "`left-bench --cfg job` prints the composed configuration; `--hydra-help` Hydra's own options.",
    ]
    return "\n".join(lines)


def _run(argv: list[str]) -> int:
    """Compose with Hydra and run; `sys.argv` is what Hydra reads."""
    if not {"-sc", "--shell-completion"} & set(argv):  # what is being typed is not whole yet
        check_options(argv)
        check_choices(argv)
        check_plugins(argv)
    import hydra

    from left_bench.launch.launching import Launch

    # composing makes millions of objects; looking for cycles after every 700 of them takes a tenth of its time
    gc.set_threshold(50_000, 20, 50)

    register_resolvers()
    register_sweeps()
    overrides = [open_section(argument) for argument in argv if is_override(argument)]
    if not any(argument.startswith("hydra.job.name=") for argument in argv):
        overrides.append(f"hydra.job.name={launch_name(argv)}")
    # all overrides in one row at the end: Hydra's parser refuses them on both sides of an option
    sys.argv = ["left-bench", *(argument for argument in argv if not is_override(argument)), *overrides]

    launch = Launch(overrides)
    with hydra_errors():
        hydra.main(version_base="1.3", config_path=str(config_root() / "conf"), config_name="config")(launch)()
    return 0


def _report(argv: list[str]) -> int:
    from left_bench.report import main as report

    return report(argv)


def _best(argv: list[str]) -> int:
    from left_bench.report.best import main as best

    return best(argv)


def _chat(argv: list[str]) -> int:
    from left_bench.cli.chat import main as chat

    return chat(argv)


def _train(argv: list[str]) -> int:
    from left_bench.cli.train import main as train

    return train(argv)


def _compare(argv: list[str]) -> int:
    from left_bench.report.compare import main as compare

    return compare(argv)


def _export(argv: list[str]) -> int:
    from left_bench.cli.export import main as export

    return export(argv)


def _track(argv: list[str]) -> int:
    from left_bench.tracker.replay import main as track

    return track(argv)


def _dashboard(argv: list[str]) -> int:
    from left_bench.tracker.dashboard import main as dashboard

    return dashboard(argv)


def _doctor(argv: list[str]) -> int:
    from left_bench.cli.doctor import main as doctor

    return doctor(argv)


def _list(argv: list[str]) -> int:
    from left_bench.cli.list_options import main as listing

    return listing(argv)


def _plan(argv: list[str]) -> int:
    from left_bench.cli.plan import main as plan

    return plan(argv)


def _data(argv: list[str]) -> int:
    from left_bench.cli.data import main as data

    return data(argv)


def _init(argv: list[str]) -> int:
    from left_bench.cli.init import main as init

    return init(argv)

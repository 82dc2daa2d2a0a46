"""`left-bench list methods`: which method serves which task, as the rules have it."""

from __future__ import annotations

from left_bench.core.errors import UserError
from left_bench.grid.command_line import options
from left_bench.grid.compose import compose_option
from left_bench.grid.rules import why_unsupported
from left_bench.spec.task import TASKS


def serving() -> dict[str, dict[str, str | None]]:
    """Method -> task -> why it does not serve it; None: it does. Tasks that name no example are left out."""
    cells = {
        name: (
            compose_option("model", task.example[0]).model.model_copy(update={"task": name}),
            compose_option("data", task.example[1]).data,
        )
        for name, task in sorted(TASKS.items())
        if task.example is not None
    }
    result: dict[str, dict[str, str | None]] = {}
    for method in options("peft"):
        try:
            with_method = compose_option("peft", method)
        except UserError:  # `custom`, which is nothing without the user's own word
            continue
        result[method] = {
            name: why_unsupported(with_method.model_copy(update={"model": model, "data": data}))
            for name, (model, data) in cells.items()
        }
    return result


def as_lines(served: dict[str, dict[str, str | None]]) -> list[str]:
    """A table in lines of one width, which refers to its reasons by number, and the reasons below it."""
    tasks = list(next(iter(served.values())))
    width = max(map(len, served))
    lines = ["  ".join(["".ljust(width), *tasks])]
    reasons: list[str] = []
    for method, verdicts in served.items():
        told = []
        for task, reason in verdicts.items():
            if reason is not None and reason not in reasons:
                reasons.append(reason)
            told.append(("yes" if reason is None else f"no ({reasons.index(reason) + 1})").ljust(len(task)))
        lines.append("  ".join([method.ljust(width), *told]).rstrip())
    models = ", ".join(
        f"{task} with {task_.example[0]}" for task in tasks if (task_ := TASKS[task]).example is not None
    )
    lines.append(f"asked of {models}:")
    return lines + [f"({number}) {reason}" for number, reason in enumerate(reasons, start=1)]

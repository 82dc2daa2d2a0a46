"""Plans kept in the user's cache, each under all that it depends on: cell, rows, packages, this package's own code."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from pathlib import Path
from typing import Any

from left_bench.core.errors import UserError
from left_bench.core.files import write_atomically
from left_bench.core.paths import cache_dir, contents_of, versions_of
from left_bench.plan.result import Plan, Rows
from left_bench.pretrained import fetched, source
from left_bench.spec.cell import Cell, fingerprint

_MOST_PLANS = 4096
_PACKAGES = (
    *(
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "bitsandbytes",
        "torchao",
        "optimum-quanto",
        "hqq",
        "galore-torch",
    ),
    *("apollo-torch", "lion-pytorch", "liger-kernel", "tokenizers", "datasets", "reasoning-gym"),
)
_ROOMS = (
    *("plan", "training", "methods", "model", "quantization", "fivebit", "hqq", "measure", "pretrained", "data"),
    *("spec", "compat"),
)


def kept_plan(cell: Cell, rows: Rows) -> Plan | None:
    """The plan that was made of the same before; None where there is none."""
    wanted = _depends_on(cell, rows)
    if wanted is None:
        return None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not there, or damaged
        result = json.loads(_path(wanted).read_text(encoding="utf-8"))
        if result["of"] == wanted:
            return Plan.from_plain(result["plan"])
    return None


def keep(plan: Plan, cell: Cell, rows: Rows) -> None:
    """Keep a plan for the next time; where the cache cannot be written, it is made again."""
    wanted = _depends_on(cell, rows)
    if wanted is None:
        return
    path = _path(wanted)
    with contextlib.suppress(OSError):
        write_atomically(path, json.dumps({"of": wanted, "plan": plan.plain()}))
        others = sorted(path.parent.glob("*.json"), key=lambda one: one.stat().st_mtime)
        for old in others[:-_MOST_PLANS]:
            old.unlink(missing_ok=True)


def _path(wanted: dict[str, Any]) -> Path:
    return cache_dir() / "plans" / f"{fingerprint(wanted)}.json"


def _depends_on(cell: Cell, rows: Rows) -> dict[str, Any] | None:
    """All that a plan is made of; None for a model of the hub whose files, which may change there, are not here."""
    try:
        files = fetched(cell.model, dtype=cell.precision.weights_dtype)
    except UserError:
        return None
    if files is None and source(cell.model) == "hub":
        return None
    cell_of = {key: value for key, value in cell.identity.items() if key != "eval"}
    cell_of["hardware"] = {key: value for key, value in cell_of["hardware"].items() if key != "memory_limit"}
    named = [cell.peft.name, cell.quantization.name, cell.optimizer.name]  # they stand in what is said
    asked = [rows.longest, rows.mean, rows.with_mean]
    made = {"cell": cell_of, "named": named, "rows": asked, "files": files, "python": list(sys.version_info[:2])}
    plain: dict[str, Any] = json.loads(json.dumps(made | {"packages": _versions(), "code": _own_code()}))
    return plain


@functools.cache
def _versions() -> dict[str, str]:
    return versions_of(_PACKAGES)


@functools.cache
def _own_code() -> str:
    root = Path(__file__).resolve().parents[1]
    return contents_of([path for room in _ROOMS for path in (root / room).rglob("*.py")], root=root)

"""The report of a running sweep, written between its cells at low cost.

It has no plots, which take most of a report's time, and is only written when fifty times the duration of the last
writing have passed, so it takes at most a fiftieth of the sweep's time. A launch's cells may end in several processes,
so the time of the last writing is in a file.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

from left_bench.core.errors import UserError
from left_bench.core.files import write_atomically

_SHARE = 50
_FIRST_SECONDS = 0.1
"""The assumed duration of the first writing: twelve cells take 0.04 s, sixty 0.3."""


def begin_partial(note: Path) -> None:
    """Record that a launch begins now and has written no report."""
    _remember(note, took=_FIRST_SECONDS)


def write_partial(
    note: Path,
    *,
    runs_dir: Path,
    name: str,
    out: Path,
    per_kwh: float | None = None,
    per_hour: float | None = None,
    always: bool = False,
) -> bool:
    """Write a running sweep's report and page, marked as partial; returns whether it was written.

    Errors (no record yet, a full disk) are not reported here but at the end of the sweep.

    Args:
        note: from `begin_partial`; if it is missing, as on another machine without the folder, nothing is written.
        always: write even if the last writing was just now.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, UserError):
        last = json.loads(note.read_text(encoding="utf-8"))
        if not always and time.time() - float(last["at"]) < _SHARE * float(last["took"]):
            return False
        from left_bench.report.command import Wanted, write_reports
        from left_bench.report.cost import Prices

        begun, prices = time.perf_counter(), Prices(per_kwh=per_kwh, per_hour=per_hour)
        write_reports([runs_dir], out=out, name=name, wanted=Wanted(formats=("md", "html"), plots=False, prices=prices))
        _remember(note, took=time.perf_counter() - begun)
        return True
    return False


def _remember(note: Path, *, took: float) -> None:
    write_atomically(note, json.dumps({"at": time.time(), "took": took}) + "\n")

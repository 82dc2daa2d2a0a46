"""The records behind the committed reports, for tests that read them."""

from __future__ import annotations

import functools
from pathlib import Path

from left_bench.report.load import Run, read_runs

RECORDS = Path(__file__).resolve().parents[2] / "reports" / "records"


@functools.cache
def committed_runs() -> list[Run]:
    """Every committed record, oldest first."""
    runs, problems = read_runs(RECORDS)
    assert not problems
    return runs

"""What would resolve two cells that are not: so many more seeds, or so many more held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from left_bench.report.cells import Row
from left_bench.report.statistics import paired_rows
from left_bench.report.uncertainty import components
from left_bench.report.values import format_difference

CHANCE = 0.8
"""Of resolving a difference of the size that was measured."""
_QUANTILE = 0.8416212335729143
"""Of the normal distribution at `CHANCE`."""
_MOST_SEEDS, _MOST_ROWS = 1000, 1_000_000


def what_would_settle(a: Row, b: Row, metric: str, *, margin: float | None, confidence: float) -> str | None:
    """In words; None where the rows were not kept, or nothing lies between the two.

    The variances are those of the paired differences measured; the difference is taken to be the one measured, which
    nobody knows: the answer tells an order of magnitude.

    Args:
        margin: where one is given, what is to be told is whether the two lie within it.
        confidence: of the interval that has to leave zero, or the margin, out.
    """
    paired = paired_rows(a, b, metric)
    result = components(*paired) if paired is not None else None
    if paired is None or result is None:
        return None
    seeds, rows = paired[0].shape
    apart = abs(float(paired[0].sum() / (seeds * paired[1].sum())))
    gap = abs(apart - margin) if margin is not None else apart
    if gap <= 0:
        return None

    def enough(n: int, of_rows: int) -> bool:
        spread = result.spread(n, of_rows)
        return spread.reach_at(confidence) + _QUANTILE * math.sqrt(spread.variance) <= gap

    told = _told(enough, seeds, rows, _rows_of_a_seed(a, rows))
    where = f" ({format_difference(gap)} from the margin)" if margin is not None else ""
    beside = "; one seed says nothing about others, so begin with `seed=0,1,2`" if seeds == 1 else ""
    return (
        f"if the true difference is the measured {apart:.3f}{where}, {told} resolve it with a probability of "
        f"{100 * CHANCE:.0f} %{beside}"
    )


def _rows_of_a_seed(row: Row, rows: int) -> float:
    """How many held-out rows are scored in the time that the rest of a seed takes; unknown: as many as there are."""
    scoring, whole = row.phase_seconds().get("evaluate"), row.value("wall_seconds")
    return rows * (whole - scoring) / scoring if scoring and whole and whole > scoring else float(rows)


def _told(enough: Callable[[int, int], bool], seeds: int, rows: int, rows_of_a_seed: float) -> str:
    """What is enough: more of the one, more of the other, or the cheapest of both."""
    of_seeds = next((n for n in range(seeds + 1, _MOST_SEEDS + 1) if enough(n, rows)), None) if seeds > 1 else None
    of_rows = _fewest(partial(enough, seeds), rows)
    by_seeds = f"{of_seeds} seeds instead of {seeds}" if of_seeds else None
    by_rows = f"{of_rows:,} held-out rows instead of {rows}" if of_rows else None
    if by_seeds or by_rows:
        return " or ".join(filter(None, (by_seeds, by_rows))) + " would"
    both = ((n, _fewest(partial(enough, n), rows)) for n in range(seeds + 1, _MOST_SEEDS + 1))
    pairs = [(n, of_n) for n, of_n in both if of_n is not None]
    if not pairs or seeds == 1:
        return f"neither {_MOST_SEEDS} seeds nor {_MOST_ROWS:,} rows would"
    n, m = min(pairs, key=lambda pair: pair[0] * (pair[1] + rows_of_a_seed))
    return f"{n} seeds and {m:,} held-out rows instead of {seeds} and {rows} would"


def _fewest(enough: Callable[[int], bool], rows: int) -> int | None:
    """The fewest rows that are enough, to two figures and upwards; None beyond a million."""
    if not enough(_MOST_ROWS):
        return None
    low, high = rows, _MOST_ROWS
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    step = 10 ** max(0, math.floor(math.log10(high)) - 1)
    return int(math.ceil(high / step) * step)

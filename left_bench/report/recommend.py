"""Which cell to take: those that fit what was asked for, the front among them, and one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from left_bench.core.errors import UserError, nearest
from left_bench.core.units import parse_bytes
from left_bench.report.cells import Row
from left_bench.report.ranking import headline_quality, pareto_front, rankable
from left_bench.report.statistics import best_shares, difference
from left_bench.report.tables import heading
from left_bench.report.values import format_value, is_number, metric_of
from left_bench.spec.record import METRICS, find_metric

MEMORY, SPEED = "peak_memory_bytes", "train_tokens_per_second"
_BUDGET = "--budget-memory"
_DRAWN = 50
"""Cells with the highest scores, of which one may be the best."""
_LEAST_SHARE = 0.01


class Need(NamedTuple):
    """A bound that a cell has to keep: `exact_match` at least 0.5."""

    metric: str
    at_least: bool
    bound: float

    def met(self, row: Row) -> bool:
        """False also where the cell has no such number: what was not measured is not known to fit."""
        value = row.value(self.metric)
        if value is None or not is_number(value):
            return False
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        return f"{heading(self.metric)} {sign} {format_value(self.metric, self.bound)}"


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """What to take, and why."""

    fitting: Sequence[Row]
    front: Sequence[Row]
    """The fitting rows that none of them beats in quality, memory and speed at once."""
    chosen: Row | None
    metrics: Sequence[str]
    """What the front is over; a metric in which the rows may not be ranked is left out."""
    tied: Sequence[Row]
    """Rows of the front as good as the best one: within one standard error of the paired difference."""


def take_needs(argv: Sequence[str]) -> tuple[list[Need], list[str]]:
    """The bounds among a command's arguments, and the other arguments.

    A bound is `--budget-memory 8GiB`, `--min-exact-match 0.5` or `--max-wall-seconds=600`: any metric by its name.

    Raises:
        UserError: there is no such metric, or the value is missing or no number.
    """
    needs, rest = [], []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name != _BUDGET and not name.startswith(("--min-", "--max-")):
            rest.append(word)
            continue
        metric = MEMORY if name == _BUDGET else name[len("--min-") :].replace("-", "_")
        if find_metric(metric) is None:
            raise UserError(f"{name}: there is no metric '{metric}'{nearest(metric, METRICS)}")
        if not equals:
            if not words or words[0].startswith("--"):
                raise UserError(f"{name}: a value is missing; {name} {'8GiB' if _is_bytes(metric) else '0.5'} has one")
            value = words.pop(0)
        needs.append(Need(metric, name.startswith("--min-"), _bound(name, metric, value)))
    return needs, rest


def recommend(rows: Sequence[Row], needs: Sequence[Need] = (), *, quality: str | None = None) -> Recommendation | None:
    """Of the rows that fit and are as good as the best of them, the one that needs the least memory.

    As good is the one-standard-error rule (Breiman et al. 1984) on the paired difference, by which the places go too: a
    tie alone would let a row win that is far behind and only poorly measured.

    None where no ok row has a score that may be ranked.

    Args:
        quality: the score to go by; None: the report's own.
    """
    quality = quality or headline_quality(rows)
    done = [row for row in rows if row.ok and quality and is_number(row.value(quality))]
    if quality is None or not done or not rankable(done, quality):
        return None
    fitting = [row for row in done if all(need.met(row) for need in needs)]
    metrics = [quality, *(metric for metric in (MEMORY, SPEED) if _all_have(done, metric) and rankable(done, metric))]
    if not fitting:
        return Recommendation(fitting=[], front=[], chosen=None, metrics=metrics, tied=[])
    front = pareto_front(fitting, quality, *metrics[1:]) if len(metrics) > 1 else []
    sign = 1.0 if metric_of(quality).better == "higher" else -1.0
    best = max(fitting, key=lambda row: sign * (row.value(quality) or 0.0))
    # for every row that is as good as the best, the front holds one that is no worse in anything
    tied = [row for row in (front or fitting) if row is best or _as_good(row, best, quality)]

    def cost(row: Row) -> tuple[float, float, float]:
        memory = row.value(MEMORY) if MEMORY in metrics else None
        speed = row.value(SPEED) if SPEED in metrics else None
        return (memory or 0.0, -(speed or 0.0), -sign * (row.value(quality) or 0.0))

    chosen = min(tied or [best], key=cost)
    return Recommendation(fitting=fitting, front=front, chosen=chosen, metrics=metrics, tied=tied)


def sentence(found: Recommendation, needs: Sequence[Need], names: dict[int, str] | None, rows: Sequence[Row]) -> str:
    """Which cell and why, as plain text."""
    name = (names or {}).get
    quality = found.metrics[0]
    asked = " and ".join(map(str, needs))
    done = [row for row in rows if row.ok]
    if found.chosen is None:
        return f"No cell fits {asked}: {_nearest_miss(done, needs, names or {})}."
    chosen = found.chosen
    facts = ", ".join(
        f"{format_value(metric, chosen.value(metric))} {_NOUNS.get(metric) or heading(metric)}"
        for metric in found.metrics
    )
    among = (
        f"of the {len(found.fitting)} of {len(done)} cells that fit {asked}, " if needs else f"of {len(done)} cells, "
    )
    best = max(
        found.fitting,
        key=lambda row: (1.0 if metric_of(quality).better == "higher" else -1.0) * (row.value(quality) or 0.0),
    )
    if len(found.fitting) == 1:
        among, why = "", f"the only one of {len(done)} cells that fits {asked}" if needs else "it is the only one"
    elif chosen is best and len(found.tied) <= 1:
        why = f"it has the best {heading(quality)}"
        if len(found.metrics) > 1:
            cheaper = "takes less" if MEMORY in found.metrics else "trains faster"
            why += f", and none that {cheaper} is within one standard error of it"
    elif chosen is best and len(found.metrics) == 1:
        why = f"it has the best {heading(quality)}"
    elif chosen is best:
        why = f"it has the best {heading(quality)} and of those within one standard error of it {_first(found)}"
    else:
        why = (
            f"it is within one standard error of the best {heading(quality)} ({name(id(best), best.cell_id)}, "
            f"{format_value(quality, best.value(quality))}), and of those that are it {_first(found)}"
        )
    return f"Take {name(id(chosen), chosen.cell_id)} ({facts}): {among}{why}."


def how_sure(found: Recommendation, names: dict[int, str]) -> str | None:
    """How often each fitting cell is the best when rows and seeds are drawn anew; None where they cannot be."""
    quality = found.metrics[0]
    sign = 1.0 if metric_of(quality).better == "higher" else -1.0
    likeliest = sorted(found.fitting, key=lambda row: -sign * (row.value(quality) or 0.0))[:_DRAWN]
    shares = best_shares(likeliest, quality)
    if shares is None:
        return None
    told = sorted(shares.items(), key=lambda item: -item[1])
    kept = [f"{names.get(id_, '?')} {share:.2f}" for id_, share in told if share >= _LEAST_SHARE]
    return f"P(best) in {heading(quality)}, held-out rows and seeds drawn anew: {', '.join(kept)}."


def _first(found: Recommendation) -> str:
    """What the choice among equals went by."""
    return "needs the least memory" if MEMORY in found.metrics else "trains the fastest"


def _as_good(row: Row, best: Row, quality: str) -> bool:
    apart = difference(best, row, quality)
    return apart is not None and abs(apart.value) <= (apart.error or 0.0)


_NOUNS = {MEMORY: "peak memory", SPEED: "training tokens/s"}


def _nearest_miss(rows: Sequence[Row], needs: Sequence[Need], names: dict[int, str]) -> str:
    """Each bound with the cell that comes nearest to it."""
    told = []
    for need in needs:
        known = [row for row in rows if is_number(row.value(need.metric))]
        if not known:
            told.append(f"{heading(need.metric)} was not measured in any cell")
            continue
        pick = max if need.at_least else min
        row = pick(known, key=lambda row: row.value(need.metric) or 0.0)
        extreme = "highest" if need.at_least else "lowest"
        value = format_value(need.metric, row.value(need.metric))
        told.append(f"the {extreme} {heading(need.metric)} is {value} ({names.get(id(row), row.cell_id)})")
    return "; ".join(told)


def _all_have(rows: Sequence[Row], metric: str) -> bool:
    return all(is_number(row.value(metric)) for row in rows)


def _is_bytes(metric: str) -> bool:
    return metric_of(metric).unit == "bytes"


def _bound(option: str, metric: str, text: str) -> float:
    if _is_bytes(metric):
        return parse_bytes(text, key=option)
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{option} {text}: not a number") from None

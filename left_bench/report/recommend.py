"""Which cell to take: of those that fit what was asked for the best, or the cheapest shown to be as good, and how sure
that is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from left_bench.core.errors import UserError, nearest
from left_bench.core.units import parse_bytes, parse_joules, parse_seconds
from left_bench.report.cells import Row
from left_bench.report.headings import heading
from left_bench.report.judgement import TOLD_RATE, Judged, Margins, in_order
from left_bench.report.ranking import Standing, headline_quality, pareto_front, rankable, standing
from left_bench.report.settle import what_would_settle
from left_bench.report.statistics import best_shares, front_shares
from left_bench.report.values import format_difference, format_interval, format_value, is_number, metric_of
from left_bench.spec.record import METRICS, find_metric

MEMORY, SPEED = "peak_memory_bytes", "train_tokens_per_second"
BUDGETS = {
    "--budget-memory": MEMORY,
    "--budget-time": "wall_seconds",
    "--budget-joules": "cell_joules",
    "--budget-money": "cell_cost",
}
BOUNDS_HELP = (
    "A cell to take is recommended among those that keep --budget-memory SIZE, --budget-time TIME, --budget-joules "
    "ENERGY and --budget-money AMOUNT (of the whole cell; money wants a price), --min-METRIC NUMBER and --max-METRIC "
    "NUMBER, any metric by its name with dashes: --budget-memory 8GiB --budget-time 2h --min-exact-match 0.5"
)
ON_THE_FRONT = 0.05
"""The share of draws in which a cell is on the Pareto front from which it counts as one of the set."""
_DRAWN = 50
"""Cells with the highest scores, of which one may be the best."""
_LEAST_SHARE = 0.01
_RIVALS_NAMED = 5
_NOUNS = {MEMORY: "peak memory", SPEED: "training tokens/s"}


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
    front: Mapping[int, float | None]
    """`id(row)` -> share of draws in which none of the fitting rows beats it in all `metrics` at once, for the rows of
    the Pareto set; None: nothing could be drawn, and it is on the front by the values as measured."""
    chosen: Row | None
    metrics: Sequence[str]
    """The score, and what it costs; a metric in which the rows may not be ranked is left out."""
    standing: Standing | None
    """Of the fitting rows in the score."""
    as_good: Sequence[Row] = ()
    """Rows shown to be no more than the margin behind the best."""
    margin: float | None = None

    @property
    def best(self) -> Row | None:
        return self.standing.best if self.standing else None


def take_needs(argv: Sequence[str]) -> tuple[list[Need], list[str]]:
    """The bounds among a command's arguments, and the other arguments.

    A bound is `--budget-memory 8GiB`, `--min-exact-match 0.5` or `--max-wall-seconds=600`: any metric by its name.

    Raises:
        UserError: there is no such metric or budget, or the value is missing or no number.
    """
    needs, rest = [], []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith(("--min-", "--max-", "--budget-")):
            rest.append(word)
            continue
        if name.startswith("--budget-") and name not in BUDGETS:
            raise UserError(f"{name}: no such budget{nearest(name, BUDGETS)} (there are {', '.join(BUDGETS)})")
        metric = BUDGETS.get(name) or name[len("--min-") :].replace("-", "_")
        if find_metric(metric) is None:
            raise UserError(f"{name}: there is no metric '{metric}'{nearest(metric, METRICS)}")
        if not equals:
            if not words or words[0].startswith("--"):
                example = _EXAMPLES.get(metric_of(metric).unit, "0.5")
                raise UserError(f"{name}: a value is missing; {name} {example} has one")
            value = words.pop(0)
        needs.append(Need(metric, name.startswith("--min-"), _bound(name, metric, value)))
    return needs, rest


def recommend(
    rows: Sequence[Row], needs: Sequence[Need] = (), *, quality: str | None = None, margins: Margins | None = None
) -> Recommendation | None:
    """The best of the rows that fit; with a margin the cheapest (in memory) of those shown to be within it.

    The rule is the one that places go by, the paired difference: a row is as good where the interval of its difference
    from the best does not reach beyond the margin. What is merely not resolved from the best is not taken for it:
    such a row may be far behind and only poorly measured.

    None where no ok row has a score that may be ranked.

    Args:
        quality: the score to go by; None: the report's own.
        margins: of `quality`, by its name or the empty one.
    """
    quality = quality or headline_quality(rows)
    done = [row for row in rows if row.ok and quality and is_number(row.value(quality))]
    if quality is None or not done or not rankable(done, quality):
        return None
    fitting = [row for row in done if all(need.met(row) for need in needs)]
    metrics = [quality, *(metric for metric in (MEMORY, SPEED) if _all_have(done, metric) and rankable(done, metric))]
    if not fitting:
        return Recommendation(fitting=[], front={}, chosen=None, metrics=metrics, standing=None)
    margin = named_margins(margins or {}, quality).get(quality)
    result = standing(fitting, quality, None if margin is None else {quality: margin})
    assert result is not None  # ranked above
    value = None if margin is None else margin.around(result.best.value(quality) or 0.0)
    others = [] if value is None else [row for row in fitting if row is not result.best]
    as_good = [row for row in others if _within(result, row, quality, value or 0.0)]

    def cost(row: Row) -> tuple[float, float]:
        memory = row.value(MEMORY) if MEMORY in metrics else None
        speed = row.value(SPEED) if SPEED in metrics else None
        return memory or 0.0, -(speed or 0.0)

    return Recommendation(
        fitting=fitting,
        front=pareto_set(fitting, metrics),
        chosen=min([result.best, *as_good], key=cost),
        metrics=metrics,
        standing=result,
        as_good=as_good,
        margin=value,
    )


def named_margins(margins: Margins, quality: str | None) -> Margins:
    """The margins with that of the score under the score's own name."""
    if quality is None or "" not in margins:
        return margins
    return {quality: margins[""], **{name: margin for name, margin in margins.items() if name}}


def pareto_set(rows: Sequence[Row], metrics: Sequence[str]) -> dict[int, float | None]:
    """`id(row)` -> share of draws in which no other row beats it in all metrics at once, see `Recommendation.front`.

    A row is of the set where that share is 0.05 or more, or where nothing beats it as measured.
    """
    if len(metrics) < 2:
        return {}
    measured = pareto_front(rows, metrics[0], *metrics[1:])
    shares = front_shares(rows, metrics[0], metrics[1:]) if len(rows) <= 200 else None
    if shares is None:
        return {id(row): None for row in measured}
    on_it = {id(row) for row in measured}
    order = [row for row in in_order(rows, metrics[1]) if id(row) in on_it or shares[id(row)] >= ON_THE_FRONT]
    return {id(row): shares[id(row)] for row in order}


def sentence(
    recommendation: Recommendation, needs: Sequence[Need], names: Mapping[int, str], rows: Sequence[Row]
) -> str:
    """Which cell and why, as plain text."""
    quality = recommendation.metrics[0]
    asked = " and ".join(map(str, needs))
    done = [row for row in rows if row.ok]
    if recommendation.chosen is None or recommendation.standing is None or recommendation.best is None:
        return f"No cell fits {asked}: {_nearest_miss(done, needs, names)}."
    chosen, best = recommendation.chosen, recommendation.best
    facts = ", ".join(
        f"{format_value(metric, chosen.value(metric))} {_NOUNS.get(metric) or heading(metric)}"
        for metric in recommendation.metrics
    )
    taken = f"Take {_name(chosen, names)} ({facts}): "
    if len(recommendation.fitting) == 1:
        return taken + (f"the only one of {len(done)} cells that fits {asked}." if needs else "it is the only one.")
    among = (
        f"the {len(recommendation.fitting)} of {len(done)} cells that fit {asked}" if needs else f"{len(done)} cells"
    )
    if chosen is not best:
        told = f"{_name(best, names)}, {format_value(quality, best.value(quality))}"
        as_good = _those(len(recommendation.as_good) + 1)
        cheapest = "needs the least memory" if MEMORY in recommendation.metrics else "trains the fastest"
        return (
            f"{taken}of {among}, {as_good} within {_margin(recommendation)} of the best ({told}), and of "
            f"these it {cheapest}."
        )
    why = f"it has the best {heading(quality)} of {among}"
    if recommendation.margin is not None:
        why += f", and no cheaper cell is shown to be within {_margin(recommendation)} of it"
    elif recommendation.standing.unresolved:
        others = len(recommendation.standing.unresolved)
        why += f"; {others} other{'s are' if others > 1 else ' is'} not resolved from it"
    else:
        why += "; every other is resolved from it"
    return f"{taken}{why}."


def how_sure(recommendation: Recommendation, names: Mapping[int, str]) -> Iterator[str]:
    """How sure that is, as plain sentences: how often each is the best, what is not resolved, what would settle it."""
    if recommendation.standing is None or recommendation.best is None:
        return
    quality = recommendation.metrics[0]
    likeliest = sorted(recommendation.fitting, key=lambda row: _places(recommendation, row))[:_DRAWN]
    shares = best_shares(likeliest, quality)
    if shares is not None:
        told = sorted(shares.items(), key=lambda item: -item[1])
        kept = [f"{names.get(id_, '?')} {share:.2f}" for id_, share in told if share >= _LEAST_SHARE]
        yield f"P(best) in {heading(quality)}, with held-out rows and seeds resampled: {', '.join(kept)}."
    family, rivals = recommendation.standing.family, recommendation.standing.unresolved
    if not rivals:
        return
    rivals = sorted(rivals, key=lambda rival: -(shares or {}).get(id(rival[0]), 0.0))
    more = len(rivals) - _RIVALS_NAMED
    named = ", ".join(_rival(recommendation, *rival, names) for rival in rivals[:_RIVALS_NAMED])
    yield f"Not resolved from {_name(recommendation.best, names)}: {named}{f', and {more} more' if more > 0 else ''}."
    yield (
        f"The brackets hold each difference's own 95 % interval. All {family.size:,} pairs are judged together: at "
        f"most {TOLD_RATE} of the differences called resolved are expected to be false "
        f"(false-discovery rate, Benjamini and Hochberg; here p ≤ {family.threshold:.2g})."
    )
    best, (rival, _) = recommendation.best, rivals[0]
    settled = what_would_settle(best, rival, quality, margin=recommendation.margin, confidence=1 - family.threshold)
    if settled is not None:
        yield f"To tell {_name(rival, names)} from {_name(best, names)}: {settled}."


def _places(recommendation: Recommendation, row: Row) -> tuple[float, float]:
    sign = 1.0 if metric_of(recommendation.metrics[0]).better == "higher" else -1.0
    return -sign * (row.value(recommendation.metrics[0]) or 0.0), row.value(MEMORY) or math.inf


def _rival(recommendation: Recommendation, row: Row, against: Judged, names: Mapping[int, str]) -> str:
    quality = recommendation.metrics[0]
    text = f"{_name(row, names)} {format_difference(against.value)}"
    if against.interval is not None:
        text += f" [{format_interval(against.interval)}]"
    memory, best = row.value(MEMORY), recommendation.best and recommendation.best.value(MEMORY)
    if MEMORY in recommendation.metrics and memory and best and memory < best:
        text += f" with less memory ({format_value(MEMORY, memory)})"
    return text if metric_of(quality).better != "none" else _name(row, names)


def _those(count: int) -> str:
    return f"{count} {'are' if count > 1 else 'is'} shown to be"


def _margin(recommendation: Recommendation) -> str:
    assert recommendation.margin is not None
    return f"{format_value(recommendation.metrics[0], recommendation.margin)} {heading(recommendation.metrics[0])}"


def _within(found: Standing, row: Row, metric: str, margin: float) -> bool:
    """Whether the interval of a row's difference from the best does not reach beyond the margin on the worse side."""
    against = found.family.of(found.best, row)
    if against is None:
        return False
    if against.interval is None:
        return against.value == 0
    worst = against.interval.high if metric_of(metric).better == "higher" else -against.interval.low
    return worst <= margin


def _name(row: Row, names: Mapping[int, str]) -> str:
    return names.get(id(row), row.cell_id)


def _nearest_miss(rows: Sequence[Row], needs: Sequence[Need], names: Mapping[int, str]) -> str:
    """Each bound with the cell that comes nearest to it."""
    told = []
    for need in needs:
        known = [row for row in rows if is_number(row.value(need.metric))]
        if not known:
            why = "; a price per kWh needs joules" if metric_of(need.metric).unit == "money" else ""
            told.append(f"{heading(need.metric)} was not measured in any cell{why}")
            continue
        pick = max if need.at_least else min
        row = pick(known, key=lambda row: row.value(need.metric) or 0.0)
        extreme = "highest" if need.at_least else "lowest"
        value = format_value(need.metric, row.value(need.metric))
        told.append(f"the {extreme} {heading(need.metric)} is {value} ({names.get(id(row), row.cell_id)})")
    return "; ".join(told)


def _all_have(rows: Sequence[Row], metric: str) -> bool:
    return all(is_number(row.value(metric)) for row in rows)


_EXAMPLES = {"bytes": "8GiB", "seconds": "15min", "joules": "5kJ"}
_PARSERS: dict[str, Callable[..., float]] = {"bytes": parse_bytes, "seconds": parse_seconds, "joules": parse_joules}


def _bound(option: str, metric: str, text: str) -> float:
    parse = _PARSERS.get(metric_of(metric).unit)
    if parse is not None:
        return parse(text, key=option)
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{option} {text}: not a number") from None

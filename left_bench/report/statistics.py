"""What a difference is worth: means over seeds and rows, paired differences, ratios, and their intervals.

`judgement` compares many pairs at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from left_bench.report.cells import Row
from left_bench.report.steps_and_rows import read_losses, read_steps
from left_bench.report.uncertainty import (
    CONFIDENCE,
    Scored,
    Spread,
    crossed_spread,
    seeds_spread,
    student_quantile,
    sum_of,
)
from left_bench.report.values import is_number, metric_of

if TYPE_CHECKING:
    import numpy

_RESAMPLES = 2000
_SHARED_DRAWS = 2048
"""Values up to which one table of draws serves every pair of cells; 32 MiB."""


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float

    def __contains__(self, value: object) -> bool:
        return isinstance(value, (int, float)) and self.low <= value <= self.high


class Difference(NamedTuple):
    """One row's value less another's, and what the noise leaves of it."""

    value: float
    spread: Spread | None
    """None: one measurement each, and nothing to tell how far the next would be."""
    how: str
    """What the spread is over: `paired rows`, `paired rows and seeds`, `seeds`, `steps`, `standard errors`, `none`."""

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval."""
        return None if self.spread is None else around(self.value, self.spread)

    @property
    def p_value(self) -> float | None:
        return None if self.spread is None else self.spread.p_value(self.value)

    @property
    def resolved(self) -> bool | None:
        """Whether the 95 % interval leaves zero out; None where nothing tells how far the noise reaches."""
        interval = self.interval
        return None if interval is None else 0 not in interval


def around(value: float, spread: Spread) -> Interval:
    """Student's interval of an estimate."""
    return Interval(value - spread.reach, value + spread.reach)


def mean_interval(row: Row, metric: str) -> Interval | None:
    """The interval of the row's value: over seeds and held-out rows where they were kept, else over the seeds.

    None where there is one measurement alone.
    """
    value = row.value(metric)
    if value is None or not is_number(value):
        return None
    scored = row.scored_rows(metric)
    spread = crossed_spread(scored.values, scored.weights) if scored else None
    if spread is None:
        spread = seeds_spread([*seed_values(row, metric).values()])
    return None if spread is None else around(value, spread)


def reach_of(row: Row, metric: str) -> float:
    """Half the width of a mean's 95 % interval; of one run two standard errors, 0 where there are none."""
    interval = mean_interval(row, metric)
    if interval is not None:
        return (interval.high - interval.low) / 2
    return 2 * (row.stderr(metric) or 0.0)


def seed_values(row: Row, metric: str) -> dict[Any, float]:
    """Seed -> value of the row's ok runs."""
    return row.by_seed(metric)


def difference(a: Row, b: Row, metric: str) -> Difference | None:
    """`a` less `b`; None where either has no number.

    Where both kept their results row by row, the rows are paired: on one question both cells meet the same difficulty,
    which the difference is then free of. Seeds are paired where both ran under the same. Where both are there they are
    crossed (`uncertainty.crossed_spread`): all seeds answer the same rows, so neither's scatter holds the other's. Of
    training speed under one seed the steps tell. Else the standard errors are taken as independent.
    """
    kept = a.differences
    if (id(b), metric) not in kept:
        kept[id(b), metric] = (b, _difference(a, b, metric))  # with the row, whose id would be given anew without it
    result: Difference | None = kept[id(b), metric][1]
    return result


def _difference(a: Row, b: Row, metric: str) -> Difference | None:
    x, y = a.value(metric), b.value(metric)
    if x is None or y is None or not (is_number(x) and is_number(y)):
        return None
    result = _over_rows(a, b, metric)
    if result is not None:
        several = len(seed_values(a, metric)) > 1 and len(seed_values(b, metric)) > 1
        return Difference(*result, "paired rows and seeds" if several else "paired rows")
    over_seeds = _over_seeds(seed_values(a, metric), seed_values(b, metric))
    if over_seeds is not None:
        return Difference(x - y, over_seeds, "seeds")
    if metric == "train_tokens_per_second" and (steps := speed_ratio(a, b)) is not None:
        # the interval of a ratio, as one of the difference: half its width, as a standard error of many steps
        reach = y * (steps[1].high - steps[1].low) / 2
        return Difference(x - y, Spread((reach / student_quantile(math.inf)) ** 2, math.inf), "steps")
    first, second = a.stderr(metric), b.stderr(metric)
    if first is not None and second is not None:
        return Difference(x - y, Spread(first**2 + second**2, math.inf), "standard errors")
    return Difference(x - y, None, "none")


def ratio(a: Row, b: Row, metric: str) -> tuple[float, Interval | None] | None:
    """`a`'s value over `b`'s; None where either is missing or not above zero.

    The interval is over the seeds (of the ratio's logarithm), for training speed over the steps too, the wider at
    either end; None: one measurement each.
    """
    x, y = a.value(metric), b.value(metric)
    if x is None or y is None or not (is_number(x) and is_number(y) and x > 0 and y > 0):
        return None
    over_seeds = ratio_of_seeds(seed_values(a, metric), seed_values(b, metric))
    result = [] if over_seeds is None else [over_seeds]
    if metric == "train_tokens_per_second" and (steps := speed_ratio(a, b)) is not None:
        result.append(steps[1])
    return x / y, Interval(min(i.low for i in result), max(i.high for i in result)) if result else None


def ratio_of_seeds(x: Mapping[Any, float], y: Mapping[Any, float]) -> Interval | None:
    """Student's interval of a ratio, from values above zero by seed; None where either side has fewer than two."""
    logs = [{seed: math.log(value) for seed, value in side.items() if value > 0} for side in (x, y)]
    result = _over_seeds(*logs)
    if result is None:
        return None
    mean = math.fsum(logs[0].values()) / len(logs[0]) - math.fsum(logs[1].values()) / len(logs[1])
    return Interval(math.exp(mean - result.reach), math.exp(mean + result.reach))


def _over_seeds(x: Mapping[Any, float], y: Mapping[Any, float]) -> Spread | None:
    """Of the difference of two means: of the pairs where the seeds are the same, else Welch's; None below two seeds."""
    if x.keys() == y.keys():
        return seeds_spread([x[seed] - y[seed] for seed in x])
    sides = [seeds_spread([*side.values()]) for side in (x, y)]
    known = [side for side in sides if side is not None]
    return sum_of(known) if len(known) == 2 else None


def paired_rows(a: Row, b: Row, metric: str) -> tuple[numpy.ndarray, numpy.ndarray] | None:
    """(seeds, rows) of `a`'s results less `b`'s, and the rows' weights; None where rows or seeds are not the same."""
    x, y = a.scored_rows(metric), b.scored_rows(metric)
    if x is None or y is None or x.questions != y.questions:
        return None
    seeds = [[str(run.seed) for run in row.runs if run.ok] for row in (a, b)]
    if sorted(seeds[0]) != sorted(seeds[1]):
        return None
    first, second = (sorted(range(len(of)), key=of.__getitem__) for of in seeds)
    return x.values[first] - y.values[second], x.weights


def _over_rows(a: Row, b: Row, metric: str) -> tuple[float, Spread] | None:
    """The difference over the rows that both were asked, and its spread; None where they were not kept, or differ."""
    paired = paired_rows(a, b, metric)
    if paired is not None:
        values, weights = paired
        spread = crossed_spread(values, weights)
        return None if spread is None else (float(values.mean(axis=0).sum() / weights.sum()), spread)
    x, y = a.scored_rows(metric), b.scored_rows(metric)
    if x is None or y is None or x.questions != y.questions:
        return None
    # other seeds on the same rows: the rows by the difference of the means, each side's seeds beside them
    means = x.values.mean(axis=0) - y.values.mean(axis=0)
    of_rows = crossed_spread(means[None], x.weights)
    of_seeds = [seeds_spread([*(side.values.sum(axis=1) / side.weights.sum())]) for side in (x, y)]
    if of_rows is None:
        return None
    apart = float(means.sum() / x.weights.sum())
    return apart, sum_of([of_rows, *(part for part in of_seeds if part is not None)])


class Draws(NamedTuple):
    """What cells might have come to under other held-out rows and seeds."""

    rows: Sequence[Row]
    scores: numpy.ndarray
    """(cells, draws): the score."""
    costs: numpy.ndarray
    """(costs, cells, draws): the metrics beside it, under the same seeds."""


def draw_again(rows: Sequence[Row], metric: str, costs: Sequence[str] = ()) -> Draws | None:
    """Held-out rows and seeds drawn with replacement, 2,000 times; None where the cells were not asked the same rows.

    Both are crossed (the pigeonhole bootstrap, Owen 2007), and the draws are shared by all cells, as the difficulty of
    a row is. What one seed alone has measured beside the score stays as it is.
    """
    import numpy as np

    kept = [(row, scored) for row in rows if (scored := row.scored_rows(metric)) is not None]
    if not kept or len(kept) < len(rows):
        return None
    first = kept[0][1]
    if len(first.questions) > _SHARED_DRAWS or any(scored.questions != first.questions for _, scored in kept):
        return None
    counts = _draws(len(first.questions))
    below = counts @ first.weights
    picked = {n: np.random.default_rng(n).multinomial(n, [1 / n] * n, size=_RESAMPLES) / n for n in _seeds_of(kept)}
    scores = [(picked[len(s.values)] * (counts @ s.values.T)).sum(axis=1) / below for _, s in kept]
    beside = [[_drawn(row, cost, picked[len(s.values)]) for row, s in kept] for cost in costs]
    return Draws(
        [row for row, _ in kept], np.array(scores), np.array(beside).reshape(len(costs), len(kept), _RESAMPLES)
    )


def _seeds_of(kept: Sequence[tuple[Row, Scored]]) -> set[int]:
    return {len(scored.values) for _, scored in kept}


def _drawn(row: Row, metric: str, picked: numpy.ndarray) -> numpy.ndarray:
    """A metric of a row under the seeds drawn; its mean throughout where a seed lacks it."""
    import numpy as np

    by_seed = [run.value(metric) for run in row.runs if run.ok]
    if len(by_seed) != picked.shape[1] or not all(map(is_number, by_seed)):
        return np.full(len(picked), row.value(metric) or 0.0)
    drawn: numpy.ndarray = picked @ np.array(by_seed, dtype=float)
    return drawn


def best_shares(rows: Sequence[Row], metric: str) -> dict[int, float] | None:
    """`id(row)` -> in what share of the draws it is the best of them, equals sharing; None where nothing can be drawn
    (`draw_again`), or there is nothing to choose from."""
    import numpy as np

    drawn = draw_again(rows, metric) if len(rows) > 1 else None
    if drawn is None:
        return None
    values = drawn.scores * _sign(metric)
    best = np.isclose(values, values.max(axis=0), rtol=1e-12, atol=0)
    return dict(zip(map(id, drawn.rows), (best / best.sum(axis=0)).mean(axis=1).tolist(), strict=True))


def front_shares(rows: Sequence[Row], metric: str, costs: Sequence[str]) -> dict[int, float] | None:
    """`id(row)` -> in what share of the draws no other row beats it in the score and every cost at once.

    None where nothing can be drawn.
    """
    import numpy as np

    drawn = draw_again(rows, metric, costs) if len(rows) > 1 and costs else None
    if drawn is None:
        return None
    points = np.stack(
        [drawn.scores * -_sign(metric), *(c * -_sign(n) for c, n in zip(drawn.costs, costs, strict=True))]
    )
    points = np.round(points / np.maximum(np.abs(points).max(axis=(1, 2), keepdims=True), 1e-300), 12)
    shares = []
    for i in range(len(drawn.rows)):
        beaten = (points <= points[:, i : i + 1]).all(axis=0) & (points < points[:, i : i + 1]).any(axis=0)
        shares.append(1 - float(beaten.any(axis=0).mean()))
    return dict(zip(map(id, drawn.rows), shares, strict=True))


def _sign(metric: str) -> int:
    return -1 if metric_of(metric).better == "lower" else 1


@lru_cache(maxsize=4)
def _draws(n: int) -> numpy.ndarray:
    """How often each of n values is drawn, resample by resample; the same records make the same report.

    A table of cells is thousands of pairs over the same rows; drawing anew for each took longer than all else.
    """
    import numpy as np

    drawn = np.random.default_rng(0).integers(0, n, (_RESAMPLES, n))
    counts = np.zeros((_RESAMPLES, n))
    np.add.at(counts, (np.arange(_RESAMPLES)[:, None], drawn), 1.0)
    return counts


def _middle(drawn: Any) -> Interval:
    """The 95 % in the middle of a bootstrap distribution."""
    import numpy as np

    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Interval(float(low), float(high))


def speed_ratio(a: Row, b: Row) -> tuple[float, Interval] | None:
    """How many times as many tokens per second `a` trained on as `b`, from the steps of the seeds that both ran.

    None where the steps were not kept. The steps of a run are taken as independent draws: what slows a machine for
    minutes is not in the interval.
    """
    by_seed = [{run.seed: run for run in row.runs if run.ok and run.path} for row in (a, b)]
    shared = [seed for seed in by_seed[0] if seed in by_seed[1]]
    pooled: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    for seed in shared:
        for side, runs in zip(pooled, by_seed, strict=True):
            side += measured_steps(runs[seed])
    return ratio_of_sums(*pooled)


def seed_losses(row: Row) -> tuple[list[int], list[list[float]]]:
    """The steps that all seeds have, and each seed's training loss at them."""
    results = [read_losses(run.path) for run in row.runs if run.path and (run.ok or not row.ok)]
    curves = [dict(zip(*curve, strict=True)) for curve in results if len(curve[0]) > 1]
    if not curves:
        return [], []
    steps = [step for step in curves[0] if all(step in curve for curve in curves)]
    return steps, [[curve[step] for step in steps] for curve in curves]


def measured_steps(run: Row) -> list[tuple[float, float]]:
    """(tokens, seconds) of a run's steps, its warm-up left out as in `train_tokens_per_second`."""
    result = read_steps(run.path) if run.path else None
    steps = list(zip(result.tokens, result.seconds, strict=True)) if result else []
    warm_up = run.section("training").get("measure_after", 3)
    return steps[min(warm_up if isinstance(warm_up, int) else 3, len(steps) // 2) :]


def ratio_of_sums(
    over: Sequence[tuple[float, float]], under: Sequence[tuple[float, float]]
) -> tuple[float, Interval] | None:
    """(tokens, seconds) of two runs' steps -> the first's tokens per second over the second's, with its interval.

    Steps of the same tokens in the same order are paired, for what a step costs depends on its rows first of all; else
    each side is drawn for itself.
    """
    import numpy as np

    if min(len(over), len(under)) < 3:
        return None
    (ta, sa), (tb, sb) = (np.array(steps, dtype=float).T for steps in (over, under))
    value = float(ta.sum() / sa.sum() / (tb.sum() / sb.sum()))
    if len(ta) == len(tb) <= _SHARED_DRAWS and bool((ta == tb).all()):
        counts = _draws(len(ta))  # the tokens cancel out
        return value, _middle((counts @ sb) / (counts @ sa))
    drawn = [
        np.random.default_rng(i).integers(0, len(side), (_RESAMPLES, len(side))) for i, side in enumerate((ta, tb))
    ]
    rates = [tokens[at].sum(axis=1) / s[at].sum(axis=1) for tokens, s, at in ((ta, sa, drawn[0]), (tb, sb, drawn[1]))]
    return value, _middle(rates[0] / rates[1])

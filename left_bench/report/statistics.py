"""What a difference is worth: means over seeds and rows, paired differences, ratios, and their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from left_bench.report.cells import Row
from left_bench.report.load import read_steps
from left_bench.report.uncertainty import CONFIDENCE, Spread, crossed_spread, seeds_spread, sum_of
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
    """One row's value less another's, and the interval that the noise leaves it."""

    value: float
    interval: Interval | None
    """None: one measurement each, and nothing to tell how far the next would be."""
    how: str
    """What the interval is over: `paired rows`, `paired rows and seeds`, `seeds`, `standard errors`, or `none`."""
    error: float | None = None
    """One standard error of the difference."""

    @property
    def tie(self) -> bool:
        """The interval holds zero; without one, only what is equal ties."""
        return self.value == 0 if self.interval is None else 0 in self.interval


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


def seed_values(row: Row, metric: str) -> dict[Any, float]:
    """Seed -> value of the row's ok runs."""
    found = {run.seed: run.value(metric) for run in row.runs if run.ok}
    return {seed: value for seed, value in found.items() if value is not None and math.isfinite(value)}


def difference(a: Row, b: Row, metric: str) -> Difference | None:
    """`a` less `b`; None where either has no number.

    Where both kept their results row by row, the rows are paired: on one question both cells meet the same difficulty,
    which the difference is then free of. Seeds are paired where both ran under the same. Where both are there they are
    crossed (`uncertainty.crossed_spread`): all seeds answer the same rows, so neither's scatter holds the other's. Else
    the standard errors are taken as independent.
    """
    x, y = a.value(metric), b.value(metric)
    if x is None or y is None or not (is_number(x) and is_number(y)):
        return None
    found = _over_rows(a, b, metric)
    if found is not None:
        several = len(seed_values(a, metric)) > 1 and len(seed_values(b, metric)) > 1
        how = "paired rows and seeds" if several else "paired rows"
        apart, spread = found
        return Difference(x - y, around(apart, spread), how, math.sqrt(spread.variance))
    over_seeds = _over_seeds(seed_values(a, metric), seed_values(b, metric))
    if over_seeds is not None:
        return Difference(x - y, around(x - y, over_seeds), "seeds", math.sqrt(over_seeds.variance))
    first, second = a.stderr(metric), b.stderr(metric)
    if first is not None and second is not None:
        error = math.hypot(first, second)
        return Difference(x - y, Interval(x - y - 2 * error, x - y + 2 * error), "standard errors", error)
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
    found = [] if over_seeds is None else [over_seeds]
    if metric == "train_tokens_per_second" and (steps := speed_ratio(a, b)) is not None:
        found.append(steps[1])
    return x / y, Interval(min(i.low for i in found), max(i.high for i in found)) if found else None


def ratio_of_seeds(x: Mapping[Any, float], y: Mapping[Any, float]) -> Interval | None:
    """Student's interval of a ratio, from values above zero by seed; None where either side has fewer than two."""
    logs = [{seed: math.log(value) for seed, value in side.items() if value > 0} for side in (x, y)]
    found = _over_seeds(*logs)
    if found is None:
        return None
    mean = math.fsum(logs[0].values()) / len(logs[0]) - math.fsum(logs[1].values()) / len(logs[1])
    return Interval(math.exp(mean - found.reach), math.exp(mean + found.reach))


def tied(a: Row, b: Row, metric: str) -> bool | None:
    """Whether the noise covers what lies between two rows; None where nothing tells how far it reaches."""
    found = difference(a, b, metric)
    if found is None:
        return None
    if found.interval is not None:
        return found.tie
    if metric == "train_tokens_per_second" and (steps := speed_ratio(a, b)) is not None:
        return 1 in steps[1]
    return None


def _over_seeds(x: Mapping[Any, float], y: Mapping[Any, float]) -> Spread | None:
    """Of the difference of two means: of the pairs where the seeds are the same, else Welch's; None below two seeds."""
    if x.keys() == y.keys():
        return seeds_spread([x[seed] - y[seed] for seed in x])
    sides = [seeds_spread([*side.values()]) for side in (x, y)]
    known = [side for side in sides if side is not None]
    return sum_of(known) if len(known) == 2 else None


def _over_rows(a: Row, b: Row, metric: str) -> tuple[float, Spread] | None:
    """The difference over the rows that both were asked, and its spread; None where they were not kept, or differ."""
    x, y = a.scored_rows(metric), b.scored_rows(metric)
    if x is None or y is None or x.questions != y.questions:
        return None
    means = x.values.mean(axis=0) - y.values.mean(axis=0)
    apart = float(means.sum() / x.weights.sum())
    seeds = [[run.seed for run in row.runs if run.ok] for row in (a, b)]
    if sorted(map(str, seeds[0])) == sorted(map(str, seeds[1])):
        order = [sorted(range(len(of)), key=lambda i, of=of: str(of[i])) for of in seeds]  # type: ignore[misc]
        spread = crossed_spread(x.values[order[0]] - y.values[order[1]], x.weights)
        return None if spread is None else (apart, spread)
    # other seeds on the same rows: the rows by the difference of the means, each side's seeds beside them
    parts = [crossed_spread(means[None], x.weights)]
    parts += [seeds_spread([*(side.values.sum(axis=1) / side.weights.sum())]) for side in (x, y)]
    known = [part for part in parts if part is not None]
    return (apart, sum_of(known)) if parts[0] is not None else None


def best_shares(rows: Sequence[Row], metric: str) -> dict[int, float] | None:
    """`id(row)` -> how often it is the best of them when held-out rows and seeds are drawn anew, 2,000 times.

    Both are drawn with replacement and crossed (the pigeonhole bootstrap, Owen 2007), the rows' draws shared by all
    cells, as their difficulty is. Equals share. None where the cells were not asked the same rows.
    """
    import numpy as np

    kept = {id(row): scored for row in rows if (scored := row.scored_rows(metric)) is not None}
    if len(kept) < 2 or len(kept) < len(rows):
        return None
    first = next(iter(kept.values()))
    if len(first.questions) > _SHARED_DRAWS or any(one.questions != first.questions for one in kept.values()):
        return None
    counts = _draws(len(first.questions))
    below = counts @ first.weights
    drawn = []
    for scored in kept.values():
        seeds = len(scored.values)
        picked = np.random.default_rng(seeds).multinomial(seeds, [1 / seeds] * seeds, size=_RESAMPLES) / seeds
        drawn.append((picked * (counts @ scored.values.T)).sum(axis=1) / below)
    values = np.array(drawn) * (1 if metric_of(metric).better == "higher" else -1)
    best = np.isclose(values, values.max(axis=0), rtol=1e-12, atol=0)
    return dict(zip(kept, (best / best.sum(axis=0)).mean(axis=1).tolist(), strict=True))


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


def measured_steps(run: Row) -> list[tuple[float, float]]:
    """(tokens, seconds) of a run's steps, its warm-up left out as in `train_tokens_per_second`."""
    found = read_steps(run.path) if run.path else None
    steps = list(zip(found.tokens, found.seconds, strict=True)) if found else []
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
    from scipy.stats import bootstrap

    if min(len(over), len(under)) < 3:
        return None
    (ta, sa), (tb, sb) = (np.array(steps, dtype=float).T for steps in (over, under))

    def rate(tokens: numpy.ndarray, seconds: numpy.ndarray, axis: int = -1) -> Any:
        return tokens.sum(axis=axis) / seconds.sum(axis=axis)

    value = float(rate(ta, sa) / rate(tb, sb))
    if len(ta) == len(tb) <= _SHARED_DRAWS and bool((ta == tb).all()):
        counts = _draws(len(ta))  # the tokens cancel out
        return value, _middle((counts @ sb) / (counts @ sa))
    options: dict[str, Any] = {"paired": True, "vectorized": True, "n_resamples": _RESAMPLES, "method": "percentile"}
    sides = [bootstrap(side, rate, rng=i, **options) for i, side in enumerate(((ta, sa), (tb, sb)))]
    return value, _middle(sides[0].bootstrap_distribution / sides[1].bootstrap_distribution)

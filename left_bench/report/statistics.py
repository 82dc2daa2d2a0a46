"""What a difference is worth: means over seeds, paired differences, and their bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from left_bench.answers import SCORES_OF_A_ROW
from left_bench.report.cells import Row
from left_bench.report.load import RowResult, read_row_results, read_steps
from left_bench.report.values import is_number

if TYPE_CHECKING:
    import numpy

CONFIDENCE = 0.95
_RESAMPLES = 2000


class Interval(NamedTuple):
    """A 95 % bootstrap interval."""

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

    @property
    def tie(self) -> bool:
        """The interval holds zero; without one, only what is equal ties."""
        return self.value == 0 if self.interval is None else 0 in self.interval


def mean_interval(values: Sequence[float]) -> Interval | None:
    """The interval of the mean by the percentile bootstrap; None below two values.

    Of three values, as three seeds give, it spans little less than all of them: few seeds tell little, and it says so.
    """
    return _bootstrap(values, [1.0] * len(values)) if len(values) > 1 else None


def seed_values(row: Row, metric: str) -> dict[Any, float]:
    """Seed -> value of the row's ok runs."""
    found = {run.seed: run.value(metric) for run in row.runs if run.ok}
    return {seed: value for seed, value in found.items() if value is not None and math.isfinite(value)}


def difference(a: Row, b: Row, metric: str) -> Difference | None:
    """`a` less `b`; None where either has no number.

    Where both kept their results row by row, the rows are paired: on one question both cells meet the same difficulty,
    which the difference is then free of. Where both ran under the same seeds, the seeds are paired too, and the
    interval is as wide as the wider of the two reaches at either end. Else the standard errors are
    taken as independent.
    """
    x, y = a.value(metric), b.value(metric)
    if x is None or y is None or not (is_number(x) and is_number(y)):
        return None
    rows, seeds = _over_rows(a, b, metric), _over_seeds(a, b, metric)
    found = [interval for interval in (rows, seeds) if interval is not None]
    if found:
        how = "paired rows and seeds" if len(found) == 2 else "paired rows" if rows else "seeds"
        return Difference(x - y, Interval(min(i.low for i in found), max(i.high for i in found)), how)
    first, second = a.stderr(metric), b.stderr(metric)
    if first is not None and second is not None:
        reach = 2 * math.hypot(first, second)
        return Difference(x - y, Interval(x - y - reach, x - y + reach), "standard errors")
    return Difference(x - y, None, "none")


def _over_seeds(a: Row, b: Row, metric: str) -> Interval | None:
    x, y = seed_values(a, metric), seed_values(b, metric)
    shared = [seed for seed in x if seed in y]
    if len(shared) > 1 and len(shared) == len(x) == len(y):
        return mean_interval([x[seed] - y[seed] for seed in shared])
    if len(x) > 1 and len(y) > 1:
        return _difference_of_means(tuple(x.values()), tuple(y.values()))
    return None


def _over_rows(a: Row, b: Row, metric: str) -> Interval | None:
    x, y = _row_means(a, metric), _row_means(b, metric)
    if x is None or y is None or x[0] != y[0]:  # other questions, or another order
        return None
    pairs = zip(x[1], y[1], strict=True)
    return _bootstrap([p - q for p, q in pairs], x[2])


def _row_means(row: Row, metric: str) -> tuple[list[Any], list[float], list[float]] | None:
    """(the questions, each row's value as a mean over the seeds, each row's weight); None where any run kept none."""
    if metric != "eval_loss" and metric not in SCORES_OF_A_ROW:
        return None
    found = []
    for run in row.runs:
        if run.ok:
            results = read_row_results(run.path) if run.path else None
            scored = results and [_score(result, metric) for result in results]
            if not results or not scored or None in scored:
                return None
            found.append(([(r.reference, r.answer_tokens) for r in results], scored))
    if not found or any(questions != found[0][0] for questions, _ in found):
        return None
    values = [sum(parts) / len(found) for parts in zip(*(scored for _, scored in found), strict=True)]
    weights = [float(tokens) if metric == "eval_loss" else 1.0 for _, tokens in found[0][0]]
    return found[0][0], values, weights


def _score(result: RowResult, metric: str) -> float | None:
    if metric == "eval_loss":
        return result.nll
    return None if result.prediction is None else SCORES_OF_A_ROW[metric](result.prediction, result.reference)


def _bootstrap(values: Sequence[float], weights: Sequence[float]) -> Interval | None:
    """The interval of sum(values) / sum(weights), values and weights drawn together."""
    if len(values) < 2 or sum(weights) <= 0:
        return None
    if len({value / weight if weight else value for value, weight in zip(values, weights, strict=True)}) == 1:
        mean = sum(values) / sum(weights)
        return Interval(mean, mean)
    return _cached_bootstrap(tuple(values), tuple(weights))


@lru_cache(maxsize=4096)
def _cached_bootstrap(values: tuple[float, ...], weights: tuple[float, ...]) -> Interval:
    from scipy.stats import bootstrap

    found = bootstrap(
        (values, weights),
        lambda value, weight, axis: value.sum(axis=axis) / weight.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=_RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",  # BCa has no answer where resamples are all alike, as they are of three seeds
        rng=0,  # the same records make the same report
    ).confidence_interval
    return Interval(float(found.low), float(found.high))


@lru_cache(maxsize=4096)
def _difference_of_means(x: tuple[float, ...], y: tuple[float, ...]) -> Interval:
    from scipy.stats import bootstrap

    if len({*x}) == len({*y}) == 1:
        return Interval(x[0] - y[0], x[0] - y[0])
    found = bootstrap(
        (x, y),
        lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis),
        vectorized=True,
        n_resamples=_RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=0,
    ).confidence_interval
    return Interval(float(found.low), float(found.high))


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
    options: dict[str, Any] = {"paired": True, "vectorized": True, "n_resamples": _RESAMPLES, "method": "percentile"}
    if len(ta) == len(tb) and bool((ta == tb).all()):
        found = bootstrap((ta, sa, sb), lambda t, a, b, axis: rate(t, a, axis) / rate(t, b, axis), rng=0, **options)
        drawn = found.bootstrap_distribution
    else:
        sides = [bootstrap(side, rate, rng=i, **options) for i, side in enumerate(((ta, sa), (tb, sb)))]
        drawn = sides[0].bootstrap_distribution / sides[1].bootstrap_distribution
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return value, Interval(float(low), float(high))

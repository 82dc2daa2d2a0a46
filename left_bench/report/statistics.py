"""What a difference is worth: means over seeds, paired differences, and their bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from left_bench.answers import SCORES_OF_A_PAIR, SCORES_OF_A_ROW
from left_bench.report.cells import Row
from left_bench.report.load import RowResult, read_row_results, read_steps
from left_bench.report.values import is_number

if TYPE_CHECKING:
    import numpy

CONFIDENCE = 0.95
_RESAMPLES = 2000
_SHARED_DRAWS = 2048
"""Values up to which one table of draws serves every pair of cells; 32 MiB."""


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

    Of three values, as three seeds give, it spans no more than all of them: it describes them, and is too narrow to
    judge by (three differences of nothing bear one sign one time in four). `difference` takes Student's t for seeds.
    """
    return _bootstrap(values, [1.0] * len(values)) if len(values) > 1 else None


def seed_values(row: Row, metric: str) -> dict[Any, float]:
    """Seed -> value of the row's ok runs."""
    found = {run.seed: run.value(metric) for run in row.runs if run.ok}
    return {seed: value for seed, value in found.items() if value is not None and math.isfinite(value)}


def difference(a: Row, b: Row, metric: str) -> Difference | None:
    """`a` less `b`; None where either has no number.

    Where both kept their results row by row, the rows are paired: on one question both cells meet the same difficulty,
    which the difference is then free of. Where both ran under several seeds, the same ones paired, Student's t says how
    far they reach, and the interval is as wide as the wider of the two at either end. Else the standard errors are
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
    found = _student(*({seed: math.log(value) for seed, value in side.items() if value > 0} for side in (x, y)))
    return None if found is None else Interval(math.exp(found.low), math.exp(found.high))


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


def _over_seeds(a: Row, b: Row, metric: str) -> Interval | None:
    return _student(seed_values(a, metric), seed_values(b, metric))


def _student(x: dict[Any, float], y: dict[Any, float]) -> Interval | None:
    """Student's interval of the difference of two means: of the pairs where the seeds are the same, else Welch's."""
    n, m = len(x), len(y)
    if min(n, m) < 2:
        return None
    if x.keys() == y.keys():
        pairs = [x[seed] - y[seed] for seed in x]
        mean, spread, freedom = math.fsum(pairs) / n, _variance(pairs) / n, n - 1.0
    else:
        parts = _variance([*x.values()]) / n, _variance([*y.values()]) / m
        mean, spread = math.fsum(x.values()) / n - math.fsum(y.values()) / m, sum(parts)
        freedom = spread**2 / (parts[0] ** 2 / (n - 1) + parts[1] ** 2 / (m - 1)) if spread else 1.0
    reach = _student_quantile(freedom) * math.sqrt(spread) if spread else 0.0
    return Interval(mean - reach, mean + reach)


def _variance(values: Sequence[float]) -> float:
    if len(set(values)) == 1:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


@lru_cache(maxsize=4096)
def _student_quantile(freedom: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def _over_rows(a: Row, b: Row, metric: str) -> Interval | None:
    x, y = _row_means(a, metric), _row_means(b, metric)
    if x is None or y is None or x[0] != y[0]:  # other questions, or another order
        return None
    pairs = zip(x[1], y[1], strict=True)
    return _bootstrap([p - q for p, q in pairs], x[2])


def _row_means(row: Row, metric: str) -> tuple[list[Any], list[float], list[float]] | None:
    """(the questions, each row's value as a mean over the seeds, each row's weight); None where any run kept none."""
    if metric not in ("eval_loss", *SCORES_OF_A_PAIR, *SCORES_OF_A_ROW):
        return None
    runs = [read_row_results(run.path) if run.path else None for run in row.runs if run.ok]
    kept = [results for results in runs if results]
    return _means_of(tuple(kept), metric) if kept and len(kept) == len(runs) else None


@lru_cache(maxsize=4096)
def _means_of(
    runs: tuple[tuple[RowResult, ...], ...], metric: str
) -> tuple[list[Any], list[float], list[float]] | None:
    questions = [(r.reference, r.answer_tokens) for r in runs[0]]
    if any([(r.reference, r.answer_tokens) for r in results] != questions for results in runs[1:]):
        return None
    scored = [[value for r in results if (value := _score(r, metric)) is not None] for results in runs]
    if any(len(values) != len(questions) for values in scored):
        return None
    values = [sum(parts) / len(runs) for parts in zip(*scored, strict=True)]
    weights = [float(tokens) if metric == "eval_loss" else 1.0 for _, tokens in questions]
    return questions, values, weights


def _score(result: RowResult, metric: str) -> float | None:
    if metric == "eval_loss":
        return result.nll
    if metric in SCORES_OF_A_PAIR:
        return None if result.rejected_nll is None else SCORES_OF_A_PAIR[metric](result.rejected_nll - result.nll)
    return None if result.prediction is None else SCORES_OF_A_ROW[metric](result.prediction, result.reference)


def _bootstrap(values: Sequence[float], weights: Sequence[float]) -> Interval | None:
    """The interval of sum(values) / sum(weights), values and weights drawn together."""
    if len(values) < 2 or sum(weights) <= 0:
        return None
    if len({value / weight if weight else value for value, weight in zip(values, weights, strict=True)}) == 1:
        mean = sum(values) / sum(weights)
        return Interval(mean, mean)
    if len(values) > _SHARED_DRAWS:
        return _scipy_bootstrap(values, weights)
    import numpy as np

    drawn = _draws(len(values))
    return _middle((drawn @ np.array(values)) / (drawn @ np.array(weights)))


def _scipy_bootstrap(values: Sequence[float], weights: Sequence[float]) -> Interval:
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


@lru_cache(maxsize=4)
def _draws(n: int) -> numpy.ndarray:
    """How often each of n values is drawn, resample by resample: those of `scipy.stats.bootstrap` with `rng=0`.

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

"""How far a mean over seeds and held-out rows would move under other seeds and other rows.

All seeds of a cell are scored on the same rows, so their scatter says nothing of which rows were drawn, and the scatter
of the rows says nothing of the seeds: the two are crossed, and both count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from left_bench.report.steps_and_rows import RowResult, read_row_results
from left_bench.spec.record import SCORER_PREFIX
from left_bench.spec.row_scores import ANSWER_METRICS, SCORES_OF_A_PAIR, SCORES_OF_A_ROW

if TYPE_CHECKING:
    import numpy

CONFIDENCE = 0.95


class Spread(NamedTuple):
    """The variance of an estimate, and the degrees of freedom of the Student's t that goes with it."""

    variance: float
    freedom: float

    @property
    def reach(self) -> float:
        """Half the width of the 95 % interval."""
        return self.reach_at(CONFIDENCE)

    def reach_at(self, confidence: float) -> float:
        """Half the width of the interval of another confidence."""
        return student_quantile(self.freedom, confidence) * math.sqrt(self.variance) if self.variance > 0 else 0.0

    def p_value(self, value: float) -> float:
        """How likely an estimate at least so far from zero is where the truth is zero, two-sided."""
        if self.variance <= 0:
            return 1.0 if value == 0 else 0.0
        return student_tail(self.freedom, abs(value) / math.sqrt(self.variance))


class Components(NamedTuple):
    """What the values of (seeds, rows) scatter by: from seed to seed, from row to row, and what is left of each."""

    of_seeds: float
    of_rows: float
    residual: float

    def spread(self, seeds: int, rows: int) -> Spread:
        """The spread that a mean over so many seeds and rows is to be expected to have."""
        squares = {
            max(1, seeds - 1): self.residual + rows * self.of_seeds if seeds > 1 else 0.0,
            max(1, rows - 1): self.residual + seeds * self.of_rows,
        }
        variance = self.of_seeds / seeds + self.of_rows / rows + self.residual / (seeds * rows)
        parts = sum((square / (seeds * rows)) ** 2 / freedom for freedom, square in squares.items())
        return Spread(variance, max(1.0, variance**2 / parts) if parts > 0 else 1.0)


class Scored(NamedTuple):
    """What a cell's seeds kept row by row of one metric."""

    questions: list[Any]
    """What was asked: cells are paired where these are equal."""
    values: numpy.ndarray
    """(seeds, rows): each row's part of the metric's numerator."""
    weights: numpy.ndarray
    """(rows,): each row's part of its denominator: 1, or its answer's tokens for a loss."""


def scored_rows(records: Sequence[Path], metric: str) -> Scored | None:
    """The row-by-row results beside some records, one record a seed.

    None where the metric is neither a mean over rows nor kept in parts of theirs, a record has none, or the seeds were
    asked otherwise.
    """
    by_row = metric in ("eval_loss", *SCORES_OF_A_PAIR, *SCORES_OF_A_ROW) or metric.startswith(SCORER_PREFIX)
    in_parts = metric in ANSWER_METRICS and ANSWER_METRICS[metric].by_leaving_out
    if not (by_row or in_parts) or not records:
        return None
    runs = [read_row_results(path) for path in records]
    kept = [results for results in runs if results]
    return _scored(tuple(kept), metric) if len(kept) == len(runs) else None


@lru_cache(maxsize=4096)
def _scored(runs: tuple[tuple[RowResult, ...], ...], metric: str) -> Scored | None:
    import numpy as np

    questions = [(result.reference, result.answer_tokens) for result in runs[0]]
    if any([(r.reference, r.answer_tokens) for r in results] != questions for results in runs[1:]):
        return None
    values = [[value for r in results if (value := _score(r, metric)) is not None] for results in runs]
    if any(len(of_run) != len(questions) for of_run in values):
        return None
    weights = [float(tokens) if metric == "eval_loss" else 1.0 for _, tokens in questions]
    return Scored(questions, np.array(values, dtype=float), np.array(weights)) if sum(weights) > 0 else None


def _score(result: RowResult, metric: str) -> float | None:
    if metric == "eval_loss":
        return result.nll
    if metric in SCORES_OF_A_PAIR:
        return None if result.rejected_nll is None else SCORES_OF_A_PAIR[metric](result.rejected_nll - result.nll)
    for name, value in result.scores:
        if name == metric:
            return value
    if result.prediction is None or metric not in SCORES_OF_A_ROW:
        return None
    return SCORES_OF_A_ROW[metric](result.prediction, result.reference)


def crossed_spread(values: numpy.ndarray, weights: numpy.ndarray) -> Spread | None:
    """Of sum(values) / sum(weights) over seeds and rows (seeds, rows), both drawn at random; None below two rows.

    The two-way random-effects analysis of variance without repetition (Searle, Casella and McCulloch 1992, ch. 4):
    Var = (MS_seeds + MS_rows - MS_residual) / (seeds x rows), never less than either alone, with Satterthwaite's
    degrees of freedom. A ratio is taken by its linear part. One seed says nothing of the others: then it is the rows'.
    """
    seeds, rows = values.shape
    if rows < 2:
        return None
    of_seeds, of_rows, residual = _mean_squares(values, weights)
    if seeds == 1:
        return Spread(of_rows / rows, rows - 1)
    beside = (seeds - 1) * (rows - 1)
    total = of_seeds + of_rows - residual
    if total <= max(of_seeds, of_rows):  # a component came out below zero: it is taken as none
        return Spread(max(of_seeds, of_rows) / (seeds * rows), (seeds if of_seeds > of_rows else rows) - 1)
    parts = of_seeds**2 / (seeds - 1) + of_rows**2 / (rows - 1) + residual**2 / beside
    return Spread(total / (seeds * rows), total**2 / parts)


def components(values: numpy.ndarray, weights: numpy.ndarray) -> Components | None:
    """The same analysis' variances, none below zero; None below two rows.

    Of one seed's values what lies between seeds is not known and taken as none.
    """
    seeds, rows = values.shape
    if rows < 2:
        return None
    of_seeds, of_rows, residual = _mean_squares(values, weights)
    if seeds == 1:
        return Components(0.0, 0.0, of_rows)
    return Components(max(0.0, of_seeds - residual) / rows, max(0.0, of_rows - residual) / seeds, residual)


def _mean_squares(values: numpy.ndarray, weights: numpy.ndarray) -> tuple[float, float, float]:
    """Of seeds, of rows and of what is left; of one seed the first and the last are 0."""
    seeds, rows = values.shape
    ratio = values.sum() / (seeds * weights.sum())
    apart = (values - ratio * weights) / weights.mean()
    by_seed, by_row = apart.mean(axis=1), apart.mean(axis=0)
    mean = apart.mean()
    of_rows = seeds * float(((by_row - mean) ** 2).sum()) / (rows - 1)
    if seeds == 1:
        return 0.0, of_rows, 0.0
    of_seeds = rows * float(((by_seed - mean) ** 2).sum()) / (seeds - 1)
    residual = float(((apart - by_seed[:, None] - by_row + mean) ** 2).sum()) / ((seeds - 1) * (rows - 1))
    return of_seeds, of_rows, residual


def seeds_spread(values: Sequence[float]) -> Spread | None:
    """Of the mean of one value a seed; None below two."""
    n = len(values)
    return Spread(variance(values) / n, n - 1) if n > 1 else None


def sum_of(spreads: Sequence[Spread]) -> Spread:
    """Of the sum or the difference of independent estimates (Welch 1947)."""
    total = sum(spread.variance for spread in spreads)
    parts = sum(spread.variance**2 / spread.freedom for spread in spreads)
    return Spread(total, total**2 / parts if parts > 0 else 1.0)


def variance(values: Sequence[float]) -> float:
    """The unbiased one; exactly 0 of values that are all the same."""
    if len(set(values)) == 1:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


@lru_cache(maxsize=4096)
def student_quantile(freedom: float, confidence: float = CONFIDENCE) -> float:
    from scipy.special import ndtri, stdtrit

    share = (1 + confidence) / 2
    return float(ndtri(share) if math.isinf(freedom) else stdtrit(freedom, share))


def student_tail(freedom: float, t: float) -> float:
    """How likely Student's t is to lie beyond `t` or `-t`."""
    from scipy.special import ndtr, stdtr

    return 2 * float(ndtr(-t) if math.isinf(freedom) else stdtr(freedom, -t))

"""Scores of one answer against its reference: what both an evaluation averages and a report pairs row by row."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

from left_bench.spec.extract import extracted, same


def exact_match(prediction: str, reference: str, *, extractor: str | None = None) -> float:
    """1 where the answer equals the reference but for surrounding white space.

    Args:
        extractor: compare what it takes out of both, numbers as numbers (see `spec.extract`). An answer in which
            it finds nothing is wrong; a reference in which it finds nothing is the bare answer already.
    """
    if extractor is None:
        return float(prediction.strip() == reference.strip())
    predicted, expected = extracted(extractor, prediction), extracted(extractor, reference)
    return float(predicted is not None and same(predicted, reference.strip() if expected is None else expected))


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the bags of lower-cased words (Rajpurkar et al. 2016)."""
    predicted, expected = prediction.lower().split(), reference.lower().split()
    shared = sum(min(predicted.count(word), expected.count(word)) for word in set(predicted))
    return 2 * shared / (len(predicted) + len(expected)) if shared else 0.0


def number_match(prediction: str, reference: str) -> float:
    """1 where the answer comes to the reference's number, compared as numbers: `1,000` is `1000.0`."""
    return exact_match(prediction, reference, extractor="number")


@lru_cache(maxsize=2**16)  # a report holds the same answers against those of every other cell
def rouge_l(prediction: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), by Google's rouge-score with stemming."""
    return float(_rouge_scorer().score(reference, prediction)["rougeL"].fmeasure)


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


SCORES_OF_A_ROW: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "accuracy": exact_match,
    "rouge_l": rouge_l,
    "f1": token_f1,
    "number_match": number_match,
}
"""Metric -> score of (prediction, reference), the metric being the mean over rows. BLEU counts over a whole corpus."""

SCORES_OF_A_PAIR: dict[str, Callable[[float], float]] = {
    "preference_accuracy": lambda margin: float(margin > 0),
    "preference_margin_nats": float,
}
"""Metric -> score of the worse answer's loss less the right one's, nats, the metric being the mean over rows."""

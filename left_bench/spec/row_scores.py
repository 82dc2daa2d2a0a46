"""Scores of one answer against its reference: what both an evaluation averages and a report pairs row by row."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from functools import cache, lru_cache
from typing import Any


def exact_match(prediction: str, reference: str) -> float:
    """1 where the answer equals the reference but for surrounding white space."""
    return float(prediction.strip() == reference.strip())


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the bags of lower-cased words (Rajpurkar et al. 2016)."""
    predicted, expected = prediction.lower().split(), reference.lower().split()
    shared = sum(min(predicted.count(word), expected.count(word)) for word in set(predicted))
    return 2 * shared / (len(predicted) + len(expected)) if shared else 0.0


def final_number(text: str) -> Decimal | None:
    """The number an answer comes to: what follows the last `####` (GSM8K's mark), else the last number in the text."""
    marked = text.rpartition("####")[2]
    for part in (marked, text):
        found = _NUMBER.findall(part)
        if found:
            return Decimal(found[0 if part is marked and marked != text else -1].replace(",", ""))
    return None


_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")


def number_match(prediction: str, reference: str) -> float:
    """1 where the answer comes to the reference's number, compared as numbers: `1,000` is `1000.0`."""
    expected = final_number(reference)
    return float(expected is not None and final_number(prediction) == expected)


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

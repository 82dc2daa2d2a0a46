"""Metrics of answers against their references: what an evaluation averages and a report pairs row by row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from typing import Any

from left_bench.core.errors import UserError
from left_bench.core.extensions import added, load
from left_bench.core.paths import is_installed
from left_bench.spec.extract import extracted, same
from left_bench.spec.metric import Metric


def exact_match(prediction: str, reference: str, *, extractor: str | None = None) -> float:
    """1 if the answer equals the reference apart from surrounding white space.

    Args:
        extractor: compare what it extracts from both, numbers as numbers (see `spec.extract`). An answer in which it
            finds nothing is wrong; a reference in which it finds nothing is used unchanged.
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
    """1 if the answer has the reference's number, compared as numbers: `1,000` equals `1000.0`."""
    return exact_match(prediction, reference, extractor="number")


@lru_cache(maxsize=2**16)  # a report compares the same answers with those of every other cell
def rouge_l(prediction: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), by Google's rouge-score with stemming."""
    return float(_rouge_scorer().score(reference, prediction)["rougeL"].fmeasure)


@cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:  # a report pairs answers that were scored on another machine
        raise UserError(
            "rouge_l: scoring answers needs the package rouge-score, which is not installed: "
            "pip install 'left-bench[text-metrics]'"
        ) from error

    return RougeScorer(["rougeL"], use_stemmer=True)


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU-4 (Papineni et al. 2002) with sacreBLEU's 13a tokenization and exponential smoothing, in 0..1."""
    import sacrebleu

    return float(sacrebleu.corpus_bleu(list(predictions), [list(references)]).score) / 100


def macro_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean F1 over the classes that occur or were predicted: a rare class weighs as much as a frequent one."""
    pairs = Counter(zip(predictions, references, strict=True))
    answered, there = Counter(predictions), Counter(references)
    classes = answered.keys() | there.keys()
    return sum(2 * pairs[name, name] / (answered[name] + there[name]) for name in classes) / len(classes)


def matthews(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Matthews correlation of predicted and right classes, for any number of classes (Gorodkin 2004); 0 if either has
    only one class."""
    rows = len(references)
    right = sum(map(str.__eq__, predictions, references))
    answered, there = Counter(predictions), Counter(references)
    together = sum(answered[name] * there[name] for name in there)
    spread = (rows**2 - sum(n**2 for n in answered.values())) * (rows**2 - sum(n**2 for n in there.values()))
    return (right * rows - together) / spread**0.5 if spread else 0.0


ANSWER_METRICS: dict[str, Metric] = {
    "exact_match": Metric(
        "fraction", "higher", "quality", "greedy answers equal to the reference", exact_match, extracts=True
    ),
    "rouge_l": Metric(
        *("fraction", "higher", "quality", "ROUGE-L F1 of greedy answers, mean over rows"),
        of_answer=rouge_l,
        needs="rouge_score",
        extra="text-metrics",
    ),
    "bleu": Metric(
        *("fraction", "higher", "quality", "corpus BLEU-4 of greedy answers"),
        of_answers=bleu,
        needs="sacrebleu",
        extra="text-metrics",
    ),
    "accuracy": Metric("fraction", "higher", "quality", "share of rows with the right class", exact_match),
    "macro_f1": Metric("fraction", "higher", "quality", "F1 of each class, mean over classes", of_answers=macro_f1),
    "matthews": Metric("", "higher", "quality", "Matthews' correlation of the classes", of_answers=matthews),
    "f1": Metric("fraction", "higher", "quality", "token-overlap F1 of greedy answers, mean over rows", token_f1),
    "number_match": Metric(
        *("fraction", "higher", "quality", "greedy answers that come to the reference's number, as GSM8K is scored"),
        of_answer=number_match,
    ),
}
"""Metrics that `eval.metrics` may name. A new one is added here, with the function that computes it."""
for _name, _point in added("left_bench.metrics").items():
    ANSWER_METRICS.setdefault(_name, load(_point))

SCORES_OF_A_ROW: dict[str, Callable[..., float]] = {
    name: metric.of_answer for name, metric in ANSWER_METRICS.items() if metric.of_answer is not None
}
"""Metric -> score of (prediction, reference), for metrics that are a mean over rows (BLEU is of a whole corpus)."""

SCORES_OF_A_PAIR: dict[str, Callable[[float], float]] = {
    "preference_accuracy": lambda margin: float(margin > 0),
    "preference_margin_nats": float,
}
"""Metric -> score of the margin (the worse answer's loss minus the right one's, nats); the metric is the mean."""


def check_installed(names: Iterable[str]) -> None:
    """Refuse a metric whose package is not installed, before anything runs.

    Raises:
        UserError: names the metric and what to install.
    """
    for name in names:
        metric = ANSWER_METRICS[name]
        if metric.needs is not None and not is_installed(metric.needs):
            what = f"'left-bench[{metric.extra}]'" if metric.extra else metric.needs
            raise UserError(
                f"eval.metrics={name}: scoring it needs the package {metric.needs}, which is not installed: "
                f"pip install {what}, or name other metrics"
            )

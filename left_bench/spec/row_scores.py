"""Metrics of answers against their references: what an evaluation averages and a report pairs row by row."""

from __future__ import annotations

import math
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


def pearson(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Pearson's correlation of told and right numbers; 0 where either are all the same."""
    return _correlation(list(map(float, predictions)), list(map(float, references)))


def spearman(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Spearman's correlation: Pearson's of the ranks, equal numbers sharing theirs."""
    from scipy.stats import rankdata

    return _correlation(*(rankdata(list(map(float, numbers))) for numbers in (predictions, references)))


def _correlation(one: Any, other: Any) -> float:
    import numpy as np

    one, other = (np.asarray(values) - np.mean(values) for values in (one, other))
    scale = float(np.sqrt((one**2).sum() * (other**2).sum()))
    return float((one * other).sum()) / scale if scale > 0 else 0.0


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The entities in the tags of a text's words (IOB1, IOB2, IOE, IOBES), as (type, first word, last word).

    Read as conlleval and seqeval read them, whose scores are the field's: an `I-X` that continues nothing begins one.
    """
    result: set[tuple[str, int, int]] = set()
    before, kind_before, begin = "O", "", 0
    for place, tag in enumerate([*tags, "O"]):
        mark, kind = tag[:1], tag[1:].split("-", maxsplit=1)[-1] or "_"
        other_kind = kind != kind_before
        ends = before in "ES" or (before in "BI" and mark in "BSO") or (before != "O" and other_kind)
        if ends and before != "O":
            result.add((kind_before, begin, place - 1))
        after_end = before in "ESO" and mark in "EI"
        if mark in "BS" or after_end or (mark != "O" and other_kind):
            begin = place
        before, kind_before = mark, kind
    return result


@lru_cache(maxsize=2**16)  # leaving out one row after the other counts each of them many times
def _counted_entities(prediction: str, reference: str) -> tuple[int, int, int]:
    """How many entities are right, told, and there."""
    told, there = entities(prediction.split(" ")), entities(reference.split(" "))
    return len(told & there), len(told), len(there)


def entity_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """F1 of entities, right where type and both ends are (Tjong Kim Sang and De Meulder 2003); 0 where none are."""
    counts = [_counted_entities(*pair) for pair in zip(predictions, references, strict=True)]
    right, told, there = (sum(count) for count in zip(*counts, strict=True))
    return 2 * right / (told + there) if told + there else 0.0


def tag_accuracy(prediction: str, reference: str) -> float:
    """The share of a text's words that have the right tag."""
    pairs = list(zip(prediction.split(" "), reference.split(" "), strict=True))
    return sum(one == other for one, other in pairs) / len(pairs)


def _rank(prediction: str) -> int:
    """Of `3 of 128`, the place at which the right text was found."""
    return int(prediction.partition(" ")[0])


def recall_at_1(prediction: str, reference: str) -> float:
    """1 where the right text was found first."""
    return float(_rank(prediction) == 1)


def recall_at_5(prediction: str, reference: str) -> float:
    """1 where the right text was among the first five."""
    return float(_rank(prediction) <= 5)


def ndcg_at_10(prediction: str, reference: str) -> float:
    """Discounted gain of the one right text, 1 / log2(1 + rank), and 0 beyond the tenth place."""
    rank = _rank(prediction)
    return 1 / math.log2(1 + rank) if rank <= 10 else 0.0


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
    "macro_f1": Metric(
        *("fraction", "higher", "quality", "F1 of each class, mean over classes"),
        of_answers=macro_f1,
        by_leaving_out=True,
    ),
    "matthews": Metric(
        *("", "higher", "quality", "Matthews' correlation of the classes"), of_answers=matthews, by_leaving_out=True
    ),
    "pearson": Metric(
        *("", "higher", "quality", "Pearson's correlation of told and right numbers"),
        of_answers=pearson,
        by_leaving_out=True,
    ),
    "spearman": Metric(
        *("", "higher", "quality", "Spearman's correlation of told and right numbers"),
        of_answers=spearman,
        by_leaving_out=True,
    ),
    "entity_f1": Metric(
        *("fraction", "higher", "quality", "F1 of entities, as seqeval has it"),
        of_answers=entity_f1,
        by_leaving_out=True,
    ),
    "tag_accuracy": Metric(
        *("fraction", "higher", "quality", "share of a text's words with the right tag, mean over texts"), tag_accuracy
    ),
    "recall_at_1": Metric(
        "fraction", "higher", "quality", "share of texts whose right one is found first", recall_at_1
    ),
    "recall_at_5": Metric(
        *("fraction", "higher", "quality", "share of texts whose right one is among the first five"), recall_at_5
    ),
    "ndcg_at_10": Metric(
        *("fraction", "higher", "quality", "discounted gain of the right text among the first ten"), ndcg_at_10
    ),
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

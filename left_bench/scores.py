"""Metrics on generated answers, as `evaluate.Metric` classes that need no hub.

Each returns `{name: value}` and, where the metric is a mean over rows, `{"per_row": [...]}` for standard errors and
paired comparisons.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from left_bench.errors import UserError, nearest


class _TextMetric(evaluate.Metric):
    """Text against text; `description` and `citation` are what `evaluate` wants to know."""

    description = ""
    citation = ""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=self.description,
            citation=self.citation,
            inputs_description="predictions and references: one string per row",
            features=datasets.Features(features),
        )

    def _per_row(self, prediction: str, reference: str) -> float:
        raise NotImplementedError

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        per_row = [self._per_row(*pair) for pair in zip(predictions, references, strict=True)]
        return {"value": sum(per_row) / len(per_row), "per_row": per_row}


class ExactMatch(_TextMetric):
    """1 where the answer equals the reference but for surrounding white space."""

    description = "share of answers equal to the reference, white space at the ends aside"

    def _per_row(self, prediction: str, reference: str) -> float:
        return float(prediction.strip() == reference.strip())


class RougeL(_TextMetric):
    """F1 of the longest common subsequence of words (Lin 2004), by Google's rouge-score with stemming."""

    description = "ROUGE-L F1, mean over rows"

    def _per_row(self, prediction: str, reference: str) -> float:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rougeL"], use_stemmer=True)
        return float(scorer.score(reference, prediction)["rougeL"].fmeasure)


class Bleu(_TextMetric):
    """Corpus BLEU-4 (Papineni et al. 2002) with sacreBLEU's 13a tokenization and exponential smoothing, in 0..1."""

    description = "corpus BLEU-4 by sacreBLEU, as a fraction"

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        import sacrebleu

        return {"value": sacrebleu.corpus_bleu(predictions, [references]).score / 100}


class TokenF1(_TextMetric):
    """F1 of the bags of lower-cased words (Rajpurkar et al. 2016)."""

    description = "token-overlap F1, mean over rows"

    def _per_row(self, prediction: str, reference: str) -> float:
        predicted, expected = prediction.lower().split(), reference.lower().split()
        shared = sum(min(predicted.count(word), expected.count(word)) for word in set(predicted))
        return 2 * shared / (len(predicted) + len(expected)) if shared else 0.0


TEXT_METRICS: dict[str, type[_TextMetric]] = {
    "exact_match": ExactMatch,
    "rouge_l": RougeL,
    "bleu": Bleu,
    "f1": TokenF1,
}


def score_text(name: str, predictions: list[str], references: list[str]) -> tuple[float, list[float] | None]:
    """One metric over all rows.

    Returns:
        The value, and the value of each row where the metric is their mean.

    Raises:
        UserError: no such metric.
    """
    if name not in TEXT_METRICS:
        hint = nearest(name, TEXT_METRICS) or f"; there are {', '.join(TEXT_METRICS)}"
        raise UserError(f"eval.metrics: unknown metric '{name}'{hint}")
    result = TEXT_METRICS[name](keep_in_memory=True).compute(predictions=predictions, references=references)
    return float(result["value"]), result.get("per_row")

"""Metrics on generated answers, as `evaluate.Metric` classes that need no hub.

Each returns `{name: value}` and, where the metric is a mean over rows, `{"per_row": [...]}` for standard errors and
paired comparisons.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import evaluate

from left_bench.core.errors import UserError, nearest
from left_bench.spec.row_scores import exact_match, number_match, rouge_l, token_f1


class _TextMetric(evaluate.Metric):
    """Text against text; `description` and `citation` are what `evaluate` wants to know."""

    description = ""
    citation = ""
    of_row: Callable[[str, str], float]
    """The score of one answer against its reference, where the metric is the mean over rows."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=self.description,
            citation=self.citation,
            inputs_description="predictions and references: one string per row",
            features=datasets.Features(features),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        per_row = [self.of_row(*pair) for pair in zip(predictions, references, strict=True)]
        return {"value": sum(per_row) / len(per_row), "per_row": per_row}


class ExactMatch(_TextMetric):
    """Share of answers that are right."""

    description = "share of answers equal to the reference: white space at the ends aside, or what is extracted of both"
    of_row = staticmethod(exact_match)

    def _compute(self, predictions: list[str], references: list[str], extractor: str | None = None) -> dict[str, Any]:
        per_row = [exact_match(*pair, extractor=extractor) for pair in zip(predictions, references, strict=True)]
        return {"value": sum(per_row) / len(per_row), "per_row": per_row}


class Accuracy(_TextMetric):
    """Share of pictures whose likeliest class is the right one."""

    description = "share of rows with the right class, by name"
    of_row = staticmethod(exact_match)


class RougeL(_TextMetric):
    """ROUGE-L (Lin 2004)."""

    description = "ROUGE-L F1, mean over rows"
    of_row = staticmethod(rouge_l)


class Bleu(_TextMetric):
    """Corpus BLEU-4 (Papineni et al. 2002) with sacreBLEU's 13a tokenization and exponential smoothing, in 0..1."""

    description = "corpus BLEU-4 by sacreBLEU, as a fraction"

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        import sacrebleu

        return {"value": sacrebleu.corpus_bleu(predictions, [references]).score / 100}


class TokenF1(_TextMetric):
    """SQuAD's F1 (Rajpurkar et al. 2016)."""

    description = "token-overlap F1, mean over rows"
    of_row = staticmethod(token_f1)


class NumberMatch(_TextMetric):
    """Share of answers with the right number, as GSM8K is scored (Cobbe et al. 2021)."""

    description = "share of answers whose number (after '####', else the last) equals the reference's"
    of_row = staticmethod(number_match)


TEXT_METRICS: dict[str, type[_TextMetric]] = {
    "exact_match": ExactMatch,
    "accuracy": Accuracy,
    "rouge_l": RougeL,
    "bleu": Bleu,
    "f1": TokenF1,
    "number_match": NumberMatch,
}


def score_text(
    name: str, predictions: list[str], references: list[str], *, extractor: str | None = None
) -> tuple[float, list[float] | None]:
    """One metric over all rows; `extractor` is what `exact_match` compares by.

    Returns:
        The value, and the value of each row where the metric is their mean.

    Raises:
        UserError: no such metric.
    """
    if name not in TEXT_METRICS:
        hint = nearest(name, TEXT_METRICS) or f"; there are {', '.join(TEXT_METRICS)}"
        raise UserError(f"eval.metrics: unknown metric '{name}'{hint}")
    given: dict[str, Any] = {"extractor": extractor} if name == "exact_match" else {}
    result = TEXT_METRICS[name](keep_in_memory=True).compute(predictions=predictions, references=references, **given)
    return float(result["value"]), result.get("per_row")

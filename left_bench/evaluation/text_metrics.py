"""A metric of answers as an `evaluate.Metric` that needs no hub: its value, and the value of each row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from left_bench.core.errors import UserError, nearest
from left_bench.spec.metric import Metric
from left_bench.spec.row_scores import ANSWER_METRICS


class AnswerMetric(evaluate.Metric):
    """Compares texts. `compute` returns the value, and `per_row` if the value is the mean over rows."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=self._metric.meaning,
            citation="",
            inputs_description="predictions and references: one string per row",
            features=datasets.Features(features),
        )

    def _compute(self, predictions: list[str], references: list[str], **options: Any) -> dict[str, Any]:
        of_answer, of_answers = self._metric.of_answer, self._metric.of_answers
        if of_answer is None:
            assert of_answers is not None
            return {"value": of_answers(predictions, references)}
        per_row = [of_answer(*pair, **options) for pair in zip(predictions, references, strict=True)]
        return {"value": sum(per_row) / len(per_row), "per_row": per_row}


def score_text(
    name: str, predictions: list[str], references: list[str], *, extractor: str | None = None
) -> tuple[float, list[float] | None]:
    """One metric over all rows; `extractor` is for `exact_match`.

    Returns:
        The value, and the value of each row if the metric is their mean.

    Raises:
        UserError: no such metric.
    """
    if name not in ANSWER_METRICS:
        hint = nearest(name, ANSWER_METRICS) or f"; choose from {', '.join(ANSWER_METRICS)}"
        raise UserError(f"eval.metrics: unknown metric '{name}'{hint}")
    metric = ANSWER_METRICS[name]
    options = {"extractor": extractor} if metric.extracts else {}
    result: Any = AnswerMetric(metric).compute(predictions=predictions, references=references, **options)
    return float(result["value"]), result.get("per_row")


_MOST_LEFT_OUT = 500
"""Beyond so many rows, several are left out at once."""


def row_parts(metric: Metric, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Each row's part in a score of all rows together: the parts' mean is the score, and their scatter tells its
    standard error as the jackknife does (Efron and Stein 1981), in pairs of cells too.

    A part is the score, plus what the others' score loses when the row is left out, times the other rows' number.
    """
    assert metric.of_answers is not None
    rows = len(references)
    score = metric.of_answers(predictions, references)
    groups = min(rows, _MOST_LEFT_OUT)
    if groups < 2:
        return [score] * rows
    without = []
    for left_out in range(groups):
        kept = [row for row in range(rows) if row % groups != left_out]
        without.append(metric.of_answers([predictions[row] for row in kept], [references[row] for row in kept]))
    apart = np.mean(without) - np.array(without)
    parts = score + math.sqrt((groups - 1) * (rows - 1)) * apart
    of_rows = parts[np.arange(rows) % groups]
    return [float(part) for part in of_rows + (score - of_rows.mean())]  # groups may differ by a row

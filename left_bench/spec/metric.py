"""Metric: how to read one number of a record, and how to compute it if it is a score of answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple


class Metric(NamedTuple):
    """How to read one number of a record; its name is its key in `spec.record.METRICS`."""

    unit: str
    """Decides how it is formatted (`report.values`): bytes, seconds, tokens/s, params, bits, nats, fraction, count,
    samples/s, joules, watts, money; empty: a plain number."""
    better: Literal["lower", "higher", "none"]
    kind: Literal["quality", "memory", "speed", "energy", "cost", "size", "fact"]
    meaning: str
    of_answer: Callable[..., float] | None = None
    """Score of one answer, `(prediction, reference)`, where the metric is the mean over held-out rows."""
    of_answers: Callable[[Sequence[str], Sequence[str]], float] | None = None
    """Score of all answers together, `(predictions, references)`, where it is not a mean over rows."""
    by_leaving_out: bool = False
    """Whether the standard error of `of_answers` is estimated by leaving out rows
    (`evaluation.text_metrics.row_parts`): it is quick to compute again."""
    extracts: bool = False
    """`of_answer` also takes `extractor=`: which part of an answer counts (`eval.extractor`)."""
    needs: str | None = None
    """A module that scoring imports and that left_bench does not depend on."""
    extra: str | None = None
    """The extra that installs it: `pip install 'left-bench[extra]'`."""

    @property
    def scores_answers(self) -> bool:
        """Whether it is computed only from answers and references, and may be named in `eval.metrics`."""
        return self.of_answer is not None or self.of_answers is not None

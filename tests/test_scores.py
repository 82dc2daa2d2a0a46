from __future__ import annotations

import math

import pytest

from left_bench.core.errors import UserError
from left_bench.evaluation.text_metrics import AnswerMetric, score_text
from left_bench.spec.record import METRICS
from left_bench.spec.row_scores import ANSWER_METRICS, number_match


@pytest.mark.parametrize(
    ("metric", "prediction", "reference", "value"),
    [
        ("exact_match", "42", "42", 1),
        ("exact_match", " 42\n", "42", 1),
        ("exact_match", "42.", "42", 0),
        ("exact_match", "", "42", 0),
        ("exact_match", "Yes", "yes", 0),
        # bags of words: 2 shared of 3 and of 4
        ("f1", "the cat sat", "The cat lay down", 2 * 2 / 7),
        ("f1", "a a a", "a b", 2 * 1 / 5),
        ("f1", "", "a", 0),
        ("f1", "x", "y", 0),
        # longest common subsequence "the cat the mat": 4 of 5 predicted, 4 of 6 expected words
        ("rouge_l", "the cat at the mat", "the cat sat on the mat", 2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6)),
        ("rouge_l", "running", "run", 1),  # stemmed
        ("rouge_l", "", "run", 0),
        ("rouge_l", "b a", "a b", 0.5),
    ],
)
def test_a_row_by_hand(metric, prediction, reference, value):
    result, per_row = score_text(metric, [prediction], [reference])
    assert result == pytest.approx(value)
    assert per_row == [pytest.approx(value)]


@pytest.mark.parametrize("metric", ["exact_match", "f1", "rouge_l"])
def test_a_mean_over_rows(metric):
    value, per_row = score_text(metric, ["a b", "c d", "no"], ["a b", "c d", "yes"])
    assert per_row == [1, 1, 0]
    assert value == pytest.approx(2 / 3)


def test_bleu_by_hand():
    # n-gram precisions 5/6, 3/5, 2/4, 1/3; equal lengths, so no brevity penalty
    value, per_row = score_text("bleu", ["the cat sat in the mat"], ["the cat sat on the mat"])
    precisions = [5 / 6, 3 / 5, 1 / 4, 1 / 6]  # the last is 0 of 3: smoothed to 1 / (2 x 3)
    assert value == pytest.approx(math.prod(precisions) ** 0.25)
    assert per_row is None
    assert score_text("bleu", ["a b c d e"], ["a b c d e"])[0] == pytest.approx(1)


def test_bleu_is_of_the_corpus_not_a_mean_of_rows():
    predictions, references = ["a b c d", "x"], ["a b c d", "a b c d e f g h"]
    together = score_text("bleu", predictions, references)[0]
    apart = [score_text("bleu", [p], [r])[0] for p, r in zip(predictions, references, strict=True)]
    assert together != pytest.approx(sum(apart) / 2)
    assert together == pytest.approx(math.exp(1 - 12 / 5) * (4 / 5 * 3 / 3 * 2 / 2 * 1 / 1) ** 0.25)


def test_many_rows_in_order():
    references = [str(i) for i in range(3000)]  # above the size where `evaluate` writes its buffer out
    predictions = [text if int(text) % 3 else "no" for text in references]
    value, per_row = score_text("exact_match", predictions, references)
    assert per_row == [float(i % 3 != 0) for i in range(3000)]
    assert value == pytest.approx(2 / 3)


def test_every_metric_is_in_the_table_and_says_what_it_is():
    for name, metric in ANSWER_METRICS.items():
        assert METRICS[name].better == "higher"
        assert AnswerMetric(metric).description == METRICS[name].meaning


def test_an_unknown_metric_is_named():
    with pytest.raises(UserError, match=r"eval\.metrics: unknown metric 'rougel'; did you mean 'rouge_l'"):
        score_text("rougel", ["a"], ["a"])


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("so 6 * 7 = 42\n#### 42", "#### 42", 1),
        ("the answer is 1,000.0.", "#### 1000", 1),
        ("#### 41 and not 42", "#### 42", 0),
        ("first 42, then 7", "#### 42", 0),
        ("forty-two", "#### 42", 0),
        ("-5", "#### 5", 0),
        ("nothing", "no number either", 0),
    ],
)
def test_numbers_are_compared_as_numbers(prediction, reference, score):
    assert number_match(prediction, reference) == score

from __future__ import annotations

import pytest

from left_bench.core.errors import UserError
from left_bench.evaluation.text_metrics import score_text
from left_bench.spec.extract import EXTRACTORS, check_extractor, extracted, same
from left_bench.spec.row_scores import exact_match, number_match


@pytest.mark.parametrize(
    ("extractor", "text", "found"),
    [
        ("number", "6 * 7 = 42\n#### 42", "42"),
        ("number", "#### 41 and not 42", "41"),
        ("number", "first 41, then 42.", "42"),
        ("number", "#### forty-two, that is 42", "42"),
        ("number", "7 apples\n####", "7"),
        ("number", "none", None),
        ("last_number", "#### 41 and not 42", "42"),
        ("last_number", "about -1,234.50 in all", "-1,234.50"),
        ("marked", "because\n#### $1,000 \nend", "$1,000"),
        ("marked", "#### 1\n#### 2", "2"),
        ("marked", "42", None),
        ("marked", "####  ", None),
        ("boxed", r"so $\boxed{42}$.", "42"),
        ("boxed", r"\boxed{1} and then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("boxed", r"\boxed{1{,}000\text{ apples}}", "1,000 apples"),
        ("boxed", r"\boxed{\$5\%}", "$5%"),
        ("boxed", r"\boxed{unfinished", None),
        ("boxed", "42", None),
        ("choice", "B", "B"),
        ("choice", "(b)", "B"),
        ("choice", " **C.** ", "C"),
        ("choice", "The answer is (D).", "D"),
        ("choice", "**Answer:** B", "B"),
        ("choice", "The answer is A, no: the answer is C", "C"),
        ("choice", "The answer is A because it fits.", "A"),
        ("choice", "The answer is a cat.", None),
        ("choice", "A good answer is B.", "B"),
        ("choice", "B. Paris", "B"),
        ("choice", "(B) Paris is the capital", "B"),
        ("choice", "Of (A) and (B) it must be (B)", "B"),
        ("choice", "Paris", None),
        ("choice", "I think so", None),
        ("code", "Here:\n```python\nx = 1  \n```\nDone.", "x = 1"),
        ("code", "x = 1\ny = 2 \n", "x = 1\ny = 2"),
        ("code", "```\ncut off", "cut off"),
        ("code", "``` \n```", None),
        ("json", 'Sure: {"b": 1.0, "a": [2]} as asked', '{"a": [2], "b": 1}'),
        ("json:answer", '{"answer": " yes "}', "yes"),
        ("json:answer", '```json\n{"answer": 1e3}\n```', "1000"),
        ("json:answer", '{"answer": true}', "true"),
        ("json:a.1.b", '{"a": [0, {"b": "deep"}]}', "deep"),
        ("json:answer", '{"other": 1}', None),
        ("json:answer", '{"answer": ', None),
        ("json:0", "[5, 6]", "5"),
        ("whole", " as it is\n", "as it is"),
    ],
)
def test_what_is_extracted(extractor, text, found):
    assert extracted(extractor, text) == found


@pytest.mark.parametrize("one", ["1,000", "1000", "1000.0", "$1,000", "+1000", " 1000. ", "1,000.00"])
@pytest.mark.parametrize("other", ["1000", "1,000.0"])
def test_numbers_are_the_same_however_they_are_written(one, other):
    assert same(one, other)


@pytest.mark.parametrize(
    ("one", "other"), [("1000", "1001"), ("-5", "5"), ("1,00", "100"), ("5 cats", "5"), ("a", "b")]
)
def test_other_texts_are_not_the_same(one, other):
    assert not same(one, other)


@pytest.mark.parametrize(
    ("extractor", "prediction", "reference", "score"),
    [
        (None, "42.", "42", 0),
        (None, "42.0", "42", 0),
        ("number", "It is 42.0 then", "42", 1),
        ("number", "so 7\n#### 1,000", "#### 1000", 1),
        ("boxed", r"\boxed{1000.0}", "1,000", 1),  # a reference without the mark is the answer itself
        ("boxed", "1000", "1000", 0),
        ("choice", "The answer is (B).", "B", 1),
        ("choice", "Paris", "B", 0),
        ("json:answer", '{"answer": 42}', '{"answer": 42.0, "why": "so"}', 1),
        ("json", '{"a": 1, "b": 2}', '{"b": 2.0, "a": 1}', 1),
        ("code", "```py\nreturn 1\n```", "return 1", 1),
        ("whole", "42.0", "42", 1),
    ],
)
def test_exact_match_compares_what_is_extracted(extractor, prediction, reference, score):
    assert exact_match(prediction, reference, extractor=extractor) == score
    value, per_row = score_text("exact_match", [prediction], [reference], extractor=extractor)
    assert (value, per_row) == (score, [score])


def test_number_match_is_exact_match_of_numbers():
    assert number_match("is 1,000", "#### 1000.0") == exact_match("is 1,000", "#### 1000.0", extractor="number") == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("numbr", ["no such extractor", "did you mean 'number'?", "json:FIELD"]),
        ("number:answer", ["number takes nothing after a colon"]),
        ("", ["no such extractor"]),
    ],
)
def test_an_unknown_extractor_is_named(name, words, tiny_cell):
    with pytest.raises(ValueError, match=r".") as refused:
        check_extractor(name)
    assert all(word in str(refused.value) for word in words)
    if name:
        with pytest.raises(UserError, match=r"^eval\.extractor='") as told:
            tiny_cell(f"eval.extractor='{name}'")
        assert all(word in str(told.value) for word in words)


@pytest.mark.parametrize("extractor", [*EXTRACTORS, "json"])
@pytest.mark.parametrize(
    "text",
    ["", " ", "{" * 5000, "####", r"\boxed{", "[" * 100_000, "1" * 5000, '{"a": ' + "1" * 5000 + "}"],
    ids=["empty", "blank", "braces", "mark", "unfinished", "brackets", "digits", "digits in JSON"],
)
def test_no_answer_breaks_an_extractor(extractor, text):
    result = extracted(extractor, text)
    assert result is None or isinstance(result, str)
    assert same(result or "", result or "")


def test_school_word_problems_are_scored_by_their_numbers(compose_cell):
    for data in ("gsm8k", "gsm_symbolic"):
        cell = compose_cell(f"data={data}", "model=tiny_llama", "hardware=cpu", "precision=fp32")
        assert (cell.eval.extractor, cell.eval.metrics) == ("number", ["exact_match"])
    assert compose_cell("model=tiny_llama", "hardware=cpu", "precision=fp32").eval.extractor is None

"""Conditions on records: what they choose, what they refuse, and that they do nothing else."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded.build import make_record, peft, write_runs

from left_bench import load_records
from left_bench.core.errors import UserError
from left_bench.report.where import parse_where

RECORD = {
    "choices.quantization": "nf4",
    "choices.peft": "lora",
    "config.peft.config.r": 16,
    "exact_match": 0.5,
    "status": "ok",
    "config.training.compile": False,
    "config.eval.rows": None,
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('choices.quantization == "nf4"', True),
        ("quantization != 'nf4'", False),
        ("peft in ('lora', 'ia3') and exact_match >= 0.5", True),
        ("peft not in ['lora']", False),
        ("not (peft.config.r < 16 or exact_match > 0.5)", True),
        ("8 < peft.config.r <= 16", True),
        ("training.compile == false", True),
        ("eval.rows == null and eval.rows is None", True),
        ("bleu == None", True),
        ("bleu < 1", False),
        ("not bleu < 1", True),
        ("bleu != 0.5", True),
        ("'or' in peft", True),
        ("exact_match > -1.5", True),
        ("'x' not in bleu", True),
    ],
)
def test_a_condition_chooses(text: str, expected: bool) -> None:
    assert parse_where(text).matches(RECORD) is expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("peft ==", "column 1 ('peft =='): invalid syntax"),
        ("__import__('os').system('x')", "column 1"),
        ("peft == 'lora' and print(1)", "column 20 ('print(1)'): 'print(1)' is not allowed"),
        ("exact_match * 2 > 1", "'exact_match * 2' is not allowed"),
        ("peft[0] == 'l'", "is not allowed"),
        ("(lambda: 1)() == 1", "is not allowed"),
        ("peft.upper() == 'LORA'", "is not allowed"),
        ("'a'.join == 1", "a field is words with dots"),
        ("peft in (lora, ia3)", "'lora' in a list wants quotation marks"),
        ("f'{peft}' == 'x'", "is not allowed"),
        ("[x for x in peft] == 1", "is not allowed"),
        ("peft := 1", "invalid syntax"),
        ("9 ** 9 ** 9 == 1", "is not allowed"),
        ("(" * 300 + "1" + ")" * 300, "--where"),
        ("not " * 990 + "peft", "more than 100 conditions within each other"),
        ("not " * 101 + "peft", "more than 100 conditions within each other"),
        ("a." * 1500 + "b", "--where"),
        ("x" * 5000, "more than the 4000"),
        ("", "--where"),
    ],
)
def test_what_is_no_condition_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        condition = parse_where(text)
        condition.check(RECORD)


def test_unknown_fields_are_named_with_position_and_nearest() -> None:
    with pytest.raises(UserError, match=r"column 17 \('exact_mach > 0.5'\).*did you mean 'exact_match'"):
        parse_where("peft == 'x' and exact_mach > 0.5").check(RECORD)


def test_text_is_not_compared_with_numbers() -> None:
    with pytest.raises(UserError, match="cannot be compared"):
        parse_where("peft < 3").matches(RECORD)


@given(st.text(max_size=40))
def test_any_text_is_a_condition_or_a_user_error(text: str) -> None:
    try:
        condition = parse_where(text)
        condition.check(RECORD)
        condition.matches(RECORD)
    except UserError:
        pass


def test_load_records_takes_a_condition(tmp_path) -> None:
    write_runs(
        tmp_path, [make_record(), make_record(changes=peft("lora", r=8)), make_record(changes=peft("lora", r=4))]
    )
    assert len(load_records(tmp_path, where="peft == 'lora'")) == 2
    assert list(load_records(tmp_path, where="peft.config.r > 4")["config.peft.config.r"]) == [8]
    with pytest.raises(UserError, match="did you mean 'peft'"):
        load_records(tmp_path, where="pefd == 'lora'")

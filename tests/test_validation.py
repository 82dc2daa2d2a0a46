"""The third split: validation rows, neither trained on nor tested on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from left_bench.core.errors import UserError
from left_bench.data.files import with_content
from left_bench.data.pictures import load_pictures
from left_bench.data.rows import DEFAULT_VALIDATION_ROWS, _answers_withheld, split_rows
from left_bench.spec.cell import Data


def sums(**changes: Any) -> Data:
    config = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    plain = {"name": "sums", "source": "reasoning_gym", "task": "chain_sum", "config": config}
    return Data(**{**plain, "train_rows": 40, "test_rows": 10, "prompt_column": "question", **changes})


def mine(path: Path, **changes: Any) -> Data:
    return Data(**{"name": "mine", "source": "jsonl", "path": str(path), "test_rows": 5, **changes})


def written(path: Path, questions: list[str]) -> Path:
    path.write_text(
        "".join(json.dumps({"prompt": question, "answer": "a"}) + "\n" for question in questions), encoding="utf-8"
    )
    return path


def prompts(rows: Any) -> list[str]:
    return [row.prompt for row in rows]


@pytest.fixture
def rows_file(tmp_path):
    return written(tmp_path / "rows.jsonl", [f"P{n}" for n in range(50)])


# --- generated ---


@pytest.mark.parametrize("wanted", [None, 0, 7, 200])
def test_generated_validation_rows_change_neither_training_nor_test_rows(wanted):
    none, result = split_rows(sums(validation_rows=0)), split_rows(sums(validation_rows=wanted))
    assert (result.train, result.test) == (none.train, none.test)
    assert len(result.validation) == (DEFAULT_VALIDATION_ROWS if wanted is None else wanted)
    everything = prompts([*result.train, *result.validation, *result.test])
    assert len(set(everything)) == len(everything)


def test_a_source_with_few_questions_gives_what_is_left_unless_a_number_was_asked_for():
    few = {"config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}, "train_rows": 170}
    left = len(split_rows(sums(**few)).validation)
    assert 0 <= left < DEFAULT_VALIDATION_ROWS
    with pytest.raises(UserError, match=rf"data.validation_rows=90: .* set data.validation_rows={left} or lower"):
        split_rows(sums(**few, validation_rows=90))


# --- files ---


def test_a_file_keeps_all_its_training_rows_unless_validation_rows_are_asked_for(rows_file):
    assert not split_rows(mine(rows_file)).validation
    before = split_rows(mine(rows_file, train_rows=20))
    result = split_rows(mine(rows_file, train_rows=20, validation_rows=0))
    assert result.train == before.train and not result.validation
    assert len(before.validation) == 25  # what lies beyond the training rows
    assert not set(prompts(before.validation)) & set(prompts([*before.train, *before.test]))


def test_validation_rows_asked_for_are_held_out_of_the_training_rows(rows_file):
    none, result = split_rows(mine(rows_file)), split_rows(mine(rows_file, validation_rows=12))
    assert result.test == none.test
    assert sorted(prompts([*result.train, *result.validation])) == sorted(prompts(none.train))
    assert len(result.validation) == 12
    assert split_rows(mine(rows_file, validation_rows=12)).validation == result.validation
    assert split_rows(mine(rows_file, validation_rows=12, seed=1)).validation != result.validation


def test_a_question_that_repeats_is_on_one_side_alone(tmp_path):
    path = written(tmp_path / "rows.jsonl", [f"P{n % 20}" for n in range(60)])
    result = split_rows(mine(path, validation_rows=6))
    parts = [set(prompts(rows)) for rows in (result.train, result.validation, result.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 20
    assert len(result.validation) == 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"validation_rows": 45}, "has only 45 different questions besides 5 test rows.*set data.validation_rows=44"),
        ({"validation_rows": 20, "train_rows": 30}, "data.train_rows=30: .* 5 test rows and 20 validation rows"),
    ],
)
def test_more_validation_rows_than_there_are_name_the_number_that_fits(rows_file, changes, words):
    with pytest.raises(UserError, match=words):
        split_rows(mine(rows_file, **changes))


def test_validation_rows_of_a_file_of_their_own_take_nothing_from_training(rows_file, tmp_path):
    none = split_rows(mine(rows_file))
    trained, tested = none.train[0].prompt, none.test[0].prompt
    apart = written(tmp_path / "validation.jsonl", ["V1", trained, "V2", tested.lower(), "V2", "V3"])
    data = mine(rows_file, validation_path=str(apart))
    result = split_rows(data)
    assert (result.train, result.test) == (none.train, none.test)
    assert sorted(prompts(result.validation)) == ["V1", "V2", "V3"]
    assert result.repeated_validation == 3  # trained on, tested on, repeated
    with pytest.raises(UserError, match=r"data.validation_rows=4: .* has only 3 validation rows"):
        split_rows(data.model_copy(update={"validation_rows": 4}))
    before = with_content(data).content
    written(apart, ["V4"])
    assert before != with_content(data).content


def test_a_saved_data_set_brings_its_own_validation_split(tmp_path):
    parts = {name: [{"prompt": f"{name} {n}", "answer": "a"} for n in range(9)] for name in ("train", "validation")}
    saved = {name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "saved")
    result = split_rows(mine(tmp_path / "saved", validation_rows=4))
    assert len(result.train) == 4 and len(result.validation) == 4
    assert all(prompt.startswith("validation") for prompt in prompts(result.validation))


@pytest.mark.parametrize(("split", "own"), [("train", True), ("train+validation", False)])
def test_a_hub_data_sets_validation_split_is_taken_unless_it_is_trained_on(tmp_path, split, own):
    for name in ("train", "validation"):
        written(tmp_path / f"{name}.jsonl", [f"{name} {n}" for n in range(9)])
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "validation")}
    config = {"data_files": files, "split": split, "cache_dir": str(tmp_path / "hf")}
    result = split_rows(Data(name="hub", source="hub", hub_id="json", config=config, test_rows=2))
    assert len(result.validation) == (9 if own else 0)
    assert len(result.train) == (7 if own else 16)


@pytest.mark.parametrize(("split", "own"), [("train", True), ("train+test", False)])
def test_a_hub_data_sets_test_split_is_taken_unless_it_is_trained_on(tmp_path, split, own):
    for name in ("train", "test"):
        written(tmp_path / f"{name}.jsonl", [f"{name} {n}" for n in range(9)])
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "test")}
    config = {"data_files": files, "split": split, "cache_dir": str(tmp_path / "hf")}
    result = split_rows(Data(name="hub", source="hub", hub_id="json", config=config, test_rows=4, validation_rows=0))
    assert len(result.test) == 4 and len(result.train) == (9 if own else 14)
    assert all(prompt.startswith("test") for prompt in prompts(result.test)) == own


def test_a_test_row_of_a_hub_data_sets_own_split_keeps_all_its_columns_for_a_scorer(tmp_path):
    for name in ("train", "test"):
        rows = [json.dumps({"prompt": f"{name} {n}", "answer": "a", "unit": "m"}) for n in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "test")}
    config = {"data_files": files, "cache_dir": str(tmp_path / "hf")}
    data = Data(name="hub", source="hub", hub_id="json", config=config, test_rows=4)
    assert [row.record["unit"] for row in split_rows(data, keep_records=True).test] == ["m"] * 4


@pytest.mark.parametrize("withheld", [None, ""])
def test_a_hub_data_sets_test_split_without_answers_is_left_aside(tmp_path, withheld):
    written(tmp_path / "train.jsonl", [f"train {n}" for n in range(9)])
    rows = [json.dumps({"prompt": f"test {n}", "answer": withheld}) for n in range(9)]
    (tmp_path / "test.jsonl").write_text("\n".join(rows))
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "test")}
    config = {"data_files": files, "cache_dir": str(tmp_path / "hf")}
    result = split_rows(Data(name="hub", source="hub", hub_id="json", config=config, test_rows=4, validation_rows=0))
    assert len(result.train) == 5 and all(prompt.startswith("train") for prompt in prompts(result.test))


@pytest.mark.parametrize(("labels", "withheld"), [([-1, -1], True), ([-1, 0], False), ([0, 1], False)])
def test_classes_of_a_split_that_are_all_minus_one_are_withheld(labels, withheld):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    dataset = datasets.Dataset.from_dict({"text": ["a", "b"], "label": labels}, features=features)
    assert _answers_withheld(dataset, "label") == withheld


def test_nothing_is_held_out_where_all_rows_are_trained_on(rows_file):
    result = split_rows(mine(rows_file, validation_rows=5, hold_out=False))
    assert len(result.train) == 50 and not result.validation and not result.test


# --- pictures ---


def test_digits_are_validated_on_pictures_beyond_the_training_rows():
    def processor(pictures: Any, return_tensors: str) -> dict[str, Any]:
        return {"pixel_values": np.stack([np.asarray(picture, dtype="float32")[None, :, :, 0] for picture in pictures])}

    def load(**changes: Any) -> Any:
        plain = {"name": "digits", "source": "scikit_learn", "task": "digits", "image_column": "image"}
        return load_pictures(
            Data(**{**plain, "answer_column": "label", "train_rows": 1024, "test_rows": 256, **changes}),
            processor,
            patches=1,
        )

    none, result = load(validation_rows=0), load()
    assert result.fingerprint == none.fingerprint
    assert len(result.validation) == DEFAULT_VALIDATION_ROWS
    shown = [{row.prompt for row in rows} for rows in (result.train, result.validation, result.test)]
    assert sum(map(len, shown)) == len(set.union(*shown))
    held_out = load(train_rows=None, validation_rows=100)
    assert len(held_out.train) == 1797 - 256 - 100
    with pytest.raises(UserError, match=r"data.validation_rows=600: .* set data.validation_rows=517 or lower"):
        load(validation_rows=600)


# --- a run ---


def test_a_record_says_which_rows_were_used_for_what(tiny_cell, work_in_process):
    result = work_in_process(tiny_cell("data.validation_rows=6"))
    splits = result["provenance"]["splits"]
    assert {name: part["rows"] for name, part in splits.items()} == {"train": 8, "validation": 6, "test": 4}
    assert "validation_loss" in splits["validation"]["used_for"]
    assert result["metrics"]["validation_rows"] == 6 and result["metrics"]["validation_loss"] > 0
    lost = work_in_process(tiny_cell("data.validation_rows=0"))
    assert "validation_loss" not in lost["metrics"] and "validation" not in lost["provenance"]["splits"]
    assert lost["provenance"]["rows"] == result["provenance"]["rows"]


def test_left_bench_data_shows_the_three_counts(left_bench):
    answer = left_bench("data", "model=tiny_llama", "data.train_rows=8", "data.test_rows=4", "data.validation_rows=6")
    assert answer.code == 0, answer.err
    assert "train 8, validation 6, test 4" in answer.out

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from left_bench.core.errors import UserError
from left_bench.spec.cell import GROUPS, SECTIONS, Cell, fingerprint, slugify

PLAIN: dict[str, Any] = {
    "model": {"name": "tiny", "name_or_path": "tiny", "weights": "random", "config": {"model_type": "llama"}},
    "quantization": {"name": "none", "_target_": None},
    "peft": {"name": "lora", "_target_": "peft.LoraConfig", "learning_rate": 1e-3, "config": {"r": 16, "bias": "none"}},
    "precision": {"name": "bf16", "weights_dtype": "bfloat16", "compute_dtype": "bfloat16"},
    "optimizer": {"name": "adamw", "_target_": "torch.optim.AdamW", "config": {"weight_decay": 0.0}},
    "training": {"name": "default", "steps": 40, "batch_size": 8},
    "data": {"name": "sums", "source": "reasoning_gym", "task": "chain_sum", "config": {"min_terms": 2}},
    "eval": {"name": "default"},
    "hardware": {"name": "cpu", "device": "cpu"},
    "seed": 0,
}
# One other value for every field of every section: a field that is missing here fails the test below.
OTHER: dict[str, dict[str, Any]] = {
    "model": {
        "name_or_path": "other",
        "content": "0" * 64,
        "task": "seq2seq_lm",
        "revision": "main",
        "weights": "pretrained",
        "trust_remote_code": True,
        "wheel": {"requirement": "x==1"},
        "config": {"model_type": "opt"},
    },
    "quantization": {
        "_target_": "transformers.BitsAndBytesConfig",
        "checkpoint_method": "gptq",
        "nominal_bits": 4,
        "config": {"load_in_4bit": True},
    },
    "peft": {"_target_": "peft.IA3Config", "init_text": "hello", "config": {"r": 8, "bias": "none"}},
    "precision": {
        "weights_dtype": "float32",
        "compute_dtype": "float16",
        "adapter_dtype": "bfloat16",
        "loss_scaling": True,
        "tf32": True,
    },
    "optimizer": {
        "_target_": "torch.optim.SGD",
        "config": {"weight_decay": 0.1},
        "matrices": {"rank": 8},
        "b_ratio": 16,
    },
    "training": {
        "steps": 41,
        "batch_size": 4,
        "gradient_accumulation": 2,
        "batching": "grouped",
        "learning_rate": 2e-3,
        "schedule": "linear",
        "warmup_ratio": 0.2,
        "max_grad_norm": None,
        "max_length": 256,
        "activation_checkpointing": True,
        "attention": "eager",
        "compile": True,
        "neftune_alpha": 4.0,
        "measure_after": 4,
        "output_head": "all",
        "kernels": "liger",
        "float8": True,
        "objective": "dpo",
        "beta": 0.3,
        "start_from": "smollm2_135m",
        "start_content": "0" * 64,
        "combine": ["one", "other"],
        "combine_content": ["0" * 64],
        "combine_weights": [0.5, 0.5],
        "combine_by": "ties",
        "combine_density": 0.3,
        "sft_batch_size": 2,
        "center_rewards": 0.01,
        "group_size": 4,
        "kl_weight": 0.1,
        "clip": 0.1,
        "updates_per_sample": 2,
        "reward": "mine:score",
        "reward_content": "0" * 64,
        "reward_model": "smollm2_135m",
        "reward_model_content": "0" * 64,
        "good_weight": 2.0,
        "bad_weight": 2.0,
        "sft_steps": 5,
        "sft_learning_rate": 3e-4,
        "max_seconds": 60,
        "stop_patience": 3,
    },
    "data": {
        "source": "hub",
        "task": "gsm_symbolic",
        "config": {"min_terms": 3},
        "path": "rows.jsonl",
        "test_path": "held_out.jsonl",
        "validation_path": "chosen_on.jsonl",
        "shape": "alpaca",
        "train_on": "last",
        "content": "0" * 64,
        "hub_id": "a/b",
        "image_column": "image",
        "pairs": True,
        "rejected_column": "worse",
        "label_column": "ok",
        "margin_column": "by",
        "prompt_column": "question",
        "second_column": "sentence2",
        "answer_column": "label",
        "template": "Q: {prompt}",
        "instruction": "Answer.",
        "train_rows": 12,
        "test_rows": 12,
        "validation_rows": 12,
        "hold_out": False,
        "seed": 1,
    },
    "eval": {
        "metrics": ["f1"],
        "extractor": "number",
        "verifier": True,
        "scorer": "mine:score",
        "scorer_content": "0" * 64,
        "tasks": ["arc_easy"],
        "tasks_content": "0" * 64,
        "task_rows": 10,
        "task_shots": 0,
        "task_batch_size": 1,
        "task_chat_template": True,
        "judge": "http://127.0.0.1:8000/v1",
        "judge_model": "judge",
        "judge_rows": 2,
        "generate": False,
        "rows": 3,
        "points": 4,
        "every": 5,
        "trial": True,
        "curve_scores": True,
        "batch_size": 2,
        "max_new_tokens": 7,
        "samples": 0,
        "forgetting": False,
        "check_reload": True,
    },
    "hardware": {
        "device": "cuda",
        "threads": 3,
        "memory_limit": "6GiB",
        "processes": 2,
        "sharding": "fsdp2",
        "sharding_config": {"reshard_after_forward": False},
    },
}
NO_RESULT = {
    "quantization": {"cache"},
    "peft": {"learning_rate"},
    "training": {"checkpoint_every", "learning_rate_scale"},
    "data": {"metrics", "max_new_tokens", "extractor"},
    "eval": {"judge_key_from"},
    "hardware": {"timeout", "phase_timeout", "patience", "plan_first"},
}


def build(**changes: Any) -> Cell:
    plain = copy.deepcopy(PLAIN)
    for key, value in changes.items():
        group, _, field = key.partition("__")
        if field:
            plain[group][field] = value
        else:
            plain[group] = value
    return Cell.from_config(plain, choices={group: plain[group]["name"] for group in GROUPS})


def shuffled(value: Any, order: Any) -> Any:
    if isinstance(value, dict):
        keys = order.draw(st.permutations(sorted(value)))
        return {key: shuffled(value[key], order) for key in keys}
    return value


# --- identity ---


@given(st.data())
def test_key_order_does_not_change_the_id(data):
    cell = Cell.from_config(shuffled(PLAIN, data), choices=dict.fromkeys(GROUPS, "x"))
    assert cell.id == build().id


def test_every_field_is_decided():
    for group, section in SECTIONS.items():
        fields = {field.alias or name for name, field in section.model_fields.items()}
        assert fields == set(OTHER[group]) | NO_RESULT.get(group, set()) | {"name"}, group


@pytest.mark.parametrize(("group", "field"), [(group, field) for group in OTHER for field in OTHER[group]])
def test_what_changes_the_result_changes_the_id(group, field):
    assert build(**{f"{group}__{field}": OTHER[group][field]}).id != build().id


def test_no_two_changes_share_an_id():
    ids = [build(**{f"{group}__{key}": value}).id for group in OTHER for key, value in OTHER[group].items()]
    assert len(set(ids)) == len(ids)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_the_seed_changes_the_id(one, other):
    assert (build(seed=one).id == build(seed=other).id) == (one == other)


@pytest.mark.parametrize("group", GROUPS)
def test_a_name_changes_only_the_slug(group):
    other = build(**{f"{group}__name": "renamed"})
    assert fingerprint(other.identity) == fingerprint(build().identity)
    assert other.id[-10:] == build().id[-10:]


def test_what_does_not_change_the_result_keeps_the_id():
    assert build(hardware__timeout=5, hardware__phase_timeout=5, training__checkpoint_every=1).id == build().id
    assert build(hardware__patience=5).id == build(hardware__patience=None).id == build().id
    assert build(hardware__plan_first=True).id == build().id
    assert build(quantization__cache=False).id == build().id
    moved = {"data__content": "a" * 64}
    assert build(**moved, data__path="here.jsonl").id == build(**moved, data__path="there.jsonl").id
    given_rate = {"training__learning_rate": 1e-3}
    assert build(**given_rate, peft__learning_rate=7e-3).id == build(**given_rate).id
    shown = {"eval__metrics": ["bleu"], "eval__max_new_tokens": 9, "eval__extractor": "number"}
    shadowed = {"data__metrics": ["f1"], "data__max_new_tokens": 3, "data__extractor": "choice"}
    assert build(**shown, **shadowed).id == build(**shown).id
    scored = {"eval__scorer_content": "a" * 64}
    here, there, other = ("here.py:score", "there/of.py:score", "here.py:another")
    assert build(**scored, eval__scorer=here).id == build(**scored, eval__scorer=there).id
    assert build(**scored, eval__scorer=here).id != build(**scored, eval__scorer=other).id


def test_null_means_the_methods_and_the_datas_own():
    assert build(training__learning_rate=1e-3).id == build().id
    assert build(peft__learning_rate=5e-3).id == build(training__learning_rate=5e-3).id != build().id
    assert build(data__metrics=["f1"]).id == build(eval__metrics=["f1"]).id != build().id
    assert build(data__max_new_tokens=9).id == build(eval__max_new_tokens=9).id != build().id
    assert build(data__extractor="boxed").id == build(eval__extractor="boxed").id != build().id
    assert build(peft__learning_rate=5e-3).learning_rate == 5e-3
    assert build(training__learning_rate_scale=0.1).id == build(training__learning_rate=build().learning_rate * 0.1).id
    # the steps before preference tuning have a rate too
    first = {"training__sft_steps": 5, "training__learning_rate": 1e-3}
    assert build(**first, peft__learning_rate=5e-3).id != build(**first).id


def test_a_default_written_out_is_the_same_cell():
    written = {
        f"{group}__{field.alias or name}": field.get_default(call_default_factory=True)
        for group, section in SECTIONS.items()
        for name, field in section.model_fields.items()
        if not field.is_required() and (field.alias or name) not in PLAIN[group]
    }
    assert len(written) > 25
    assert build(**written).id == build().id


@given(st.integers(1, 10**6), st.sampled_from([int, float, str]))
def test_a_numbers_spelling_is_no_change(steps, spell):
    assert build(training__steps=spell(steps) if spell is not str else str(steps)).id == build(training__steps=steps).id


def test_a_size_is_the_same_in_bytes_and_in_words():
    assert build(hardware__memory_limit="6GiB").id == build(hardware__memory_limit=6 * 2**30).id


def test_a_cell_survives_json():
    cell = build(training__learning_rate=1e-4, quantization__config={"load_in_4bit": True})
    again = Cell.model_validate_json(cell.model_dump_json(by_alias=True))
    assert again == cell
    assert again.id == cell.id
    json.dumps(cell.sections(), allow_nan=False)


def test_frozen():
    with pytest.raises(ValueError, match="frozen"):
        build().training.steps = 3


# --- slug ---


@given(st.text())
def test_a_slug_is_safe(name):
    slug = slugify(name)
    assert re.fullmatch(r"[A-Za-z0-9_.]{1,40}", slug)
    assert not slug.startswith(".")


@settings(max_examples=50)
@given(st.lists(st.text(min_size=1), min_size=5, max_size=5), st.integers(0, 2**32 - 1))
def test_an_id_is_one_folder(names, seed):
    keys = ("model__name", "quantization__name", "peft__name", "precision__name", "data__name")
    cell = build(**dict(zip(keys, names, strict=True)), seed=seed)
    assert len(cell.id.encode()) <= 255
    assert not set("/\\\0\n ") & set(cell.id)


@pytest.mark.parametrize("name", ["../../etc/passwd", "a\x00b\nc\x1b[31m", "x" * 4096, "ß" * 4096, "..", " ", "CON\\"])
def test_weird_names(name, tmp_path):
    folder = tmp_path / build(model__name=name).id
    folder.mkdir()
    assert folder.parent == tmp_path


def test_unlike_names_of_one_slug_are_told_apart_by_the_sections():
    assert (
        build(model__name="a/b", model__name_or_path="a/b").id != build(model__name="a b", model__name_or_path="a b").id
    )


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training__setps": 3}, ["training.setps", "did you mean 'steps'"]),
        ({"training__schedule": "cosin"}, ["training.schedule='cosin'", "did you mean 'cosine'"]),
        ({"training__batch_size": -1}, ["training.batch_size=-1", "greater than or equal to 1"]),
        ({"training__steps": 0}, ["training.steps=0"]),
        ({"training__steps": 2.5}, ["training.steps=2.5"]),
        ({"training__steps": "many"}, ["training.steps='many'", "integer"]),
        ({"training__learning_rate": 0}, ["training.learning_rate=0"]),
        ({"training__learning_rate": -1e-3}, ["training.learning_rate=-0.001"]),
        ({"training__learning_rate": float("nan")}, ["training.learning_rate=nan"]),
        ({"training__learning_rate": float("inf")}, ["training.learning_rate=inf"]),
        ({"training__warmup_ratio": 1}, ["training.warmup_ratio=1"]),
        ({"training__max_length": 4}, ["training.max_length=4"]),
        ({"training__batching": "group"}, ["training.batching='group'", "did you mean 'grouped'"]),
        ({"training__steps": None}, ["training.steps=None"]),
        ({"precision__compute_dtype": "bf16"}, ["precision.compute_dtype='bf16'", "bfloat16"]),
        ({"data__train_rows": 0}, ["data.train_rows=0"]),
        ({"data__source": "jsonlines"}, ["data.source='jsonlines'", "did you mean 'jsonl'"]),
        ({"peft__config": [1]}, ["peft.config=[1]"]),
        ({"eval__metrics": "f1"}, ["eval.metrics='f1'"]),
        ({"hardware__timeout": -3}, ["hardware.timeout=-3"]),
        ({"hardware__device": "gpu"}, ["hardware.device='gpu'", "cuda"]),
        ({"hardware__memory_limit": "lots"}, ["hardware.memory_limit='lots'", "6GiB"]),
        ({"hardware__memory_limit": 24}, ["hardware.memory_limit=24", "include the unit", "24GiB"]),
        ({"hardware__memory_limit": "24KiB"}, ["hardware.memory_limit=24KiB", "too few for any model"]),
        ({"quantization__bits": 4}, ["quantization.bits", "nominal_bits"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"seed": "one"}, ["seed='one'"]),
        ({"seed": 2**70}, ["seed="]),
        ({"peft__r": 4}, ["peft.r: no such key", "peft has name, _target_"]),
    ],
)
def test_a_wrong_value_names_key_value_and_mend(changes, words):
    with pytest.raises(UserError) as refused:
        build(**changes)
    message = str(refused.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_a_missing_group_is_named():
    with pytest.raises(UserError, match=r"the group 'data' is missing; choose an option with data=NAME"):
        Cell.from_config({key: value for key, value in PLAIN.items() if key != "data"}, choices={})
    with pytest.raises(UserError, match=r"training"):
        Cell.from_config(PLAIN | {"training": "default"}, choices={})
    with pytest.raises(UserError, match=r"seed"):
        Cell.from_config({key: value for key, value in PLAIN.items() if key != "seed"}, choices={})

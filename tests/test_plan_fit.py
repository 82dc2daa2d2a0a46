"""Repeated layers are followed once, plans are kept, and what fits is found by asking the planner."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import pytest
from test_train import SMALLER

from left_bench.core.errors import Unsupported
from left_bench.core.paths import config_root
from left_bench.grid.rules import why_unsupported
from left_bench.launch import fit as fitting
from left_bench.launch.fit import largest_batch, largest_length, remedies
from left_bench.plan import kept, repeat
from left_bench.plan import predict as predicting
from left_bench.plan.predict import predict
from left_bench.plan.result import Rows

MIB = 2**20
LAYERS = ("model.config.num_hidden_layers=5", "training.steps=10", "precision=bf16")
METHODS = sorted(path.stem for path in (config_root() / "conf" / "peft").glob("*.yaml"))


def planned_both_ways(cell, monkeypatch):
    """The plan by the short way, whether that was taken, and the plan by the whole walk."""
    monkeypatch.setattr(repeat, "_FEWEST_LAYERS", 4)
    extrapolated, taken = repeat.extrapolated, []
    monkeypatch.setattr(predicting, "extrapolated", lambda *walks: taken.append(1) or extrapolated(*walks))
    short = predict(cell)
    monkeypatch.setattr(predicting, "repeats_of", lambda *_: None)
    return short, bool(taken), predict(cell)


@pytest.mark.parametrize("name", METHODS)
def test_a_plan_from_few_layers_is_that_of_the_whole_model(name, tiny_cell, monkeypatch):
    cell = tiny_cell(f"peft={name}", *SMALLER.get(name, []), *LAYERS)
    if (reason := why_unsupported(cell)) is not None:
        pytest.skip(reason)
    if cell.peft.target is not None and cell.peft.target not in repeat._LAYER_BY_LAYER:
        pytest.skip("the whole model is followed")
    try:
        short, taken, whole = planned_both_ways(cell, monkeypatch)
    except Unsupported as error:
        pytest.skip(str(error))
    assert short == whole
    assert taken or name in ("lora_attention", "layer_freeze", "monteclora")


@pytest.mark.parametrize(
    "overrides",
    [
        ["peft=full", "training.gradient_accumulation=2"],
        ["peft=lora", "quantization=nf4_dq", "training.activation_checkpointing=true"],
        ["peft=lora", "model=tiny_neox", "optimizer=adafactor"],
        ["peft=full", "model=tiny_opt", "training.output_head=all", "optimizer=adamw_8bit"],
        ["peft=lora", "training=packed"],
    ],
    ids=" ".join,
)
def test_the_short_way_holds_for_other_models_and_options(overrides, tiny_cell, monkeypatch):
    short, taken, whole = planned_both_ways(tiny_cell(*overrides, *LAYERS), monkeypatch)
    assert taken
    assert short == whole


@pytest.mark.parametrize(
    "config",
    [
        ("+peft.config.layers_to_transform=[1,3]", "peft.config.target_modules=[q_proj]"),
        ("peft.config.target_modules=[layers.3.mlp.up_proj]",),
    ],
    ids=" ".join,
)
def test_a_method_on_some_layers_is_followed_whole(config, tiny_cell, monkeypatch):
    _, taken, _ = planned_both_ways(tiny_cell("peft=lora", *config, *LAYERS), monkeypatch)
    assert not taken


# --- what fits ---


@pytest.fixture
def linear(monkeypatch):
    """A planner by which a cell needs a MiB for each row of a pass and one for each 8 tokens of a row."""
    monkeypatch.setattr(fitting, "room_needed", lambda room, cell: room)

    def plan(cell, rows):
        plan.asked += 1
        return MIB * cell.training.batch_size + (rows.longest or 0) * MIB // 8

    plan.asked = 0
    return plan


@pytest.mark.parametrize(("limit", "size", "passes"), [(100, 24, 1), (12, 12, 2), (11, 8, 3), (1, 1, 24), (0, None, 1)])
def test_the_largest_batch_that_fits_keeps_the_rows_of_a_step(limit, size, passes, tiny_cell, linear):
    cell = tiny_cell("training.batch_size=4", "training.gradient_accumulation=6")
    result = largest_batch(cell, limit * MIB, rows=Rows(), plan=linear)
    assert (result.value, result.gradient_accumulation) == (size, passes)
    assert result.bounded == (size == 24)


@pytest.mark.parametrize("limit", [6, 7, 20, 41, 100, 10_000])
def test_the_largest_length_is_the_last_that_fits(limit, tiny_cell, linear):
    cell = tiny_cell("training.batch_size=4")
    result = largest_length(cell, limit * MIB, rows=Rows(), plan=linear)
    fitting_lengths = [length for length in range(8, 513) if 4 * MIB + length * MIB // 8 <= limit * MIB]
    assert result.value == max(fitting_lengths)
    assert result.bounded == (result.value == 512)
    assert linear.asked < 30


def test_changes_that_save_nothing_are_no_remedy_and_the_search_ends_where_it_fits(tiny_cell, monkeypatch):
    """Checkpointing saves 2 here, the optimizer nothing, four bits 3, single rows 3."""
    monkeypatch.setattr(fitting, "room_needed", lambda room, cell: room)

    def plan(cell, rows):
        saved = 2 * cell.training.activation_checkpointing + 3 * (cell.quantization.target is not None)
        return 10 - saved - 3 * (cell.training.batch_size == 1)

    cell = tiny_cell("peft=lora", "training.batch_size=4")
    result = remedies(cell, 5, rows=Rows(), plan=plan)
    assert [(len(remedy.overrides), remedy.needed_bytes, remedy.fits) for remedy in result] == [
        *((1, 8, False), (1, 7, False), (1, 7, False)),
        (2, 5, True),
    ]
    assert not any("optimizer=" in overrides for remedy in result for overrides in remedy.overrides)


def test_a_batch_that_fits_by_the_real_planner_needs_no_more_than_the_limit(tiny_cell):
    cell = tiny_cell("peft=full", "training.batch_size=16", "data.train_rows=32")
    rows = Rows(longest=64)

    def plan(cell, rows):
        return predict(cell, rows=rows)

    most, least = (largest_batch(cell, limit, rows=rows, plan=plan).needed_bytes for limit in (10**12, 1))
    result = largest_batch(cell, (most + least) // 2, rows=rows, plan=plan)
    assert 1 <= result.value < 16
    assert least <= result.needed_bytes <= (most + least) // 2


# --- plans that are kept ---


def test_a_plan_is_kept_for_the_same_question_alone(tiny_cell):
    cell, rows = tiny_cell("peft=lora"), Rows(longest=32)
    plan = predict(cell, rows=rows)
    kept.keep(plan, cell, rows)
    assert kept.kept_plan(cell, rows) == plan
    assert kept.kept_plan(cell, replace(rows, longest=33)) is None
    assert kept.kept_plan(tiny_cell("peft=lora", "peft.config.r=3"), rows) is None


def test_a_damaged_plan_is_made_again(tiny_cell):
    cell, rows = tiny_cell("peft=ia3"), Rows(longest=32)
    kept.keep(predict(cell, rows=rows), cell, rows)
    path = kept._path(kept._depends_on(cell, rows))
    path.write_text("{")
    assert kept.kept_plan(cell, rows) is None


# --- the command ---


TINY_PLAN = ("model=tiny_llama", "precision=fp32", "hardware=cpu")


def test_the_command_says_the_largest_batch_and_length(left_bench):
    asked = ("plan", *TINY_PLAN, "peft=lora", "hardware.memory_limit=1GiB", "--length", "64")
    answer = left_bench(*asked, "--fit", "batch", "--json")
    assert answer.code == 0, answer.err
    [cell] = json.loads(answer.out)
    [batch] = cell["largest"]
    assert (batch["limit_bytes"], batch["value"], batch["bounded"]) == (2**30, 8, True)
    assert batch["needed_bytes"] <= 2**30
    answer = left_bench(*asked, "--fit", "length", "--csv")
    assert answer.code == 0, answer.err
    [row] = csv.DictReader(io.StringIO(answer.out))
    assert 64 < int(row[f"largest_for_{2**30}_value"]) <= 512


def test_the_command_plans_a_configuration_file_without_weights(left_bench, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4
    ).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    answer = left_bench("plan", f"model={path}", "peft=lora,full", "-m", "--length", "64", "precision=bf16")
    assert answer.code == 0, answer.err
    assert "lora" in answer.out and "full" in answer.out


@pytest.mark.parametrize("length", ["0", "-3", "many", "64,128"])
def test_a_length_that_is_none_is_refused(length, left_bench):
    answer = left_bench("plan", *TINY_PLAN, "peft=lora", "--length", length)
    assert answer.code == 2
    assert "--length" in answer.err


def test_remedies_are_told_for_what_does_not_fit(left_bench):
    asked = ("plan", *TINY_PLAN, "peft=full", "hardware.memory_limit=1MiB", "--remedies", "--length", "64")
    answer = left_bench(*asked)
    assert answer.code == 1, answer.err
    assert "training.activation_checkpointing=true" in answer.out
    [cell] = json.loads(left_bench(*asked, "--json").out)
    assert cell["remedies"][0]["overrides"] == ["training.activation_checkpointing=true"]
    assert not any(remedy["fits"] for remedy in cell["remedies"])


def test_rows_that_are_told_are_not_read(tiny_cell, monkeypatch):
    monkeypatch.setattr(predicting, "_rows_at_hand", lambda _: pytest.fail("read"))
    assert predict(tiny_cell("peft=lora"), rows=Rows(longest=48)).largest.length == 48


def test_a_layer_that_is_not_there_is_a_mistake_and_no_limit_of_planning(left_bench):
    answer = left_bench("plan", *TINY_PLAN, "peft=lora", "peft.config.target_modules=[nosuch]")
    assert answer.code == 2
    assert "nosuch" in answer.err

"""A cell that goes on from another: it begins with what that one ended with, and says so."""

from __future__ import annotations

import shutil

import pytest

from left_bench.core.errors import UserError
from left_bench.grid.rules import why_unsupported
from left_bench.spec.run_files import ADAPTER_NAME
from left_bench.worker.earlier_cell import find_earlier, with_earlier

STILL = ("training.learning_rate=1e-12", "training.steps=1")
LEARNT = ("training.learning_rate=3e-2", "training.steps=3")


@pytest.fixture(scope="module")
def lora(finished, tiny_cell):
    cell = tiny_cell(*LEARNT, "peft=lora")
    return (cell, *finished(cell))


METHODS = ["full", "lora", "dora", "ia3", "pissa", "lora_ga", "vera", "pfeiffer", "bitfit"]


@pytest.mark.parametrize("peft", METHODS)
def test_it_begins_where_the_other_ended(peft, tiny_cell, finished):
    model = ["model=tiny_neox"] if peft == "bitfit" else []
    run_dir, before = finished(tiny_cell(f"peft={peft}", *model, *LEARNT))
    cell = tiny_cell(f"peft={peft}", *model, *STILL, f"training.start_from={run_dir}")
    _, after = finished(cell)
    assert after["metrics"]["validation_loss"] == pytest.approx(before["metrics"]["validation_loss"], rel=1e-5)
    _, new = finished(tiny_cell(f"peft={peft}", *model, *STILL))
    assert abs(new["metrics"]["validation_loss"] - before["metrics"]["validation_loss"]) > 1e-4
    assert after["metrics"]["trainable_params"] == before["metrics"]["trainable_params"]


def test_over_a_quantized_base_too(tiny_cell, finished):
    common = ("peft=qlora", "quantization=nf4")
    run_dir, before = finished(tiny_cell(*common, *LEARNT))
    _, after = finished(tiny_cell(*common, *STILL, f"training.start_from={run_dir}"))
    assert after["metrics"]["validation_loss"] == pytest.approx(before["metrics"]["validation_loss"], rel=1e-4)


def test_a_chain_stands_in_the_record_first_cell_first(lora, tiny_cell, finished):
    first, run_dir, _ = lora
    pairs = ("peft=lora", "training=dpo", "training.sft_steps=0", "data.pairs=true")
    second = tiny_cell(*pairs, f"training.start_from={run_dir}")
    second_dir, measured = finished(second)
    [link] = measured["provenance"]["started_from"]
    assert (link["cell"], link["objective"], link["steps"]) == (first.id, "sft", 3)
    # the reference of DPO is what it started from
    assert measured["metrics"]["first_train_loss"] == pytest.approx(0.693147, abs=1e-5)
    _, measured = finished(tiny_cell("peft=lora", *STILL, f"training.start_from={second_dir}"))
    assert [link["cell"] for link in measured["provenance"]["started_from"]] == [first.id, second.id]


def test_the_id_follows_the_weights_and_not_where_they_lie(lora, tiny_cell, tmp_path):
    first, run_dir, _ = lora
    moved = tmp_path / "runs" / first.id
    shutil.copytree(run_dir, moved)
    here, there = (tiny_cell("peft=lora", f"training.start_from={folder}") for folder in (run_dir, moved))
    assert here.id == there.id != tiny_cell("peft=lora").id
    by_id = with_earlier(
        tiny_cell("peft=lora").model_copy(update=starting(first.id[:-3], tiny_cell)), tmp_path / "runs"
    )
    assert by_id.id == here.id
    weights = next((moved / ADAPTER_NAME).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    changed = with_earlier(tiny_cell("peft=lora").model_copy(update=starting(first.id, tiny_cell)), tmp_path / "runs")
    assert changed.id != here.id


def starting(named, tiny_cell):
    training = tiny_cell("peft=lora").training
    return {"training": training.model_copy(update={"start_from": named})}


def test_weights_that_change_before_the_run_fail_it(lora, tiny_cell, work_in_process, tmp_path):
    first, run_dir, _ = lora
    moved = tmp_path / first.id
    shutil.copytree(run_dir, moved)
    cell = tiny_cell("peft=lora", f"training.start_from={moved}")
    weights = next((moved / ADAPTER_NAME).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(UserError, match="changed since this cell was composed"):
        work_in_process(cell)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["peft=ia3"], "peft=lora and not peft=ia3"),
        (["peft=lora", "peft.config.r=4"], "other settings of peft"),
        (["peft=lora", "quantization=nf4"], "quantization=none and not quantization=nf4"),
        (["peft=lora", "model=tiny_neox"], "model=tiny_llama and not model=tiny_neox"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides, words, lora, tiny_cell):
    with pytest.raises(UserError, match=words):
        tiny_cell(*overrides, f"training.start_from={lora[1]}")


def test_what_cannot_be_started_from_is_said(lora, tmp_path):
    first, run_dir, _ = lora
    runs = tmp_path / "runs"

    def refused(named):
        with pytest.raises(UserError) as error:
            find_earlier(named, runs, key="training.start_from")
        return str(error.value)

    assert "no finished cell" in refused(first.id)
    for number in (1, 2):
        shutil.copytree(run_dir, runs / f"tiny-{number}")
    assert "2 cells" in refused("tiny")
    assert find_earlier("tiny-2", runs, key="training.start_from").run_dir.name == "tiny-2"
    shutil.rmtree(runs / "tiny-1" / ADAPTER_NAME)
    assert "no weights any more" in refused("tiny-1")
    record = runs / "tiny-2" / "record.json"
    record.write_text(record.read_text().replace('"status": "ok"', '"status": "diverged"'))
    assert "ended as diverged" in refused("tiny-2")


def test_methods_that_cannot_go_on_are_a_rule(tiny_cell, work_in_process, finished):
    for peft in ("prompt_tuning", "adalora"):
        cell = tiny_cell(f"peft={peft}", "eval.generate=false", *LEARNT)
        alone = why_unsupported(cell)
        going_on = cell.model_copy(update={"training": cell.training.model_copy(update={"start_from": "x"})})
        assert alone is None and "loaded prompt" in str(why_unsupported(going_on))
    run_dir, _ = finished(tiny_cell("peft=prompt_tuning", "eval.generate=false", *LEARNT))
    with pytest.raises(ValueError, match="trainable"):
        work_in_process(tiny_cell("peft=prompt_tuning", "eval.generate=false", f"training.start_from={run_dir}"))

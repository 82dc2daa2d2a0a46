"""What was saved gives back what was measured, in a process that the run has not touched."""

from __future__ import annotations

import json
import shutil

import pytest

from left_bench.spec.run_files import ADAPTER_NAME, CELL_NAME, ROWS_NAME
from left_bench.worker import reload_check


@pytest.fixture(scope="module", params=["lora", "dora", "p_tuning"])
def done(request, tiny_cell, work_in_process):
    """The folder of a run whose adapter does something, in bfloat16 with the adapter's own weights in float32."""
    cell = tiny_cell(f"peft={request.param}", "training.steps=5", "eval.generate=false", "precision=bf16")
    run_dir = work_in_process(cell)["run_dir"]
    (run_dir / CELL_NAME).write_text(cell.model_dump_json(by_alias=True))
    return run_dir


def test_an_adapter_gives_back_its_losses(done):
    assert reload_check.start_reload_checker()(done)


@pytest.mark.parametrize("done", ["dora"], indirect=True)  # of a method, the interpreter makes no difference
def test_an_adapter_gives_them_back_in_a_new_interpreter(done):
    assert reload_check.gives_the_same_loss(done)


def test_another_loss_is_noticed(done, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(done, run_dir)
    lines = [json.loads(line) for line in (run_dir / ROWS_NAME).read_text().splitlines()]
    lines[1]["nll"] += 1e-6
    (run_dir / ROWS_NAME).write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert not reload_check.start_reload_checker()(run_dir)


def test_what_cannot_be_loaded_says_why(done, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(done, run_dir)
    shutil.rmtree(run_dir / ADAPTER_NAME)
    with pytest.raises(RuntimeError, match="cannot be used again"):
        reload_check.start_reload_checker()(run_dir)


@pytest.mark.parametrize("peft", ["lora", "pfeiffer"])
def test_an_adapter_in_half_precision_comes_back_in_it(peft, tiny_cell, work_in_process):
    overrides = [f"peft={peft}", "precision=bf16", "precision.adapter_dtype=bfloat16", "training.steps=5"]
    cell = tiny_cell(*overrides, "eval.generate=false")
    run_dir = work_in_process(cell)["run_dir"]
    (run_dir / CELL_NAME).write_text(cell.model_dump_json(by_alias=True))
    assert reload_check.compare_losses(run_dir) == reload_check.EQUAL

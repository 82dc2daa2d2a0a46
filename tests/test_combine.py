"""Adapters of several cells as one: what it computes, what it says of itself, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from left_bench.core.errors import UserError
from left_bench.grid.rules import why_unsupported
from left_bench.spec.run_files import ADAPTER_NAME, ROWS_NAME

TRAINED = ("peft=lora", "training.learning_rate=3e-2", "training.steps=3")


@pytest.fixture(scope="module")
def two(finished, tiny_cell):
    """The run folders of two cells of different seeds, and their cells."""
    cells = [tiny_cell(*TRAINED, f"seed={seed}") for seed in (0, 1)]
    return [finished(cell)[0] for cell in cells], cells


def losses(run_dir):
    return [json.loads(line)["nll"] for line in (run_dir / ROWS_NAME).read_text().splitlines()]


def combine(folders, *more):
    return ("peft=lora", "training=combine", f"training.combine=[{','.join(map(str, folders))}]", *more)


def test_one_cell_alone_in_the_sum_is_that_cell(two, tiny_cell, work_in_process):
    folders, cells = two
    result = work_in_process(
        tiny_cell(*combine(folders, "training.combine_weights=[1.0,0.0]", "training.combine_by=cat"))
    )
    assert losses(result["run_dir"]) == pytest.approx(losses(folders[0]), rel=1e-4)
    assert [link["cell"] for link in result["provenance"]["combined"]] == [cell.id for cell in cells]
    assert result["metrics"]["trainable_params"] == 0
    assert "train_steps" not in result["metrics"]
    assert [path.name for path in (result["run_dir"] / ADAPTER_NAME).iterdir() if path.is_dir()] == []
    assert result["provenance"]["splits"]["train"]["used_for"] == []


@pytest.mark.parametrize("how", ["linear", "svd", "ties", "dare_linear", "dare_ties"])
def test_each_way_makes_an_adapter_that_is_neither(how, two, tiny_cell, work_in_process):
    folders, _ = two
    result = work_in_process(tiny_cell(*combine(folders, f"training.combine_by={how}")))
    own = losses(result["run_dir"])
    assert all(torch.isfinite(torch.tensor(own)))
    assert all(own != losses(folder) for folder in folders)
    saved = load_file(result["run_dir"] / ADAPTER_NAME / "adapter_model.safetensors")
    assert saved and any(tensor.abs().sum() > 0 for tensor in saved.values())


def test_what_cannot_be_combined_is_said(two, tiny_cell):
    folders, _ = two
    for wrong in (combine(folders[:1]), combine(folders, "training.combine_weights=[1.0]")):
        with pytest.raises(UserError, match="two finished cells or more"):
            tiny_cell(*wrong)
    with pytest.raises(UserError, match="other settings of peft"):
        tiny_cell(*combine(folders, "peft.config.r=4"))
    cell = tiny_cell(*combine(folders))
    assert why_unsupported(cell) is None
    assert cell.id != tiny_cell(*combine(folders, "training.combine_by=svd")).id
    training = cell.training.model_copy(update={"sft_steps": 2})
    assert "trains nothing" in str(why_unsupported(cell.model_copy(update={"training": training})))

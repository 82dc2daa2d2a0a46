"""What other packages' classes refuse is refused before a sweep begins; what ships, and what fits, passes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from left_bench.core.errors import Unsupported, UserError
from left_bench.grid.command_line import register_resolvers
from left_bench.grid.compose import compose_option
from left_bench.grid.rules import why_unsupported
from left_bench.launch.preflight import Trial, has_user_values, refusal_of, rehearse
from left_bench.worker.classify_error import status_of

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = [
    (group, path.stem)
    for group in ("peft", "optimizer", "quantization")
    for path in sorted(ROOT.glob(f"conf/{group}/*.yaml"))
    if path.stem != "custom"  # wants a class
]
MODELS = ["tiny_neox", "tiny_opt", "tiny_bert", "tiny_t5", "tiny_vit"]


def there(group: str, name: str) -> bool:
    return (ROOT / "conf" / group / f"{name}.yaml").is_file()


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_what_ships_passes(group, option, tiny_cell):
    register_resolvers()
    chosen = getattr(compose_option(group, option), group)
    cell = tiny_cell("training.steps=10").model_copy(update={group: chosen})  # AdaLoRA wants more than two
    assert why_unsupported(cell) is not None or refusal_of(cell) is None


@pytest.mark.parametrize("model", [name for name in MODELS if there("model", name)])
def test_every_architecture_passes(model, tiny_cell):
    data = ["data=digits"] if model == "tiny_vit" else []
    for peft in ("lora", "prefix_tuning", "pfeiffer", "full"):
        cell = tiny_cell(f"model={model}", f"peft={peft}", *data)
        assert why_unsupported(cell) is not None or refusal_of(cell) is None


def test_the_default_model_passes(compose_cell):
    assert refusal_of(compose_cell("peft=lora", "peft.config.r=3", "hardware=cpu")) is None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["peft.config.target_modules=[q_porj]"],
            ["peft.config.target_modules=['q_porj']", "no layer of the model has this name", "did you mean 'q_proj'?"],
        ),
        (["peft.config.target_modules='(q_porj)$'"], ["peft.config", "peft.LoraConfig refuses it", "q_porj"]),
        (["peft.config.lora_dropout=7"], ["peft.config", "dropout probability", "7"]),
        (["peft.config.init_lora_weights=no_such_start"], ["peft.config", "no_such_start"]),
        (["peft.config.bias=sometimes"], ["peft.config", "sometimes"]),
        (["optimizer.config.betas=[2,0.9]"], ["optimizer.config", "torch.optim.AdamW", "beta"]),
        (["optimizer.config.eps=-1"], ["optimizer.config", "epsilon"]),
        (["model.config.num_attention_heads=3"], ["model.config", "3"]),
        (["model.config.hidden_size=-8"], ["model.config"]),
        (["model.config.num_key_value_heads=3"], ["model.config"]),
        (["model.config.hidden_act=nope"], ["model.config", "nope"]),
        (["quantization=nf4", "quantization.config.bnb_4bit_compute_dtype=floaty"], ["quantization.config", "floaty"]),
        (
            ["quantization=nf4", "quantization.config.bnb_4bit_quant_type=nf3"],
            ["bnb_4bit_quant_type=nf3: bitsandbytes refuses it"],
        ),
    ],
)
def test_a_value_that_fits_nowhere(overrides, words, tiny_cell):
    refusal = refusal_of(tiny_cell(*overrides))
    assert refusal is not None
    assert len(refusal.splitlines()) == 1
    for word in words:
        assert word in refusal


@pytest.mark.parametrize(
    ("overrides", "own"),
    [
        (["peft=dora", "seed=1", "training.steps=3", "data.train_rows=9"], False),
        (["+sweep=smoke"], False),
        (["peft.config.r=3"], True),
        (["++peft.config.r=3"], True),
        (["+model.revision=main"], True),
        (["model.name_or_path=./here"], True),
    ],
)
def test_values_of_ones_own_are_told_from_what_ships(overrides, own, composed):
    assert has_user_values(composed(*overrides).hydra) is own


def test_the_first_refusal_of_a_process_of_its_own_is_raised(tiny_cell):
    """Real, with its imports; nothing but the sentence comes back."""
    good, bad = tiny_cell("peft.config.r=3"), tiny_cell("peft.config.target_modules=[q_porj]")
    rehearse([], cells_follow=True)
    with pytest.raises(UserError, match="did you mean 'q_proj'"):
        rehearse([Trial(good), Trial(bad)], cells_follow=False)


def test_a_trial_that_dies_is_no_refusal(tiny_cell, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.devnull)
    monkeypatch.setattr(
        "left_bench.launch.preflight.worker_environment", lambda cell: {"PATH": "", "PYTHONHOME": os.devnull}
    )
    rehearse([Trial(tiny_cell("peft.config.target_modules=[q_porj]"))], cells_follow=False)


def test_the_last_job_of_a_sweep_is_refused_before_the_first_runs(tmp_path):
    command = [sys.executable, "-m", "left_bench", "-m", "model=tiny_llama", "precision=fp32", "hardware=cpu"]
    command += ["tracker=none", "training.steps=1", "data.train_rows=8", "peft.config.target_modules=[q_proj],[q_porj]"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done
    assert done.stderr.count("\n") == 1
    assert "peft.config.target_modules=['q_porj']" in done.stderr
    assert not list(tmp_path.glob("runs/*/record.json"))


@pytest.mark.parametrize(
    ("overrides", "own"),
    [
        (["peft=prefix_tuning", "model.name_or_path=./here", "peft.learning_rate=1"], False),
        (["peft.config.r=3"], True),
        (["++peft.config.target_modules=[q]"], True),
    ],
)
def test_a_method_with_ones_own_arguments_is_told_from_one_that_ships(overrides, own, composed, tiny_cell):
    assert Trial.of(tiny_cell(), composed(*overrides).hydra).own_method is own


def test_a_method_that_ships_and_does_not_fit_stops_nothing(tiny_cell):
    """peft's prefixes and activation checkpointing do not go together, and neither is mistyped."""
    cell = tiny_cell("peft=prefix_tuning", "training=checkpointing")
    assert refusal_of(cell, own_method=False) is None
    assert "PREFIX_TUNING does not work with gradient checkpointing" in str(refusal_of(cell))


def test_what_peft_does_not_attach_is_an_unsupported_row(tiny_cell, work_in_process):
    with pytest.raises(Unsupported, match="peft=prefix_tuning on LlamaForCausalLM: peft refuses it") as raised:
        work_in_process(tiny_cell("peft=prefix_tuning", "training=checkpointing"))
    status, reason = status_of(raised.value)
    assert status == "unsupported" and "gradient checkpointing" in reason

"""The loader of sweeps composes what Hydra's own does."""

from __future__ import annotations

import pickle

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from left_bench.grid.loader import SweepLoader, use_sweep_loader
from omegaconf import OmegaConf

JOBS = [
    ["peft=lora", "quantization=nf4"],
    ["peft=qlora", "++peft.config.r=4", "seed=3"],  # an option that chooses for another group
    ["quantization=nf4", "++quantization.config.bnb_4bit_quant_type=fp4", "peft=lora"],
    ["++training.steps=7", "++data.config={min_terms: 3}", "training=long", "seed=1"],
    ["peft=dora", "optimizer=adafactor", "quantization=int8", "training=long"],  # put together, one section from each
    ["peft=qlora", "optimizer=adafactor", "training=long", "quantization=int8"],
    ["peft=dora", "peft=lora", "training=long"],
    ["+recipe=lora_nf4", "peft=dora", "training=long"],
    ["peft=lora", "~tracker.wandb.project"],
    ["tracker=none", "++peft.config.target_modules=[q_proj,v_proj]"],
    [],
]


@pytest.fixture
def loaders(composed):
    config = composed("+sweep=smoke", "training.max_length=64")
    ours = use_sweep_loader()
    return config, ConfigLoaderImpl(ours.config_search_path), ours


def test_it_composes_what_hydra_composes(loaders):
    config, plain, ours = loaders
    for job in [*JOBS, *JOBS]:  # the second time from what is kept
        expected, found = plain.load_sweep_config(config, list(job)), ours.load_sweep_config(config, list(job))
        assert OmegaConf.to_container(found) == OmegaConf.to_container(expected), job
        assert OmegaConf.is_struct(found) == OmegaConf.is_struct(expected)
        for group, section in expected.items():
            if OmegaConf.is_config(section) and group != "hydra":
                assert list(found[group]) == list(section), job
                assert OmegaConf.is_readonly(found[group]) == OmegaConf.is_readonly(section)


def test_one_job_does_not_change_the_next(loaders):
    config, _, ours = loaders
    first = ours.load_sweep_config(config, ["peft=lora", "++peft.config.r=3"])
    first.peft.config.r = 99
    assert ours.load_sweep_config(config, ["peft=lora"]).peft.config.r == 16
    assert ours.load_sweep_config(config, ["peft=lora", "++peft.config.r=3"]).hydra.overrides.task == [
        "peft=lora",
        "++peft.config.r=3",
    ]


def test_a_wrong_value_is_refused_as_by_hydra(loaders):
    config, plain, ours = loaders
    with pytest.raises(Exception, match="peft/laro") as expected:
        plain.load_sweep_config(config, ["peft=laro"])
    with pytest.raises(type(expected.value), match="peft/laro"):
        ours.load_sweep_config(config, ["peft=laro"])


def test_it_travels_light(loaders):
    config, _, ours = loaders
    before = len(pickle.dumps(ours))
    for seed in range(3):
        ours.load_sweep_config(config, ["peft=lora", f"seed={seed}"])
    assert len(pickle.dumps(ours)) == before
    assert isinstance(ours, SweepLoader)
    assert use_sweep_loader() is ours


def test_a_grid_is_composed_once_for_each_option_and_not_for_each_combination(loaders, monkeypatch):
    config, plain, ours = loaders
    composed, by_hydra = [], ConfigLoaderImpl.load_sweep_config

    def counted(self, master, overrides):
        composed.append(overrides)
        return by_hydra(self, master, overrides)

    monkeypatch.setattr(ConfigLoaderImpl, "load_sweep_config", counted)
    grid = [
        [f"quantization={quantization}", f"peft={peft}", "training=long", f"seed={seed}"]
        for quantization in ("none", "int8", "nf4")
        for peft in ("lora", "dora", "ia3", "full")
        for seed in (0, 1)
    ]
    found = [ours.load_sweep_config(config, job) for job in grid]
    assert len(composed) == 3 + 4 - 1
    monkeypatch.undo()
    for job, one in zip(grid, found, strict=True):
        expected = plain.load_sweep_config(config, list(job))
        assert OmegaConf.to_container(one) == OmegaConf.to_container(expected), job
        assert one.hydra.runtime.choices == expected.hydra.runtime.choices

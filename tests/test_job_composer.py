"""A sweep's jobs are composed as Hydra composes them."""

from __future__ import annotations

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from left_bench.grid.job_composer import JobComposer

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
def sweep(composed):
    """`(config, plain, ours)`: a sweep's configuration, Hydra's own loader, and what composes the sweep's jobs."""
    config = composed("+sweep=smoke", "training.max_length=64")
    plain = GlobalHydra.instance().config_loader()
    return config, plain, JobComposer(plain, config)


def of_the_job(config):
    """Without the parts of Hydra's own that say nothing of a job."""
    whole = OmegaConf.to_container(config)
    for key in ("help", "hydra_help", "hydra_logging", "job_logging"):
        whole["hydra"].pop(key, None)
    del whole["hydra"]["job"]["override_dirname"]  # nothing is named by it
    return whole


def test_it_composes_what_hydra_composes(sweep):
    config, plain, ours = sweep
    for job in [*JOBS, *JOBS]:  # the second time from what is kept
        expected, result = plain.load_sweep_config(config, list(job)), ours.compose(job)
        assert of_the_job(result) == of_the_job(expected), job
        assert OmegaConf.is_struct(result) == OmegaConf.is_struct(expected)
        for group, section in expected.items():
            if OmegaConf.is_config(section) and group != "hydra":
                assert list(result[group]) == list(section), job
                assert OmegaConf.is_readonly(result[group]) == OmegaConf.is_readonly(section)


def test_one_job_does_not_change_the_next(sweep):
    _, _, ours = sweep
    first = ours.compose(["peft=lora", "++peft.config.r=3"])
    first.peft.config.r = 99
    assert ours.compose(["peft=lora"]).peft.config.r == 16
    assert ours.compose(["peft=lora", "++peft.config.r=3"]).hydra.overrides.task == ["peft=lora", "++peft.config.r=3"]


@pytest.mark.parametrize("job", [["peft=laro"], ["no_such_key=1"], ["training.no_such_key=1"], ["~nothing"]])
def test_a_wrong_value_is_refused_as_by_hydra(job, sweep):
    config, plain, ours = sweep
    with pytest.raises(Exception, match=job[0].strip("~").partition("=")[0]) as expected:
        plain.load_sweep_config(config, list(job))
    with pytest.raises(type(expected.value)) as refused:
        ours.compose(job)
    assert str(refused.value) == str(expected.value)


def test_a_grid_is_composed_once_for_each_option_and_not_for_each_combination(sweep, monkeypatch):
    config, plain, ours = sweep
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
    results = [ours.compose(job) for job in grid]
    assert len(composed) == 3 + 4 - 1
    monkeypatch.undo()
    for job, item in zip(grid, results, strict=True):
        expected = plain.load_sweep_config(config, list(job))
        assert of_the_job(item) == of_the_job(expected), job
        assert item.hydra.runtime.choices == expected.hydra.runtime.choices


def test_hydras_loader_takes_files_that_are_read_once(sweep, monkeypatch):
    """Where this fails, another Hydra has another loader: see `grid.read_once`."""
    _, plain, ours = sweep
    read, load = [], ConfigRepository.load_config
    monkeypatch.setattr(
        ConfigRepository, "load_config", lambda self, config_path: read.append(config_path) or load(self, config_path)
    )
    ours.compose(["peft=lora"])
    first = len(read)
    ours.compose(["+recipe=lora_nf4"])  # composed by Hydra anew
    assert first > 20 and len(read) - first < 5
    assert len(read) == len(set(read))
    assert plain.repository is not ours._loader.repository

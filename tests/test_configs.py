"""Every YAML under conf/ and sweeps/ is a test case."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from left_bench.cli.list_options import summary_of
from left_bench.core.errors import UserError
from left_bench.core.paths import config_root
from left_bench.grid.command_line import options
from left_bench.grid.compose import compose
from left_bench.grid.rules import why_unsupported
from left_bench.grid.sweep import jobs_of, sweep_name
from left_bench.spec.cell import GROUPS, fingerprint
from left_bench.tracker import open_tracker

ROOT = config_root()
FILES = sorted(path for folder in ("conf", "sweeps") for path in (ROOT / folder).rglob("*.yaml"))
OPTIONS = [(path.parent.name, path.stem) for path in FILES if path.parent.parent == ROOT / "conf"]
OF_FINISHED_CELLS = {("training", "combine")}  # composed from cells that have run; see test_combine.py
CELL_OPTIONS = [(group, name) for group, name in OPTIONS if group in GROUPS and (group, name) not in OF_FINISHED_CELLS]
# an option that is nothing without the user's own word
NEEDS = {("peft", "custom"): ["peft._target_=peft.OFTConfig", "peft.config.oft_block_size=8"]}
# the whole of these would be hundreds of compositions
NARROWED = {
    "full_grid": ["quantization=none,nf4", "peft=lora,ia3", "precision=bf16,fp32"],
    "quantization_x_peft": ["quantization=none,int8,nf5", "peft=full,lora"],
}
SEARCHES = {"learning_rate"}  # their cells are not known before; see test_search.py
GRIDS = [name for name in options("sweep") if name not in SEARCHES]
PEFT = [name for group, name in OPTIONS if group == "peft"]


def test_no_file_lies_where_nothing_looks():
    assert {group for group, _ in OPTIONS} == {*GROUPS, "tracker", "recipe", "tune"}
    assert [path for path in FILES if path.parent == ROOT / "conf"] == [ROOT / "conf" / "config.yaml"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_file_says_what_it_is(path: Path):
    summary = summary_of(path)
    assert 20 < len(summary) <= 140
    assert not summary.startswith(("TODO", "@"))


@pytest.mark.parametrize(("group", "name"), CELL_OPTIONS)
def test_an_option_composes_to_a_cell(group, name, compose_cell):
    cell = compose_cell(f"{group}={name}", *NEEDS.get((group, name), []))
    if (group, name) == ("precision", "auto"):  # it stands for another, which the machine decides
        name = cell.precision.name
    assert cell.choices[group] == name
    section = getattr(cell, group)
    plain = yaml.safe_load((ROOT / "conf" / group / f"{name}.yaml").read_text())
    assert section.name == plain.get("name", section.name)
    if "name" in plain:  # else an option such as qlora: its method is LoRA, and the name says so
        assert section.name == name


@pytest.mark.parametrize("name", options("tracker"))
def test_a_tracker_opens(name, composed, tmp_path):
    _, settings = compose(*[(config := composed(f"tracker={name}")), config.hydra])
    assert list(settings.tracker) == ([] if name == "none" else [name])
    try:
        open_tracker(settings.tracker, store=tmp_path)
    except UserError as error:  # an extra that is not installed here
        assert f"pip install 'left-bench[{name}]'" in str(error)


def test_the_default_is_the_same_as_every_default_named(compose_cell):
    defaults = yaml.safe_load((ROOT / "conf" / "config.yaml").read_text())["defaults"]
    named = [
        f"{key}={value}"
        for default in defaults
        if isinstance(default, dict)
        for key, value in default.items()
        if key in GROUPS
    ]
    assert len(named) == len(GROUPS)
    assert compose_cell().id == compose_cell(*named).id


@pytest.mark.parametrize("group", GROUPS)
def test_options_of_a_group_are_different_cells(group, compose_cell):
    names = [name for kind, name in CELL_OPTIONS if kind == group]
    cells = {name: compose_cell(f"{group}={name}", *NEEDS.get((group, name), [])) for name in names}
    if group in ("hardware", "precision"):  # `auto` is what this machine has, and the same cell as naming it
        cells.pop("auto")
    assert len({fingerprint(cell.identity) for cell in cells.values()}) == len(cells)


# --- peft ---


def test_custom_alone_is_refused(compose_cell):
    with pytest.raises(UserError, match=r"peft\._target_"):
        compose_cell("peft=custom")


@pytest.mark.parametrize("name", PEFT)
def test_peft_arguments_are_the_upstream_classs_own(name, compose_cell):
    from left_bench.spec.instantiate import instantiate

    cell = compose_cell(f"peft={name}", *NEEDS.get(("peft", name), []))
    if cell.peft.target is None:
        assert name == "full"
        return
    arguments = dict(cell.peft.config)
    if cell.peft.target.startswith("peft."):
        arguments["task_type"] = "CAUSAL_LM"
    if "adapter_layers" in arguments:
        arguments["adapter_layers"] = 2
    if "not installed" in str(why_unsupported(cell)):
        return  # the rule says so in the report; test_rules.py holds that it does
    config = instantiate(cell.peft.target, arguments, key="peft")
    for key, value in cell.peft.config.items():
        kept = getattr(config, key)
        if isinstance(value, (int, float)):
            assert kept == value, key


def test_every_method_of_pefts_has_an_option_or_a_reason_in_the_docs(compose_cell):
    """The types, the variants of LoRA and its ways to start; the reasons are a table in docs/extending.md."""
    import dataclasses
    import typing

    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    cells = [compose_cell(f"peft={name}").peft for name in PEFT if name != "custom"]
    used = {cell.target for cell in cells}
    switched = {key for cell in cells for key, value in cell.config.items() if value is not False}
    started = {cell.config.get("init_lora_weights") for cell in cells}
    text = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
    excused = {line.split("`")[1] for line in text.splitlines() if line.startswith("| `")}

    types = {kind.value for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items() if f"peft.{made.__name__}" not in used}
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    ways = {name for name in fields if name.startswith("use_") or name.endswith(("_config", "_tokens"))} - switched
    hints = typing.get_type_hints(peft.LoraConfig)["init_lora_weights"]
    starts = {
        word for part in typing.get_args(hints) for word in typing.get_args(part) if not word.startswith("pissa_niter")
    } - started
    assert types | ways | starts == excused


def test_the_sweep_of_all_methods_has_all():
    plain = yaml.safe_load((ROOT / "sweeps" / "peft_all.yaml").read_text())
    named = [name.strip() for name in plain["hydra"]["sweeper"]["params"]["peft"].split(",")]
    assert sorted(named) == sorted(set(PEFT) - {"custom"})


def test_qlora_sets_both_groups(compose_cell):
    qlora, spelt = compose_cell("peft=qlora"), compose_cell("peft=lora", "quantization=nf4_dq")
    assert qlora.quantization.name == qlora.choices["quantization"] == "nf4_dq"
    assert qlora.quantization.config["bnb_4bit_use_double_quant"] is True
    assert qlora.quantization.config["bnb_4bit_quant_type"] == "nf4"
    assert qlora.choices["peft"] == "qlora"
    assert qlora.identity == spelt.identity
    assert qlora.id == spelt.id


def test_dora_is_lora_but_for_one_switch(compose_cell):
    dora, lora = compose_cell("peft=dora").peft.config, compose_cell("peft=lora").peft.config
    assert dora == lora | {"use_dora": True}


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 40, 1000])
def test_adalora_always_has_its_three_phases(steps, compose_cell):
    from left_bench.spec.instantiate import instantiate

    cell = compose_cell("peft=adalora", f"training.steps={steps}")
    config = cell.peft.config
    assert config["total_step"] == steps
    if steps >= 4:
        instantiate(cell.peft.target, {"task_type": "CAUSAL_LM", **config}, key="peft")
        assert config["tinit"] < steps - config["tfinal"]


@pytest.mark.parametrize("name", [name for group, name in OPTIONS if group == "quantization"])
def test_quantization_arguments_are_the_upstream_classs_own(name, compose_cell):
    from left_bench.spec.instantiate import instantiate

    cell = compose_cell(f"quantization={name}", "precision=bf16")
    if cell.quantization.target is None:
        assert cell.quantization.config == {}
        return
    try:
        config = instantiate(cell.quantization.target, cell.quantization.config, key="quantization")
    except (ImportError, UserError):
        assert "not installed" in str(why_unsupported(cell))
        return
    dtype = cell.quantization.config.get("bnb_4bit_compute_dtype")
    if dtype is not None:
        assert str(config.bnb_4bit_compute_dtype) == f"torch.{dtype}"
        other = compose_cell(f"quantization={name}", "precision=fp32")
        assert other.quantization.config["bnb_4bit_compute_dtype"] == "float32"


# --- sweeps ---


@pytest.mark.parametrize("name", GRIDS)
def test_a_sweep_is_made_of_unlike_cells(name, composed):
    config = composed(f"+sweep={name}", *NARROWED.get(name, []))
    jobs = (job for _, job in jobs_of(config))
    cells = [compose(job, job.hydra)[0] for job in jobs]
    assert len(cells) > 1
    assert len({cell.id for cell in cells}) == len(cells)
    assert len({cell.id.rsplit("-", 1)[1] for cell in cells}) == len(cells)
    assert sweep_name(config.hydra) == name
    assert len({fingerprint(cell.data.model_dump()) for cell in cells}) == 1  # the same rows
    seeds = [cell.seed for cell in cells]  # and the same order: every seed has as many cells as the next
    assert len({seeds.count(seed) for seed in seeds}) == 1
    assert any(why_unsupported(cell) is None for cell in cells)


@pytest.mark.parametrize("name", options("sweep"))
def test_a_sweep_names_options_that_exist(name):
    parameters = yaml.safe_load((ROOT / "sweeps" / f"{name}.yaml").read_text())["hydra"]["sweeper"]["params"]
    for key, value in parameters.items():
        if key in GROUPS:
            chosen = [name.strip() for name in value.split(",")]
            assert set(chosen) <= set(options(key))
            assert len(set(chosen)) == len(chosen)


@pytest.mark.parametrize("name", [name for group, name in OPTIONS if group == "recipe"])
def test_a_recipe_chooses_what_it_is_named_for(name, compose_cell):
    cell = compose_cell(f"+recipe={name}")
    if name.startswith("rlhf_"):  # what comes after 40 supervised steps, which are the same in each
        after = name.removeprefix("rlhf_").replace("sft", "default")
        assert (cell.choices["peft"], cell.choices["training"]) == ("lora", after)
        first = cell.sft_before() if cell.training.sft_steps else cell
        assert (first.training.steps, first.training.rows_per_step, first.learning_rate) == (40, 8, 1e-3)
        return
    method, _, rest = name.partition("_") if name.startswith(("lora_", "full_")) else (name, "", "")
    chosen = (cell.choices["quantization"], cell.choices["precision"], cell.choices["training"])
    assert cell.choices["peft"] == method
    assert set(chosen) - {"none", "bf16", "default"} == ({rest} if rest else set())


def test_the_command_line_overrules_a_recipe(compose_cell):
    assert compose_cell("+recipe=lora_nf4", "quantization=fp4").choices["quantization"] == "fp4"


def test_the_ranks_keep_alpha_at_twice_the_rank(composed):
    cells = [compose(job, job.hydra)[0] for _, job in jobs_of(composed("+sweep=lora_rank"))]
    assert [cell.peft.config["r"] for cell in cells] == [2, 4, 8, 16, 32, 64, 128]
    assert all(cell.peft.config["lora_alpha"] == 2 * cell.peft.config["r"] for cell in cells)


def test_the_methods_sweep_has_every_method(composed):
    cells = [compose(job, job.hydra)[0] for _, job in jobs_of(composed("+sweep=peft_methods"))]
    assert [cell.choices["peft"] for cell in cells] == [*dict.fromkeys(cell.choices["peft"] for cell in cells)]
    assert len(cells) >= 12
    assert {cell.choices["peft"] for cell in cells} <= set(PEFT) - {"custom"}


@pytest.mark.parametrize(
    ("overrides", "chosen"),
    [
        (["+sweep=peft_methods", "peft=lora,ia3"], [("lora", 16), ("ia3", None)]),
        (["+sweep=lora_rank", "peft.config.r=2"], [("lora", 2)]),
        (["+sweep=lora_rank", "peft.config.r=2,3"], [("lora", 2), ("lora", 3)]),
        (["+sweep=peft_methods", "peft=lora", "seed=0,1"], [("lora", 16), ("lora", 16)]),
    ],
)
def test_an_override_narrows_or_widens_a_sweep(overrides, chosen, composed):
    cells = [compose(job, job.hydra)[0] for _, job in jobs_of(composed(*overrides))]
    assert [(cell.choices["peft"], cell.peft.config.get("r")) for cell in cells] == chosen
    assert len({cell.id for cell in cells}) == len(cells)


def test_an_override_reaches_every_cell_of_a_sweep(composed):
    config = composed("+sweep=smoke", "training.steps=3", "data.train_rows=5")
    cells = [compose(job, job.hydra)[0] for _, job in jobs_of(config)]
    assert {(cell.training.steps, cell.data.train_rows) for cell in cells} == {(3, 5)}


def test_a_named_model_brings_none_of_the_options_facts(compose_cell, tmp_path):
    cell = compose_cell(f"model.name_or_path={tmp_path}/my-model")
    assert cell.model.name == "my_model"
    assert (cell.model.config, cell.model.wheel, cell.model.weights) == (None, None, "pretrained")
    assert cell.choices["model"] == f"{tmp_path}/my-model"

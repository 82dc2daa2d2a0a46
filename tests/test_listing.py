"""`left-bench list`: every option in one line, with a verdict."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hydra.core.global_hydra import GlobalHydra

from left_bench.cli import list_options
from left_bench.cli.doctor import main as doctor
from left_bench.cli.list_options import main
from left_bench.core.errors import UserError, nearest
from left_bench.grid import command_line
from left_bench.grid.compose import compose_option
from left_bench.grid.options import OnlyHydraKnows
from left_bench.spec.cell import GROUPS


def test_every_option_of_every_group_is_one_line(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for group in ("sweep", "recipe", *GROUPS, "tracker"):
        start = lines.index(group)
        for option in command_line.options(group):
            (line,) = [
                line for line in lines[start + 1 :][: len(command_line.options(group))] if line.split()[0] == option
            ]
            assert len(line.split()) > 3, f"{group}={option} says nothing of itself"


def test_what_this_machine_cannot_run_says_why(capsys, monkeypatch):
    monkeypatch.setattr("left_bench.grid.compose.find_device", lambda asked: "cpu")
    main(["precision"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert "not here" in lines["tf32"] and "CUDA" in lines["tf32"]
    assert "runs here" in lines["bf16"]


def test_json_has_an_object_for_each_option(capsys, monkeypatch):
    monkeypatch.setattr("left_bench.grid.compose.find_device", lambda asked: "cpu")
    assert main(["precision", "sweep", "--json"]) == 0
    results = {(load["group"], load["option"]): load for load in json.loads(capsys.readouterr().out)}
    assert {name for group, name in results if group == "precision"} == set(command_line.options("precision"))
    assert results["precision", "bf16"]["runs_here"] is True and results["precision", "bf16"]["reason"] is None
    assert results["precision", "tf32"]["runs_here"] is False and "CUDA" in results["precision", "tf32"]["reason"]
    assert results["sweep", "peft_methods"]["runs_here"] is None and results["sweep", "peft_methods"]["summary"]


def test_letters_that_changed_places_are_the_likeliest_slip():
    assert nearest("lroa", command_line.options("peft")) == "; did you mean 'lora'?"


@pytest.mark.parametrize(
    ("flags", "told"), [("avx2", "fp32 (no bfloat16 instructions)"), ("amx_bf16", "bf16 (amx_bf16)")]
)
def test_auto_says_what_it_is_here(flags, told, capsys, monkeypatch):
    monkeypatch.setattr("left_bench.measure.auto_precision.find_device", lambda asked: "cpu")
    monkeypatch.setenv("LEFT_BENCH_CPU_FLAGS", flags)
    main(["precision"])
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.split()[0] == "auto"]
    assert line.endswith(f"Here: {told}")


def test_a_group_that_is_none():
    with pytest.raises(UserError, match="unknown group 'pft'"):
        main(["pft"])


def test_a_group_that_is_nearly_right_is_suggested_and_help_is_no_group(capsys):
    with pytest.raises(UserError, match="unknown group 'quantisation'; did you mean 'quantization'"):
        main(["quantisation"])
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: left-bench list")


def test_the_doctor_takes_no_other_option_than_json(capsys):
    with pytest.raises(UserError, match="--jsn: the only option is --json"):
        doctor(["--jsn"])
    assert doctor(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: left-bench doctor")


@pytest.mark.parametrize("group", GROUPS)
def test_what_is_read_from_the_file_is_what_hydra_composes(group, compose_cell):
    command_line.register_resolvers()
    for option in command_line.options(group):
        # nothing without the user's own word, or without cells that have run
        if (group, option) not in {("peft", "custom"), ("training", "combine")}:
            assert compose_option(group, option) == compose_cell(f"{group}={option}"), option


def test_what_only_hydra_can_read_is_left_to_it(monkeypatch, capsys):
    def refuse(group, option):
        raise OnlyHydraKnows

    GlobalHydra.instance().clear()  # other tests leave their composition open
    main(["hardware"])
    expected = capsys.readouterr().out
    monkeypatch.setattr(list_options, "compose_option", refuse)
    main(["hardware"])
    assert capsys.readouterr().out == expected


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from left_bench.cli.main import main; main(['list']); "
        "print(sorted({'torch', 'transformers', 'peft', 'hydra', 'pandas', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"

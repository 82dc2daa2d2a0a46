from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from left_bench import __version__
from left_bench.cli.main import help_text
from left_bench.core.errors import UserError
from left_bench.core.paths import config_root
from left_bench.grid import command_line
from left_bench.grid.command_line import check_choices, launch_name, open_section
from left_bench.grid.compose import Settings
from left_bench.spec.cell import GROUPS, Cell
from left_bench.spec.record import Record, not_started

SWEEPS = ("smoke", "lora_rank", "peft_methods", "precision", "quantization")


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "left_bench", *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


# --- in a process of its own: exit codes, and what is imported ---


def test_help(tmp_path):
    done = run("--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for word in (*SWEEPS, *GROUPS, "report", "doctor", "qlora", "nf4_dq"):
        assert word in done.stdout


def test_an_unknown_sweep(tmp_path):
    done = run("+sweep=smoek", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("left-bench: unknown sweep 'smoek'; did you mean 'smoke'?")
    assert all(name in done.stderr for name in SWEEPS)
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--help"], ["+sweep=nope"], ["+sweep=smoke", "training.schedule=cosin"]])
def test_torch_is_not_imported(arguments, tmp_path):
    program = (
        "import sys; from left_bench.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'pandas', 'matplotlib', 'wandb'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_shell_completion(tmp_path):
    done = run("-sc", "query=bash", cwd=tmp_path, COMP_LINE="left-bench precision=bf", COMP_POINT="23")
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {"precision=bf16", "precision=bf16_mixed"}


# --- in this process ---


def test_version_and_help(left_bench):
    assert left_bench("--version") == (0, f"left-bench {__version__}\n", "")
    assert left_bench("-h").out == help_text() + "\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["reprot", "runs"], ["unknown command 'reprot'", "did you mean 'report'"]),
        (["zzz"], ["unknown command 'zzz'", "list"]),
        (["peft=lorra"], ["unknown peft 'lorra'", "did you mean 'lora'?", "vera"]),
        (["quantization=int9"], ["unknown quantization 'int9'", "int8", "nf4_dq"]),
        (["+sweep=smoke", "peft=lora,qlara"], ["unknown peft 'qlara'", "did you mean 'qlora'?"]),
        (["+sweep=xyz", "--cfg", "job"], ["unknown sweep 'xyz'", "smoke"]),
        (["training.setps=3"], ["training.setps", "did you mean 'steps'"]),
        (["training.schedule=cosin"], ["training.schedule='cosin'", "did you mean 'cosine'"]),
        (["training.batch_size=-4"], ["training.batch_size=-4"]),
        (["training.steps=few"], ["training.steps='few'"]),
        (["hardware.memory_limit=lots"], ["hardware.memory_limit='lots'", "6GiB"]),
        (["peft=custom"], ["peft._target_"]),
        (["data=jsonl"], ["data.path"]),
        (["data=jsonl", "data.path=/no/such/rows.jsonl"], ["data.path=/no/such/rows.jsonl"]),
        (["model.name_or_path=./no/such/model"], ["model.name_or_path", "does not exist"]),
        (["seed=-1"], ["seed=-1"]),
        (["+sweep=smoke", "training.steps=4,0"], ["training.steps=0"]),
        (["+sweep=smoke", "+no_such_key=1"], ["no_such_key"]),
        (["no_such_key=1"], ["no_such_key"]),
        (["tracker.wandbb.project=x"], ["tracker.wandbb", "did you mean 'wandb'"]),
        (["sede=1"], ["sede: no such key; did you mean 'seed'?"]),
        (["training.learning_rate=1e-3x"], ["training.learning_rate='1e-3x'"]),
        (["peft.config.r=[1"], ["peft.config.r=[1"]),
        (["training.steps=${nope}"], ["training.steps", "nope"]),
        (["-m", "training.steps=0,4"], ["training.steps=0"]),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(arguments, words, left_bench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("left_bench.launch.job.run_cell", None)
    answer = left_bench(*arguments)
    assert answer.code == 2, answer
    assert "Traceback" not in answer.err
    for word in words:
        assert word in answer.err, answer.err
    assert len(answer.err.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("record.json"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["+sweep=peft_methods", "training.steps=4,-1"],
        ["+sweep=smoke", "seed=0,1,2,x"],
        ["-m", "training.schedule=cosine,linear,cosin"],
        ["-m", "data=chain_sum,jsonl"],
        ["-m", "hardware.memory_limit=6GiB,lots"],
        ["-m", "model=tiny_llama,smollm2_135m", "model.weights=random,pretrained", "model.config=null"],
    ],
)
def test_bad_input_in_the_last_job_runs_nothing(arguments, left_bench, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("left_bench.launch.job.run_cell", lambda *a, **k: started.append(a))
    monkeypatch.chdir(tmp_path)
    answer = left_bench(*arguments, "tracker=none")
    assert answer.code == 2, answer
    assert started == []
    assert not list(tmp_path.rglob("*.json"))


def done(cell: Cell, settings: Settings) -> Record:
    """A stand-in for running a cell."""
    record = not_started(cell, "unsupported", "a stand-in")
    record.write(settings.runs_dir / cell.id)
    return record


def test_hydras_options_are_known():
    from hydra._internal.utils import get_args_parser

    results = {string for action in get_args_parser()._actions for string in action.option_strings}
    assert results - {"--config-path", "-cp"} == set(command_line._HYDRA_OPTIONS)


def test_cfg_job(left_bench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = left_bench("peft=qlora", "--cfg", "job", "training.steps=7")
    assert answer.code == 0, answer.err
    plain = yaml.safe_load(answer.out)
    assert plain["training"]["steps"] == 7
    assert plain["quantization"]["name"] == "nf4_dq"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["-m", "seed=0,1"], ["+sweep=smoke", "seed=0,1", "peft=lora"], ["--multirun", "seed=0,1"]]
)
def test_multirun(arguments, left_bench, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "left_bench.launch.job.run_cell", lambda cell, *a, **k: seen.append(cell.seed) or done(cell, *a)
    )
    monkeypatch.chdir(tmp_path)
    answer = left_bench(*arguments, "model=tiny_llama")
    assert answer.code == 0, answer
    assert seen == [0, 1]


def test_config_dir_adds_options_and_sweeps(left_bench, tmp_path, monkeypatch):
    (tmp_path / "mine" / "peft").mkdir(parents=True)
    (tmp_path / "mine" / "sweep").mkdir()
    lora = (config_root() / "conf" / "peft" / "lora.yaml").read_text()
    (tmp_path / "mine" / "peft" / "slim.yaml").write_text(
        lora.replace("name: lora", "name: slim").replace("r: 16", "r: 1")
    )
    (tmp_path / "mine" / "sweep" / "two.yaml").write_text(
        "# @package _global_\n# Mine.\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      peft: slim,lora\n"
    )
    monkeypatch.chdir(tmp_path)
    answer = left_bench("--config-dir", "mine", "peft=slim", "--cfg", "job")
    assert answer.code == 0, answer
    assert yaml.safe_load(answer.out)["peft"]["config"]["r"] == 1

    seen = []
    monkeypatch.setattr(
        "left_bench.launch.job.run_cell", lambda cell, *a, **k: seen.append(cell.peft.name) or done(cell, *a)
    )
    answer = left_bench("--config-dir=mine", "+sweep=two", "model=tiny_llama")
    assert answer.code == 0, answer
    assert seen == ["slim", "lora"]

    refused = left_bench("--config-dir", "mine", "peft=slmi")
    assert (refused.code, "did you mean 'slim'" in refused.err) == (2, True)


def test_interrupted(left_bench, monkeypatch):
    def interrupt(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("left_bench.cli.main._run", interrupt)
    answer = left_bench("seed=0")
    assert answer.code == 130
    assert "the same command goes on" in answer.err


def test_keys_outside_the_yaml_are_opened():
    assert open_section("peft.config.r=8") == "++peft.config.r=8"
    assert open_section("+sweep=smoke") == "+sweep=smoke"
    assert open_section("peft=lora") == "peft=lora"
    assert open_section("runs_dir=a.b") == "runs_dir=a.b"
    assert open_section("hydra.job.name=x") == "hydra.job.name=x"


def test_launch_name():
    assert launch_name(["+sweep=smoke", "seed=0,1"]) == "smoke"
    assert launch_name(["-m", "seed=0,1", "peft=lora"]) == launch_name(["peft=lora", "seed=0,1", "-m"])
    assert launch_name(["-m", "seed=0,1"]) != launch_name(["-m", "seed=0,2"])


@pytest.mark.parametrize(
    "argument",
    ["peft=lora", "peft='lora'", "peft=lora,ia3", "peft=choice(lora,ia3)", "peft=glob(*)", "~tracker", "--x=y"],
)
def test_choices_that_pass(argument):
    check_choices(["-m", argument])


def test_choices_name_a_folders_own_options(tmp_path):
    with pytest.raises(UserError, match="mine"):
        check_choices(["model=mine"])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("")
    check_choices(["-cd", str(tmp_path), "model=mine"])

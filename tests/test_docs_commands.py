"""Every command printed in the documentation composes, and every launcher's key in it is one the launcher takes."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from left_bench.grid import command_line
from left_bench.grid.compose import compose
from left_bench.grid.sweep import check_launcher, jobs_of

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLUGINS = {
    "joblib": "joblib_launcher",
    "submitit": "submitit_launcher",
    "ray": "ray_launcher",
    "optuna": "optuna_sweeper",
}


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of each `left-bench ...` that a page's shell blocks print."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                if words[0] == "left-bench":
                    yield words[1:end]
                words = words[end + 1 :]


RUNS = [
    pytest.param(arguments, id=f"{page.stem}: {shlex.join(arguments)[:60]}")
    for page in PAGES
    if page.stem != "extending"  # its commands are run, in tests/test_extending.py
    for arguments in commands(page)
    if command_line.is_override(arguments[0]) or arguments[0] == "-m"
]


def test_commands_are_found():
    assert len(RUNS) > 20
    assert sum("launcher" in argument for run in RUNS for argument in run.values[0]) > 10


@pytest.mark.parametrize("arguments", RUNS)
def test_a_printed_command_composes_to_cells(arguments, composed, tmp_path, monkeypatch):
    for word, plugin in PLUGINS.items():
        if any(argument.partition("=")[2].startswith(word) for argument in arguments):
            pytest.importorskip(f"hydra_plugins.hydra_{plugin}", reason="needs the launcher's extra")
    if any(argument.startswith("eval.tasks=") for argument in arguments):
        pytest.importorskip("lm_eval", reason="needs left-bench[lm-eval]")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    (tmp_path / "score.py").write_text("def score(prediction, reference, row):\n    return 1.0\n")
    command_line.check_choices(arguments)
    config = composed(*(item for item in arguments if item not in ("--cfg", "job")))
    swept = "-m" in arguments or any(item.startswith("+sweep=") for item in arguments)
    if swept:
        check_launcher(config)
    job = next(jobs_of(config))[1] if swept else config
    cell, _ = compose(job, job.hydra)
    assert cell.id


def conversations(path: Path) -> None:
    """A support desk's, in OpenAI's messages: four questions, each about several things, put in several ways."""
    things = ["my password", "my phone number", "my address", "my billing e-mail", "my user name", "my time zone"]
    asked = {
        "How do I change {}?": "Open Settings, choose Account, and edit {}.",
        "How do I reset {}?": "Open Settings, choose Account, and press Reset beside {}.",
        "Where do I see {}?": "Open Settings and choose Account: it lists {}.",
        "Can somebody else see {}?": "No. Nobody but you sees {}.",
    }
    system = {"role": "system", "content": "You are the support desk. Answer in one sentence."}
    lines = []
    for question, answer in asked.items():
        for thing in things:
            said = [("user", question.format(thing)), ("assistant", answer.format(thing.replace("my", "your")))]
            turns = [{"role": role, "content": text} for role, text in said]
            lines.append(json.dumps({"messages": [system, *turns]}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.slow
def test_the_five_commands_lead_from_conversations_to_a_model(tmp_path):
    """Those of docs/your_data.md, as they are printed, on the default model."""
    page = (ROOT / "docs" / "your_data.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- five commands -->\n```bash\n(.*?)```", page, flags=re.DOTALL)
    assert block is not None
    lines = block[1].splitlines()
    assert len(lines) == 5 and all(line.startswith("left-bench ") for line in lines)
    conversations(tmp_path / "chat.jsonl")
    said = []
    for line in lines:
        command = [sys.executable, "-m", *shlex.split(line.replace("left-bench", "left_bench", 1))]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        said.append(done.stdout)
    assert re.search(r"train 20,.* test 4", said[0]) and "conversations" in said[0]
    assert re.search(r"^cell:   smollm2_135m-none-(lora|ia3)-", said[1], flags=re.MULTILINE)
    assert re.search(r"train 24,.* test 0", said[2])
    base, adapted = re.fullmatch(r"base:    (.*?)\nadapted: (.*)\n", said[3], flags=re.DOTALL).groups()
    assert base != adapted and adapted
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "my_model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "my_model")
    turns = [{"role": "user", "content": "How do I reset my password?"}]
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**asked, max_new_tokens=24, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(written, skip_special_tokens=True).strip()


def launcher_keys() -> list[tuple[str, str]]:
    """`(launcher, override)` of every launcher's key that docs/cluster.md names; what has no value gets 1."""
    results = []
    for section in (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        launcher = {"Slurm": "submitit_slurm", "Ray": "ray"}.get(section.splitlines()[0])
        for override in re.findall(r"`'?(\+?hydra\.launcher\.[^`]*?)'?`", section):
            key, _, value = override.partition("=")
            guessed = launcher or ("ray" if ".ray." in key else "joblib" if "n_jobs" in key else "submitit_slurm")
            results.append((guessed, f"{key}={value if value and not value.startswith('<') else '1'}"))
    return results


def test_the_tables_of_launcher_keys_are_found():
    assert len(launcher_keys()) > 15


@pytest.mark.parametrize(("launcher", "override"), launcher_keys())
def test_a_launcher_takes_the_documented_key(launcher, override, left_bench, tmp_path, monkeypatch):
    plugin = PLUGINS[launcher.partition("_")[0]]
    pytest.importorskip(f"hydra_plugins.hydra_{plugin}", reason="needs the launcher's extra")
    monkeypatch.chdir(tmp_path)
    answer = left_bench("+sweep=smoke", "hardware=cpu", f"hydra/launcher={launcher}", override, "--cfg", "hydra")
    assert answer.code == 0, answer.err


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs left-bench[ray]")
def test_ray_takes_the_documented_keys():
    """Hydra's plugin hands both sections to Ray as they are, so composing them proves nothing."""
    import ray

    for page in PAGES:
        for part, name, value in re.findall(r"hydra\.launcher\.ray\.(init|remote)\.(\w+)=([\w.]*)", page.read_text()):
            if part == "init":
                assert name in inspect.signature(ray.init).parameters, name
            else:
                ray.remote(**{name: {"a": 1} if name == "resources" else int(value or 1)})(lambda: None)

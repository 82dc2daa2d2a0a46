"""Base-model files, without a network (the slow test fetches the default model's wheel)."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from left_bench.core.errors import UserError
from left_bench.pretrained import (
    check_model,
    check_vocabulary,
    fetch,
    load_tokenizer,
    model_folder,
    resolved_revision,
    source,
    unloadable,
)
from left_bench.spec.cell import Model

ROOT = Path(__file__).parents[1]
OPTIONS = sorted((ROOT / "conf" / "model").glob("*.yaml"))
PARAMETERS = {
    "smollm2_135m": 134_515_008,
    "pythia_70m": 70_426_624,
    "pythia_410m": 405_334_016,
    "opt_350m": 331_196_416,
    "tinyllama_1b": 1_100_048_384,
    "qwen2_5_0_5b": 494_032_768,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "llama2_7b": 6_738_415_616,
    "mistral_7b": 7_248_023_552,
    "flan_t5_small": 76_961_152,
    "flan_t5_base": 247_577_856,
    "vit_base": 85_798_656,
    "tiny_t5": 230_400,
    "tiny_vit": 71_360,
    "tiny_bert": 136_896,
    "minilm_l6": 22_713_216,
    "tiny_llama": 139_584,
    "tiny_neox": 165_632,
    "tiny_opt": 165_760,
}


def option(name: str, **changes: object) -> Model:
    plain = yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text())
    return Model.model_validate(plain | changes)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LEFT_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of tiny_llama's random weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEFT_BENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        return model_folder(option("tiny_llama"), dtype="float32")


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: path.stem)
def test_option_is_a_model_of_the_published_size(path):
    import torch
    import transformers

    from left_bench.pretrained.make import architecture
    from left_bench.spec.task import TASKS

    text = path.read_text()
    model = option(path.stem)
    check_model(model)
    assert model.name == path.stem
    with torch.device("meta"):
        auto_class = getattr(transformers, TASKS[model.task].auto_class)
        built = auto_class.from_config(architecture(model.config), dtype=torch.bfloat16)
    published = built.num_parameters()
    if path.stem.startswith("flan_"):  # its checkpoint has a head of its own
        published += built.lm_head.weight.numel()
    if TASKS[model.task].new_output:  # the output layer is the data's
        published -= sum(parameter.numel() for parameter in built.classifier.parameters())
    assert published == PARAMETERS[path.stem]
    first = text.splitlines()[0]
    assert first.startswith("# ") and f"{PARAMETERS[path.stem]:,} parameters" in first


def test_every_expected_option_is_there():
    assert {path.stem for path in OPTIONS} == set(PARAMETERS)


# --- what can be seen without torch ----------------------------------------------------------------------------------


def test_checks_import_neither_torch_nor_transformers():
    code = (
        "import sys; from left_bench.spec.cell import Model; from left_bench.pretrained import check_model; "
        "check_model(Model(name='x', name_or_path='a/b')); "
        "print([m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def fill(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "no config.json"),
        (["adapter_config.json", "adapter_model.safetensors"], "an adapter"),
        (["config.json", "tokenizer.json"], "no weights"),
        (["config.json", "adapter_model.safetensors", "tokenizer.json"], "no weights"),
        (["config.json", "pytorch_model.bin", "tokenizer.json"], "convert it to safetensors"),
        (["config.json", "model.safetensors"], "no tokenizer"),
    ],
)
def test_folder_that_is_no_model(tmp_path, names, words):
    folder = fill(tmp_path / "m", *names)
    with pytest.raises(UserError, match=words) as error:
        check_model(Model(name="m", name_or_path=str(folder)))
    assert str(folder) in str(error.value)


def test_folder_lacking_a_shard(tmp_path):
    folder = fill(tmp_path / "m", "config.json", "tokenizer.json", "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"lacks model-00002-of-00002\.safetensors"):
        check_model(Model(name="m", name_or_path=str(folder)))


def test_good_folder_is_given_as_an_absolute_path(tmp_path, monkeypatch):
    fill(tmp_path / "m", "config.json", "model.safetensors", "tokenizer.json")
    monkeypatch.chdir(tmp_path)
    for name in ("./m", "m", str(tmp_path / "m")):
        model = Model(name="m", name_or_path=name)
        assert source(model) == "folder"
        assert model_folder(model) == str(tmp_path / "m")
        assert resolved_revision(model) is None


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/no_such_model_here", "a/b/c"])
def test_path_that_does_not_exist(name):
    with pytest.raises(UserError, match="does not exist"):
        check_model(Model(name="m", name_or_path=name))


def test_hub_id_is_unchanged():
    model = option("pythia_70m")
    assert source(model) == "hub"
    assert model_folder(model) == "EleutherAI/pythia-70m"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": None}, "model_type"),
        ({"config": {"vocab_size": 512}}, "model_type"),
        ({"trust_remote_code": True}, "trust_remote_code"),
    ],
)
def test_random_weights_that_cannot_be(changes, words):
    with pytest.raises(UserError, match=words):
        check_model(option("tiny_llama", **changes))


# --- random weights --------------------------------------------------------------------------------------------------


def test_random_model_loads_and_is_not_degenerate(tiny):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert model.dtype == torch.float32
    assert model.num_parameters() == PARAMETERS["tiny_llama"]
    tokenizer = load_tokenizer(tiny, option("tiny_llama"))
    check_vocabulary(tokenizer, model.config.vocab_size)
    logits = model(**tokenizer("two different texts", return_tensors="pt")).logits
    assert torch.isfinite(logits).all() and logits.std() > 1e-3
    assert logits[0, 0].argmax() != logits[0, 1].argmax() or logits[0].std(dim=0).max() > 1e-3
    assert (model.config.pad_token_id, model.config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    written = json.loads((Path(tiny) / "generation_config.json").read_text())
    assert not {"temperature", "top_p", "top_k"} & set(written) and not written.get("do_sample")


@settings(max_examples=100)
@given(text=st.text() | st.sampled_from(["<eos>", "a<pad> b", "  two  spaces . ", "can 't", "\r\n\t"]))
def test_bytes_come_back_whole(text):
    tokenizer = bytes_tokenizer()
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert all(0 <= id < 258 for id in ids)


def bytes_tokenizer(made=[]):  # noqa: B006 (built once for all examples)
    from left_bench.pretrained.make import byte_tokenizer

    if not made:
        made.append(byte_tokenizer())
    return made[0]


def test_reloaded_byte_tokenizer_is_lossless_and_has_no_chat_template(tiny):
    tokenizer = load_tokenizer(tiny, option("tiny_llama"))
    text = "Ünïcode \u4f60 <eos> 12  34\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.chat_template is None
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<eos>")


def test_same_seed_same_weights(tiny, tmp_path):
    from left_bench.pretrained.make import save_random

    save_random(option("tiny_llama").config, tmp_path, dtype="float32")
    assert (tmp_path / "model.safetensors").read_bytes() == (Path(tiny) / "model.safetensors").read_bytes()
    assert len({path.stat().st_mode for path in Path(tiny).iterdir()}) == 1  # safetensors alone writes 0600


def test_other_dtype_or_sizes_other_folder(cache, monkeypatch):
    orders = []

    def make(order, folder):
        orders.append(order)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr("left_bench.pretrained.in_fresh_process", make)
    plain = option("tiny_llama")
    wider = plain.model_copy(update={"config": plain.config | {"intermediate_size": 256}})
    folders = [model_folder(plain), model_folder(plain, dtype="float32"), model_folder(wider), model_folder(plain)]
    assert len(set(folders)) == len(orders) == 3
    assert [order["dtype"] for order in orders] == ["bfloat16", "float32", "bfloat16"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 200}, "vocab_size=200"),
        ({"hiden_size": 64}, "hiden_size.*did you mean 'hidden_size'"),
        ({"model_type": "lama"}, "model_type=lama"),
        ({"num_attention_heads": "four"}, "cannot be used"),
        ({"model_type": "bert_like_nothing"}, "no such architecture"),
    ],
)
def test_config_that_cannot_be_built(changes, words, tmp_path):
    from left_bench.pretrained.make import save_random

    with pytest.raises(UserError, match=words):
        save_random(option("tiny_llama").config | changes, tmp_path, dtype="float32")


def test_error_of_the_fresh_process_reaches_the_user(cache):
    plain = option("tiny_llama")
    with pytest.raises(UserError, match="vocab_size=200"):
        model_folder(plain.model_copy(update={"config": plain.config | {"vocab_size": 200}}))
    assert leftovers(cache) == []


# --- made once -------------------------------------------------------------------------------------------------------

MAKE = (
    "import yaml, sys; from left_bench.spec.cell import Model; from left_bench.pretrained import model_folder; "
    "print(model_folder(Model.model_validate(yaml.safe_load(open('conf/model/tiny_neox.yaml')))))"
)


def leftovers(models: Path) -> list[str]:
    return [path.name for path in models.iterdir() if path.name.endswith(".tmp")]


def test_two_processes_at_once_make_one_folder(cache):
    started = [
        subprocess.Popen([sys.executable, "-c", MAKE], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    folders = {process.communicate(timeout=120)[0].strip() for process in started}
    assert [process.returncode for process in started] == [0, 0]
    assert len(folders) == 1
    assert [str(path) for path in cache.iterdir() if path.is_dir()] == list(folders)


@pytest.mark.skipif(sys.platform == "win32", reason="no fcntl")
def test_a_waiting_process_takes_over_from_a_killed_one(cache):
    from left_bench.pretrained.cache import made_once

    code = (
        "import time; from left_bench.pretrained.cache import made_once; "
        "made_once('x-1', lambda folder: ((folder / 'half').write_text('half'), time.sleep(60)))"
    )
    first = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 30
    while not list(cache.glob(".x-1.*.tmp/model/half")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert leftovers(cache)
    made = made_once("x-1", lambda folder: (folder / "config.json").write_text("whole") and None)
    assert [path.name for path in made.iterdir()] == ["config.json"]
    assert leftovers(cache) == []


def test_without_locks_the_first_rename_wins(cache, monkeypatch):
    from left_bench.pretrained.cache import made_once

    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows

    def build(folder):
        (folder / "config.json").write_text("late")
        (cache / "x-1").mkdir()
        (cache / "x-1" / "config.json").write_text("early")

    assert (made_once("x-1", build) / "config.json").read_text() == "early"
    assert leftovers(cache) == []


def test_a_failed_build_leaves_nothing(cache):
    from left_bench.pretrained.cache import made_once

    with pytest.raises(ZeroDivisionError):
        made_once("x-1", lambda folder: 1 / 0)
    assert leftovers(cache) == [] and not (cache / "x-1").exists()


def test_cache_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LEFT_BENCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="LEFT_BENCH_CACHE"):
        model_folder(option("tiny_llama"))


# --- the wheel -------------------------------------------------------------------------------------------------------


def make_wheel(index: Path, files: dict[str, bytes]) -> Path:
    index.mkdir(exist_ok=True)
    wheel = index / "fake_model-1.0-py3-none-any.whl"
    info = "fake_model-1.0.dist-info"
    files = files | {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\nRequires-Dist: no-such-thing\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return wheel


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of one folder, in place of the network; the wheel's dependency does not exist."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return make_wheel(tmp_path / "index", {"fake_model/m.gguf": b"not a model"})


def fake(wheel: Path | None = None, **changes: str) -> Model:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest() if wheel else "0" * 64
    section = {"requirement": "fake-model==1.0", "sha256": digest, "member": "fake_model/m.gguf"} | changes
    return Model(name="fake", name_or_path="pypi:fake-model", wheel=section)


def test_wheel_with_another_hash_is_refused(index, cache):
    with pytest.raises(UserError, match=r"SHA-256.*model\.name_or_path="):
        model_folder(fake())
    assert leftovers(cache) == []


def test_pip_that_fails_says_why(index, cache):
    with pytest.raises(UserError, match=r"No matching distribution found for fake-model==2\.0.*model\.name_or_path="):
        model_folder(fake(requirement="fake-model==2.0"))
    assert leftovers(cache) == []


def test_missing_member_is_named(index, cache):
    with pytest.raises(UserError, match="no such file"):
        model_folder(fake(index, member="fake_model/other.gguf"))


def test_member_is_taken_and_its_name_decides_no_path(index, tmp_path, cache, monkeypatch):
    taken = []

    def convert(order, folder):
        taken.append(Path(order["gguf"]).read_bytes())
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr("left_bench.pretrained.wheel.in_fresh_process", convert)
    first = model_folder(fake(index))
    assert taken == [b"not a model"]
    assert model_folder(fake(index)) == first and len(taken) == 1  # found, not made again
    assert Path(first).parent == cache and Path(first).name.startswith("m-")


@pytest.mark.parametrize("member", ["../m.gguf", "/m.gguf", "a/../../m.gguf", "a\\..\\m.gguf", "m.pkl", "m.gguf/"])
def test_hostile_member_is_refused(member, cache):
    with pytest.raises(UserError, match="member"):
        model_folder(fake(member=member))
    assert not cache.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"requirement": "fake-model"},
        {"requirement": "--index-url=http://x"},
        {"requirement": "fake-model==1.0 other"},
        {"requirement": "other==1.0"},
        {"sha256": "abc"},
        {"surplus": "x"},
    ],
)
def test_wheel_section_that_pins_nothing_is_refused(changes):
    with pytest.raises(UserError, match=r"model\.wheel"):
        check_model(fake(**changes))


def test_pypi_model_without_its_wheel_section():
    with pytest.raises(UserError, match=r"model\.wheel=None"):
        check_model(Model(name="fake", name_or_path="pypi:fake-model"))


def test_environment_without_pip(monkeypatch):
    from left_bench.core import wheels

    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(wheels.shutil, "which", lambda name: f"/bin/{name}" if name == "uv" else None)
    assert wheels.pip_command("x==1", instead="or not") == ["/bin/uv", "tool", "run", "pip"]
    monkeypatch.setattr(wheels.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="ensurepip"):
        wheels.pip_command("x==1", instead="or not")


# --- tokenizers ------------------------------------------------------------------------------------------------------


def test_tokenizer_without_padding_pads_with_its_end(tmp_path):
    from transformers import PreTrainedTokenizerFast

    backend = bytes_tokenizer().backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(tmp_path / "a")
    model = Model(name="m", name_or_path=str(tmp_path / "a"))
    assert load_tokenizer(str(tmp_path / "a"), model).pad_token == "<eos>"
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "b")
    with pytest.raises(UserError, match="end-of-text"):
        load_tokenizer(str(tmp_path / "b"), Model(name="m", name_or_path=str(tmp_path / "b")))


def test_vocabulary_larger_than_the_embedding():
    check_vocabulary(bytes_tokenizer(), 258)
    with pytest.raises(UserError, match=r"257.*257 rows"):
        check_vocabulary(bytes_tokenizer(), 257)


def test_errors_of_loading_name_the_mend():
    model = option("llama3_2_1b")
    assert "hf auth login" in str(unloadable(model, OSError("You are trying to access a gated repo.\nmore")))
    assert "model.trust_remote_code=true" in str(unloadable(model, ValueError("set `trust_remote_code=True`")))
    assert "connection" in str(unloadable(model, OSError("\nWe couldn't connect\nto the hub")))


def test_hub_out_of_reach(tmp_path):
    code = (
        "from left_bench.spec.cell import Model; from left_bench.core.errors import UserError\n"
        "from left_bench.pretrained import load_tokenizer, resolved_revision\n"
        "model = Model(name='m', name_or_path='someone/something')\n"
        "try: load_tokenizer('someone/something', model)\n"
        "except UserError as error: print(error)\n"
        "print(resolved_revision(model))"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=env)
    assert "someone/something cannot be loaded" in out.stdout and out.stdout.strip().endswith("None")


def test_resolved_revision_is_read_from_the_hub_cache(tmp_path, monkeypatch):
    commit = "a" * 40
    refs = tmp_path / "models--someone--something" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert resolved_revision(Model(name="m", name_or_path="someone/something")) == commit


def test_a_hub_model_is_fetched_apart_from_loading(monkeypatch):
    from left_bench import pretrained

    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **how: asked.append((name, how)))
    model = Model(name="m", name_or_path="someone/apart", revision="v1")
    fetch(model)
    fetch(model)
    [(name, how)] = asked  # once for a launch
    assert (name, how["revision"]) == ("someone/apart", "v1")
    wanted = ["model-00001-of-00002.safetensors", "config.json", "tokenizer.model"]
    others = ["pytorch_model.bin", "consolidated.safetensors", "onnx/config.json", "modeling.py", "weights.gguf"]
    from huggingface_hub.utils import filter_repo_objects

    kept = filter_repo_objects(
        wanted + others, allow_patterns=how["allow_patterns"], ignore_patterns=how["ignore_patterns"]
    )
    assert list(kept) == wanted
    pretrained._fetch_snapshot.cache_clear()


def test_a_hub_model_that_cannot_be_had_is_said_before_anything_runs(tmp_path):
    code = (
        "from left_bench.spec.cell import Model; from left_bench.core.errors import UserError\n"
        "from left_bench.pretrained import fetch, local_files\n"
        "model = Model(name='m', name_or_path='someone/something')\n"
        "try: fetch(model)\n"
        "except UserError as error: print(error)\n"
        "print(local_files(model, 'someone/something'))"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=env)
    assert "model.name_or_path=someone/something cannot be loaded" in out.stdout
    assert out.stdout.strip().endswith("None")


# --- the default model, with a network -------------------------------------------------------------------------------


@pytest.mark.slow
def test_default_model_answers(tmp_path, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM

    if not os.environ.get("LEFT_BENCH_CACHE"):
        monkeypatch.setenv("LEFT_BENCH_CACHE", str(tmp_path))
    section = option("smollm2_135m")
    folder = model_folder(section)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = load_tokenizer(folder, section)
    check_vocabulary(tokenizer, model.config.vocab_size)
    assert model.dtype == torch.bfloat16 and model.num_parameters() == PARAMETERS["smollm2_135m"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not hasattr(model.config, "quantization_config") and model.config.architectures == ["LlamaForCausalLM"]
    for key, value in section.config.items():
        result = getattr(model.config, key)
        assert result == (pytest.approx(value) if isinstance(value, float) else value), key
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]  # digits are cut before white space
    written = json.loads((Path(folder) / "generation_config.json").read_text())
    assert not {"temperature", "top_p", "top_k"} & set(written) and not written.get("do_sample")
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == "The capital of France is Paris."

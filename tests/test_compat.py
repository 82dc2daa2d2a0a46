"""What `left_bench.compat` does to other packages: each entry is still needed, and still fits.

A failing test here is news of another package: where it says that something is not needed any more, the entry goes.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from transformers import LlamaConfig, LlamaForCausalLM

import left_bench
from left_bench.compat import bitsandbytes as compat_bitsandbytes
from left_bench.compat import peft as compat_peft
from left_bench.compat import torch as compat_torch
from left_bench.compat import transformers as compat_transformers
from left_bench.core.errors import NotInForce
from left_bench.fivebit import Linear5bit

PACKAGE = Path(left_bench.__file__).parent


@pytest.fixture
def llama():
    """`llama(dtype)`: one layer of random weights."""

    def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).to(dtype)

    return llama


@pytest.fixture
def adalora(llama):
    """`adalora(dtype)`: AdaLoRA over that model, as peft makes it."""

    def adalora(dtype: torch.dtype = torch.float32) -> PeftModel:
        steps = {"total_step": 8, "tinit": 1, "tfinal": 2, "deltaT": 1}
        config = AdaLoraConfig(init_r=4, target_r=2, target_modules="all-linear", task_type="CAUSAL_LM", **steps)
        return get_peft_model(llama(dtype), config)

    return adalora


def take_steps(model: PeftModel, *steps: int) -> None:
    """Steps of AdaLoRA's allocator, after a gradient for each."""
    ids = torch.arange(16)[None]
    for step in steps:
        model(input_ids=ids, labels=ids).loss.backward()
        model.base_model.update_and_allocate(step)


# --- the room ---


def foreign_private_names(source: str, own: set[str]) -> set[str]:
    """Names with an underscore that a module uses of others' packages."""
    results = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("left_bench"):
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            if node.module != "__future__":
                results |= {f"{node.module}.{part}" for part in parts if part.startswith("_")}
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            of = node.value.id if isinstance(node.value, ast.Name) else ""
            if of not in ("self", "cls") and node.attr not in own:
                results.add(f"{of}.{node.attr}")
    return results


OPEN_TO_ALL = {"_replace", "_asdict", "_exit"}  # public names of the standard library
ELSEWHERE = {
    "hydra.": "Hydra's doors are the business of `grid` and `cli`",
    "._option_string_actions": "of Hydra's parser",
    "_aten.": "torch's operators are called so, and a mode that watches them meets them by these names",
    "._target_": "the key by which Hydra names a class",
    "._model_call": "lm-eval's abstract method, which its models define",
    "._model_generate": "lm-eval's abstract method, which its models define",
}


def test_no_room_but_compat_reaches_behind_another_packages_doors():
    sources = {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    own = set(OPEN_TO_ALL)
    for source in sources.values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own |= {node.attr} if ast.unparse(node.value) == "self" else set()
    results = {
        f"{path.relative_to(PACKAGE).as_posix()}: {name}"
        for path, source in sources.items()
        if path.parent.name != "compat"
        for name in foreign_private_names(source, own)
        if not name.startswith(tuple(ELSEWHERE))
    }
    assert not results


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("compat/[a-z]*.py")), ids=lambda path: path.stem)
def test_every_entry_says_why_it_is_there_and_has_a_test(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    told = ast.get_docstring(tree) or ""
    assert "seen with" in told.splitlines()[0]
    tests = Path(__file__).read_text(encoding="utf-8")
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert f"`{node.name}`" in told, f"the docstring does not say why {node.name} is there"
            assert f".{node.name}" in tests, f"{node.name} has no test"


# --- transformers ---


def test_transformers_still_has_no_public_reading_of_the_attention_kernel(llama):
    model = llama()
    assert not hasattr(model, "get_attn_implementation"), "take it in the place of attention_kernel"
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert compat_transformers.attention_kernel(model) == name


def test_the_repeated_blocks_are_the_layers(llama):
    model = llama()
    assert compat_transformers.repeated_blocks(model) == list(model.model.layers)
    assert compat_transformers.repeated_blocks(torch.nn.Linear(1, 1)) == []


def test_what_is_kept_in_float32_is_in_the_form_that_quantizers_take(llama):
    from transformers.quantizers import HfQuantizer

    model = llama()
    kept = compat_transformers.kept_in_float32(model)
    assert "lm_head" in HfQuantizer.get_modules_to_not_convert(model, None, kept)


def test_transformers_still_refuses_its_own_hqq_configuration():
    from transformers.quantizers.quantizer_hqq import HqqHfQuantizer

    with pytest.raises(NotImplementedError, match="not available yet"):
        # what loading calls for every weight: were it there, left_bench.hqq would not be needed
        HqqHfQuantizer.get_quantize_ops(_Stub())


class _Stub:
    class quantization_config:
        quant_method = "hqq"


def test_hqqs_layer_is_still_no_linear_layer_and_ours_is_one():
    pytest.importorskip("hqq")
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    from left_bench.hqq import layer_class

    assert not issubclass(HQQLinear, torch.nn.Linear), "left_bench.hqq.layer_class is not needed any more"
    settings = {"quant_config": BaseQuantizeConfig(nbits=4, group_size=16), "compute_dtype": torch.float32}
    layers = []
    for kind in (HQQLinear, layer_class()):
        torch.manual_seed(0)
        layers.append(kind(torch.nn.Linear(32, 16), device="cpu", **settings))
    theirs, ours = layers
    assert not hasattr(theirs, "weight")
    assert isinstance(ours, torch.nn.Linear) and ours.weight is ours.W_q
    x = torch.randn(3, 32)
    assert torch.equal(ours(x), theirs(x))


# --- peft ---


@pytest.mark.parametrize("name", ["kasa", "monteclora"])
def test_peft_still_leaves_a_methods_loss_to_the_loop_by_a_private_name(name, llama):
    import peft

    own = {"kasa": "KasaConfig", "monteclora": "MontecloraConfig"}[name]
    settings = {f"{name}_config": getattr(peft, own)()}
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], **settings))
    model.train()
    ids = torch.arange(8)[None]
    model(input_ids=ids)  # MonteCLoRA's is of the latest pass
    tuner = model.base_model
    assert not hasattr(tuner, f"get_{name}_loss"), "take it in the place of method_loss"
    assert torch.equal(compat_peft.method_loss(tuner), getattr(tuner, f"_get_{name}_loss")())
    assert compat_peft.method_loss(get_peft_model(llama(), LoraConfig(r=2)).base_model) is None


def test_peft_still_lets_adaloras_ranks_be_trained_over_half_precision(adalora):
    model = adalora(torch.bfloat16)
    ranks = [item for layer in model.modules() for item in getattr(layer, "ranknum", {}).values()]
    assert len(ranks) == 7
    assert all(rank.requires_grad for rank in ranks), "freeze_ranks is not needed any more"
    compat_peft.freeze_ranks(model)
    assert not any(rank.requires_grad for rank in ranks)


def test_peft_still_rounds_an_adalora_adapter_when_it_loads_it(adalora, llama, tmp_path):
    model = adalora(torch.bfloat16)
    compat_peft.freeze_ranks(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    take_steps(model, 2, 3)
    model.save_pretrained(tmp_path)
    expected = {name: item for name, item in model.named_parameters() if "lora_B" in name}

    def of(loaded: PeftModel) -> dict[str, torch.Tensor]:
        return {name: item for name, item in loaded.named_parameters() if name in expected}

    from safetensors.torch import load_file

    saved = load_file(tmp_path / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(llama(torch.bfloat16), tmp_path)
    alike = [torch.equal(item.float(), saved[name.replace(".default", "")]) for name, item in of(loaded).items()]
    assert not all(alike), "load_unrounded is not needed any more"
    compat_peft.load_unrounded(loaded, tmp_path)
    for name, item in of(loaded).items():
        assert torch.equal(item, saved[name.replace(".default", "")])


def test_adaloras_allocator_still_has_no_state_and_goes_on_with_ours(adalora):
    whole, resumed = adalora(), adalora()
    assert not hasattr(whole.base_model.rankallocator, "state_dict"), "take it in the place of allocator_state"
    for model in (whole, resumed):
        compat_peft.freeze_ranks(model)
    take_steps(whole, 2, 3)
    state = compat_peft.allocator_state(whole)
    assert state is not None and state["ipt"] and state["rank_pattern"]
    resumed.load_state_dict(whole.state_dict())
    for one, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        one.grad = None if other.grad is None else other.grad.clone()
    compat_peft.restore_allocator(resumed, state)
    take_steps(whole, 4)
    take_steps(resumed, 4)
    patterns = [model.base_model.rankallocator.peft_config.rank_pattern for model in (whole, resumed)]
    assert patterns[0] == patterns[1] != state["rank_pattern"]
    assert compat_peft.allocator_state(torch.nn.Linear(1, 1)) is None
    compat_peft.restore_allocator(resumed, None)


def test_corda_still_takes_its_start_from_an_attribute(llama):
    from peft.tuners.lora.config import CordaConfig

    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="corda", corda_config=CordaConfig())
    with pytest.raises(ValueError, match="`eigens` attribute not found"):
        get_peft_model(llama(), config)
    model = llama()
    layer = model.model.layers[0].self_attn.q_proj
    u, s, vh = torch.linalg.svd(layer.weight.detach())
    compat_peft.put_corda_start(layer, {"U_WC": u[:, :2], "S_WC": s[:2], "V_WC": vh[:2].T})
    adapted = get_peft_model(model, config).base_model.model.model.layers[0].self_attn.q_proj
    product = adapted.lora_B["default"].weight @ adapted.lora_A["default"].weight
    torch.testing.assert_close(product, (u[:, :2] * s[:2]) @ vh[:2], atol=1e-5, rtol=1e-4)


def test_peft_still_asks_no_layer_it_does_not_know_for_its_dense_weight():
    dense = torch.randn(16, 32)
    layer = Linear5bit(32, 16, bias=False).quantize_(dense)
    assert isinstance(layer, compat_peft.AskedToDequantize)
    assert torch.equal(dequantize_module_weight(layer), layer.dequantize())

    class Unknown(torch.nn.Linear):
        def dequantize(self) -> torch.Tensor:
            return dense

    unknown = Unknown(32, 16, bias=False)
    unknown.weight = torch.nn.Parameter(layer.weight, requires_grad=False)
    assert dequantize_module_weight(unknown).dtype == torch.uint8, "AskedToDequantize is not needed any more"


def test_peft_still_drops_variants_without_a_word(llama, tiny_cell, load_tiny):
    from peft import KasaConfig

    config = LoraConfig(r=2, target_modules=["q_proj"], kasa_config=KasaConfig())
    model = get_peft_model(load_tiny(tiny_cell("quantization=nf4"))[0], config)
    results = list(compat_peft.dropped_variants(model))
    assert [(name.rpartition(".")[2], variant) for name, _, variant in results] == [("q_proj", "kasa_config")] * 2
    assert {type(layer).__name__ for _, layer, _ in results} == {"Linear4bit"}
    assert not list(compat_peft.dropped_variants(get_peft_model(llama(), config)))


@pytest.mark.parametrize(("modules", "is_so"), [(["no_such_layer"], True), (["input_layernorm"], False)])
def test_a_name_that_no_layer_has_is_told_from_other_refusals_by_pefts_words(modules, is_so, llama):
    with pytest.raises(ValueError) as refusal:
        get_peft_model(llama(), LoraConfig(r=2, target_modules=modules))
    assert compat_peft.names_no_layer(refusal.value) == is_so


# --- torch ---


def test_torch_still_has_no_public_fake_tensors():
    assert importlib.util.find_spec("torch.subclasses") is None, "import them from there"
    with compat_torch.FakeTensorMode():
        assert isinstance(torch.empty(2), compat_torch.FakeTensor)


def test_a_storages_key_is_its_own_where_it_has_no_address():
    with torch.device("meta"):
        one, other = torch.empty(2), torch.empty(2)
    assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() == 0
    keys = [compat_torch.storage_key(tensor.untyped_storage()) for tensor in (one, one.view(2, 1), other)]
    assert keys[0] == keys[1] != keys[2]


def test_torch_still_refuses_the_parts_of_a_sparse_tensor_that_is_not_coalesced():
    entries = torch.tensor([[0, 0, 2]])
    tensor = torch.sparse_coo_tensor(entries, torch.ones(3), (4,))
    with pytest.raises(RuntimeError, match="uncoalesced"):
        tensor.indices()
    assert [part.tolist() for part in compat_torch.sparse_parts(tensor)] == [entries.tolist(), [1.0, 1.0, 1.0]]
    like = compat_torch.sparse_like(tensor, dtype=torch.bfloat16)
    assert (like.shape, like.dtype, like._nnz()) == ((4,), torch.bfloat16, 3)


def test_a_dispatch_mode_is_still_not_told_of_a_storage_that_is_resized():
    told: list[str] = []

    class Listening(compat_torch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            told.append(str(func))
            return func(*args, **(kwargs or {}))

    storage = torch.zeros(4).untyped_storage()
    sizes: list[int] = []
    with Listening(), compat_torch.watch_resizing(lambda resized: sizes.append(resized.nbytes())):
        storage.resize_(64)
        storage.resize_(0)
    assert (told, sizes) == ([], [64, 0])
    storage.resize_(8)
    assert sizes == [64, 0]


def test_one_process_still_stands_for_many_by_a_private_name_alone():
    from torch import distributed

    assert not hasattr(distributed, "FakeStore")
    with compat_torch.one_of_many(3):
        assert (distributed.get_rank(), distributed.get_world_size()) == (0, 3)
        distributed.all_reduce(torch.ones(2))  # waits for nobody
    assert not distributed.is_initialized()


def test_torch_still_tells_of_compilations_in_private_alone_and_has_no_undo():
    told = [name for name in dir(torch.compiler) if "callback" in name or name.startswith("on_compile")]
    assert not told, "take these in the place of watch_compiling"
    assert not {"uncompile", "decompile"} & set(dir(torch.nn.Module)), "take it in the place of uncompile"
    begun: list[object] = []
    ended: list[object] = []
    compat_torch.watch_compiling(begun.append, ended.append)

    class Doubled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    layer = Doubled()
    layer.compile(backend="eager")
    x = torch.ones(1, 2)
    compiled = layer(x)
    assert len(begun) == len(ended) == 1
    with compat_torch.run_eagerly([layer]):
        assert torch.equal(layer(torch.ones(5, 2))[:1], compiled)
        assert len(begun) == 1
    assert torch.equal(layer(x), compiled) and layer._compiled_call_impl is not None
    compat_torch.uncompile(layer)
    assert torch.equal(layer(torch.ones(3, 2))[:1], compiled)
    assert len(begun) == 1  # another shape, and nothing was compiled for it


def test_ddp_is_still_told_in_private_what_to_pass_by():
    """torch has no argument for it; that ranks train so is in tests/test_ranks.py."""
    import inspect

    taken = inspect.signature(torch.nn.parallel.DistributedDataParallel.__init__).parameters
    assert not [name for name in taken if "ignore" in name], "take it in the place of leave_out_of_ddp"
    module = torch.nn.Linear(2, 2)
    compat_torch.leave_out_of_ddp(module, iter(["weight"]))
    assert module._ddp_params_and_buffers_to_ignore == ["weight"]


def test_torch_still_casts_every_buffer_and_ours_keeps_its_dtype():
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(2, dtype=torch.float16))
            self.register_buffer("other", torch.ones(2, dtype=torch.float16))

    class Ours(compat_torch.MovedNotCast, Plain):
        constant_names = ("scale",)
        moved = 0

        def after_moving(self) -> None:
            self.moved += 1

    assert Plain().to(torch.float32).scale.dtype == torch.float32, "MovedNotCast is not needed any more"
    for cast in (lambda module: module.to(torch.float32), lambda module: module.float()):
        ours = cast(Ours())
        assert (ours.scale.dtype, ours.other.dtype, ours.moved) == (torch.float16, torch.float32, 1)
    assert Ours().to("meta").scale.device.type == "meta"
    mode = compat_torch.TorchDispatchMode
    assert issubclass(mode, object) and hasattr(mode, "__torch_dispatch__")


# --- bitsandbytes ---


def test_bitsandbytes_still_repacks_a_layer_when_it_is_evaluated(monkeypatch):
    """As on a CPU with AVX512-BF16, whatever this one has."""
    import bitsandbytes

    repacked = []

    def repack(weight, state):
        repacked.append(weight)
        raise ZeroDivisionError  # the arithmetic itself wants the CPU

    monkeypatch.setattr(bitsandbytes.nn.modules, "_convert_weight_packed_for_cpu", repack)
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False)
    layer.to("cpu").eval()
    setattr(layer, compat_bitsandbytes.REPACKS, True)
    x = torch.ones(1, 64)
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        layer(x)
    assert repacked, "keep_trainable is not needed any more"
    compat_bitsandbytes.keep_trainable(torch.nn.Sequential(layer))
    with torch.no_grad():
        layer(x)
    assert len(repacked) == 1


def test_a_bitsandbytes_without_the_switch_for_repacking_is_refused():
    import bitsandbytes

    model = torch.nn.Sequential(bitsandbytes.nn.Linear4bit(4, 4))
    with pytest.raises(NotInForce, match=r"bitsandbytes \S+: its 4-bit layers no longer have no_such_switch"):
        compat_bitsandbytes.keep_trainable(model, switch="no_such_switch")
    compat_bitsandbytes.keep_trainable(torch.nn.Linear(4, 4), switch="no_such_switch")  # has no such layers


def test_a_4_bit_weight_still_loses_its_class_when_it_is_divided():
    import bitsandbytes

    model = torch.nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64), torch.nn.Linear(4, 4))
    model.to("cpu")
    weight = model[0].weight
    assert type(weight.data[:1]) is not bitsandbytes.nn.Params4bit, "not_to_shard is not needed any more"
    assert compat_bitsandbytes.not_to_shard(model) == {weight}


# --- liger-kernel, lm-eval, trackio, wandb-workspaces ---


def test_liger_still_changes_one_model_by_a_private_name(llama):
    liger = pytest.importorskip("liger_kernel.transformers")
    from left_bench.compat import liger_kernel

    assert not hasattr(liger, "apply_liger_kernel_to_instance"), "take it in the place of replace_layers"
    model = llama()
    liger_kernel.replace_layers(model, cross_entropy=False, fused_linear_cross_entropy=False)
    norm = model.model.norm
    assert (type(norm).__name__, liger_kernel.name_of(norm)) == ("LlamaRMSNorm", "LigerRMSNorm")


def test_lm_eval_still_ties_the_weights_of_a_model_that_it_is_given(llama, tiny_cell, load_tiny):
    models = pytest.importorskip("lm_eval.models.huggingface")
    from left_bench.compat import lm_eval

    model, tokenizer = load_tiny(tiny_cell())
    tied = []
    model.tie_weights = lambda *_, **__: tied.append(True)
    models.HFLM(pretrained=model, backend="causal", tokenizer=tokenizer)
    assert tied, "weights_left_tied is not needed any more"
    del model.tie_weights
    before = model.tie_weights
    with lm_eval.weights_left_tied(model):
        assert model.tie_weights is not before
    assert model.tie_weights == before


def test_trackio_still_makes_what_its_store_keeps_in_private(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    from left_bench.compat import trackio as compat_trackio

    where = {"project": "p", "run": "r"}
    for kind in (trackio.Table, trackio.Markdown, trackio.Image):
        assert not hasattr(kind, "to_dict"), "take it in the place of as_logged"
    table = compat_trackio.as_logged(trackio.Table(columns=["a"], data=[[1]]), **where)
    assert table["_value"] == [{"a": 1}]
    text = compat_trackio.as_logged(trackio.Markdown("# words"), **where)
    assert "# words" in text.values()


def test_wandb_workspaces_still_tells_in_private_what_it_would_save():
    workspaces = pytest.importorskip("wandb_workspaces.workspaces")
    from left_bench.compat import wandb_workspaces

    built = workspaces.Workspace(entity="e", project="p", name="n")
    assert not hasattr(built, "to_dict") and not hasattr(built, "model_dump"), "take it in the place of as_saved"
    assert wandb_workspaces.as_saved(built)["displayName"] == "n"

"""Bottleneck adapters, BitFit and layer freezing on tiny models of every family, and the whole way through a cell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, BitsAndBytesConfig, PreTrainedModel

from left_bench.core.errors import UserError
from left_bench.methods import Attached, BitFitConfig, BottleneckConfig, LayerFreezeConfig, Method
from left_bench.methods.attach import added_parameters, attach_adapter, load_trained, save_trained, trainable_parameters
from left_bench.spec.cell import Peft

ROOT = Path(__file__).parents[1]
WIDTH, INNER, LAYERS, VOCABULARY = 64, 128, 2, 96
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GATED: dict[str, Any] = {"intermediate_size": INNER, "num_key_value_heads": 2, "tie_word_embeddings": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GATED,
    "mistral": GATED,
    "qwen2": GATED,
    "qwen3": {**GATED, "head_dim": 16},
    "gpt_neox": {"intermediate_size": INNER, "tie_word_embeddings": False},
    "opt": {"ffn_dim": INNER, "word_embed_proj_dim": WIDTH, "dropout": 0.0},
    "bert": {"intermediate_size": INNER, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
BOTTLENECK = WIDTH // 16
ADAPTER = WIDTH * BOTTLENECK + BOTTLENECK + BOTTLENECK * WIDTH + WIDTH  # down with bias, up with bias
# Biases of a layer, then of the model, counted on the architecture's own papers and drawings
BIASES = {
    "qwen2": LAYERS * (WIDTH + 2 * WIDTH // 2),  # queries, and two key-value heads of four
    "gpt_neox": LAYERS * (3 * WIDTH + WIDTH + INNER + WIDTH + 2 * WIDTH) + WIDTH,  # final normalization
    "opt": LAYERS * (4 * WIDTH + INNER + WIDTH + 2 * WIDTH) + WIDTH,
    # embedding normalization; in the head: transform, its normalization, one bias for each word
    "bert": LAYERS * (4 * WIDTH + INNER + WIDTH + 2 * WIDTH) + WIDTH + 2 * WIDTH + VOCABULARY,
}
LAYER = {
    # q, o; k, v; gate, up, down; two normalizations
    "llama": 2 * WIDTH**2 + WIDTH**2 + 3 * WIDTH * INNER + 2 * WIDTH,
    "gpt_neox": 4 * WIDTH**2 + 4 * WIDTH + 2 * WIDTH * INNER + INNER + WIDTH + 4 * WIDTH,
    "opt": 4 * WIDTH**2 + 4 * WIDTH + 2 * WIDTH * INNER + INNER + WIDTH + 4 * WIDTH,
    "bert": 4 * WIDTH**2 + 4 * WIDTH + 2 * WIDTH * INNER + INNER + WIDTH + 4 * WIDTH,
}
HOULSBY, PFEIFFER = BottleneckConfig(placement="houlsby"), BottleneckConfig(placement="pfeiffer")
METHODS = [HOULSBY, PFEIFFER, BitFitConfig(), LayerFreezeConfig(last_layers=1)]
PAIRS = [
    (family, method)
    for family in FAMILIES
    for method in METHODS
    if not (isinstance(method, BitFitConfig) and family not in BIASES)
]


def build(family: str, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **COMMON, **FAMILIES[family])
    auto: Any = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    return auto.from_config(config).to(dtype).eval()


def tokens() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, 10), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**tokens()).logits


def learn(model: torch.nn.Module, *, steps: int = 5, learning_rate: float = 1e-2) -> list[float]:
    """Losses of a few steps on one batch."""
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=learning_rate)
    model.train()
    losses = []
    for _ in range(steps):
        scores = model(**tokens()).logits.float()
        loss = torch.nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), tokens()["input_ids"][:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def trained_numbers(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in trainable_parameters(model))


def name_of(value: Any) -> str:
    return getattr(value, "placement", type(value).__name__) if isinstance(value, Method) else str(value)


@pytest.mark.parametrize("family", FAMILIES)
def test_bottleneck_parameters(family: str) -> None:
    assert trained_numbers(HOULSBY.attach(build(family))) == LAYERS * 2 * ADAPTER
    assert trained_numbers(PFEIFFER.attach(build(family))) == LAYERS * ADAPTER


@pytest.mark.parametrize("family", BIASES)
def test_bitfit_parameters(family: str) -> None:
    model = build(family)
    assert trained_numbers(BitFitConfig().attach(model)) == BIASES[family]
    assert all(parameter.ndim == 1 for parameter in trainable_parameters(model))


@pytest.mark.parametrize("family", LAYER)
def test_layer_freeze_parameters(family: str) -> None:
    assert trained_numbers(LayerFreezeConfig(last_layers=1).attach(build(family))) == LAYER[family]
    model = LayerFreezeConfig(last_layers=1).attach(build(family))
    assert {name.split("layer")[1].split(".")[1] for name, p in model.named_parameters() if p.requires_grad} == {"1"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", [HOULSBY, PFEIFFER], ids=name_of)
@pytest.mark.parametrize("family", FAMILIES)
def test_bottleneck_starts_as_the_identity(family: str, method: Method, dtype: torch.dtype) -> None:
    model = build(family, dtype=dtype)
    before = logits(model)
    attached = method.attach(model)
    after = logits(attached)
    assert torch.equal(after, before) and after.dtype == dtype
    assert {parameter.dtype for parameter in trainable_parameters(attached)} == {torch.float32}


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_added_weights_take_the_adapter_dtype_and_trained_ones_keep_theirs(adapter_dtype: torch.dtype) -> None:
    added = HOULSBY.attach(build("opt", dtype=torch.bfloat16), adapter_dtype=adapter_dtype)
    assert {parameter.dtype for parameter in trainable_parameters(added)} == {adapter_dtype}
    own = BitFitConfig().attach(build("opt", dtype=torch.bfloat16), adapter_dtype=adapter_dtype)
    assert {parameter.dtype for parameter in trainable_parameters(own)} == {torch.bfloat16}
    for attached in (added, own):
        losses = learn(attached)
        assert losses[-1] < losses[0] - 0.01


@pytest.mark.parametrize(("family", "method"), PAIRS, ids=name_of)
def test_learns_saves_and_reloads(family: str, method: Method, tmp_path: Path) -> None:
    attached = method.attach(build(family))
    frozen = {name: p.detach().clone() for name, p in attached.named_parameters() if not p.requires_grad}
    trained = {name for name, p in attached.named_parameters() if p.requires_grad}
    if isinstance(method, BottleneckConfig):
        assert all(".down." in name or ".up." in name for name in trained)
    losses = learn(attached)
    assert losses[-1] < losses[0] - 0.01
    parameters = dict(attached.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())
    assert all(parameters[name].grad is None for name in frozen)

    size = save_trained(attached, tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["adapter_model.safetensors"]
    assert size == (tmp_path / "adapter_model.safetensors").stat().st_size
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(value.numel() for value in saved.values()) == trained_numbers(attached)

    base = build(family)
    assert not torch.equal(logits(base), logits(attached))
    again = load_trained(base, tmp_path)
    assert isinstance(again, Attached) and again.method == method
    assert torch.equal(logits(again), logits(attached))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bert"])
def test_generation_uses_the_adapter_and_the_cache(family: str) -> None:
    attached = HOULSBY.attach(build(family))
    learn(attached, steps=10)
    decode: Any = attached.generate
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = decode(**tokens(), use_cache=True, **settings)
    assert torch.equal(cached, decode(**tokens(), use_cache=False, **settings))
    plain: Any = build(family).generate
    assert not torch.equal(cached, plain(**tokens(), **settings))


@pytest.mark.parametrize("non_linearity", ["gelu", "relu", "silu", "swish", "tanh"])
def test_non_linearities(non_linearity: Any) -> None:
    attached = BottleneckConfig(non_linearity=non_linearity, reduction_factor=8).attach(build("llama"))
    assert trained_numbers(attached) == LAYERS * (2 * WIDTH * 8 + 8 + WIDTH)
    losses = learn(attached)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_activation_checkpointing_gives_the_same_gradients(family: str) -> None:
    plain, saving = HOULSBY.attach(build(family)), build(family)
    saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = HOULSBY.attach(saving)
    checkpointed.load_state_dict(plain.state_dict())
    assert learn(plain) == pytest.approx(learn(checkpointed), rel=1e-5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    results = {}
    for family in ("llama", "gpt_neox", "opt"):
        results[family] = tmp_path_factory.mktemp(family)
        build(family, dtype=torch.bfloat16).save_pretrained(results[family])
    return results


def quantized(folder: Path, bits: str) -> PreTrainedModel:
    config: Any = (
        BitsAndBytesConfig(load_in_8bit=True)
        if bits == "int8"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)


@pytest.mark.parametrize("bits", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt"])
def test_bottleneck_over_bitsandbytes(folders: dict[str, Path], family: str, bits: str, tmp_path: Path) -> None:
    attached = HOULSBY.attach(quantized(folders[family], bits))
    assert trained_numbers(attached) == LAYERS * 2 * ADAPTER
    losses = learn(attached)
    assert losses[-1] < losses[0] - 0.01
    assert all(p.is_floating_point() and ("down" in n or "up" in n) for n, p in attached.named_parameters()
               if p.requires_grad)  # fmt: skip
    save_trained(attached, tmp_path)
    again = load_trained(quantized(folders[family], bits), tmp_path)
    assert torch.equal(logits(again), logits(attached))


@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_layer_freeze_refuses_quantized_weights(folders: dict[str, Path], bits: str) -> None:
    with pytest.raises(UserError, match=r"'self_attn.q_proj.weight' is quantized.*quantization=none"):
        LayerFreezeConfig(last_layers=1).attach(quantized(folders["llama"], bits))


def test_reload_of_full_fine_tuning_and_of_peft(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    full = build("llama").train()
    learn(full)
    save_trained(full, tmp_path / "full")
    assert torch.equal(logits(load_trained(build("llama"), tmp_path / "full")), logits(full))

    adapted = get_peft_model(build("llama"), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    learn(adapted)
    save_trained(adapted, tmp_path / "lora")
    assert torch.equal(logits(load_trained(build("llama"), tmp_path / "lora").eval()), logits(adapted))

    with pytest.raises(UserError, match=r"no weights for"):
        load_trained(build("llama"), tmp_path)
    with pytest.raises(UserError, match=r"this base model has no"):
        load_trained(build("gpt_neox"), tmp_path / "full")


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    save_trained(PFEIFFER.attach(build("llama")), tmp_path)
    with pytest.raises(UserError, match=r"does not fit this base model"):
        load_trained(build("gpt_neox"), tmp_path)


def test_merging() -> None:
    partial = BitFitConfig().attach(build("opt"))
    learn(partial)
    trained = logits(partial)
    merged = partial.merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    assert torch.equal(logits(merged), trained)
    with pytest.raises(UserError, match=r"cannot be merged"):
        HOULSBY.attach(build("opt")).merge_and_unload()


def gpt2() -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=1, n_embd=16, n_head=2, vocab_size=32))


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (lambda: HOULSBY.attach(gpt2()), r"model type 'gpt2'.*llama.*gpt_neox.*opt.*bert"),
        (lambda: BitFitConfig().attach(build("llama")), r"bias terms.*'llama' has none"),
        (lambda: LayerFreezeConfig(last_layers=3).attach(build("llama")), r"last_layers=3.*2 layers"),
        (lambda: LayerFreezeConfig(last_layers=0), r"last_layers=0"),
        (lambda: BottleneckConfig(placement="houlsbi"), r"placement='houlsbi'.*did you mean 'houlsby'"),  # type: ignore[arg-type]
        (lambda: BottleneckConfig(non_linearity="geru"), r"non_linearity='geru'.*did you mean"),  # type: ignore[arg-type]
        (lambda: BottleneckConfig(reduction_factor=0), r"reduction_factor=0"),
    ],
)
def test_user_errors(refused: Callable[[], object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        refused()


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "peft").glob("*.yaml")), ids=lambda path: path.stem)
def test_options_are_valid(path: Path) -> None:
    option = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert option.get("name", path.stem) == path.stem
    if "defaults" not in option:
        Peft.model_validate(option)


@pytest.mark.parametrize(
    ("model", "peft", "trainable"),
    [
        ("tiny_llama", "pfeiffer", 2 * ADAPTER),
        # 256 inner units; the head has no bias
        ("tiny_neox", "bitfit", 2 * (3 * 64 + 64 + 256 + 64 + 2 * 64) + 64),
    ],
)
def test_whole_cell(model: str, peft: str, trainable: int, tiny_cell, work_in_process) -> None:
    result = work_in_process(tiny_cell(f"model={model}", f"peft={peft}", "eval.check_reload=false"))
    assert result["metrics"]["trainable_params"] == trainable
    [weights] = result["run_dir"].rglob("*.safetensors")
    assert result["metrics"]["adapter_file_bytes"] == weights.stat().st_size


def test_of_an_encoder_with_a_decoder_the_decoders_last_layers_are_trained(tiny_cell, load_tiny):
    cell = tiny_cell("model=tiny_t5", "peft=layer_freeze", "peft.config.last_layers=1")
    model, tokenizer = load_tiny(cell)
    attached = attach_adapter(model, cell, tokenizer=tokenizer, rows=[])
    trained = {name for name, parameter in attached.named_parameters() if parameter.requires_grad}
    assert trained and all(".decoder.block." in name for name in trained)


@pytest.mark.parametrize("overrides", [["peft=layer_freeze"], ["model=tiny_opt", "peft=bitfit"]])
def test_weights_trained_in_place_are_counted_once(overrides, tiny_cell, work_in_process):
    parts = work_in_process(tiny_cell(*overrides, "eval=loss"))["memory_breakdown"]
    assert parts["adapter"] == 0 < parts["weights"]


def test_biases_that_peft_trains_in_place_are_none_of_the_adapters(tiny_cell, load_tiny):
    cell = tiny_cell("model=tiny_opt", "peft=lora", "peft.config.bias=all")
    model, tokenizer = load_tiny(cell)
    base = [name for name, _ in model.named_parameters()]
    attached = attach_adapter(model, cell, tokenizer=tokenizer, rows=[])
    added = {id(parameter) for parameter in added_parameters(attached, base=base)}
    trained = {name for name, item in attached.named_parameters() if item.requires_grad}
    assert {name for name, item in attached.named_parameters() if id(item) in added} == {
        name for name in trained if "lora_" in name
    }
    assert any(name.endswith("bias") for name in trained)

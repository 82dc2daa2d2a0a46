"""5-bit storage: codebook, packing, the layer, transformers and peft over it, and a whole cell."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from left_bench.core.errors import UserError
from left_bench.fivebit import FiveBitConfig, Linear5bit
from left_bench.fivebit.codebook import levels, normal_float
from left_bench.fivebit.packing import pack, unpack
from left_bench.measure.meter import logical_numel, stored_bytes
from left_bench.model.load import base_metrics, quantized_weights
from left_bench.model.quantization_error import quantization_error

SCHEMES = {
    "nf5": {"scheme": "nf5"},
    "nf5_dq": {"scheme": "nf5", "double_quant": True},
    "int5": {"scheme": "int5"},
}
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def weight_like(out_features: int, in_features: int, *, seed: int = 0) -> torch.Tensor:
    """Gaussian with a few large entries, which is what trained linear layers look like."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(out_features, in_features, generator=generator)
    outliers = torch.rand(weight.shape, generator=generator) < 0.001
    return torch.where(outliers, 8 * weight, weight)


def layer_of(scheme: str, weight: torch.Tensor, **options: object) -> Linear5bit:
    layer = Linear5bit(weight.shape[1], weight.shape[0], False, **SCHEMES[scheme], **options)  # type: ignore[arg-type]
    return layer.quantize_(weight)


def error(decoded: torch.Tensor, weight: torch.Tensor) -> float:
    return float((decoded.float() - weight.float()).norm() / weight.float().norm())


def nf4_error(weight: torch.Tensor) -> float:
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return error(bnb.dequantize_4bit(packed, state), weight)


def int8_error(weight: torch.Tensor) -> float:
    codes, scale, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
    return error(bnb.int8_vectorwise_dequant(codes, scale), weight)


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load(folder: Path, scheme: str = "nf5", **arguments: object) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=FiveBitConfig(**SCHEMES[scheme]), dtype=torch.float32, **arguments
    )


# codebook and packing


def test_normal_float_at_four_bits_is_bitsandbytes_nf4() -> None:
    torch.testing.assert_close(normal_float(4), bnb.get_4bit_type("nf4", device="cpu"), rtol=0, atol=1e-6)


def test_normal_float_at_five_bits() -> None:
    result = normal_float(5)
    assert len(result) == 32
    assert torch.equal(result, result.sort().values) and len(result.unique()) == 32
    assert result[0] == -1 and result[-1] == 1
    assert result[15] == 0, "15 levels below zero, 16 above"


@given(st.lists(st.integers(0, 31), min_size=1, max_size=200), st.sampled_from([1, 2]))
def test_pack_round_trip(values: list[int], together: int) -> None:
    codes = torch.tensor(values * 128, dtype=torch.uint8)[: 128 * len(values)]
    packed = pack(codes, together=together)
    assert packed.numel() * 8 == codes.numel() * 5
    assert torch.equal(unpack(packed, together=together), codes)


@settings(max_examples=40)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    scheme=st.sampled_from(list(SCHEMES)),
    block_size=st.sampled_from([16, 64, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_shape_decodes_to_near_levels(
    rows: int, columns: int, scheme: str, block_size: int, dtype: torch.dtype
) -> None:
    weight = weight_like(rows, columns).to(dtype)
    layer = layer_of(scheme, weight, block_size=block_size)
    decoded = layer.dequantize()
    assert decoded.shape == weight.shape
    flat = weight.float().reshape(-1)
    whole = torch.nn.functional.pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)
    spread = (whole.amax(1).clamp(min=0) - whole.amin(1).clamp(max=0)).repeat_interleave(block_size)[: len(flat)]
    # half the widest step of nf5 is 0.113 of the largest magnitude; int5's is 1/62 of the range
    assert ((decoded.reshape(-1) - flat).abs() <= 0.13 * spread + 1e-8).all()


def test_pieces_decode_like_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of("nf5_dq", weight_like(96, 200))
    whole = layer.dequantize()
    monkeypatch.setattr("left_bench.fivebit.blocks._PIECE", 2048)
    assert torch.equal(layer.dequantize(), whole)
    assert torch.equal(layer_of("nf5_dq", weight_like(96, 200)).weight, layer.weight)


def test_more_threads_decode_the_same() -> None:
    layer = layer_of("int5", weight_like(64, 128))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        item = layer.dequantize()
        torch.set_num_threads(2)
        assert torch.equal(layer.dequantize(), item)
    finally:
        torch.set_num_threads(before)


def test_codes_are_the_nearest_levels() -> None:
    weight = weight_like(8, 64)
    layer = layer_of("nf5", weight)
    scale = layer.scale.float()[:8, None]
    nearest = (weight / scale - levels("nf5", weight.device)[:, None, None]).abs().argmin(0)
    assert torch.equal(unpack(layer.weight.view(5, -1), together=2)[: weight.numel()].view(8, 64).long(), nearest)


@each_scheme
def test_zero_stays_zero(scheme: str) -> None:
    weight = weight_like(64, 64)
    weight[3:7] = 0
    weight[20, :10] = 0
    decoded = layer_of(scheme, weight).dequantize()
    assert (decoded[3:7] == 0).all() and (decoded[20, :10] == 0).all()
    assert torch.isfinite(decoded).all()


# error and storage


@each_scheme
def test_error_lies_between_nf4_and_int8(scheme: str) -> None:
    weight = weight_like(256, 512)
    result = error(layer_of(scheme, weight).dequantize(), weight)
    assert int8_error(weight) < result < nf4_error(weight)


@each_scheme
def test_bits_per_parameter_are_counted_from_storage(dense_folder: Path, scheme: str) -> None:
    model = load(dense_folder, scheme)
    dense = AutoModelForCausalLM.from_pretrained(dense_folder)
    metrics = base_metrics(model)
    assert metrics["quantized_modules"] == 14
    assert metrics["total_params"] == sum(parameter.numel() for parameter in dense.parameters())
    expected = {"nf5": 5.25, "nf5_dq": 5.127, "int5": 5.375}[scheme]
    assert metrics["quantized_bits_per_param"] == pytest.approx(expected, abs=0.03)  # small layers share less
    big = layer_of(scheme, weight_like(1024, 2048))
    assert 8 * stored_bytes([big.weight]) / logical_numel(big.weight) == pytest.approx(expected, abs=0.002)
    assert stored_bytes([big.weight]) == stored_bytes([*big.parameters(), *big.buffers()])


@pytest.mark.slow
@each_scheme
def test_error_on_the_real_default_model(scheme: str) -> None:
    from left_bench.core.paths import config_root
    from left_bench.pretrained import model_folder
    from left_bench.spec.cell import Model

    yaml = pytest.importorskip("yaml")
    section = yaml.safe_load((config_root() / "conf/model/smollm2_135m.yaml").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(model_folder(Model.model_validate(section)), dtype=torch.bfloat16)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.14.mlp.down_proj", "model.layers.29.mlp.gate_proj"):
        weight = model.get_submodule(name).weight.detach()
        result = error(layer_of(scheme, weight).dequantize(), weight)
        assert int8_error(weight) < result < nf4_error(weight), name


# the layer


@each_scheme
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_the_dense_layer_in_float64(scheme: str, bias: bool) -> None:
    weight = weight_like(40, 24)
    layer = Linear5bit(24, 40, bias, **SCHEMES[scheme], compute_dtype=torch.float64).quantize_(weight)
    dense = torch.nn.Linear(24, 40, bias, dtype=torch.float64)
    dense.weight.data = layer.dequantize()
    if bias:
        layer.bias = torch.nn.Parameter(dense.bias.detach().clone())
    inputs = [torch.randn(3, 5, 24, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    inputs[1].data = inputs[0].data.clone()
    outputs = [module(x) for module, x in zip((layer, dense), inputs, strict=True)]
    torch.testing.assert_close(*outputs, rtol=1e-14, atol=1e-15)
    upstream = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(upstream)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-13, atol=1e-14)
    assert layer.weight.grad is None
    if bias:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad, rtol=1e-13, atol=1e-14)
    probe = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (probe,))


def test_backward_keeps_nothing_dense() -> None:
    layer = layer_of("nf5", weight_like(64, 64))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(2, 64, requires_grad=True))
    assert not [tensor for tensor in kept if tensor.is_floating_point()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_input_dtypes_autocast_and_inference_mode(dtype: torch.dtype) -> None:
    layer = layer_of("nf5", weight_like(32, 64), compute_dtype=torch.bfloat16)
    x = torch.randn(2, 64, dtype=dtype)
    assert layer(x).dtype == dtype, "as bitsandbytes: the input's dtype comes back"
    with torch.inference_mode():
        assert torch.equal(layer(x), layer(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_gradient_checkpointing_gives_equal_gradients() -> None:
    layer = layer_of("nf5", weight_like(64, 64))
    x = torch.randn(4, 64)
    results = []
    for reentrant in (None, False, True):
        leaf = x.clone().requires_grad_(True)
        out = layer(leaf) if reentrant is None else checkpoint(layer, leaf, use_reentrant=reentrant)
        out.square().sum().backward()
        results.append(leaf.grad)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@each_scheme
def test_survives_casts_copies_and_state_dicts(scheme: str) -> None:
    layer = layer_of(scheme, weight_like(64, 96))
    expected, stored = layer.dequantize(), stored_bytes([layer.weight])
    for dtype in (torch.float16, torch.float64, torch.bfloat16):
        layer.to(dtype)
        assert torch.equal(layer.dequantize(torch.float32), expected)
        assert stored_bytes([layer.weight]) == stored, "what is stored does not grow with the computation's dtype"
    twin = copy.deepcopy(layer)
    assert torch.equal(twin.weight.left_dequantize(), expected)
    assert stored_bytes([twin.weight]) == stored and logical_numel(twin.weight) == 64 * 96
    assert stored_bytes([twin.weight, layer.weight]) == 2 * stored
    empty = Linear5bit(96, 64, False, **SCHEMES[scheme])
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty.dequantize(), expected) and torch.equal(twin.dequantize(torch.float32), expected)


def test_impossible_settings_are_refused() -> None:
    for options, key in (
        ({"scheme": "nf6"}, "scheme"),
        ({"block_size": 40}, "block_size"),
        ({"scheme": "int5", "double_quant": True}, "double_quant"),
        ({"compute_dtype": "int8"}, "compute_dtype"),
    ):
        with pytest.raises(UserError, match=rf"quantization\.config\.{key}"):
            FiveBitConfig(**options)


# transformers and peft


@each_scheme
def test_loading_quantizes_every_linear_layer_but_the_head(dense_folder: Path, scheme: str) -> None:
    model = load(dense_folder, scheme)
    dense = AutoModelForCausalLM.from_pretrained(dense_folder)
    assert len(quantized_weights(model)) == 14 and type(model.lm_head) is torch.nn.Linear
    for name in quantized_weights(model):
        weight = dense.get_submodule(name).weight.detach()
        assert torch.equal(model.get_submodule(name).dequantize(), layer_of(scheme, weight).dequantize())
    mapped = load(dense_folder, scheme, device_map={"": "cpu"})
    for key, value in model.state_dict().items():
        assert torch.equal(value, mapped.state_dict()[key]), key


@each_scheme
def test_saved_model_reloads_bit_equal(dense_folder: Path, tmp_path: Path, scheme: str) -> None:
    model = load(dense_folder, scheme)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert stored["quant_method"] == "left_fivebit"
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert base_metrics(again)["quantized_bits_per_param"] == base_metrics(model)["quantized_bits_per_param"]
    for name, layer in model.named_modules():
        if isinstance(layer, Linear5bit):
            twin = again.get_submodule(name)
            for key, value in layer.state_dict().items():
                assert value.dtype == twin.state_dict()[key].dtype and torch.equal(value, twin.state_dict()[key]), key


@each_scheme
def test_quantization_error_is_measured_against_the_checkpoint(dense_folder: Path, scheme: str) -> None:
    result = quantization_error(load(dense_folder, scheme), Path(dense_folder))
    assert result is not None and 0.02 < result < 0.07


def test_dequantized_model_computes_the_same(dense_folder: Path) -> None:
    model = load(dense_folder)
    ids = torch.arange(10)[None]
    expected = model(ids).logits
    dense = model.dequantize()
    assert not quantized_weights(dense)
    torch.testing.assert_close(dense(ids).logits, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_gradients_are_those_over_the_dequantized_model(dense_folder: Path, checkpointing: bool) -> None:
    models = [load(dense_folder), load(dense_folder).dequantize()]
    ids = torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(0))
    gradients = []
    for model in models:
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        adapted = get_peft_model(model, config).train()
        adapted(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in adapted.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 28 and all(grad.abs().sum() > 0 for grad in gradients[0].values())
    for name, grad in gradients[0].items():
        torch.testing.assert_close(grad, gradients[1][name], rtol=1e-4, atol=1e-7, msg=name)


def test_dora_computes_what_it_does_over_the_dequantized_model(dense_folder: Path) -> None:
    models = [load(dense_folder), load(dense_folder).dequantize()]
    ids = torch.arange(12)[None]
    outputs = []
    for model in models:
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_dora=True)
        outputs.append(get_peft_model(model, config).eval()(ids).logits)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_lora_over_five_bits_learns(dense_folder: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(load(dense_folder), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = torch.randint(0, 128, (4, 16), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-2)
    losses = []
    for _ in range(25):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("safe", [False, True])
def test_merging_raises_and_changes_nothing(dense_folder: Path, safe: bool) -> None:
    base = load(dense_folder)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    with pytest.raises(RuntimeError):
        model.merge_adapter(safe_merge=safe)
    after = {key.replace("base_layer.", ""): value for key, value in base.state_dict().items()}
    for key, value in before.items():
        assert torch.equal(after[key], value), key


def test_a_merge_that_peft_lets_through_is_noticed_at_the_next_use(dense_folder: Path) -> None:
    """IA3 multiplies whatever `weight.data` is and stores the broadcast product."""
    model = get_peft_model(load(dense_folder), IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]))
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="overwritten"):
        model(torch.arange(4)[None])


@pytest.mark.parametrize("shape", [(5, 64), (1, 320), (320, 1), (64, 64)])
def test_packed_storage_cannot_take_a_dense_update(shape: tuple[int, int]) -> None:
    """(5, 64) pads to 512 codes, 5 x 64 bytes: in two dimensions a dense update of uint8 would fit."""
    layer = layer_of("nf5", weight_like(*shape))
    with pytest.raises(RuntimeError):
        layer.weight.data += torch.ones(shape, dtype=torch.uint8)


@pytest.mark.parametrize("name", ["nf5", "nf5_dq", "int5"])
def test_a_whole_cell(tmp_path: Path, name: str) -> None:
    import subprocess
    import sys

    result = subprocess.run(
        [
            sys.executable, "-m", "left_bench", "model=tiny_llama", f"quantization={name}", "peft=lora",
            "training.steps=2", "tracker=none", "data.train_rows=8", "data.test_rows=4", "eval.generate=false",
            f"runs_dir={tmp_path / 'runs'}",
        ],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr + result.stdout
    (path,) = (tmp_path / "runs").glob("*/record.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["status"] == "ok", record.get("reason")
    assert record["metrics"]["quantized_modules"] == 14
    compute = getattr(torch, record["config"]["precision"]["compute_dtype"])
    decoder = Linear5bit(64, 64, **SCHEMES[name], compute_dtype=compute).decoded_by
    assert record["environment"]["effective"]["five_bit_decoder"] == decoder
    assert 5.1 < record["metrics"]["quantized_bits_per_param"] <= 5.5

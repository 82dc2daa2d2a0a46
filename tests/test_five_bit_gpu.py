"""Decoding 5-bit weights by Triton: the bits of the CPU. In Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

import left_bench.fivebit
from left_bench.fivebit import Linear5bit, blocks, native

SCHEMES = {"nf5": {}, "nf5_dq": {"double_quant": True}, "int5": {"scheme": "int5"}}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
INTERPRETED = """
import torch
from left_bench.fivebit import Linear5bit, blocks, on_gpu

for options in ({}, {"double_quant": True}, {"scheme": "int5"}):
    for block_size, shape in ((64, (70, 640)), (16, (33, 30)), (48, (97, 80))):
        torch.manual_seed(block_size)
        layer = Linear5bit(shape[1], shape[0], False, block_size=block_size, **options)
        layer.quantize_(torch.randn(shape) * torch.rand(shape[0], 1).pow(20))
        scheme = layer.scheme
        for dtype in (torch.float16, torch.float32):  # the interpreter cuts bfloat16 off where a GPU rounds
            wanted = blocks._by_torch(
                layer.weight, layer.constants, scheme=scheme, block_size=block_size, dtype=dtype
            )
            out = torch.full_like(wanted, 7)
            second = layer.constants.get("nested_scale", layer.constants.get("zero_point"))
            mean = layer.constants.get("nested_mean")
            on_gpu.decode(layer.weight.data, layer.scale, second, mean, out, scheme=scheme, block_size=block_size)
            assert torch.equal(out.view(torch.uint8), wanted.view(torch.uint8)), (options, block_size, dtype)
print("same bits")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_interpreted_kernel_gives_the_same_bits():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "same bits", done.stderr


@cuda
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cuda_layer_is_quantized_and_decoded_to_the_cpus_bits(scheme, dtype):
    torch.manual_seed(0)
    weight = torch.randn(1200, 1040) * torch.rand(1200, 1).pow(20)  # many scales: their mean depends on the order
    here, there = (
        Linear5bit(1040, 1200, False, compute_dtype=dtype, device=device, **SCHEMES[scheme])
        for device in ("cpu", "cuda")
    )
    here.quantize_(weight)
    there.quantize_(weight.cuda())
    assert there.decoded_by == native.TRITON
    assert torch.equal(there.weight.cpu(), here.weight)
    assert all(torch.equal(there.constants[name].cpu(), here.constants[name]) for name in here.constants)
    assert torch.equal(there.dequantize().cpu().view(torch.uint8), here.dequantize().view(torch.uint8))


@cuda
def test_cuda_products_are_the_cpus():
    torch.manual_seed(0)
    here, there = (Linear5bit(512, 256, True, device=device) for device in ("cpu", "cuda"))
    here.quantize_(torch.randn(256, 512))
    there.load_state_dict(here.state_dict())
    one = torch.randn(3, 512, requires_grad=True)
    other = one.detach().cuda().requires_grad_()
    result, wanted = there(other), here(one)
    torch.testing.assert_close(result.cpu(), wanted, rtol=1e-4, atol=1e-4)
    result.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(other.grad.cpu(), one.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [
        ((9, 0), torch.bfloat16, native.TRITON),
        ((7, 5), torch.bfloat16, native.TORCH),
        ((7, 5), torch.float16, native.TRITON),
        ((6, 1), torch.float16, native.TORCH),
    ],
)
def test_older_cards_are_decoded_by_torch(capability, dtype, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda _name: object())
    monkeypatch.setattr(native, "_launches", lambda *_: True)
    native._triton_decodes.cache_clear()
    assert native.decoder(block_size=64, dtype=dtype, device=torch.device("cuda", 0)) == expected
    native._triton_decodes.cache_clear()


def test_where_triton_cannot_launch_torch_decodes(monkeypatch):
    def decode(*_, **__):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nand more")

    monkeypatch.setitem(sys.modules, "left_bench.fivebit.on_gpu", SimpleNamespace(decode=decode))
    monkeypatch.setattr(left_bench.fivebit, "on_gpu", sys.modules["left_bench.fivebit.on_gpu"], raising=False)
    with pytest.warns(
        UserWarning, match=r"torch decodes 5-bit weights, more slowly: Failed to find C compiler\. .*variable\.$"
    ):
        assert not native._launches(torch.device("cpu"), torch.bfloat16)


# torch.compile


@pytest.fixture
def gpu_for_the_compiler(monkeypatch):
    """The operation that a GPU decodes by, done on the CPU: a compiler sees what it would see of a GPU's."""

    def decode(packed, scale, second, mean, after, *, scheme, block_size, dtype):
        constants = {"scale": scale}
        if mean is not None:
            constants |= {"nested_scale": second, "nested_mean": mean}
        elif second is not None:
            constants["zero_point"] = second
        return blocks._by_torch(packed, constants, scheme=scheme, block_size=block_size, dtype=dtype)

    library = torch.library.Library("left_bench", "IMPL")
    library.impl("decode_five_bits", decode, "CPU")
    monkeypatch.setattr(native, "by_triton", lambda **_: True)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    library._destroy()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_gpus_layers_are_compiled_whole_and_keep_nothing_dense(gpu_for_the_compiler, scheme):
    torch.manual_seed(0)
    options = {"compute_dtype": torch.bfloat16, **SCHEMES[scheme]}
    layers = [Linear5bit(64, 128, True, **options), torch.nn.GELU(), Linear5bit(128, 64, False, **options)]
    for layer in layers[::2]:
        layer.quantize_(torch.randn(layer.out_features, layer.in_features)).requires_grad_(False)
    network = torch.nn.Sequential(*layers)
    graphs = {"forward": [], "backward": []}

    def seen(name):
        def compiler(graph, _inputs):
            graphs[name].append(graph.graph)
            return make_boxed_func(graph.forward)

        return compiler

    backend = aot_autograd(
        fw_compiler=seen("forward"), bw_compiler=seen("backward"), partition_fn=min_cut_rematerialization_partition
    )
    results = []
    for call in (network, torch.compile(network, backend=backend, fullgraph=True, dynamic=True)):
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
        out = call(x)
        out.float().square().sum().backward()
        results.append((out, x.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    for kind, (graph,) in graphs.items():  # ValueError: more than one
        assert sum("decode_five_bits" in str(node.target) for node in graph.nodes) == 2, kind
    (kept,) = [node.args[0] for node in graphs["forward"][0].nodes if node.op == "output"]
    tensors = [node.meta["val"] for node in kept if isinstance(node.meta.get("val"), torch.Tensor)]
    assert not [each for each in tensors if each.is_floating_point() and each.numel() >= 64 * 128]
    assert [each for each in tensors if each.dtype == torch.uint8], "the packed weights are what is kept"


def test_a_gpus_layer_alone_is_compiled_whole(gpu_for_the_compiler):
    layer = Linear5bit(64, 32, False).quantize_(torch.eye(64)[:32])
    x = torch.randn(3, 64, requires_grad=True)
    out = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)(x)
    out.sum().backward()
    assert torch.equal(out, x[:, :32]) and torch.equal(x.grad, torch.eye(64)[:32].sum(0).expand(3, -1))


@cuda
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_compiled_cuda_layer_computes_the_same(scheme):
    torch.manual_seed(0)
    layer = Linear5bit(256, 128, False, compute_dtype=torch.bfloat16, device="cuda", **SCHEMES[scheme])
    layer.quantize_(torch.randn(128, 256, device="cuda"))
    results = []
    for call in (layer, torch.compile(layer, fullgraph=True, dynamic=True)):
        x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).to("cuda", torch.bfloat16).requires_grad_()
        out = call(x)
        out.float().square().sum().backward()
        results.append((out, x.grad))
    torch.testing.assert_close(results[0], results[1])

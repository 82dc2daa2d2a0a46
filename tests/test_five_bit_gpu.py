"""Decoding 5-bit weights by Triton: the bits of the CPU. In Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from left_bench.fivebit import Linear5bit, native

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
            on_gpu.decode(
                layer.weight.data, layer.constants, out, scheme=scheme, block_size=block_size,
                nested_block=blocks.NESTED_BLOCK,
            )
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
    weight = torch.randn(300, 520) * torch.rand(300, 1).pow(20)
    here, there = (
        Linear5bit(520, 300, False, compute_dtype=dtype, device=device, **SCHEMES[scheme]) for device in ("cpu", "cuda")
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
    found, wanted = there(other), here(one)
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=1e-4)
    found.sum().backward()
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
    native._has_triton.cache_clear()
    assert native.decoder(block_size=64, dtype=dtype, device=torch.device("cuda", 0)) == expected
    native._has_triton.cache_clear()

"""The one-pass decoder of 5-bit weights: the same bits as torch's operations, whatever is stored."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from left_bench.fivebit import FiveBitConfig, Linear5bit, blocks, native

llvm = pytest.importorskip("llvmlite.binding")

SCHEMES = {
    "nf5": {"scheme": "nf5", "double_quant": False},
    "nf5_dq": {"scheme": "nf5", "double_quant": True},
    "int5": {"scheme": "int5", "double_quant": False},
}
FEATURES = llvm.get_host_cpu_features()
WAYS = ["plain", *(way for way, needs in (("avx2", "avx2"), ("avx512", "avx512f")) if FEATURES.get(needs))]
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@contextmanager
def settled(**replaced: object) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in replaced.items():
            patch.setattr(native, name, value)
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def anything(
    numel: int, *, scheme: str, double_quant: bool, block_size: int, seed: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Random bits for codes and constants: every code, and scales that are tiny, huge, infinite and no numbers."""
    generator = torch.Generator().manual_seed(seed)
    stored = blocks.padded_numel(numel, block_size) * 5 // 8
    packed = torch.randint(0, 256, (stored,), dtype=torch.uint8, generator=generator)
    constants = {}
    shapes = blocks.constant_shapes(numel, scheme=scheme, block_size=block_size, double_quant=double_quant)
    for name, (length, dtype) in shapes.items():
        high = 32 if name == "zero_point" else 256
        raw = torch.randint(0, high, (length * dtype.itemsize,), dtype=torch.uint8, generator=generator)
        constants[name] = raw.view(dtype)
    return packed, constants


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether all numbers are the same bits, and what is none in one is none in the other."""
    ints = {2: torch.int16, 4: torch.int32}[one.dtype.itemsize]
    strange = one.isnan()
    equal = torch.where(strange, 0, one.view(ints)) == torch.where(other.isnan(), 0, other.view(ints))
    return one.dtype == other.dtype and torch.equal(strange, other.isnan()) and bool(equal.all())


@settings(max_examples=120)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    scheme=st.sampled_from(list(SCHEMES)),
    block_size=st.sampled_from([32, 64, 96]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    way=st.sampled_from(WAYS),
    seed=st.integers(0, 2**32),
)
@example(rows=1, columns=1, scheme="nf5", block_size=64, dtype=torch.bfloat16, way="plain", seed=0)
def test_any_bits_decode_as_torch_does(
    rows: int, columns: int, scheme: str, block_size: int, dtype: torch.dtype, way: str, seed: int
) -> None:
    packed, constants = anything(rows * columns, **SCHEMES[scheme], block_size=block_size, seed=seed)
    options = {"scheme": SCHEMES[scheme]["scheme"], "block_size": block_size, "dtype": dtype}
    with settled(look_up=lambda: way):
        result = blocks.dequantize(packed, constants, shape=(rows, columns), **options)
    with settled(look_up=lambda: None):
        expected = blocks.dequantize(packed, constants, shape=(rows, columns), **options)
    assert result.shape == expected.shape == (rows, columns)
    assert same_bits(result, expected)


@each_scheme
@pytest.mark.parametrize("openmp", [True, False])
def test_threads_share_the_work_without_a_gap(scheme: str, openmp: bool) -> None:
    shape = (331, 517)  # blocks that no number of threads divides
    packed, constants = anything(shape[0] * shape[1], **SCHEMES[scheme], block_size=64, seed=1)
    options = {"shape": shape, "scheme": SCHEMES[scheme]["scheme"], "block_size": 64, "dtype": torch.bfloat16}
    with settled(look_up=lambda: None):
        expected = blocks.dequantize(packed, constants, **options)
    for count in (1, 2, 3, 5):
        with threads(count), settled(**({} if openmp else {"_openmp": lambda: None})):
            assert same_bits(blocks.dequantize(packed, constants, **options), expected), count


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the entry points have other names")
def test_torchs_own_threads_are_used() -> None:
    assert native._openmp() is not None


def test_stored_bytes_may_begin_anywhere() -> None:
    packed, constants = anything(70 * 70, **SCHEMES["nf5_dq"], block_size=64, seed=2)
    options = {"shape": (70, 70), "scheme": "nf5", "block_size": 64, "dtype": torch.bfloat16}
    expected = blocks.dequantize(packed, constants, **options)
    moved = torch.cat([torch.zeros(1, dtype=torch.uint8), packed])[1:]
    assert moved.data_ptr() % 2 == 1
    assert same_bits(blocks.dequantize(moved, constants, **options), expected)


@each_scheme
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_and_gradients_are_those_of_torch(scheme: str, dtype: torch.dtype) -> None:
    weight = 0.02 * torch.randn(40, 72, generator=torch.Generator().manual_seed(0))
    layer = Linear5bit(72, 40, False, **SCHEMES[scheme], compute_dtype=dtype).quantize_(weight)
    results = []
    for way in (native.look_up(), None):
        with settled(look_up=lambda way=way: way):
            x = torch.randn(3, 72, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
            out = layer(x)
            out.float().square().sum().backward()
            results.append((out, x.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_who_decodes_is_told() -> None:
    layer = Linear5bit(64, 64, compute_dtype=torch.bfloat16)
    assert layer.decoded_by == {"plain": "llvm", "avx2": "llvm-avx2", "avx512": "llvm-avx512"}[WAYS[-1]]
    assert Linear5bit(64, 64, compute_dtype=torch.float64).decoded_by == "torch"
    assert Linear5bit(64, 64, block_size=48).decoded_by == "torch"
    assert Linear5bit(64, 64, device="meta").decoded_by == "torch"


def test_without_llvmlite_torch_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = FiveBitConfig(compute_dtype="bfloat16")
    layer = Linear5bit(64, 64, False, compute_dtype=torch.bfloat16).quantize_(torch.eye(64))
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    native.look_up.cache_clear()
    try:
        config.prepare("cpu")
        assert layer.decoded_by == "torch"
        assert torch.equal(layer.dequantize(), torch.eye(64).bfloat16())
    finally:
        native.look_up.cache_clear()


def test_preparing_compiles_all_that_a_run_decodes() -> None:
    FiveBitConfig(scheme="int5", block_size=160, compute_dtype="bfloat16").prepare("cpu")
    before = native.compiled.cache_info().misses
    layer = Linear5bit(64, 64, False, scheme="int5", block_size=160, compute_dtype=torch.bfloat16)
    layer.quantize_(torch.eye(64))(torch.randn(2, 64, requires_grad=True)).sum().backward()
    layer.weight.left_dequantize()  # as measuring the quantization's error does
    assert native.compiled.cache_info().misses == before


def test_a_compiled_layer_computes_the_same() -> None:
    """The kernel is left out of what torch.compile traces; the backend matters not."""
    layer = Linear5bit(64, 64, False, compute_dtype=torch.float32).quantize_(torch.eye(64))
    results = []
    for call in (layer, torch.compile(layer, backend="eager", dynamic=True)):
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
        call(x).square().sum().backward()
        results.append(x.grad)
    assert torch.equal(*results)

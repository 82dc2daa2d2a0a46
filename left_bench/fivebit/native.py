"""Decoding in one pass over memory, with machine code that LLVM generates for this CPU (`llvmlite`).

It is compiled in memory by each process, in about 50 ms, without files and without another compiler. If llvmlite is not
installed, and for other devices and dtypes, torch decodes (`blocks`), with identical bits.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import torch

from left_bench.fivebit import kernel
from left_bench.fivebit.codebook import levels, pool

TRITON = "triton"
TORCH = "torch"
"""`decoder`'s name for decoding without a kernel."""
_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
# Minimum weights per thread: torch's own grain size.
_GRAIN = 2**15


class _OpenMP(NamedTuple):
    """Entry points of torch's OpenMP runtime: its threads are already running, and a second pool would compete with
    them."""

    parallel: Callable[..., None]
    threads: int
    thread: int


class Kernel(NamedTuple):
    """Compiled code; the engine owns its memory."""

    decode: Callable[[int, int, int], None]
    share: int | None
    engine: object


def decoder(*, block_size: int, dtype: torch.dtype, device: torch.device) -> str:
    """The decoder for such weights: `llvm-avx512`, `llvm-avx2`, `llvm`, `triton` or `torch`."""
    if by_triton(block_size=block_size, dtype=dtype, device=device):
        return TRITON
    if device.type != "cpu" or dtype not in _DTYPES or block_size % (2 * kernel.LANES) or look_up() is None:
        return TORCH
    if dtype == torch.float16 and not _halves():
        return TORCH
    way = look_up()
    return "llvm" if way == "plain" else f"llvm-{way}"


def by_triton(*, block_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `decoder` returns `triton`; unlike `decoder`, torch.compile can trace this."""
    return device.type == "cuda" and dtype in _DTYPES and block_size % 2 == 0 and _has_triton(device, dtype)


@torch.compiler.assume_constant_result  # not traced
def _has_triton(device: torch.device, dtype: torch.dtype) -> bool:
    return _triton_decodes(device, dtype)


@cache
def _triton_decodes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton is installed, supports the GPU (bfloat16 needs Ampere) and can launch kernels."""
    if importlib.util.find_spec("triton") is None:
        return False
    oldest = (8, 0) if dtype == torch.bfloat16 else (7, 0)
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < oldest:
        return False
    return _launches(device, dtype)


def _launches(device: torch.device, dtype: torch.dtype) -> bool:
    """Try it on the smallest weight: Triton needs a C compiler for its launchers, which many images lack."""
    from left_bench.fivebit import on_gpu

    packed = torch.zeros(320, dtype=torch.uint8, device=device)
    scale = torch.zeros(8, dtype=torch.bfloat16, device=device)
    out = torch.empty(512, dtype=dtype, device=device)
    try:
        on_gpu.decode(packed, scale, None, None, out, scheme="nf5", block_size=64)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # from Triton, its compilers or the driver
        what = str(error).strip().partition("\n")[0]
        warnings.warn(f"Triton does not work here; torch decodes 5-bit weights, more slowly: {what}", stacklevel=2)
        return False
    return True


def prepare(*, scheme: str, double_quant: bool, block_size: int, compute_dtype: torch.dtype) -> None:
    """Compile the decoders for such weights before any measured step; float32 too, for measuring the error."""
    for dtype in {compute_dtype, torch.float32}:
        if decoder(block_size=block_size, dtype=dtype, device=torch.device("cpu")) != TORCH:
            _compiled_here(scheme=scheme, double_quant=double_quant, block_size=block_size, dtype=dtype)


def decode(
    packed: torch.Tensor, constants: Mapping[str, torch.Tensor], out: torch.Tensor, *, scheme: str, block_size: int
) -> None:
    """Decode all stored weights into `out`, flat, in its dtype, padding included.

    Only valid if `decoder` does not return `torch`.
    """
    double_quant = "nested_scale" in constants
    code = _compiled_here(scheme=scheme, double_quant=double_quant, block_size=block_size, dtype=out.dtype)
    second = constants.get("nested_scale", constants.get("zero_point"))
    tensors = (out, packed, constants["scale"], second, constants.get("nested_mean"))
    held = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    blocks = out.numel() // (block_size * 8)
    fields = [0 if tensor is None else tensor.data_ptr() for tensor in held]
    arguments = (ctypes.c_int64 * len(kernel.ARGUMENTS))(*fields, blocks)
    _run(code, ctypes.addressof(arguments), blocks, out.numel())


def _compiled_here(*, scheme: str, double_quant: bool, block_size: int, dtype: torch.dtype) -> Kernel:
    way = look_up()
    assert way is not None, "only called where `decoder` names a kernel"
    return compiled(scheme=scheme, double_quant=double_quant, block_size=block_size, dtype=_DTYPES[dtype], look_up=way)


def _run(code: Kernel, arguments: int, blocks: int, numel: int) -> None:
    threads = min(torch.get_num_threads(), blocks, max(1, numel // _GRAIN))
    openmp = _openmp()
    if threads == 1:
        code.decode(arguments, 0, blocks)
    elif openmp is not None and code.share is not None:
        openmp.parallel(code.share, arguments, threads, 0)
    else:
        edges = [blocks * part // threads for part in range(threads + 1)]
        list(pool(threads, os.getpid()).map(code.decode, [arguments] * threads, edges[:-1], edges[1:]))


@cache
def look_up() -> str | None:
    """How this CPU looks up levels (`kernel.source`); None if llvmlite is not installed or cannot be loaded."""
    try:
        import llvmlite.binding as llvm
    except (ImportError, OSError):  # OSError: its library needs a newer system
        return None
    if sys.byteorder != "little":
        return None  # pairs of results are combined as integers
    features = llvm.get_host_cpu_features()
    return next((way for way, needs in (("avx512", "avx512f"), ("avx2", "avx2")) if features.get(needs)), "plain")


@cache
def _halves() -> bool:
    """Whether this CPU can round to float16; otherwise LLVM would call a library that is not present."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    return bool(features.get("f16c") or features.get("avx512f")) or llvm.get_process_triple().startswith(
        ("aarch64", "arm64")
    )


@cache
def compiled(*, scheme: str, double_quant: bool, block_size: int, dtype: str, look_up: str) -> Kernel:
    """The machine code for one kind of weights."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), jit=True
    )
    openmp = _openmp()
    text = kernel.source(
        scheme=scheme,
        double_quant=double_quant,
        block_size=block_size,
        dtype=dtype,
        levels=levels("nf5", torch.device("cpu")).tolist(),
        look_up=look_up,
    )
    if openmp is not None:
        text += kernel.team(count=openmp.threads, number=openmp.thread)
    module = llvm.parse_assembly(text)
    module.triple = machine.triple
    module.verify()
    # no optimization passes: they do not improve these loops, and take twice as long as generating the code
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)  # releases the GIL
    decode_address = engine.get_function_address("decode")
    share = engine.get_function_address("share") if openmp is not None else None
    return Kernel(prototype(decode_address), share, engine)


@cache
def _openmp() -> _OpenMP | None:
    """torch's OpenMP runtime in this process, if its GNU entry points are visible."""
    if sys.platform != "linux":
        return None
    process = ctypes.CDLL(None)
    try:
        parallel = process.GOMP_parallel
        addresses = [
            ctypes.cast(function, ctypes.c_void_p).value or 0
            for function in (process.omp_get_num_threads, process.omp_get_thread_num)
        ]
    except AttributeError:
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return _OpenMP(parallel, *addresses)

"""What an exception, or a process's last words, make of a run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from left_bench.worker import classify_error
from left_bench.worker.classify_error import NoRoomToCheck, out_of_memory_reason, says_out_of_memory, status_of

GIBIBYTE = 2**30


@pytest.mark.parametrize(
    "words",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.18 GiB",
        "HIP out of memory. Tried to allocate 2.00 GiB",
        "MPS backend out of memory (MPS allocated: 17.9 GB)",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "NCCL error in: ProcessGroupNCCL.cpp:3356, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
        "Failed to CUDA calloc async 608 bytes\nCuda failure 'out of memory'",
        "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate 4",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes",
    ],
)
def test_every_librarys_words_for_it_are_out_of_memory(words):
    assert status_of(RuntimeError(words))[0] == "oom"
    assert says_out_of_memory(words)


@pytest.mark.parametrize(
    "words", ["CUDA error: an illegal memory access was encountered", "CUBLAS_STATUS_EXECUTION_FAILED"]
)
def test_other_cuda_errors_are_failures(words):
    assert status_of(RuntimeError(words), device="cuda")[0] == "failed"
    assert not says_out_of_memory(words)


def card(monkeypatch: pytest.MonkeyPatch, *, free: int, total: int = 80 * GIBIBYTE, broken: bool = False) -> None:
    def mem_get_info() -> tuple[int, int]:
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return free, total

    fake = SimpleNamespace(
        mem_get_info=mem_get_info,
        max_memory_allocated=lambda: 70 * GIBIBYTE,
        max_memory_reserved=lambda: 75 * GIBIBYTE,
    )
    monkeypatch.setattr(torch, "cuda", fake)


def test_the_reason_quotes_the_cards_memory_and_not_the_machines(monkeypatch):
    card(monkeypatch, free=0)
    status, reason = status_of(torch.OutOfMemoryError("CUDA out of memory."), device="cuda", limit_bytes=2**30)
    assert status == "oom"
    assert "hardware.memory_limit=1024MiB, device memory 80.0 GiB, 70.0 GiB of it allocated by this run" in reason
    assert "machine memory" not in reason


def test_a_card_that_no_longer_answers_leaves_the_machines_memory(monkeypatch):
    card(monkeypatch, free=0, broken=True)
    assert "machine memory" in out_of_memory_reason("CUDA out of memory.", limit_bytes=None, device="cuda")


@pytest.mark.parametrize(("free", "status"), [(100 * 2**20, "oom"), (20 * GIBIBYTE, "failed")])
def test_a_missing_cublas_handle_is_out_of_memory_on_a_full_card_alone(free, status, monkeypatch):
    card(monkeypatch, free=free)
    error = RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`")
    assert status_of(error, device="cuda")[0] == status


def test_a_reload_without_room_is_no_verdict_on_what_was_saved():
    from left_bench.worker.reload_check import _unusable

    assert isinstance(_unusable("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"), NoRoomToCheck)
    other = _unusable("ValueError: shapes differ")
    assert type(other) is RuntimeError and "cannot be used again" in str(other)


def test_the_last_words_of_bitsandbytes_are_known():
    assert classify_error.says_out_of_memory(
        "step 3\nError out of memory at line 380 in file /src/csrc/pythonInterface.cpp\n"
    )
    assert not classify_error.says_out_of_memory("the log speaks of an Error out of memory at line 380 in file x")

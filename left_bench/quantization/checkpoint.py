"""Checkpoints published in quantized form: GPTQ, AWQ, SpQR, FP8, loaded by transformers with their own kernels."""

from __future__ import annotations

from left_bench.quantization import QuantizationBackend
from left_bench.spec.cell import Quantization


class Checkpoint(QuantizationBackend):
    """The cell names no configuration, only the method by which the checkpoint must have been quantized."""

    runs_on = ("cuda",)
    why_not_elsewhere = "kernels for quantized checkpoints (GPTQ, AWQ, SpQR, FP8) run only on CUDA"

    def is_of(self, quantization: Quantization) -> bool:
        return quantization.checkpoint_method is not None

    def can_shard(self, quantization: Quantization) -> bool:
        return False


BACKEND = Checkpoint()

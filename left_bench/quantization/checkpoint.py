"""Checkpoints that come quantized: GPTQ, AWQ, SpQR, FP8, by transformers and the kernels that each wants."""

from __future__ import annotations

from left_bench.quantization import QuantizationBackend
from left_bench.spec.cell import Quantization


class Checkpoint(QuantizationBackend):
    """What a cell names is not a configuration but the method that the checkpoint must have been quantized by."""

    runs_on = ("cuda",)
    why_not_elsewhere = "kernels for checkpoints that come quantized (GPTQ, AWQ, SpQR, FP8) run on CUDA alone"

    def is_of(self, quantization: Quantization) -> bool:
        return quantization.checkpoint_method is not None

    def can_shard(self, quantization: Quantization) -> bool:
        return False


BACKEND = Checkpoint()

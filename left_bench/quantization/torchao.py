"""torchao: weights as tensor subclasses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from left_bench.quantization import QuantizationBackend, StoredBytes, rows_of_bytes
from left_bench.spec.cell import Precision, Quantization

if TYPE_CHECKING:
    import torch


class TorchAo(QuantizationBackend):
    targets = ("transformers.TorchAoConfig",)
    needs = "torchao"
    extra = "torchao"
    packages = ("torchao",)
    readers = ("torchao",)

    def can_shard(self, quantization: Quantization) -> bool:
        return False

    def stored_bytes(self, config: Mapping[str, Any], precision: Precision) -> StoredBytes | None:
        if "Int8WeightOnly" not in str(config.get("quant_type")):
            return None
        return rows_of_bytes(for_each_row=5)  # a float32 scale and an int8 zero point

    def dequantize(self, weight: Any) -> torch.Tensor | None:
        return weight.dequantize() if type(weight).__module__.startswith("torchao.") else None


BACKEND = TorchAo()

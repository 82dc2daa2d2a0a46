"""Optimum Quanto: int8 and int4 weights as tensor subclasses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from left_bench.quantization import ITEM_BYTES, QuantizationBackend, StoredBytes, rows_of_bytes
from left_bench.spec.cell import Precision

if TYPE_CHECKING:
    import torch

_SCALES = 8
"""Bytes of the float32 scales for a layer's input and output."""


class Quanto(QuantizationBackend):
    targets = ("transformers.QuantoConfig",)
    needs = "optimum.quanto"
    extra = "quanto"
    packages = ("optimum-quanto",)
    readers = ("optimum",)

    def stored_bytes(self, config: Mapping[str, Any], precision: Precision) -> StoredBytes | None:
        scale = ITEM_BYTES[precision.weights_dtype]
        if config.get("weights") == "int8":
            return rows_of_bytes(for_each_row=scale, for_each_layer=_SCALES)
        return _four_bits(scale) if config.get("weights") == "int4" else None

    def dequantize(self, weight: Any) -> torch.Tensor | None:
        return weight.dequantize() if type(weight).__module__.startswith("optimum.") else None


def _four_bits(item_bytes: int) -> StoredBytes:
    """Two weights per byte; scale and shift for each group of 128, or of the next smaller size that fits."""

    def stored(out: int, width: int) -> int:
        group = next((size for size in (128, 96, 64) if width % size == 0), 32)
        return out * width // 2 + 2 * item_bytes * (out * width // group) + _SCALES

    return stored


BACKEND = Quanto()

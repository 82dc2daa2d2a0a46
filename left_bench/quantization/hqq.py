"""HQQ (Badri & Shaji 2023), by its own library (`left_bench.hqq`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from left_bench.quantization import ITEM_BYTES, QuantizationBackend, StoredBytes
from left_bench.spec.cell import Precision


class Hqq(QuantizationBackend):
    """The model is loaded dense, then its linear layers are quantized in place."""

    targets = ("left_bench.hqq.HqqConfig",)
    needs = "hqq"
    extra = "hqq"
    packages = ("hqq",)
    readers = ("hqq",)
    has_dense_shape = False
    rules = (
        (
            lambda cell: cell.task.new_output,
            "HQQ cannot leave the new output layer unquantized; bitsandbytes and the 5-bit quantizations can",
        ),
    )

    def stored_bytes(self, config: Mapping[str, Any], precision: Precision) -> StoredBytes:
        """Groups as rows, packed over rows; scale and zero in the compute dtype. 3-bit values: ten per int32."""
        bits, group = config.get("nbits", 4), config.get("group_size", 64)
        item_bytes = ITEM_BYTES[str(config.get("compute_dtype") or precision.compute_dtype)]

        def stored(out: int, width: int) -> int:
            rows = out * width // group
            packed = 4 * -(-rows // 10) if bits == 3 else rows * bits // 8
            return packed * group + 2 * item_bytes * rows

        return stored


BACKEND = Hqq()

"""left_bench's own 5-bit formats, NF5 and INT5 (`left_bench.fivebit`, docs/five_bits.md)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from left_bench.quantization import QuantizationBackend, StoredBytes
from left_bench.spec.cell import Precision, Quantization

_BLOCK = 64


class FiveBit(QuantizationBackend):
    """Decoded on a CPU in one pass with llvmlite if it is installed, otherwise by torch."""

    targets = ("left_bench.fivebit.FiveBitConfig",)
    packages = ("llvmlite",)
    readers = ("left_bench.fivebit",)
    cacheable = True
    has_dense_shape = False

    def make_ready(self, quantization: Quantization, *, device: str) -> None:
        from left_bench.spec.instantiate import instantiate

        instantiate(self.targets[0], quantization.config, key="quantization").prepare(device)

    def sources(self) -> list[str]:
        modules = (file for file in files("left_bench.fivebit").iterdir() if file.name.endswith(".py"))
        return [module.read_text(encoding="utf-8") for module in sorted(modules, key=lambda file: file.name)]

    def stored_bytes(self, config: Mapping[str, Any], precision: Precision) -> StoredBytes:
        from left_bench.fivebit.blocks import constant_shapes, padded_numel

        scheme, block_size = config.get("scheme", "nf5"), config.get("block_size", _BLOCK)
        double_quant = config.get("double_quant", False)

        def stored(out: int, width: int) -> int:
            shapes = constant_shapes(out * width, scheme=scheme, block_size=block_size, double_quant=double_quant)
            constants = sum(length * dtype.itemsize for length, dtype in shapes.values())
            return padded_numel(out * width, block_size) * 5 // 8 + constants

        return stored


BACKEND = FiveBit()

"""Bytes that a quantized linear layer stores, constants included, from its shape alone.

A test holds each of these against what the library really stores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from left_bench.fivebit.blocks import constant_shapes, padded_numel
from left_bench.spec.cell import Cell

_BLOCK, _NESTED_BLOCK = 64, 256
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_QUANTO_SCALES = 8
"""Optimum Quanto keeps a float32 scale for a layer's input and one for its output."""

StoredBytes = Callable[[int, int], int]
"""(out features, in features) -> bytes of the weight as stored, without the bias."""


def stored_bytes_of(cell: Cell) -> StoredBytes | None:
    """What a layer of so many outputs and inputs takes; None for a format whose layout is not known here."""
    target, config = cell.quantization.target, cell.quantization.config
    if target == "transformers.BitsAndBytesConfig":
        if config.get("load_in_8bit"):
            return _rows_of_bytes(for_each_row=4)  # LLM.int8: a float32 scale
        return _bitsandbytes_4bit(nested=bool(config.get("bnb_4bit_use_double_quant")))
    if target == "left_bench.fivebit.FiveBitConfig":
        return _five_bits(
            scheme=config.get("scheme", "nf5"),
            block_size=config.get("block_size", _BLOCK),
            double_quant=config.get("double_quant", False),
        )
    if target == "left_bench.hqq.HqqConfig":
        return _hqq(config.get("nbits", 4), config.get("group_size", 64), _item_bytes(config, cell))
    if target == "transformers.QuantoConfig" and config.get("weights") in ("int8", "int4"):
        scale = _ITEM_BYTES[cell.precision.weights_dtype]
        if config["weights"] == "int8":
            return _rows_of_bytes(for_each_row=scale, for_each_layer=_QUANTO_SCALES)
        return _quanto_int4(scale)
    if target == "transformers.TorchAoConfig" and "Int8WeightOnly" in str(config.get("quant_type")):
        return _rows_of_bytes(for_each_row=5)  # a float32 scale and an int8 zero point
    return None


def _item_bytes(config: dict[str, Any], cell: Cell) -> int:
    return _ITEM_BYTES[str(config.get("compute_dtype") or cell.precision.compute_dtype)]


def _rows_of_bytes(*, for_each_row: int, for_each_layer: int = 0) -> StoredBytes:
    """A byte a weight, constants for each output row."""
    return lambda out, width: out * width + for_each_row * out + for_each_layer


def _hqq(bits: int, group: int, item_bytes: int) -> StoredBytes:
    """Groups as rows, packed over rows; scale and zero in the compute dtype. 3 bits: ten to an int32."""

    def stored(out: int, width: int) -> int:
        rows = out * width // group
        packed = 4 * -(-rows // 10) if bits == 3 else rows * bits // 8
        return packed * group + 2 * item_bytes * rows

    return stored


def _quanto_int4(item_bytes: int) -> StoredBytes:
    """Two weights a byte; scale and shift for each group of 128, or of the next smaller size that fits."""

    def stored(out: int, width: int) -> int:
        group = next((size for size in (128, 96, 64) if width % size == 0), 32)
        return out * width // 2 + 2 * item_bytes * (out * width // group) + _QUANTO_SCALES

    return stored


def _bitsandbytes_4bit(*, nested: bool) -> StoredBytes:
    """Half a byte a weight; for each block of 64 a float32 constant, or 8 bits and a float32 for every 256 of those.

    Every layer holds its own table of 16 levels; nested, one of 256 levels and an offset as well (QLoRA, section 3).
    """

    def stored(out: int, width: int) -> int:
        numel = out * width
        blocks = -(-numel // _BLOCK)
        constants = blocks + 4 * -(-blocks // _NESTED_BLOCK) + 4 * 256 + 4 if nested else 4 * blocks
        return -(-numel // 2) + constants + 4 * 16

    return stored


def _five_bits(*, scheme: str, block_size: int, double_quant: bool) -> StoredBytes:
    def stored(out: int, width: int) -> int:
        shapes = constant_shapes(out * width, scheme=scheme, block_size=block_size, double_quant=double_quant)
        constants = sum(length * dtype.itemsize for length, dtype in shapes.values())
        return padded_numel(out * width, block_size) * 5 // 8 + constants

    return stored

"""bitsandbytes: LLM.int8 (Dettmers et al. 2022), NF4 and FP4 (QLoRA, Dettmers et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from left_bench.quantization import QuantizationBackend, StoredBytes, rows_of_bytes
from left_bench.spec.cell import Cell, Precision, Quantization

if TYPE_CHECKING:
    import torch

_BLOCK, _NESTED_BLOCK = 64, 256
_SEEN = "(seen with peft 0.21.2, bitsandbytes 0.50.2)"


def _int8(cell: Cell) -> bool:
    return bool(cell.quantization.config.get("load_in_8bit"))


def _four_bit(cell: Cell) -> bool:
    return bool(cell.quantization.config.get("load_in_4bit"))


class Bitsandbytes(QuantizationBackend):
    """A layer's weight is a parameter subclass, with its constants in the attribute `quant_state` or `SCB`."""

    targets = ("transformers.BitsAndBytesConfig",)
    packages = ("bitsandbytes",)
    readers = ("bitsandbytes",)
    cacheable = True
    rules = (
        (
            lambda cell: _int8(cell) and cell.peft.is_lora_with("use_dora"),
            f"DoRA over bitsandbytes int8 weights fails inside peft {_SEEN}",
        ),
        (
            lambda cell: cell.peft.is_lora_with("monteclora_config"),
            f"peft's quantized layers do not support this variant of LoRA and would be plain LoRA {_SEEN}",
        ),
        (
            lambda cell: _four_bit(cell) and cell.peft.is_one_of("LoHa", "LoKr"),
            f"peft takes the packed 4-bit weight's shape for the layer's shape {_SEEN}",
        ),
        (
            lambda cell: (
                not cell.autocast
                and cell.precision.weights_dtype != "float32"
                and (cell.peft.is_one_of("IA3", "RandLora") or (_int8(cell) and cell.peft.is_one_of("Shira")))
            ),
            f"peft mixes dtypes here unless autocast is on; precision.adapter_dtype=float32 turns it on {_SEEN}",
        ),
        (
            lambda cell: cell.peft.is_one_of("C3A", "Gralora") and cell.model.family == "gpt_neox",
            f"peft's in-place update of this method fails over bitsandbytes layers that have a bias {_SEEN}",
        ),
    )

    def can_shard(self, quantization: Quantization) -> bool:
        return not quantization.config.get("load_in_8bit")

    def trials(self, config: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[], object]]]:
        kind = config.get("bnb_4bit_quant_type")
        if kind is not None:  # the configuration class accepts any value
            import torch
            from bitsandbytes.functional import quantize_4bit

            yield "bnb_4bit_quant_type", partial(quantize_4bit, torch.zeros(64), quant_type=kind)

    def stored_bytes(self, config: Mapping[str, Any], precision: Precision) -> StoredBytes:
        if config.get("load_in_8bit"):
            return rows_of_bytes(for_each_row=4)  # LLM.int8: a float32 scale
        return _four_bits(nested=bool(config.get("bnb_4bit_use_double_quant")))

    def constants(self, weight: Any) -> Iterator[tuple[Any, str]]:
        """Including those of double quantization. Our 5-bit and HQQ layers use the same names for their constants."""
        state = getattr(weight, "quant_state", None)
        owners: list[tuple[Any, tuple[str, ...]]] = [(weight, ("SCB", "CB"))]
        while state is not None:
            owners.append((state, ("absmax", "code", "offset")))
            state = getattr(state, "state2", None)
        for owner, names in owners:
            for name in names:
                if hasattr(getattr(owner, name, None), "untyped_storage"):
                    yield owner, name

    def dequantize(self, weight: Any) -> torch.Tensor | None:
        if hasattr(weight, "left_dequantize"):  # one of our own layers, whose constants have the same names
            return None
        if getattr(weight, "quant_state", None) is not None:
            from bitsandbytes.functional import dequantize_4bit

            return dequantize_4bit(weight.data, weight.quant_state)
        if getattr(weight, "SCB", None) is not None:
            # LLM.int8: one scale for each output row, absmax / 127
            dense: torch.Tensor = weight.CB.float() * (weight.SCB.float() / 127).unsqueeze(1)
            return dense
        return None


def _four_bits(*, nested: bool) -> StoredBytes:
    """Half a byte per weight; for each block of 64 a float32 constant, or 8 bits and a float32 per 256 of those.

    Every layer has its own table of 16 levels; nested, also one of 256 levels and an offset (QLoRA, section 3).
    """

    def stored(out: int, width: int) -> int:
        numel = out * width
        blocks = -(-numel // _BLOCK)
        constants = blocks + 4 * -(-blocks // _NESTED_BLOCK) + 4 * 256 + 4 if nested else 4 * blocks
        return -(-numel // 2) + constants + 4 * 16

    return stored


BACKEND = Bitsandbytes()

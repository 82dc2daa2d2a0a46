"""Quantize and decode a weight block by block, on plain tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from left_bench.fivebit import custom_op, native
from left_bench.fivebit.codebook import levels, look_up
from left_bench.fivebit.packing import PLANES, SEGMENTS, pack, unpacked

TOGETHER = {"nf5": 2, "int5": 1}
"""Codes packed together: pairs need only one look-up; integers are computed one by one."""
NESTED_BLOCK = 256
"""Number of scales that share a constant under double quantization (QLoRA, section 3)."""
# Weights decoded at a time: enough to hide the cost of starting an operation, few enough that only a small float32 copy
# exists in addition to the result.
_PIECE = 2**20
_PIECE_ON_ACCELERATOR = 2**26
"""Larger, because there an operation on a million weights ends before the next is launched."""


def padded_numel(numel: int, block_size: int) -> int:
    """Number of stored codes for `numel` weights: each of the 8 segments holds whole blocks."""
    unit = SEGMENTS * block_size
    return -(-numel // unit) * unit


def constant_shapes(
    numel: int, *, scheme: str, block_size: int, double_quant: bool
) -> dict[str, tuple[int, torch.dtype]]:
    """Name -> length and dtype of the constants stored in addition to the codes.

    Bits per weight with blocks of 64: `nf5` 5 + 16/64 = 5.25 (bfloat16 scales); double-quantized 5 + 8/64 +
    32/(64 256) = 5.127; `int5` 5 + 16/64 + 8/64 = 5.375 (bfloat16 scales, 8-bit zero points).
    """
    blocks = padded_numel(numel, block_size) // block_size
    if double_quant:
        return {
            "scale": (blocks, torch.int8),
            "nested_scale": (-(-blocks // NESTED_BLOCK), torch.float32),
            "nested_mean": (1, torch.float32),
        }
    shapes = {"scale": (blocks, torch.bfloat16)}
    if scheme == "int5":
        shapes["zero_point"] = (blocks, torch.uint8)
    return shapes


def quantize(
    weight: torch.Tensor, *, scheme: str, block_size: int, double_quant: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Codes and constants of a weight of any shape; blocks run along its flattened elements.

    `nf5`: each block is divided by its largest magnitude and rounded to the nearest NormalFloat level. `int5`: each
    block's range, zero included, is divided into 31 equal steps, and zero is one of the levels. Codes are chosen with
    the stored (rounded) constants, so that rounding them causes no systematic error.

    Returns:
        Packed codes, uint8 [5 / 8 padded numel], and the tensors that `constant_shapes` names.
    """
    flat = weight.detach().reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, padded_numel(flat.numel(), block_size) - flat.numel()))
    blocks = blocks.view(-1, block_size)
    low, high = (edge.float() for edge in torch.aminmax(blocks, dim=1))
    if scheme == "int5":
        low, high = low.clamp(max=0), high.clamp(min=0)
        constants = {"scale": ((high - low) / _tensor(31, high)).to(torch.bfloat16)}
        stored = decoded_scale(constants)
        zero_point = torch.where(stored > 0, -low / stored, 0.0).round().clamp(0, 31)
        constants["zero_point"] = zero_point.to(torch.uint8)
    else:
        largest = torch.maximum(high, -low)
        constants = _nested(largest) if double_quant else {"scale": largest.to(torch.bfloat16)}
        stored = decoded_scale(constants)
        zero_point = torch.zeros_like(stored)
    inverse = torch.where(stored > 0, 1 / stored, 0.0)
    item = levels(scheme, weight.device)
    edges = (item[1:] + item[:-1]) / 2
    codes = torch.empty(blocks.shape, dtype=torch.uint8, device=weight.device)
    rows = max(1, _PIECE // block_size)
    for start in range(0, len(blocks), rows):
        piece = slice(start, start + rows)
        scaled = blocks[piece].float() * inverse[piece, None] + zero_point[piece, None]
        codes[piece] = torch.bucketize(scaled, edges, out_int32=True)
    return pack(codes.view(-1), together=TOGETHER[scheme]).view(-1), constants


def dequantize(
    packed: torch.Tensor,
    constants: Mapping[str, torch.Tensor],
    *,
    shape: tuple[int, ...],
    scheme: str,
    block_size: int,
    dtype: torch.dtype,
    after: torch.Tensor | None = None,
) -> torch.Tensor:
    """The dense weight of the codes: computed in float32, rounded once to `dtype`.

    In one pass if there is a kernel for it (`native`), else by torch operations, with identical bits.

    Args:
        after: a tensor that a compiled graph computes first (`custom_op.decode`).
    """
    if native.by_triton(block_size=block_size, dtype=dtype, device=packed.device):
        out = custom_op.decode(packed, constants, scheme=scheme, block_size=block_size, dtype=dtype, after=after)
    else:
        out = _outside_graphs(packed, constants, scheme=scheme, block_size=block_size, dtype=dtype)
    return out[: math.prod(shape)].view(shape)


@torch.compiler.disable  # tracing into Arrow and LLVM would fail
def _outside_graphs(
    packed: torch.Tensor, constants: Mapping[str, torch.Tensor], *, scheme: str, block_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """All stored weights, padding included, flat."""
    if native.decoder(block_size=block_size, dtype=dtype, device=packed.device) == native.TORCH:
        return _by_torch(packed, constants, scheme=scheme, block_size=block_size, dtype=dtype)
    out = torch.empty(packed.numel() * 8 // 5, dtype=dtype)
    native.decode(packed, constants, out, scheme=scheme, block_size=block_size)
    return out


def _by_torch(
    packed: torch.Tensor, constants: Mapping[str, torch.Tensor], *, scheme: str, block_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """All stored weights, padding included, flat."""
    planes = packed.view(PLANES, -1)
    scale = decoded_scale(constants).view(SEGMENTS, -1, 1)
    blocks = scale.shape[1]  # per segment
    together = _PIECE if packed.device.type == "cpu" else _PIECE_ON_ACCELERATOR
    step = min(blocks, max(1, together // (SEGMENTS * block_size)))
    out = torch.empty(SEGMENTS, blocks, block_size, dtype=dtype, device=packed.device)
    for start in range(0, blocks, step):
        piece = slice(start, min(start + step, blocks))
        result = unpacked(planes[:, piece.start * block_size : piece.stop * block_size], together=TOGETHER[scheme])
        if scheme == "int5":
            zero_point = constants["zero_point"].view(torch.int8).view(SEGMENTS, -1, 1)[:, piece]
            steps = result.view(torch.int8).view(SEGMENTS, -1, block_size).sub_(zero_point)
            values = [steps.float()]  # -31 to 31; integers need no table of levels
        else:
            values = [some.view(len(some), -1, block_size) for some in look_up(result)]
        first = 0
        for some in values:
            part = (slice(first, first + len(some)), piece)
            out[part] = some.mul_(scale[part])
            first += len(some)
    return out.view(-1)


def _tensor(number: float, like: torch.Tensor) -> torch.Tensor:
    """A divisor as a tensor: with a plain number, a GPU multiplies by the rounded 1 / number instead of dividing."""
    return torch.tensor(number, dtype=like.dtype, device=like.device)


def decoded_scale(constants: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """One float32 scale per block."""
    scale = constants["scale"].float()
    if "nested_scale" not in constants:
        return scale
    whole = torch.nn.functional.pad(scale, (0, -len(scale) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    decoded = (whole * constants["nested_scale"][:, None]).view(-1)[: len(scale)] + constants["nested_mean"]
    return decoded.clamp_(min=0)  # a block of zeros may become slightly negative


def _nested(largest: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scales quantized once more, as in QLoRA: subtract their mean, then 8 bits with a constant for every 256.

    The 8-bit levels are evenly spaced; bitsandbytes uses its dynamic map, but centred scales have no long tail.
    """
    mean = largest.cpu().mean().view(1).to(largest.device)  # on the CPU, because a GPU sums in another order
    centred = torch.nn.functional.pad(largest - mean, (0, -len(largest) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested_scale = centred.abs().amax(dim=1) / _tensor(127, largest)
    ratio = torch.where(nested_scale[:, None] > 0, centred / nested_scale[:, None], 0.0)
    codes = ratio.round().clamp(-127, 127).to(torch.int8).view(-1)[: len(largest)]
    # a copy: a slice would keep the padding's storage
    return {"scale": codes.clone(), "nested_scale": nested_scale, "nested_mean": mean}

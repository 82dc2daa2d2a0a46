"""Decoding on a GPU in one Triton kernel, which reads the packed weight once and writes the dense one.

It does the same operations as torch on a CPU (`blocks`), so the bits are identical: products and sums are rounded one
by one (no fused multiply-add), and the result once to its dtype. Imported only where it is used, because it needs
Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from left_bench.fivebit.blocks import NESTED_BLOCK
from left_bench.fivebit.codebook import levels
from left_bench.fivebit.packing import PLANES, SEGMENTS

_WORDS = 512
"""Words of a plane that one program decodes, into 8 runs of as many weights, or twice as many (`nf5`)."""
_WARPS = 4


def decode(
    packed: torch.Tensor,
    scale: torch.Tensor,
    second: torch.Tensor | None,
    mean: torch.Tensor | None,
    out: torch.Tensor,
    *,
    scheme: str,
    block_size: int,
) -> None:
    """Decode all stored weights into `out`, flat, in its dtype, padding included; all on one device.

    Args:
        scale: as described in `blocks.constant_shapes`, like the next two.
        second: `nested_scale` or `zero_point`.
        mean: `nested_mean`; None without double quantization.
    """
    pairs = scheme != "int5"
    planes = packed.view(torch.int16) if pairs else packed
    words = planes.numel() // PLANES
    scale = scale.view(torch.int16) if mean is None else scale
    with torch.cuda.device_of(out):  # Triton launches on the current device, whatever the tensors' device
        _decode[(triton.cdiv(words, _WORDS),)](
            planes,
            levels("nf5", packed.device),
            scale,
            scale if second is None else second,
            scale if mean is None else mean,
            out,
            words,
            words * (2 if pairs else 1) // block_size,
            BLOCK=block_size,
            PAIRS=pairs,
            NESTED=mean is not None,
            NESTED_BLOCK=NESTED_BLOCK,
            WORDS=_WORDS,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )


@triton.jit
def _scale(scale, second, mean, block, mask, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr):
    stored = tl.load(scale + block, mask=mask, other=0)
    if NESTED:
        result = stored.to(tl.float32) * tl.load(second + block // NESTED_BLOCK, mask=mask, other=0.0) + tl.load(mean)
        return tl.where(result < 0.0, 0.0, result)  # `maximum` would drop NaN
    return (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)  # bfloat16, exactly


@triton.jit
def _write(
    code, segment, levels, scale, second, mean, out, word, mask, words, blocks,
    BLOCK: tl.constexpr, PAIRS: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Write one segment's weights from its codes (or pairs of codes): level or integer, times scale, rounded."""
    start = tl.full((), segment, tl.int64) * words
    if PAIRS:
        block = segment * blocks + (2 * word) // BLOCK  # both of a pair are in the same block
        factor = _scale(scale, second, mean, block, mask, NESTED, NESTED_BLOCK)
        first = tl.load(levels + (code & 31)) * factor
        other = tl.load(levels + (code >> 5)) * factor
        values = tl.interleave(first, other)
        place = 2 * WORDS * tl.program_id(0).to(tl.int64) + tl.arange(0, 2 * WORDS)
        tl.store(out + 2 * start + place, values.to(out.dtype.element_ty), mask=place < 2 * words)
    else:
        block = segment * blocks + word // BLOCK
        factor = _scale(scale, second, mean, block, mask, NESTED, NESTED_BLOCK)
        zero = tl.load(second + block, mask=mask, other=0).to(tl.int32)
        values = (code - zero).to(tl.float32) * factor
        tl.store(out + start + word, values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _decode(
    planes, levels, scale, second, mean, out, words, blocks,
    BLOCK: tl.constexpr, PAIRS: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Decode the layout of `packing.pack`: T codes together, five planes of 8 T bits, the high 3 T for segments 5 to 7.

    `words`: per plane; `blocks`: per segment.
    """
    T: tl.constexpr = 2 if PAIRS else 1
    LOW: tl.constexpr = (1 << (5 * T)) - 1
    WORD: tl.constexpr = (1 << (8 * T)) - 1
    LACKING: tl.constexpr = (1 << (2 * T)) - 1
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    mask = word < words
    wide = words.to(tl.int64)
    p0 = tl.load(planes + word, mask=mask, other=0).to(tl.int32) & WORD
    p1 = tl.load(planes + wide + word, mask=mask, other=0).to(tl.int32) & WORD
    p2 = tl.load(planes + 2 * wide + word, mask=mask, other=0).to(tl.int32) & WORD
    p3 = tl.load(planes + 3 * wide + word, mask=mask, other=0).to(tl.int32) & WORD
    p4 = tl.load(planes + 4 * wide + word, mask=mask, other=0).to(tl.int32) & WORD
    h3 = p3 >> (5 * T)
    h4 = p4 >> (5 * T)
    fifth = (p0 >> (5 * T)) | ((h3 & LACKING) << (3 * T))
    sixth = (p1 >> (5 * T)) | ((h3 >> (2 * T)) << (3 * T)) | ((h4 >> (2 * T)) << (4 * T))
    seventh = (p2 >> (5 * T)) | ((h4 & LACKING) << (3 * T))
    codes = (p0 & LOW, p1 & LOW, p2 & LOW, p3 & LOW, p4 & LOW, fifth, sixth, seventh)
    for segment in tl.static_range(8):
        _write(
            codes[segment], segment, levels, scale, second, mean, out, word, mask, wide, blocks,
            BLOCK, PAIRS, NESTED, NESTED_BLOCK, WORDS,
        )  # fmt: skip


assert SEGMENTS == 8

"""Packing 5-bit codes without padding bits, in a layout for whole-array operations.

Codes are packed one by one into bytes, 8 codes in 5 bytes (`together=1`), or as pairs of 10 bits into 16-bit words, 16
codes in 5 words (`together=2`); the layout is the same, with every width doubled in the second case. A flat array is
divided into 8 segments of n codes or pairs. Word j of plane k (k = 0 to 4) has code j of segment k in its low 5 (10)
bits. The 3 (6) bits above hold the other segments: the low bits of segments 5, 6 and 7 are in planes 0, 1 and 2; their
remaining 2 (4) bits are in planes 3 and 4. So an unpacked segment is contiguous, and no step moves single elements.
"""

from __future__ import annotations

import torch

SEGMENTS = 8
PLANES = 5
_WORDS = {1: torch.uint8, 2: torch.int16}


def pack(codes: torch.Tensor, *, together: int) -> torch.Tensor:
    """Pack a flat array of codes 0 to 31, whose length is a multiple of 64, into uint8 [5, codes / 8]."""
    if together == 2:
        codes = codes[0::2].to(torch.int32) | codes[1::2].to(torch.int32) << 5
    segments = codes.view(SEGMENTS, -1)
    low, lacking, half = 3 * together, 2 * together, together
    fifth, sixth, seventh = segments[5:]
    first, second = (sixth >> low) & (1 << half) - 1, sixth >> low + half
    above = torch.stack(
        [
            *(segment & (1 << low) - 1 for segment in (fifth, sixth, seventh)),
            (fifth >> low) | first << lacking,
            (seventh >> low) | second << lacking,
        ]
    )
    return (segments[:PLANES] | above << 5 * together).to(_WORDS[together]).view(torch.uint8)


def unpacked(packed: torch.Tensor, *, together: int) -> torch.Tensor:
    """The codes, uint8 [8, n], or pairs of codes (first + 32 second), int16 [8, n], from uint8 [5, ...], in order.

    Works on 64 bits at a time: shifts move bits from one word into the next, and the masks remove them.
    """
    words = packed.view(_WORDS[together])
    result = torch.empty(SEGMENTS, words.shape[1], dtype=words.dtype, device=words.device)
    planes, whole = words.view(torch.int64), result.view(torch.int64)
    each = (2**64 - 1) // (2 ** (8 * together) - 1)  # a one in every word

    def mask(start: int, bits: int) -> int:
        return ((1 << bits * together) - 1 << start * together) * each

    torch.bitwise_and(planes, mask(0, 5), out=whole[:PLANES])
    high, ends = whole[PLANES:], planes[3:]
    torch.bitwise_right_shift(planes[:3], 5 * together, out=high).bitwise_and_(mask(0, 3))
    high[::2] |= (ends >> 2 * together).bitwise_and_(mask(3, 2))
    high[1] |= (ends[0] >> 4 * together).bitwise_and_(mask(3, 1))
    high[1] |= (ends[1] >> 3 * together).bitwise_and_(mask(4, 1))
    return result


def unpack(packed: torch.Tensor, *, together: int) -> torch.Tensor:
    """The flat uint8 codes of a packed array."""
    result = unpacked(packed, together=together)
    return (
        result.view(-1) if together == 1 else torch.stack([result & 31, result >> 5], dim=-1).to(torch.uint8).view(-1)
    )

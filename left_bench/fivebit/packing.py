"""Five bits for five bits: 16 codes in five 16-bit words (8 in 5 bytes), laid out for whole-array operations.

A flat array of codes is cut into 8 segments. Column j of the packed array holds the j-th pair of codes, 10 bits, of
each segment. Words 0 to 4 carry the pairs of segments 0 to 4 in their low 10 bits; the pairs of segments 5 to 7 lie
in the five times 6 bits above. So an unpacked segment is contiguous, and no step moves single elements about.
"""

from __future__ import annotations

import torch

SEGMENTS = 8
WORDS = 5


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Pack a flat array of codes 0 to 31, a multiple of 16 of them, into uint8 [5, codes / 8]."""
    pairs = codes.view(SEGMENTS, -1, 2)
    index = pairs[..., 0].to(torch.int32) + (pairs[..., 1].to(torch.int32) << 5)
    low, fifth, sixth, seventh = index[:WORDS], index[5], index[6], index[7]
    high = torch.stack(
        [
            fifth & 63,
            sixth & 63,
            (fifth >> 6) | (seventh >> 6 & 3) << 4,
            (sixth >> 6) | (seventh >> 8) << 4,
            seventh & 63,
        ]
    )
    return (low | high << 10).to(torch.int16).view(torch.uint8)


def pair_indices(words: torch.Tensor) -> torch.Tensor:
    """What each pair of codes is: first + 32 * second, int16 [8, columns], from int16 words [5, columns]."""
    index = torch.empty(SEGMENTS, words.shape[1], dtype=torch.int16, device=words.device)
    torch.bitwise_and(words, 1023, out=index[:WORDS])
    high = (words >> 10).bitwise_and_(63)  # the shift keeps the sign, the mask drops it
    middle = high[2:4]
    torch.bitwise_or(high[:2], (middle & 15) << 6, out=index[5:7])
    top = middle >> 4
    torch.bitwise_or(high[4], (top[0] << 6).bitwise_or_(top[1] << 8), out=index[7])
    return index


def pair_codes(index: torch.Tensor) -> torch.Tensor:
    """The codes of pairs, in their order: a byte each, uint8 [8, 2 columns]. The bytes of little-endian int16."""
    return (index << 3).bitwise_and_(31 << 8).bitwise_or_(index & 31).view(torch.uint8)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The flat uint8 codes of a packed array."""
    return pair_codes(pair_indices(packed.view(torch.int16))).view(-1)

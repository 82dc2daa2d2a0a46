"""Amounts as people write them."""

from __future__ import annotations

import re

from left_bench.core.errors import UserError

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_BINARY = {"K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}


def parse_bytes(value: str | int, *, key: str) -> int:
    """`'6GiB'`, `'500MB'` or a number of bytes.

    Raises:
        UserError: not a size; names `key`.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?))?B?\s*", str(value), re.IGNORECASE)
    units = _BINARY if match and match[3] else _UNITS
    size = int(float(match[1]) * units[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise UserError(f"{key}={value!r}: not a memory size; write one like 6GiB or 500MB")
    return size

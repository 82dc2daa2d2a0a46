"""Amounts as people write them."""

from __future__ import annotations

import re

from left_bench.core.errors import UserError

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_BINARY = {"K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
_SECONDS = {"": 1, "s": 1, "min": 60, "h": 3600, "d": 86400}
_JOULES = {"": 1, "j": 1, "kj": 1e3, "mj": 1e6, "wh": 3600, "kwh": 3.6e6}


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


def parse_seconds(value: str, *, key: str) -> float:
    """`'90s'`, `'15min'`, `'2h'`, `'1d'` or a number of seconds.

    Raises:
        UserError: not a time; names `key`.
    """
    return _amount(value, _SECONDS, f"{key}={value!r}: not a time; write one like 90s, 15min or 2h")


def parse_joules(value: str, *, key: str) -> float:
    """`'5kJ'`, `'2MJ'`, `'0.5kWh'` or a number of joules.

    Raises:
        UserError: not an energy; names `key`.
    """
    return _amount(value, _JOULES, f"{key}={value!r}: not an energy; write one like 5kJ or 0.5kWh")


def _amount(value: str, units: dict[str, float] | dict[str, int], message: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*([a-z]*)\s*", value, re.IGNORECASE)
    unit = units.get(match[2].lower()) if match else None
    if match is None or unit is None or float(match[1]) * unit <= 0:
        raise UserError(message)
    return float(match[1]) * unit

"""Numbers and words of a record as text; every unit is spelled here and nowhere else."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from left_bench.spec.metric import Metric
from left_bench.spec.record import METRICS, find_metric

ABSENT = "\u2013"  # an en dash
COUNTED = frozenset(
    name for name, metric in METRICS.items() if metric.kind == "size" or metric.unit in ("params", "bits", "count")
) | {"weights_bytes", "reload_ok"}
"""Metrics that are counted and not measured: any difference is one."""
_TIMES, _MINUS = "\u00d7", "\u2212"
_BYTES = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))
_JOULES = (("MJ", 10**6), ("kJ", 10**3))
_FLOPS = (("TFLOP/s", 10**12), ("GFLOP/s", 10**9), ("MFLOP/s", 10**6), ("FLOP/s", 1))
_PARAMS = (("B", 10**9), ("M", 10**6), ("k", 10**3), ("", 1))
_SCALES = {"bytes": _BYTES, "params": _PARAMS, "joules": _JOULES}
# Controls, lone surrogates (JSON may hold them, UTF-8 may not) and marks that reverse the reading direction.
_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def is_number(value: float | None) -> bool:
    """Whether there is a value that can be ranked and drawn: neither missing, nor NaN, nor infinite."""
    return value is not None and math.isfinite(value)


def metric_of(name: str) -> Metric:
    """The metric's meaning; `base_<name>` reads like `<name>`; an unknown name is a plain number."""
    return find_metric(name) or Metric("", "none", "fact", "")


def format_value(metric: str, value: float | None) -> str:
    """One number of a record with its unit: `812 MiB`, `4.88 M`, `0.625`; `–` when it was not measured."""
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return str(value)
    value = value or 0.0  # minus zero is zero
    if value < 0:
        text = format_value(metric, -value)
        return _MINUS + text if any(digit in "123456789" for digit in text) else text
    unit = metric_of(metric).unit
    if unit == "bytes":
        return _scaled(value, _BYTES)
    if unit == "params":
        return _scaled(value, _PARAMS)
    if unit in ("fraction", "nats"):
        return _decimals(value)
    if unit == "count":
        return f"{value:,.0f}"
    if unit == "seconds":
        return f"{significant(value)} s"
    if unit == "watts":
        return f"{significant(value)} W"
    if unit == "joules":  # of a thousand tokens a fraction of one
        return _scaled(value, _JOULES) if value >= 999.5 else f"{significant(value)} J"
    return significant(value)


def format_error(metric: str, value: float, error: float) -> str:
    """A standard error in its value's unit, no digit finer than the value's: `0.09` beside `1.77`.

    An error too small for that keeps its own digits and unit: `591 KiB` beside `1.17 GiB`.
    """
    own = format_value(metric, error)
    if not (math.isfinite(value) and math.isfinite(error)):
        return own
    number, _, unit = format_value(metric, value).partition(" ")
    scaled = error / dict(_SCALES.get(metric_of(metric).unit, ())).get(unit, 1)
    decimals = min(len(text.partition(".")[2]) for text in (number, significant(scaled)))
    text = f"{scaled:,.{decimals}f}"
    return f"{text} {unit}".rstrip() if float(text.replace(",", "")) else own


def format_against(metric: str, value: float | None, baseline: float | None) -> str:
    """How a number stands to the baseline's: a signed difference of scores, else a ratio; empty where there is none."""
    if value is None or baseline is None or not (math.isfinite(value) and math.isfinite(baseline)):
        return ""
    if metric_of(metric).kind == "quality":
        return format_difference(value - baseline)
    if baseline <= 0:
        return ""
    return format_ratio(value / baseline)


def format_against_both(metric: str, value: float | None, baseline: float | None) -> str:
    """Difference and ratio to the baseline's: `+0.031, 1.06×`; empty where there is none."""
    if value is None or baseline is None or not (math.isfinite(value) and math.isfinite(baseline)):
        return ""
    if metric_of(metric).unit in ("fraction", "nats") or metric_of(metric).kind == "quality":
        difference = format_difference(value - baseline)
    else:
        sign = "+" if value > baseline else _MINUS if value < baseline else ""
        difference = sign + format_value(metric, abs(value - baseline))
    return f"{difference}, {format_ratio(value / baseline)}" if baseline > 0 and value >= 0 else difference


def format_ratio(ratio: float) -> str:
    """`0.64×`, `12.5×`."""
    plain = f"{ratio:.2f}" if 0.095 <= ratio < 9.995 else significant(ratio, digits=2 if ratio < 1 else 3)
    return plain + _TIMES


def format_difference(difference: float) -> str:
    """`+0.050`, `−0.012`; `0.000` for what rounds to nothing."""
    text = f"{abs(difference):.3f}"
    sign = "" if float(text) == 0 else "+" if difference > 0 else _MINUS
    return sign + text


def format_interval(ends: Iterable[float]) -> str:
    """A difference's interval: `−0.110, +0.070`."""
    return ", ".join(map(format_difference, ends))


def format_flops(lowest: float, highest: float) -> str:
    """A speed of computing, or a range of them: `442 GFLOP/s`, `210 GFLOP/s to 442 GFLOP/s`."""
    return " to ".join(dict.fromkeys(_scaled(value, _FLOPS) for value in (lowest, highest)))


def format_share(part: float | None, whole: float | None) -> str:
    """`part` of `whole` in percent: `3.51%`; empty where either is missing."""
    if part is None or not whole or not math.isfinite(part / whole):
        return ""
    share = 100 * part / whole
    return "100%" if share == 100 else f"{significant(share)}%"


def format_setting(value: Any) -> str:
    """One setting of a configuration: `8`, `0.0002`, `on`, `q_proj, v_proj`; `–` for None."""
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(format_setting(part) for part in value)
    return one_line(value)


def significant(value: float, *, digits: int = 3) -> str:
    """`digits` significant figures, thousands grouped, never an exponent: `1,234`, `45.6`, `0.0036`."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")  # 99.96 is 100, and counts its digits as 100 does
    decimals = digits - 1 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{decimals}f}" if decimals >= 0 else f"{value:,.0f}"


def clean(text: object) -> str:
    """Text that can be printed: controls but tab and newline, lone surrogates and direction marks become spaces."""
    return _UNPRINTABLE.sub(" ", str(text))


def one_line(text: object, *, limit: int | None = None) -> str:
    """Clean text on one line, cut to `limit` characters with an ellipsis."""
    line = " ".join(clean(text).split())
    return line if limit is None or len(line) <= limit else line[: limit - 1].rstrip() + "…"


def _scaled(value: float, scale: tuple[tuple[str, int], ...]) -> str:
    for unit, size in scale:
        # 999.7 k would be printed as 1,000 k: step up to the larger unit just before it
        if abs(value) >= size * 0.9995 or size == 1:
            text = significant(value / size) if size > 1 else f"{value:.0f}"
            return f"{text} {unit}".rstrip()
    raise AssertionError(scale)


def _decimals(value: float) -> str:
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else significant(value, digits=2)

"""Whom it hurts where some cells train weights in 16 bits and others in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from left_bench.report.cells import Row

_LISTED = 12


def without_master_weights(row: Row) -> bool:
    """Whether what the row trains is held in 16 bits alone: small updates are then lost in rounding."""
    dtypes = str(row.noted("effective").get("trainable_dtype", "")).split("+")
    return all(dtype in ("bfloat16", "float16") for dtype in dtypes)


def has_master_weights(row: Row) -> bool:
    return str(row.noted("effective").get("trainable_dtype", "")) == "float32"


def whom_rounding_hurts(rows: Sequence[Row], names: Mapping[int, str]) -> str | None:
    """One sentence where some rows train in 16 bits without a float32 copy and others in float32; else None."""
    done = [row for row in rows if row.ok]
    hurt = [row for row in done if without_master_weights(row)]
    spared = [row for row in done if has_master_weights(row)]
    if not hurt or not spared:
        return None
    dtypes = " and ".join(sorted({str(row.noted("effective")["trainable_dtype"]) for row in hurt}))
    return (
        f"Trained in {dtypes} without a float32 master copy: {_listed(hurt, names)}; in float32: "
        f"{_listed(spared, names)}. Rounding takes small updates from the first and none from the others, so this "
        f"comparison is unfair to {_listed(hurt, names)}; under precision=bf16_mixed all of them train float32 weights"
    )


def _listed(rows: Sequence[Row], names: Mapping[int, str]) -> str:
    more = len(rows) - _LISTED
    return ", ".join(names[id(row)] for row in rows[:_LISTED]) + (f" and {more:,} more" if more > 0 else "")

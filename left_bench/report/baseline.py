"""The row that the others are compared with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from left_bench.core.errors import UserError, nearest
from left_bench.report.cells import Row, settings
from left_bench.report.values import format_setting


def find_baseline(rows: Sequence[Row], selector: str | None = None) -> Row | None:
    """The row that the others are held against; None where none is ok.

    Args:
        selector: a cell id or the beginning of one, or settings as `peft=lora` or `quantization=none,peft=full`
            (the first ok row that has them all). None: unquantized full fine-tuning, else the first ok row.

    Raises:
        UserError: the selector fits no row, several ids, or only rows that are not ok.
    """
    if selector is not None:
        return _selected(rows, selector)
    done = [row for row in rows if row.ok]
    full = [row for row in done if _choice(row, "peft") == "full" and _choice(row, "quantization") in ("none", None)]
    return next(iter(full + done), None)


def _selected(rows: Sequence[Row], selector: str) -> Row:
    wanted = dict(part.partition("=")[::2] for part in selector.split(",")) if "=" in selector else None
    if wanted is None:
        ids = list(dict.fromkeys(run.cell_id for row in rows for run in row.runs))
        fitting = [selector] if selector in ids else [cell_id for cell_id in ids if cell_id.startswith(selector)]
        if not selector or not fitting:
            known = [*ids, *sorted({option for row in rows if row.record for option in row.record.choices.values()})]
            raise UserError(f"--baseline {selector}: no cell has an id that begins so{nearest(selector, known)}")
        if len(fitting) > 1:
            raise UserError(f"--baseline {selector}: {len(fitting)} ids begin so, {fitting[0]} and {fitting[1]} too")
        results = [row for row in rows if any(run.cell_id == fitting[0] for run in row.runs)]
    else:
        results = [row for row in rows if row.record]
        for key, value in ((key.strip(), value.strip()) for key, value in wanted.items()):
            known = sorted({name for row in results for name in settings(row)})
            if key not in known:
                raise UserError(f"--baseline {selector}: the cells have no setting '{key}'{nearest(key, known)}")
            texts = {format_setting(settings(row).get(key)) for row in results}
            results = [row for row in results if value in _spellings(settings(row).get(key))]
            if not results:
                raise UserError(f"--baseline {selector}: no cell has {key}={value}{_among(value, texts)}")
    done = [row for row in results if row.ok]
    if not done:
        raise UserError(f"--baseline {selector}: {results[0].cell_id} is {results[0].status}; choose a cell that is ok")
    return done[0]


def _spellings(value: Any) -> tuple[str, ...]:
    """A setting as reports print it and as it is typed on the command line."""
    return format_setting(value), str(value), "null" if value is None else str(value).lower()


def _among(value: str, known: Iterable[str]) -> str:
    return nearest(value, known) or f"; there is {', '.join(sorted(known)[:8])}"


def _choice(row: Row, group: str) -> str | None:
    return row.record.choices.get(group) if row.record else None

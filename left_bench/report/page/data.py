"""Rows -> the one block of JSON that the page's script reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from left_bench.report.axes import Axis
from left_bench.report.bands import AXIS_NAMES, Band, axes_told, band_of, loss_band, metrics_told
from left_bench.report.cells import Row, settings
from left_bench.report.curves import curves_of
from left_bench.report.headings import heading
from left_bench.report.judgement import Family
from left_bench.report.leaderboard import axis_blocks, reference_of
from left_bench.report.ranking import (
    COST,
    ENERGY,
    MEMORY_AND_SIZE,
    QUALITY,
    SPEED,
    best_rows,
    comparable,
    family_of,
    headline_quality,
    present,
    qualities,
    rankable,
    standing,
    yardstick,
)
from left_bench.report.rates import tuned_of
from left_bench.report.recommend import pareto_set, recommend
from left_bench.report.report import Report
from left_bench.report.sensitivity_plot import line_of
from left_bench.report.styles import row_styles
from left_bench.report.tables import told_against
from left_bench.report.values import (
    clean,
    format_against,
    format_error,
    format_setting,
    format_share,
    format_value,
    is_number,
    metric_of,
    one_line,
)
from left_bench.spec.record import METRICS

DETAILED_CELLS = 1000
"""Cells whose answers and logs are in the page, and that are judged beside the baseline; more would be slow."""
COLUMNS = (*QUALITY, *MEMORY_AND_SIZE, *SPEED, *ENERGY, *COST)
CURVES = 200
CURVE_POINTS = 100
_SAMPLES, _TEXT_LIMIT, _LOG_LIMIT = 4, 600, 4000
_SCALES = {
    "bytes": ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")),
    "joules": ((10**6, "MJ"), (10**3, "kJ"), (1, "J")),
    "watts": ((1, "W"),),
    "money": ((1, ""),),
    "params": ((10**9, "billion"), (10**6, "million"), (10**3, "thousand"), (1, "")),
}
_PARTS = (
    *("weights", "adapter", "adapter_frozen", "gradients", "optimizer", "activations", "workspace"),
    "activations_and_workspace",
)


class _Strings(dict[str, int]):
    """Every text of the page once, by number: thousands of cells repeat the same few."""

    def __missing__(self, text: str) -> int:
        self[text] = len(self)
        return self[text]


def page_data(
    rows: Sequence[Row], *, axes: Sequence[Axis], labels: Sequence[str], baseline: Row | None
) -> dict[str, Any]:
    """Everything the script shows, column by column; whatever is text is a number, its place in `strings`.

    Numbers stand beside their formatted text, so that units are written in one place only. What was not measured, is
    not finite or does not exist is null.
    """
    strings = _Strings()

    def put(value: object) -> int:
        return strings[one_line(value)]

    report = Report(name="", rows=rows, axes=axes, labels=labels, baseline=baseline)
    same, told = _settings(rows)
    metrics = [_metric(rows, name, baseline, put) for name in _metric_names(rows)]
    shown = present(rows, (*qualities(rows), *COLUMNS[len(QUALITY) :]))
    parts = _parts(rows)
    main = [name for name in (headline_quality(rows), "peak_memory_bytes", "train_tokens_per_second") if name]
    return {
        "cells": len(rows),
        "ids": [put(row.cell_id) for row in rows],
        "labels": [put(label) for label in labels],
        "ok": [row.ok for row in rows],
        "status": [put(status_of(row)) for row in rows],
        "reasons": [_reason(row, put) for row in rows],
        "commands": [_command(row, put) for row in rows],
        "baseline": next((i for i, row in enumerate(rows) if row is baseline), None) if len(rows) > 1 else None,
        "axes": [
            {"key": put(axis.key), "heading": put(axis.heading), "values": [put(value) for value in axis.values]}
            for axis in axes
        ],
        "metrics": metrics,
        "shown": shown,
        "main": main,
        **_standing(rows, main, put),
        "sets": _pareto_sets(rows, main),
        "styles": [list(style) for style in row_styles(rows)],
        "by_axis": _by_axis(report, main, put) if len(rows) <= DETAILED_CELLS else [],
        "parts": [put(part.replace("_", " ")) for part in parts],
        "memory": [_memory(row, parts, put) for row in rows],
        "curves": _curves(rows),
        "along": _along(rows, put),
        "rates": _rates(rows),
        "constants": [[put(key), put(format_setting(value))] for key, value in same.items()],
        "details": [
            _detail(row, own, put, strings, full=i < DETAILED_CELLS, main=main)
            for i, (row, own) in enumerate(zip(rows, told, strict=True))
        ],
        "strings": list(strings),  # last: the other entries fill it
    }


def runs_of(row: Row) -> tuple[Row, ...]:
    """The single runs behind a row: itself, or one for each seed that it was pooled from."""
    return getattr(row, "members", ()) or (row,)


def status_of(row: Row) -> str:
    """The status as a word: `ok`, `OOM`, `2 of 3 ok`."""
    runs = runs_of(row)
    done = sum(run.ok for run in runs)
    if row.ok and done < len(runs):
        return f"{done} of {len(runs)} ok"
    return "OOM" if row.status == "oom" else row.status


def _reason(row: Row, put: Callable[[object], int]) -> int | None:
    failed = next((run for run in runs_of(row) if not run.ok), None)
    return None if failed is None else put(failed.reason or "no reason was recorded")


def _metric_names(rows: Sequence[Row]) -> list[str]:
    """Every metric that some row has; the columns a report shows come first, then the others as METRICS lists them."""
    known = {name: None for row in rows for run in runs_of(row) if run.record for name in run.record.metrics}
    order = [*qualities(rows), *COLUMNS, *METRICS]
    places = {name: place for place, name in reversed(list(enumerate(order)))}

    def place(name: str) -> tuple[bool, int, str]:
        plain = name.removeprefix("base_")
        return plain not in places or name != plain, places.get(plain, len(order)), name

    return [name for name in sorted(known, key=place) if any(row.value(name) is not None for row in rows)]


def _metric(rows: Sequence[Row], name: str, baseline: Row | None, put: Callable[[object], int]) -> dict[str, Any]:
    meaning = metric_of(name)
    values = [row.value(name) for row in rows]
    numbers = [_number(value) for value in values]
    best = {id(row) for row in best_rows(rows, name)}
    # what is the same under every seed has no error worth a place
    errors = [error if (error := row.stderr(name)) or meaning.kind == "quality" else None for row in rows]
    size, unit = _scale(meaning.unit, [abs(number) for number in numbers if number is not None])
    column: dict[str, Any] = {
        "name": one_line(name),
        "heading": one_line(_heading(name)),
        "kind": meaning.kind,
        "better": meaning.better,
        "meaning": meaning.meaning + (", before training" if name.startswith("base_") else ""),
        "unit": unit,
        "scale": size,
        "numbers": numbers,
        "texts": [
            None if value is None else put(_text(name, value, row)) for row, value in zip(rows, values, strict=True)
        ],
        "best": [i for i, row in enumerate(rows) if id(row) in best],
    }
    if any(error is not None for error in errors):
        column["errors"] = [_number(error) for error in errors]
        column["error_texts"] = [
            None if error is None or value is None else put(format_error(name, value, error))
            for value, error in zip(values, errors, strict=True)
        ]
    if meaning.better != "none" and not name.startswith("base_") and (result := standing(rows, name)):
        unresolved = {id(row) for row, against in result.unresolved if against.interval is not None} - best
        column["unresolved"] = [i for i, row in enumerate(rows) if id(row) in unresolved]
    if baseline is not None and len(rows) > 1 and not name.startswith("base_"):
        judged = len(rows) <= DETAILED_CELLS and (name in COLUMNS or meaning.kind == "quality")
        family = family_of(rows, name) if judged else None
        column["against"] = [_against(row, baseline, name, put, family) for row in rows]
    if not rankable(rows, name):
        # rows of two groups are not to be ranked with each other
        groups: dict[Any, int] = {}
        column["groups"] = [groups.setdefault(yardstick(row, name), len(groups)) if row.ok else None for row in rows]
    return column


def _heading(name: str) -> str:
    plain = heading(name.removeprefix("base_"))
    plain = plain.replace("_", " ") if plain == name.removeprefix("base_") else plain
    return f"{plain} before training" if name.startswith("base_") else plain


def _text(name: str, value: float, row: Row) -> str:
    text = format_value(name, value)
    share = format_share(value, row.value("total_params")) if name == "trainable_params" else ""
    return f"{text}, {share}" if share else text


def _against(row: Row, baseline: Row, name: str, put: Callable[[object], int], family: Family | None) -> int | None:
    if family is not None:  # judged: only where a reader looks
        text = told_against(row, baseline, name, family)
    elif row is baseline or not row.ok or not comparable(row, baseline, name):
        text = ""
    else:
        text = format_against(name, row.value(name), baseline.value(name))
    return put(text) if text else None


def _number(value: float | None) -> float | int | None:
    """A number as JSON can hold it; seven figures are more than any measurement here has."""
    if value is None or not is_number(value):
        return None
    return int(value) if float(value).is_integer() and abs(value) < 2**53 else float(f"{value:.7g}")


def _scale(unit: str, sizes: Sequence[float]) -> tuple[int, str]:
    """What an axis of these numbers is counted in: (1048576, "MiB")."""
    steps = _SCALES.get(unit, ((1, unit if unit not in ("fraction", "count") else ""),))
    return next((step for step in steps if max(sizes, default=0) >= step[0]), steps[-1])


def _command(row: Row, put: Callable[[object], int]) -> int | None:
    command = row.record.provenance.get("command") if row.record else None
    return put(command) if command else None


def _parts(rows: Sequence[Row]) -> list[str]:
    results = {part for row in rows for breakdown in _breakdowns(row) for part, size in breakdown.items() if size > 0}
    return [*(part for part in _PARTS if part in results), *sorted(results - set(_PARTS))]


def _breakdowns(row: Row) -> list[dict[str, int]]:
    return [
        run.record.memory_breakdown for run in runs_of(row) if run.record and run.ok and run.record.memory_breakdown
    ]


def _memory(row: Row, parts: Sequence[str], put: Callable[[object], int]) -> list[list[int]] | None:
    """(bytes, as text) of every part and of all; means over the seeds, null where the parts are not known."""
    result = _breakdowns(row)
    if not result:
        return None
    sizes = [round(sum(max(0, breakdown.get(part, 0)) for breakdown in result) / len(result)) for part in parts]
    if sum(sizes) <= 0:
        return None
    return [[size, put(format_value("peak_memory_bytes", size))] for size in (*sizes, sum(sizes))]


def _standing(rows: Sequence[Row], main: Sequence[str], put: Callable[[object], int]) -> dict[str, Any]:
    """Each row's place in the first metric, and whether it is of the Pareto set over all of `main`."""
    result = standing(rows, main[0]) if main else None
    places = [None if result is None else result.places.get(id(row)) for row in rows]
    advice = recommend(rows) if len(rows) > 1 else None
    front = advice.front if advice else {}
    shares = [front.get(id(row)) for row in rows]
    return {
        "places": places,
        "pareto": [put("yes" if id(row) in front else "no") for row in rows] if front else None,
        "pareto_texts": [
            None if id(row) not in front else put("yes" if share is None else f"{share:.0%}")
            for row, share in zip(rows, shares, strict=True)
        ],
    }


def _pareto_sets(rows: Sequence[Row], main: Sequence[str]) -> dict[str, list[int]]:
    """For each cost the rows of the Pareto set over the first metric and it: what the scatter marks."""
    result: dict[str, list[int]] = {}
    for cost in (*main[1:], "trainable_params") if metric_of(main[0]).kind == "quality" else ():
        drawn = [row for row in rows if row.ok and all(is_number(row.value(metric)) for metric in (main[0], cost))]
        if len(drawn) > 1 and all(rankable(drawn, metric) for metric in (main[0], cost)):
            members = pareto_set(drawn, [main[0], cost])
            result[cost] = [i for i, row in enumerate(rows) if id(row) in members]
    return result


def _by_axis(report: Report, main: Sequence[str], put: Callable[[object], int]) -> list[dict[str, Any]]:
    """The rows that differ in one axis alone, each block with its reference, and how the others stand to that."""
    numbers = {id(row): i for i, row in enumerate(report.rows)}
    tables = []
    for group, own, _, blocks in axis_blocks(report):
        listed = []
        for block in blocks:
            reference = reference_of(report, own, block)
            against = {
                name: [
                    put(text) if (text := told_against(row, reference, name, report.family(name))) else None
                    for row in block
                ]
                for name in main
            }
            listed.append(
                {
                    "rows": [numbers[id(row)] for row in block],
                    "reference": None if reference is None else numbers[id(reference)],
                    "against": against,
                }
            )
        tables.append({"axis": put(group), "blocks": listed})
    return tables


def _curves(rows: Sequence[Row]) -> list[list[Any]]:
    """(row, steps, smoothed training loss, lowest and highest of the seeds) of the first cells that have a curve."""
    result: list[list[Any]] = []
    for i, row in enumerate(rows):
        if len(result) == CURVES:
            break
        band = loss_band(row)
        if band is not None:
            steps = [*map(int, band.at)]
            thinned, means = thin_out(steps, band.mean)
            ends = [thin_out(steps, values)[1] for values in (band.low, band.high)] if band.is_wide else []
            result.append([i, thinned, means, *ends])
    return result


def _along(rows: Sequence[Row], put: Callable[[object], int]) -> dict[str, Any] | None:
    """Validation loss and scores along training, by each axis that may be compared; None where no cell has a curve."""
    drawn = [(i, row) for i, row in enumerate(rows) if any(len(curve) > 1 for curve in curves_of(row))][:CURVES]
    told = [row for _, row in drawn]
    axes, metrics = axes_told(told), metrics_told(told)
    if not drawn or not metrics:
        return None
    lines = [
        [[i, *_line(band)] for i, row in drawn if (band := band_of(row, axis, metric)) is not None]
        for metric in metrics
        for axis in axes
    ]
    return {
        "metrics": [[metric, put(_heading(metric)), metric_of(metric).better] for metric in metrics],
        "axes": [[axis, put(AXIS_NAMES[axis])] for axis in axes],
        "lines": lines,
    }


def _line(band: Band) -> list[list[float]]:
    """Places, means and, where the seeds differ, the lowest and the highest."""
    kept = (band.at, band.mean, *((band.low, band.high) if band.is_wide else ()))
    return [[float(f"{value:.5g}") for value in values] for values in kept]


def _rates(rows: Sequence[Row]) -> list[list[Any]]:
    """Of each tuned row its number, the trials as [rate, loss], which of them was chosen, and rates that diverged."""
    result: list[list[Any]] = []
    for i, row in enumerate(rows):
        tuned = tuned_of(row)
        if len(result) == CURVES or tuned is None or len(points := line_of(tuned)) < 2:
            continue
        chosen = next((n for n, point in enumerate(points) if point.rate == tuned.rate), None)
        diverged = [point.rate for point in tuned.points if point.ended == "diverged"]
        result.append([i, [[point.rate, point.loss] for point in points], chosen, diverged])
    return result


def thin_out(steps: Sequence[int], losses: Sequence[float]) -> tuple[list[int], list[float]]:
    """At most `CURVE_POINTS` points: the last step and the mean loss of stretches of equal length."""
    width = -(-len(steps) // CURVE_POINTS)
    starts = range(0, len(steps), width)
    means = [sum(part := losses[start : start + width]) / len(part) for start in starts]
    return [steps[min(start + width, len(steps)) - 1] for start in starts], [float(f"{mean:.4g}") for mean in means]


def _settings(rows: Sequence[Row]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings that all records share, and what each row has beside them; None is no setting."""
    flat = [settings(row) for row in rows]
    known = [item for item in flat if item]
    first = known[0] if known else {}
    missing = object()
    same = {key: value for key, value in first.items() if all(item.get(key, missing) == value for item in known)}
    if any(len(runs_of(row)) > 1 for row in rows):  # then a row stands for several seeds, whatever its record says
        same.pop("seed", None)
        flat = [{key: value for key, value in item.items() if key != "seed"} for item in flat]
    own = [{key: value for key, value in item.items() if key not in same and value is not None} for item in flat]
    return {key: value for key, value in same.items() if value is not None}, own


def _detail(
    row: Row, own: dict[str, Any], put: Callable[[object], int], strings: _Strings, *, full: bool, main: Sequence[str]
) -> dict[str, Any] | None:
    """What the page tells of one cell alone. Of a row over several seeds it is one seed's, and every seed is listed."""
    record = row.record
    if record is None:
        return None

    def text(value: object, limit: int) -> int:
        cleaned = clean(value).strip("\n")
        return strings[cleaned if len(cleaned) <= limit else cleaned[: limit - 1] + "…"]

    detail: dict[str, Any] = {
        "settings": [[put(key), put(format_setting(value))] for key, value in own.items()],
        "effective": [[put(key), put(format_setting(value))] for key, value in row.noted("effective").items()],
        "when": put(f"{record.started_at} to {record.finished_at}, attempt {record.attempt}"),
        "phases": [
            [
                put(phase.name),
                put(format_value("load_seconds", phase.seconds)),
                put(format_value("peak_memory_bytes", phase.peak_memory_bytes)),
            ]
            for phase in record.phases
        ],
    }
    if row.machine:
        detail["machine"] = put(row.machine)
    if len(runs := runs_of(row)) > 1:
        detail["seed"] = put(record.config.get("seed"))
        detail["runs"] = [
            [
                put(run.record.config.get("seed") if run.record else run.cell_id),
                put(status_of(run)),
                *(put(format_value(name, run.value(name))) for name in main),
                _command(run, put),
            ]
            for run in runs
        ]
    if not full:
        return detail
    if row.scored:
        detail["samples"] = [
            [
                None if part is None else text(part, _TEXT_LIMIT)
                for part in (sample.prompt, sample.reference, sample.base_prediction, sample.prediction)
            ]
            for sample in record.samples[:_SAMPLES]
        ]
    if tail := record.provenance.get("log_tail"):
        detail["log"] = text(clean(tail)[-_LOG_LIMIT:], _LOG_LIMIT)
    return detail

"""What differs between the rows beside the thing compared, and which kind of metric it may explain."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from left_bench.measure.cpu_contention import DISTURBED
from left_bench.report.cells import Row, machines_of, peaks_of
from left_bench.report.ranking import PER_TOKEN, TIME, effective_value, present, qualities, rankable
from left_bench.report.values import format_flops, format_setting, one_line

# Keys that change what a step costs, or what it learns from: they are named wherever the rows differ in them.
_LAYOUT = (
    "training.batching",
    "training.batch_size",
    "training.gradient_accumulation",
    "training.max_length",
    "training.activation_checkpointing",
    "training.steps",
    "hardware.threads",
)
_LISTED = 12  # cells named one by one
# What a difference in a setting may change; every kind where it is not here.
_TOUCHES = {
    "training.steps": ("quality", *TIME),
    "hardware.threads": TIME,
    "threads": TIME,
    "processes": ("memory", *TIME),
    "batching": ("memory", *TIME),
    "training.batching": ("memory", *TIME),
    "training.activation_checkpointing": ("memory", *TIME),
    "attention": ("memory", *TIME),
    "five_bit_decoder": ("memory", *TIME),
    "output_head": ("memory", *TIME),
    "output_head_fallback": ("memory", *TIME),
    "kernels": ("memory", *TIME),
    "training.kernels": ("memory", *TIME),
    "peak_memory": ("memory",),
    "energy": ("energy", "cost"),
    "power limit (W)": TIME,
    "machine": TIME,
    "other processes": TIME,
    "peak": TIME,
    "model_flops_utilization": ("speed",),
    "learning_rate": ("quality",),
    "trainable_dtype": ("quality", "memory"),
    "optimizer_state_dtype": ("quality", "memory"),
    "held-out rows": ("quality",),
    "eval_loss": ("quality",),
    "eval_perplexity": ("quality",),
    "forgetting_nats": ("quality",),
}
_PEAKS_APART = 1.3
"""Measured peaks of one dtype are told where the highest is more than so many times the lowest."""
# precision and quantization have columns of their own; merging comes after everything that is compared; weights from
# the cache are the same bits, and loading is measured apart
_NO_CONFOUNDERS = {"weights_dtype", "merge", "rank_peak_memory_bytes", "weights_from"} | {
    # told in words of their own
    *("peak_flops_per_second", "peak_other_cpu_share", "utilization_withheld"),
}


def touching(pairs: Sequence[tuple[str, str]], kind: str) -> list[tuple[str, str]]:
    """Those confounders that may explain a difference in a kind of metric: `quality`, `memory`, `speed`, …"""
    return [(what, how) for what, how in pairs if kind in _TOUCHES.get(what, (kind,))]


def confounders(rows: Sequence[Row], names: Mapping[int, str]) -> list[tuple[str, str]]:
    """What differs beside the thing compared, as (what, how): layout, machine, kernels, unfulfilled requests, notes.

    Args:
        names: `id(row)` -> the row's label.
    """
    names = {id(run): _run_name(run, row, names[id(row)]) for row in rows for run in row.runs} | dict(names)
    whole = {id(run): row for row in rows for run in row.runs}
    runs = [run for row in rows for run in row.runs if run.record]
    done = [run for run in runs if run.ok]
    result: list[tuple[str, str]] = []

    def differing(what: str, having: list[Row], values: list[Any]) -> list[tuple[str, str]]:
        """The values, each with its cells: by their row's name where all its runs have it."""
        texts = [format_setting(value) for value in values]
        if len(set(texts)) < 2:
            return []
        told = [f"{text}: {_listed(_rejoined(group, having, whole), names)}" for text, group in _grouped(having, texts)]
        return [(what, "; ".join(told))]

    for key in _LAYOUT:
        section, _, leaf = key.partition(".")
        result += differing(key, runs, [run.section(section).get(leaf) for run in runs])
    asked = {what.rpartition(".")[2] for what, _ in result}
    for key in dict.fromkeys(key for run in done for key in run.noted("effective")):
        if key not in asked and key not in _NO_CONFOUNDERS:
            having = [run for run in done if key != "five_bit_decoder" or _five_bits(run)]
            result += differing(key, having, [effective_value(run, key) for run in having])
    result += differing("torch version", done, [run.noted("versions").get("torch") for run in done])
    having = [run for run in done if "gpu" in run.noted("machine")]
    result += differing("power limit (W)", having, [_power_limit(run) for run in having])
    if len(machines_of(runs)) > 1:
        [(_, how)] = differing("", runs, [run.machine for run in runs])
        result.append(("machine", f"{how}. Speed is not ranked across machines"))
    disturbed = [(run, share) for run in done if (share := run.value("other_cpu_share") or 0) > DISTURBED]
    if disturbed:
        shares = "; ".join(f"{100 * share:.0f} %: {names[id(run)]}" for run, share in disturbed[:_LISTED])
        shares += f"; and {len(disturbed) - _LISTED:,} more" if len(disturbed) > _LISTED else ""
        how = f"took CPU time while a cell trained, which makes its speed too low ({shares})"
        result.append(("other processes", how))
    result += [("peak", how) for how in _unlike_peaks(done, names)]
    withheld = [(run, one_line(why)) for run in runs if (why := run.noted("effective").get("utilization_withheld"))]
    for why, group in _grouped([run for run, _ in withheld], [why for _, why in withheld]):
        result.append(("model_flops_utilization", f"left out, because {why} ({_listed(group, names)})"))
    rows = [row for row in rows if row.record]
    scores = [name for name in present(rows, qualities(rows)) if not rankable(rows, name)]
    if any(name not in PER_TOKEN for name in scores):
        result.append(("held-out rows", "the cells were scored on different rows: their scores are not ranked"))
    elif scores:
        result.append((scores[0], "the cells differ in model or held-out rows: losses per token are not ranked"))
    result += _unfulfilled(done, whole, names)
    notes = [(run, note) for run in runs for note in _notes(run)]
    for note, group in _grouped([run for run, _ in notes], [note for _, note in notes]):
        listed = _listed(_rejoined(group, runs, whole), names)
        result.append(("note", f"{note} ({'all cells' if len(group) == len(runs) else listed})"))
    return result


def _unlike_peaks(runs: Sequence[Row], names: Mapping[int, str]) -> Iterator[str]:
    """Where the machine was not equally fast for all cells, by the matrix products that each cell's peak is of."""
    for dtype, peaks in peaks_of(runs).items():
        (lowest, slow), (highest, fast) = (pick(peaks, key=lambda peak: peak[0]) for pick in (min, max))
        if highest > _PEAKS_APART * lowest:
            yield (
                f"matrix products in {dtype} ran at {format_flops(highest, highest)} for {names[id(fast)]} and at "
                f"{format_flops(lowest, lowest)} for {names[id(slow)]}: the machine was not equally fast for all cells "
                f"(up to {highest / lowest:.2g} times)"
            )


def _run_name(run: Row, row: Row, name: str) -> str:
    return name if run is row or len(row.runs) == 1 else f"{name} seed {run.seed}"


def _rejoined(group: Sequence[Row], having: Sequence[Row], whole: Mapping[int, Row]) -> list[Row]:
    """The runs of a group, and in their place the row that all of them belong to where the group has them all."""
    size = Counter(id(whole[id(run)]) for run in having)
    here = Counter(id(whole[id(run)]) for run in group)
    joined = {id(row): row for run in group if here[id(row := whole[id(run)])] == size[id(row)]}
    return list({id(item): item for run in group if (item := joined.get(id(whole[id(run)]), run))}.values())


def _unfulfilled(rows: list[Row], whole: Mapping[int, Row], names: Mapping[int, str]) -> list[tuple[str, str]]:
    """Effective values that are not what was asked for."""
    result: list[tuple[Row, str]] = []
    for row in rows:
        for key, effective in row.noted("effective").items():
            if key == "weights_dtype" and row.section("quantization").get("_target_"):
                continue  # quantized weights are stored in their own type
            if key in ("output_head", "kernels") and str(effective).startswith(str(row.section("training").get(key))):
                continue  # what was found is told in more words
            asked = next(
                (row.section(part)[key] for part in ("training", "precision", "hardware") if key in row.section(part)),
                None,
            )
            if asked is not None and not _same(asked, effective):
                result.append((row, f"{key}: asked for {format_setting(asked)}, got {format_setting(effective)}"))
    groups = _grouped([row for row, _ in result], [text for _, text in result])
    return [("not as asked", f"{text} ({_listed(_rejoined(group, rows, whole), names)})") for text, group in groups]


def _power_limit(row: Row) -> Any:
    gpu = row.noted("machine")["gpu"]
    return gpu.get("power_limit_watts") if isinstance(gpu, dict) else None


def _five_bits(row: Row) -> bool:
    return str(row.section("quantization").get("_target_")).startswith("left_bench.fivebit.")


def _same(asked: Any, effective: Any) -> bool:
    numbers = all(isinstance(value, (int, float)) for value in (asked, effective))
    return math.isclose(asked, effective, rel_tol=1e-6) if numbers else asked == effective


def _notes(row: Row) -> list[str]:
    notes = row.record.provenance.get("notes") if row.record else None
    return list(dict.fromkeys(map(one_line, notes))) if isinstance(notes, list) else []


def _grouped(rows: Sequence[Row], values: Sequence[str]) -> list[tuple[str, list[Row]]]:
    groups: dict[str, list[Row]] = {}
    for row, value in zip(rows, values, strict=True):
        groups.setdefault(value, []).append(row)
    return list(groups.items())


def _listed(rows: Sequence[Row], names: Mapping[int, str]) -> str:
    more = len(rows) - _LISTED
    listed = ", ".join(names[id(row)] for row in (rows[:_LISTED] if more > 1 else rows))
    return f"{listed} and {more:,} more" if more > 1 else listed

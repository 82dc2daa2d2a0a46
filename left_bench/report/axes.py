"""The label columns that tell rows apart, and a short name for each row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from left_bench.report.cells import Row, machines_of
from left_bench.report.frame import FlatSections, flat_section
from left_bench.report.values import ABSENT, format_setting, one_line
from left_bench.spec.cell import GROUPS, slugify

_ID_GROUPS = ("model", "quantization", "peft", "precision", "data")  # the parts of a cell id, see Cell.id
# Labels, what another key has taken over, and where a file happens to lie: none of them tells two cells apart.
_NOT_AN_AXIS = ("peft.learning_rate", "hardware.timeout", "data.path", "model.wheel.")
# A section's key that another group's option decides when it is left open, see Cell.from_config.
_DECIDED_BY = {
    "training.learning_rate": "peft",
    "eval.metrics": "data",
    "eval.max_new_tokens": "data",
    "quantization.config.bnb_4bit_compute_dtype": "precision",
    "quantization.config.compute_dtype": "precision",
    **dict.fromkeys(("peft.config.total_step", "peft.config.tinit", "peft.config.tfinal"), "training"),
}


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A setting in which the rows differ: a label column."""

    key: str
    """As on the command line: `peft`, `peft.config.r`, `seed`; or `machine`, `cell`."""
    heading: str
    values: tuple[str, ...]
    """One per row; a dash where the cell has no such setting."""


# A value chosen by tuning belongs to its method: tuned rows do not differ by it.
_TUNED = "training.learning_rate"
_TUNED_WITH_SIZES = tuple(
    f"peft.config.{key}"
    for key in (
        *("r", "init_r", "target_r", "lora_alpha", "alpha"),
        *("num_virtual_tokens", "adapter_len", "n_frequency"),
    )
)


def find_axes(rows: Sequence[Row]) -> list[Axis]:
    """The label columns that tell the rows apart.

    They are the choices that vary, the seed, and the configuration's leaves that vary although the choices do not
    (`peft.config.r` in a sweep over ranks). A leaf that follows from an option, as `peft.config.r` does where only
    LoRA has one, is explained by that option's column.
    """
    choices = _choices(rows)
    groups = sorted({group for row in choices for group in row}, key=lambda g: (_place(g), g))
    varying = [group for group in groups if len({row[group] for row in choices if group in row}) > 1]
    columns = {group: [row.get(group) for row in choices] for group in varying}
    columns |= _varying_leaves(rows, choices, varying)
    if len(machines_of(rows)) > 1:
        columns["machine"] = [row.machine for row in rows]
    axes = [
        Axis(key=key, heading=heading, values=tuple(map(format_setting, columns[key])))
        for key, heading in _headings(columns).items()
    ]
    if not axes and len(rows) == 1 and (method := rows[0].record and rows[0].record.choices.get("peft")):
        return [Axis(key="peft", heading="peft", values=(one_line(method),))]
    if not axes or len({*_points(axes)}) < len(rows):
        axes.append(_cell_axis(rows, alone=not axes))
    return axes


def labels(rows: Sequence[Row], axes: Sequence[Axis]) -> list[str]:
    """A short name for every row, all different: `lora`, `nf4 lora`, `r=8`."""
    axes = _naming(axes)
    plain = [" ".join(_label_part(axis, axis.values[i]) for axis in axes) for i in range(len(rows))]
    # `none` says little in a name: `full` instead of `none full`, as long as the names stay apart
    short = [
        " ".join(_label_part(axis, axis.values[i]) for axis in axes if axis.values[i] not in ("none", ABSENT))
        or one_line(rows[i].cell_id)
        for i in range(len(rows))
    ]
    chosen = short if len(set(short)) == len(rows) else plain
    counts = Counter(chosen)
    return [label if counts[label] == 1 else f"{label} #{i + 1}" for i, label in enumerate(chosen)]


def _place(group: str) -> int:
    return GROUPS.index(group) if group in GROUPS else len(GROUPS) + (group == "seed")


def _choices(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Group -> option and the seed, row by row; of a cell that left no record, as far as its id tells them."""
    options: dict[tuple[str, str], str] = {}
    for row in rows:
        for group, option in row.record.choices.items() if row.record else ():
            options[group, slugify(str(row.section(group).get("name", option)))] = option
    pooled = any(row.members for row in rows)  # then a seed tells no two rows apart, or the cell's hash has to
    results = []
    for row in rows:
        if row.record is not None:
            seed = None if pooled else row.seed
            results.append(dict(row.record.choices) | ({} if seed is None else {"seed": str(seed)}))
            continue
        *slugs, seed, _hash = parts if len(parts := row.cell_id.split("-")) == len(_ID_GROUPS) + 2 else ["", ""]
        named = {g: options.get((g, slug), slug) for g, slug in zip(_ID_GROUPS, slugs, strict=False)}
        results.append(named | ({"seed": seed[1:]} if named and not pooled else {}))
    return results


def _varying_leaves(
    rows: Sequence[Row], choices: Sequence[dict[str, str]], varying: Sequence[str]
) -> dict[str, list[Any]]:
    configs = [row.record.config if row.record else None for row in rows]
    flat: FlatSections = {}
    section_of = {
        key: name for config in configs if config for name in config for key in flat_section(name, config[name], flat)
    }
    one_only = {name for name in section_of.values() if len({id(c.get(name)) for c in configs if c is not None}) == 1}
    chosen = _chosen_by_tuning(rows)
    leaves: dict[str, list[Any]] = {}
    for key, name in section_of.items():
        if "." not in key or name in one_only or key.startswith(_NOT_AN_AXIS) or key.endswith((".name", "._target_")):
            continue
        values = [flat_section(name, c[name], flat).get(key) if c and name in c else None for c in configs]
        known = [(value, choice) for value, choice, c in zip(values, choices, configs, strict=True) if c is not None]
        if len({value for value, _ in known}) < 2:
            continue
        deciders: list[tuple[str, ...]] = [(group,) for group in varying]
        if key in _DECIDED_BY:
            deciders.append((key.partition(".")[0], _DECIDED_BY[key]))
        if key not in chosen and not any(_follows(known, groups) for groups in deciders):
            leaves[key] = values
    return leaves


def _chosen_by_tuning(rows: Sequence[Row]) -> tuple[str, ...]:
    """Keys that tuning chose for every row."""
    tunings = [row.record.provenance.get("tuned") for row in rows if row.record]
    if not tunings or not all(isinstance(tuned, dict) for tuned in tunings):
        return ()
    sized = any(isinstance(tuned, dict) and "size" in tuned for tuned in tunings)
    return (_TUNED, *_TUNED_WITH_SIZES) if sized else (_TUNED,)


def _follows(known: Sequence[tuple[Any, dict[str, str]]], groups: Sequence[str]) -> bool:
    """Whether the options of `groups` alone decide the value."""
    seen: dict[tuple[str | None, ...], Any] = {}
    return all(seen.setdefault(tuple(choice.get(g) for g in groups), value) == value for value, choice in known)


def _headings(columns: Iterable[str]) -> dict[str, str]:
    """The last part of each key, or all of it where that would be read as another column."""
    keys = list(columns)
    short = Counter(key.rpartition(".")[2] for key in keys)
    return {key: last if short[last := key.rpartition(".")[2]] == 1 and last not in GROUPS else key for key in keys}


def _cell_axis(rows: Sequence[Row], *, alone: bool) -> Axis:
    """The cell's id, or its hash beside other columns; numbered where a cell was run more than once."""
    names = [row.cell_id if alone else row.cell_id.rpartition("-")[2] for row in rows]
    if not alone and len(set(names)) < len({row.cell_id for row in rows}):
        names = [row.cell_id for row in rows]
    counts, seen = Counter(names), Counter[str]()
    for i, name in enumerate(names):
        seen[name] += 1
        names[i] = f"{name} ({seen[name]})" if counts[name] > 1 else name
    return Axis(key="cell", heading="cell", values=tuple(one_line(name) for name in names))


def _naming(axes: Sequence[Axis]) -> list[Axis]:
    """Without the keys that tell no more rows apart: where alpha is always twice the rank, the rank is enough."""
    kept = list(axes)
    for axis in reversed(axes):
        rest = [other for other in kept if other is not axis]
        if "." in axis.key and rest and len({*_points(rest)}) == len({*_points(kept)}):
            kept = rest
    return kept


def _points(axes: Sequence[Axis]) -> Iterator[tuple[str, ...]]:
    return zip(*(axis.values for axis in axes), strict=True)


def _label_part(axis: Axis, value: str) -> str:
    if axis.key == "seed":
        return f"seed {value}"
    if axis.key == "machine":
        return f"on {value}"
    return f"{axis.heading}={value}" if "." in axis.key else value

"""Runs that differ in nothing but the seed, made one row of a report."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Sequence

from left_bench.report.cells import Row
from left_bench.report.frame import FlatSections, deciding, flat_section


def pool(rows: Sequence[Row]) -> list[Row]:
    """One row for the runs that differ in the seed alone, in the place of the first of them.

    A second run of the same cell and seed, or one on another machine, is no repetition under another seed and stays a
    row of its own. A cell that left no record joins the row that its id belongs to, where there is only one.
    """
    alike: dict[Hashable, list[Row]] = {}
    flat: FlatSections = {}
    told: dict[tuple[str, int], Hashable] = {}  # frozen once for all rows that share the section
    for row in rows:
        if row.record:
            config = row.record.config
            for name in config:
                if (name, id(config[name])) not in told:
                    told[name, id(config[name])] = frozenset(deciding(flat_section(name, config[name], flat)).items())
            leaves = (told[name, id(config[name])] for name in config if name != "seed")
            alike.setdefault((frozenset(row.record.choices.items()), frozenset(filter(None, leaves))), []).append(row)
    groups = [group for same in alike.values() for group in _apart(same)]
    by_slug: dict[str, list[list[Row]]] = {}
    for group in groups:
        by_slug.setdefault(_slug(group[0]), []).append(group)
    for row in rows:
        if not row.record:
            fitting = by_slug.get(_slug(row), [])
            if len(fitting) == 1:
                fitting[0].append(row)
            else:
                groups.append([row])
    place = {id(row): i for i, row in enumerate(rows)}
    for group in groups:
        group.sort(key=lambda row: place[id(row)])
    return [_joined(group) for group in sorted(groups, key=lambda group: place[id(group[0])])]


def _apart(rows: Sequence[Row]) -> list[list[Row]]:
    """Runs of one configuration, by machine and by how often the seed has come before."""
    machines: list[str | None] = list(dict.fromkeys(row.machine for row in rows if row.machine)) or [None]
    groups: dict[Hashable, list[Row]] = {}
    seen: Counter[Hashable] = Counter()
    for row in rows:
        machine = row.machine or machines[0]  # what never started names none
        groups.setdefault((machine, seen[machine, row.seed]), []).append(row)
        seen[machine, row.seed] += 1
    return list(groups.values())


def _joined(group: Sequence[Row]) -> Row:
    if len(group) == 1:
        return group[0]
    return dataclasses.replace(next((row for row in group if row.ok), group[0]), members=tuple(group))


def _slug(row: Row) -> str:
    """The cell's id without seed and hash."""
    return row.cell_id.rsplit("-", 2)[0]

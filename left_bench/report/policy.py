"""Sections of a report on cells that go on from others: where they began, and what rewards did along training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from left_bench.report.cells import Row
from left_bench.report.markdown import code, escape, table
from left_bench.report.report import Report
from left_bench.report.tables import ROWS_SHOWN, cut_line
from left_bench.report.values import ABSENT, significant
from left_bench.spec.record import PolicyPoint, Record


def origins_section(report: Report) -> Iterator[str]:
    """The cells that others went on from, the first of them first; nothing where each began with its base model."""
    lines = [
        [escape(name), _links(record, "started_from"), _links(record, "combined", " + "), _links(record, "rewarded_by")]
        for record, name in _records(report)
        if any(record.provenance.get(key) for key in ("started_from", "combined", "rewarded_by"))
    ]
    if lines:
        yield "## Where these cells began"
        yield table(["cell", "goes on from", "is made of", "rewarded by"], lines[:ROWS_SHOWN], labels=4)
        yield from cut_line(len(lines))


def policy_section(report: Report) -> Iterator[str]:
    """Rewards, divergence, entropy and length of answers at the beginning and at the end of policy optimization."""
    lines = [_line(record, name) for record, name in _records(report) if record.policy]
    if not lines:
        return
    yield "## Rewards along training"
    yield (
        "Of the answers sampled in training, at the first step → over the last tenth of the steps. Nats are for each "
        "sampled token; a group whose answers are all worth the same teaches nothing."
    )
    header = ["cell", "reward", "divergence (nats)", "entropy (nats)", "tokens of an answer", "equal groups"]
    yield table([*header, "time spent sampling"], lines[:ROWS_SHOWN])
    yield from cut_line(len(lines))


def _records(report: Report) -> Iterator[tuple[Record, str]]:
    run: Row
    for run, name in report.runs:
        if run.record is not None:
            yield run.record, name


def _links(record: Record, key: str, between: str = " → ") -> str:
    chain: list[Mapping[str, Any]] = record.provenance.get(key) or []
    told = [f"{code(link.get('cell', '?'))} ({escape(link.get('objective', '?'))})" for link in chain]
    return between.join(told) or ABSENT


def _line(record: Record, name: str) -> list[str]:
    points = record.policy
    last = points[-max(1, len(points) // 10) :]

    def both(field: str) -> str:
        values = [getattr(point, field) for point in last]
        first = getattr(points[0], field)
        if first is None or None in values:
            return ABSENT
        return f"{significant(first, digits=3)} → {significant(sum(values) / len(values), digits=3)}"

    fields = ("reward", "kl_nats", "entropy_nats", "answer_length", "equal_groups")
    return [escape(name), *map(both, fields), _share(points, record)]


def _share(points: list[PolicyPoint], record: Record) -> str:
    seconds = record.metrics.get("train_seconds")
    return f"{100 * sum(point.generating_seconds for point in points) / seconds:.0f}%" if seconds else ABSENT

"""The claims beside a set of records: which cells each one rests on, its verdict, and their section of a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from left_bench.report.cells import Row, option
from left_bench.report.claims import CLAIMS, DEFAULT, NOT_MEASURED, Claim, Evidence, Missing, Verdict
from left_bench.report.frame import deciding, flatten
from left_bench.report.headings import heading
from left_bench.report.judgement import judge
from left_bench.report.markdown import code, escape, table
from left_bench.report.tables import told_against
from left_bench.report.values import ABSENT, format_error, format_value

_GROUPS = ("quantization", "peft", "precision", "training")
# Sections in which the cells of a claim differ, or may; all the rest has to be the same.
_OWN = ("quantization.", "peft.", "precision.")
_OWN_KEYS = {"training.name", "training.batch_size", "training.gradient_accumulation", "training.learning_rate", "seed"}


class Finding(NamedTuple):
    """A claim with its verdict and the cells it rests on."""

    claim: Claim
    verdict: Verdict
    cells: Mapping[str, Row]


def judge_claims(rows: Sequence[Row]) -> list[Finding]:
    """Every claim against the rows; one whose cells or numbers are missing is not measured."""
    findings = []
    contexts = _contexts(rows)
    for claim in CLAIMS:
        best: tuple[int, dict[str, Row], list[Row]] = (0, {}, [])
        for context in contexts:
            cells = _cells(claim, context)
            done = sum(row.ok for row in cells.values())
            if done > best[0] or not best[1]:
                best = (done, cells, context)
        _, cells, context = best
        try:
            verdict = claim.judge(Evidence(cells=cells, beside=[row for row in context if row.ok]))
        except Missing as missing:
            verdict = Verdict(NOT_MEASURED, str(missing))
        findings.append(Finding(claim, verdict, cells))
    return findings


def _contexts(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that are alike in all that no claim compares: model, data, steps, optimizer, evaluation, machine."""
    groups: dict[object, list[Row]] = {}
    for row in rows:
        if not row.record:
            continue
        rest = frozenset(
            (key, value)
            for key, value in deciding(flatten(row.record.config)).items()
            if not key.startswith(_OWN) and key not in _OWN_KEYS
        )
        groups.setdefault(rest, []).append(row)
    split = []
    for group in groups.values():
        machines: list[str | None] = list(dict.fromkeys(row.machine for row in group if row.machine)) or [None]
        split += [[row for row in group if row.machine in (machine, None)] for machine in machines]
    return split


def _cells(claim: Claim, rows: Sequence[Row]) -> dict[str, Row]:
    results = {}
    for name, options in claim.cells.items():
        wanted = {**DEFAULT, **options}
        fitting = [row for row in rows if all(option(row, group) == wanted[group] for group in _GROUPS)]
        if fitting:
            results[name] = next((row for row in fitting if row.ok), fitting[0])
    return results


def claims_section(rows: Sequence[Row]) -> Iterator[str]:
    """The claims as Markdown: all verdicts in one table, then each with what was compared, the rule and the numbers."""
    findings = judge_claims(rows)
    yield "## Claims"
    yield (
        "Common claims, beside what was measured here: with this model, this data, this machine and so few steps. A "
        "verdict follows from the numbers by the claim's rule; a claim that does not hold here may hold elsewhere. "
        "Square brackets hold 95 % intervals. Each claim was written down before it was measured, so its comparisons "
        "are judged on their own."
    )
    lines = [
        [
            escape(f.claim.sentence),
            f"**{f.verdict.word}**",
            escape(f.verdict.measured[:1].upper() + f.verdict.measured[1:]),
        ]
        for f in findings
    ]
    yield table(["claim", "verdict", "measured"], lines, labels=3)
    for claim, verdict, cells in findings:
        yield f"### {escape(claim.sentence)}: {verdict.word}"
        yield f"{escape(claim.rule)}"
        measured = [name for name in claim.cells if name in cells]
        if measured:
            yield _claim_table(claim, cells)
        compared = "; ".join(
            f"{escape(name)}: {_options(options) or 'unchanged'}" for name, options in claim.cells.items()
        )
        rates = {row.section("training").get("learning_rate") for row in cells.values()}
        but = " except the learning rate, which is each method's own" if len(rates) > 1 else ""
        yield f"Compared, as changes to {_options(DEFAULT)}: {compared}. All other settings are equal{but}."


def _claim_table(claim: Claim, cells: Mapping[str, Row]) -> str:
    reference = next((cells[name] for name in claim.cells if name in cells and cells[name].ok), None)
    lines = []
    for name in claim.cells:
        row = cells.get(name)
        if row is None or not row.ok:
            word = "not run" if row is None else row.status
            lines.append(
                [
                    escape(name),
                    *[f"**{escape(word)}**"] * min(1, len(claim.metrics)),
                    *[ABSENT] * (len(claim.metrics) - 1),
                    "",
                ]
            )
            continue
        numbers = []
        for metric in claim.metrics:
            value, stderr = row.value(metric), row.stderr(metric)
            text = format_value(metric, value)
            text += f" ± {format_error(metric, value, stderr)}" if value is not None and stderr else ""
            against = told_against(
                row, reference, metric, judge([(row, reference)] if reference else [], metric), both=True
            )
            numbers.append(f"{text} ({against})" if against else text)
        seeds = sum(run.ok for run in row.runs)
        lines.append([escape(name), *numbers, str(seeds)])
    return table(["cell", *(heading(metric) for metric in claim.metrics), "seeds"], lines)


def _options(options: Mapping[str, str]) -> str:
    return " ".join(code(f"{group}={chosen}") for group, chosen in options.items())

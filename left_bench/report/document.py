"""One comparison report as Markdown, section by section."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from left_bench import __version__
from left_bench.report.archive import ENDING
from left_bench.report.cells import Row, machine_line, so_far
from left_bench.report.curves import curves_section
from left_bench.report.headings import heading
from left_bench.report.leaderboard import axis_tables, crossed_tables, leaderboard, recommendation
from left_bench.report.markdown import code, details, escape, fence, table
from left_bench.report.policy import origins_section, policy_section
from left_bench.report.ranking import COST, ENERGY, MEMORY_AND_SIZE, SPEED, present, qualities
from left_bench.report.rates import rates_section
from left_bench.report.report import Report
from left_bench.report.tables import (
    ROWS_SHOWN,
    cells_tables,
    cut_line,
    phases_table,
    predictions_table,
    seeds_table,
    status_word,
)
from left_bench.report.values import ABSENT, format_setting, metric_of, one_line
from left_bench.report.verdicts import claims_section
from left_bench.spec.cell import GROUPS
from left_bench.spec.events import ROW_COUNTS, VALIDATION_COUNTS, rows_in_words
from left_bench.spec.record import Sample

# Settings that a reader wants to see once where they are the same in every cell.
_CONSTANTS = {
    "model": ("name_or_path", "revision", "weights"),
    "precision": ("weights_dtype", "compute_dtype"),
    "training": (
        "steps",
        "batch_size",
        "gradient_accumulation",
        "batching",
        "learning_rate",
        "optimizer",
        "schedule",
        "max_length",
        "activation_checkpointing",
    ),
    "data": ("task", "hub_id", "train_rows", "test_rows"),
    "eval": ("rows", "generate", "max_new_tokens"),
    "hardware": ("device", "threads", "memory_limit"),
}
_VERSIONS = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "torchao", "datasets")
_PROMPTS_SHOWN = 2
_TEXT_LIMIT = 300
_COMMANDS_SHOWN = 20
_LOGS_SHOWN = 20


def write_document(report: Report) -> str:
    """The report as GitHub-flavoured Markdown: the answer, then the tables behind it, then how it was measured."""
    answer = [plot for plot in report.plots if plot[0].endswith("_pareto.svg")]
    rates = [plot for plot in report.plots if plot[0].endswith("_rates.svg")]
    plots = [plot for plot in report.plots if plot not in answer and plot not in rates]
    sections = [
        f"# {escape(report.name)}",
        *_what_this_is(report),
        *(claims_section(report.rows) if report.claims else ()),
        *recommendation(report),
        *leaderboard(report),
        *_pictures(answer),
        *crossed_tables(report),
        *axis_tables(report),
        *rates_section(report, rates),
        *curves_section(report),
        *policy_section(report),
        *cells_tables(report),
        *_failures(report),
        *_plots(plots),
        *origins_section(report),
        *_settings(report),
        *predictions_table(report),
        *seeds_table(report),
        *phases_table(report),
        *_samples(report),
        *_glossary(report),
        *_sources(report),
    ]
    return "\n\n".join(sections) + "\n"


def _what_this_is(report: Report) -> Iterator[str]:
    runs = [run for run, _ in report.runs]
    counts = Counter(run.status for run in runs)
    tally = ", ".join(f"{n} {status}" for status, n in sorted(counts.items(), key=lambda count: count[0] != "ok"))
    days = sorted({one_line(run.record.started_at)[:10] for run in runs if run.record})
    when = f" measured {' to '.join(dict.fromkeys((days[0], days[-1])))}" if days else ""
    machines = {row.machine: row for row in reversed(report.records) if row.machine}
    several = len(machines) > 1
    told = [machine_line(row, report.records, several=several) for row in reversed(machines.values())]
    where = "; ".join(dict.fromkeys(map(escape, told)))
    parts = [f"{len(runs):,} {'cell' if len(runs) == 1 else 'cells'} ({tally}){when}"]
    parts[0] = escape(parts[0]) + (f" on {where}." if where else ".")
    if len(runs) > len(report.rows):
        parts.append(f"{len(report.rows):,} rows: cells that differ only in their seed are pooled.")
    if report.where:
        parts.append(f"Only records for which {code(report.where)} (`--where`).")
    if report.sweep and report.sweep.finished_at is None:
        parts.append(f"**{so_far(runs, report.sweep)}**")
    yield " ".join(parts)


def _settings(report: Report) -> Iterator[str]:
    """How this was measured: the command, the versions, and what is the same in all cells."""
    yield "## Settings"
    yield f"Written by left_bench {__version__} from the records alone. The command that repeats the runs:"
    yield fence("\n".join(_commands(report)), "bash")
    if versions := _versions(report):
        yield f"Versions: {versions}."
    yield from _constants(report)


def _versions(report: Report) -> str:
    result: dict[str, list[str]] = {}
    for row in (run for run, _ in report.runs):
        for package, version in row.noted("versions").items():
            result.setdefault(str(package), []).append(str(version))
    order = sorted(result, key=lambda name: (_VERSIONS.index(name) if name in _VERSIONS else len(_VERSIONS), name))
    return ", ".join(escape(f"{name} {' and '.join(dict.fromkeys(result[name]))}") for name in order)


def _commands(report: Report) -> list[str]:
    if report.sweep and report.sweep.command:
        return report.sweep.command.splitlines()
    recorded = (row.record.provenance.get("command") for row in report.records if row.record)
    commands = list(dict.fromkeys(one_line(command) for command in recorded if command))
    more = len(commands) - _COMMANDS_SHOWN
    return (commands[:_COMMANDS_SHOWN] + [f"# and {more} more"] * (more > 0)) or ["# no command was recorded"]


def _constants(report: Report) -> Iterator[str]:
    """What is the same in all cells."""
    lines: list[list[str]] = []
    for group in GROUPS if report.records else ():
        choices = [row.record.choices.get(group) for row in report.records if row.record]
        option = choices[0] if len(set(choices)) == 1 else None
        sections = [row.section(group) for row in report.records]
        kept = [
            (key, sections[0].get(key)) for key in _CONSTANTS.get(group, ()) if _same([s.get(key) for s in sections])
        ]
        told = ", ".join(f"{key} {format_setting(value)}" for key, value in kept if value is not None)
        if option or told:
            lines.append([group, code(option) if option else "*varies*", escape(told) or ABSENT])
    seeds = {format_setting(run.seed) for run, _ in report.runs if run.record}
    if len(seeds) == 1:
        lines.append(["seed", escape(seeds.pop()), ABSENT])
    if lines:
        yield "The same in every cell:"
        yield table(["", "option", "settings"], lines, labels=3)
    keys = [f"{code(axis.key)}" for axis in report.axes]
    if len(report.rows) > 1 and report.axes[0].key != "cell":
        yield f"The cells differ in {', '.join(keys)}."
    of_rows = list(dict.fromkeys(filter(None, map(_rows_told, report.records))))
    if len(of_rows) == 1:
        yield f"Rows: {escape(of_rows[0])}."
    elif of_rows:
        yield "\n".join(["Rows:", "", *(f"- {escape(item)}" for item in of_rows)])


def _rows_told(row: Row) -> str | None:
    """What became of a cell's rows; None where its record is older than the counts."""
    if row.record is None or not row.record.metrics.keys() >= set(ROW_COUNTS):
        return None
    metrics = row.record.metrics
    counts = {name: metrics[name] if name == "train_epochs" else int(metrics[name]) for name in ROW_COUNTS}
    counts |= {name: int(metrics[name]) for name in VALIDATION_COUNTS if name in metrics}
    max_length = row.section("training").get("max_length")
    return f"{row.record.choices.get('data')}: {rows_in_words(counts, max_length=max_length)}"


def _same(values: list[Any]) -> bool:
    return all(value == values[0] for value in values)


def _failures(report: Report) -> Iterator[str]:
    failed = [(run, name) for run, name in report.runs if not run.ok]
    problems = report.problems
    if not failed and not problems:
        return
    yield "## What did not run, and why"
    if failed:
        lines = [
            [
                escape(name),
                escape(status_word(row)),
                escape(row.reason or "no reason was recorded", limit=_TEXT_LIMIT),
            ]
            for row, name in failed[:ROWS_SHOWN]
        ]
        yield table(["cell", "status", "reason"], lines, labels=3)
        yield from cut_line(len(failed))
        for row, name in failed[:_LOGS_SHOWN]:
            tail = row.record.provenance.get("log_tail") if row.record else None
            if tail:
                yield details(f"{name}: end of the log", fence(tail, "text"))
    if problems:
        files = "1 file" if len(problems) == 1 else f"{len(problems)} files"
        yield f"{files} could not be read and is left out of the tables:"
        told = problems[:ROWS_SHOWN]
        yield "\n".join(f"- {code(_short(problem.path))}: {escape(problem.message)}" for problem in told)
        yield from cut_line(len(problems))


def _plots(plots: Sequence[tuple[str, str]]) -> Iterator[str]:
    if plots:
        yield "## Plots"
    yield from _pictures(plots)


def _pictures(plots: Sequence[tuple[str, str]]) -> Iterator[str]:
    for file, shown in plots:
        yield f"![{escape(shown)}]({file})"


def _samples(report: Report) -> Iterator[str]:
    """What the cells answered to the prompts that most of them were asked."""
    asked: dict[tuple[str, str], list[tuple[Row, Sample]]] = {}
    for row in report.records:
        for sample in row.record.samples if row.record and row.scored else ():
            answers = asked.setdefault((sample.prompt, sample.reference), [])
            if len(answers) < ROWS_SHOWN and not any(row is other for other, _ in answers):
                answers.append((row, sample))
    chosen = sorted(asked.items(), key=lambda item: -len(item[1]))[:_PROMPTS_SHOWN]
    if not chosen:
        return
    yield "## Samples"
    for (prompt, reference), answers in chosen:
        lines = [
            [
                escape(report.names[id(row)]),
                *(
                    ABSENT if text is None else escape(text, limit=_TEXT_LIMIT) or "*nothing*"
                    for text in (sample.base_prediction, sample.prediction)
                ),
            ]
            for row, sample in answers
        ]
        answered = table(["cell", "before training", "after training"], lines, labels=3)
        body = f"{fence(prompt, 'text')}\n\nReference: {escape(reference, limit=_TEXT_LIMIT)}\n\n{answered}"
        yield details(f"{one_line(prompt, limit=100)}", body)


def _glossary(report: Report) -> Iterator[str]:
    used = present(report.rows, (*qualities(report.rows), *MEMORY_AND_SIZE, *SPEED, "overhead_seconds", *ENERGY, *COST))
    if not used:
        return
    better = {"lower": "lower", "higher": "higher", "none": ABSENT}
    lines = [
        [
            escape(heading(name)),
            code(name),
            metric_of(name).unit or ABSENT,
            better[metric_of(name).better],
            escape(metric_of(name).meaning),
        ]
        for name in used
    ]
    yield "## Metrics"
    yield details(
        "What each column means", table(["column", "name in the record", "unit", "better", "meaning"], lines, labels=5)
    )


def _sources(report: Report) -> Iterator[str]:
    lines = [
        [
            escape(label),
            code(row.cell_id),
            escape(row.status),
            code(_short(row.path)) if row.path else ABSENT,
            escape(row.record.finished_at) if row.record else ABSENT,
        ]
        for row, label in report.runs[:ROWS_SHOWN]
    ]
    yield "## Where each number comes from"
    yield details("The records", table(["cell", "id", "status", "record", "finished"], lines, labels=5))
    yield from cut_line(len(report.runs))


def _short(path: Path) -> str:
    """The runs folder's name and what lies below: where it lies on this machine is nobody's business.

    Of a record in a file of records its path in that file: two reports may share a cell, and each file has its record.
    """
    return "/".join(path.parts[-2 if path.parent.parent.suffix == ENDING else -3 :])

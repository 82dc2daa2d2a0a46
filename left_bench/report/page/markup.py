"""The parts of the page that are there without the script: facts, the table's first rows, what failed and why."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from left_bench import __version__
from left_bench.report.cells import Row, machine_line, machines_of, so_far
from left_bench.report.confounders import confounders
from left_bench.report.curves import Target, Told, equal_cost, to_target
from left_bench.report.load import Problem, Sweep
from left_bench.report.master_weights import whom_rounding_hurts
from left_bench.report.page.data import CURVES, DETAILED_CELLS, runs_of, status_of
from left_bench.report.rates import rates_told
from left_bench.report.values import ABSENT, metric_of, one_line
from left_bench.spec.cell import GROUPS
from left_bench.spec.record import find_metric

ROWS_SHOWN = 200
"""Rows of the table at a time, with the script and without it."""
_NAMED = 12
_TEXT_LIMIT = 1500


def text(value: object, *, limit: int = _TEXT_LIMIT) -> str:
    """Anything as HTML that shows it, on one line."""
    return html.escape(one_line(value, limit=limit))


def introduction(rows: Sequence[Row], sweep: Sweep | None) -> str:
    """What was measured, when and where."""
    pooled, rows = len(rows), [run for row in rows for run in runs_of(row)]
    counts = Counter(map(status_of, rows))
    tally = ", ".join(f"{n:,} {status}" for status, n in sorted(counts.items(), key=lambda count: count[0] != "ok"))
    days = sorted({one_line(row.record.started_at)[:10] for row in rows if row.record})
    when = f" measured {' to '.join(dict.fromkeys((days[0], days[-1])))}" if days else ""
    several = len(machines_of(rows)) > 1
    where = list(dict.fromkeys(machine_line(row, rows, several=several) for row in rows if row.machine))
    counted = f"{len(rows):,} {'cell' if len(rows) == 1 else 'cells'} ({tally})"
    seeds = f" {pooled:,} rows: cells that differ only in their seed are pooled." if pooled < len(rows) else ""
    lines = [f"<p>{text(counted + when)}.{seeds}</p>"]
    lines += [f"<p><b>Machine:</b> {text('; '.join(where))}</p>"] if where else []
    if sweep and sweep.finished_at is None:
        lines.append(f'<p class="warning">{text(so_far(rows, sweep))}</p>')
    return "\n".join(lines)


def versions(rows: Sequence[Row]) -> str:
    told = _versions(run for row in rows for run in runs_of(row))
    return f"<p><b>Versions:</b> {text(told)}</p>" if told else ""


def commands(rows: Sequence[Row], sweep: Sweep | None) -> str:
    """How the whole is repeated, as a block to copy."""
    rows = [run for row in rows for run in runs_of(row)]
    if sweep and sweep.command:
        lines = [one_line(line) for line in sweep.command.splitlines()]
    else:
        recorded = (row.record.provenance.get("command") for row in rows if row.record)
        results = list(dict.fromkeys(one_line(command) for command in recorded if command))
        lines = results[:_NAMED] + [f"# and {len(results) - _NAMED:,} more"] * (len(results) > _NAMED)
    block = html.escape("\n".join(lines) or "# no command was recorded")
    return (
        f"<p>Written by left_bench {text(__version__)} from the records alone. The command that repeats it:</p>\n"
        + (f'<pre class="command" tabindex="0"><code id="command">{block}</code></pre>')
    )


def constants(data: Mapping[str, Any]) -> str:
    """What is the same in every cell: the chosen options in a line, every setting in a fold."""
    strings = data["strings"]
    pairs = [(strings[key], strings[value]) for key, value in data["constants"]]
    if not pairs:
        return ""
    line = ", ".join(f"{key} <b>{text(value)}</b>" for key, value in pairs if key in GROUPS or key == "seed")
    told = [(key, value) for key, value in pairs if "." in key and not key.endswith(".name")]
    listed = "".join(f"<tr><th scope='row'>{text(key)}</th><td>{text(value)}</td></tr>" for key, value in told)
    fold = f"<details><summary>{len(told)} settings that all cells share</summary>\n"
    fold += f'<div class="scroll" tabindex="0"><table class="plain">{listed}</table></div></details>'
    return (f"<p><b>The same in every cell:</b> {line}.</p>\n" if line else "") + (fold if told else "")


def notices(rows: Sequence[Row], labels: Sequence[str], notes: Sequence[str], data: Mapping[str, Any]) -> str:
    """Sentences a reader must have read before the numbers."""
    lines = list(notes)
    records = [(row, label) for row, label in zip(rows, labels, strict=True) if row.record]
    drawn = [label for row, label in records if not row.scored]
    if drawn:
        those = "" if len(drawn) == len(records) else f" in {_listed(drawn)}"
        lines.append(f"Random weights: no quality is scored{those}.")
    if any("groups" in metric and metric["kind"] == "speed" for metric in data["metrics"]):
        lines.append(
            "The cells come from different machines: speed is sorted within each machine, and no cell is the fastest."
        )
    seeds = {run.record.config.get("seed") for row, _ in records for run in runs_of(row) if run.record}
    if any("errors" in metric for metric in data["metrics"]):
        if len(rows) > 1 and len(seeds) == 1:
            lines.append(
                "One seed only: ± is one standard error over the held-out rows and does not cover other seeds."
            )
        elif any(len(runs_of(row)) > 1 for row in rows):
            lines.append(
                "± is one standard error: over held-out rows and seeds for scores, over seeds for everything else."
            )
    if (
        told := whom_rounding_hurts(rows, {id(row): label for row, label in zip(rows, labels, strict=True)})
    ) is not None:
        lines.append(f"Master weights: {told}.")
    if len(rows) > DETAILED_CELLS:
        lines.append(f"Answers and logs are in this page for the first {DETAILED_CELLS:,} cells only.")
    if len(data["curves"]) == CURVES:
        lines.append(f"Loss curves are in this page for the first {CURVES} cells that have one only.")
    listed = "\n".join(f"<p>{text(line)}</p>" for line in lines)
    return f'<div class="notices">\n{listed}\n</div>' if lines else ""


def along_training(rows: Sequence[Row], labels: Sequence[str], target: Target | None) -> str:
    """What the curves of the validation loss tell, folded; empty where there are none."""
    told = [to_target(rows, labels, target)] if target is not None else []
    told += [equal] if (equal := equal_cost(rows, labels)) is not None else []
    return _folded("Along training", told)


def learning_rates(rows: Sequence[Row], labels: Sequence[str]) -> str:
    """How the learning rates were come by, folded; empty where none was tuned."""
    told = rates_told(rows, labels)
    return "" if told is None else _folded("Learning rates", [told])


def _folded(title: str, told: Sequence[Told]) -> str:
    """A section of tables, each folded; empty where there are none."""
    folds = []
    for item in told:
        head = "".join(f"<th scope='col'>{text(name)}</th>" for name in item.header)
        body = "\n".join(
            f"<tr><th scope='row'>{text(name)}</th>{''.join(f'<td>{text(cell)}</td>' for cell in cells)}</tr>"
            for name, *cells in item.lines[:ROWS_SHOWN]
        )
        folds.append(
            f"<details><summary>{text(item.title)}</summary>\n"
            '<div class="scroll" tabindex="0"><table class="plain">'
            f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"
            f"<p>{text(' '.join(item.remarks))}</p></details>"
        )
    listed = "\n".join(folds)
    return f"<section>\n<h2>{text(title)}</h2>\n{listed}\n</section>\n" if folds else ""


def leaderboard(data: Mapping[str, Any]) -> str:
    """The table's first rows; the script puts its own, sortable one in their place."""
    strings, several = data["strings"], len(data["axes"]) > 1
    axes = data["axes"] if several else []
    columns = [metric for metric in data["metrics"] if metric["name"] in data["shown"]]
    ranked = any(place is not None for place in data["places"])
    head = ["cell", *(["#"] if ranked else []), *(strings[axis["heading"]] for axis in axes), "status"]
    head += [metric["heading"] for metric in columns]
    body = []
    for i in range(min(data["cells"], ROWS_SHOWN)):
        name = text(strings[data["labels"][i]]) + (" <small>baseline</small>" if i == data["baseline"] else "")
        place = ABSENT if data["places"][i] is None else data["places"][i]
        cells = [f'<th scope="row">{name}</th>', *([f'<td class="number">{place}</td>'] if ranked else [])]
        cells += [*(f"<td>{text(strings[axis['values'][i]])}</td>" for axis in axes)]
        status, reason = strings[data["status"][i]], data["reasons"][i]
        told = "" if reason is None else f' <span class="reason">{text(strings[reason], limit=200)}</span>'
        kind = "ok" if status == "ok" else "failed"
        cells.append(f'<td><span class="status {kind}">{text(status)}</span>{told}</td>')
        cells += [_number(strings, metric, i) for metric in columns]
        body.append(f"<tr>{''.join(cells)}</tr>")
    headings = "".join(f'<th scope="col">{text(heading)}</th>' for heading in head)
    return f"<thead><tr>{headings}</tr></thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody>"


def confounding(rows: Sequence[Row], labels: Sequence[str]) -> str:
    """What else differs between the cells."""
    result = confounders(rows, {id(row): label for row, label in zip(rows, labels, strict=True)})
    if not result:
        return ""
    listed = "\n".join(f"<li><b>{text(what)}</b>: {text(how)}</li>" for what, how in result)
    return (
        "<h2>Confounders</h2>\n<p>The cells also differ in the following; a difference between them may come from it."
        f"</p>\n<ul>\n{listed}\n</ul>"
    )


def failures(rows: Sequence[Row], labels: Sequence[str], problems: Sequence[Problem]) -> str:
    """Every cell that is not ok under its reason, and every file that could not be read."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row, label in zip(rows, labels, strict=True):
        for run in runs_of(row):
            if not run.ok:
                seed = f" seed {run.record.config.get('seed')}" if run.record and len(runs_of(row)) > 1 else ""
                reason = run.reason or "no reason was recorded"
                groups.setdefault((status_of(run), reason), []).append(label + seed)
    parts: list[str] = []
    if groups:
        lines = [
            f'<tr><th scope="row">{text(_listed(names))}</th><td><span class="status failed">{text(status)}</span></td>'
            f"<td>{text(reason)}</td></tr>"
            for (status, reason), names in groups.items()
        ]
        head = '<thead><tr><th scope="col">cell</th><th scope="col">status</th><th scope="col">reason</th></tr></thead>'
        rest = "\n".join(lines)
        parts.append(
            f'<div class="scroll" tabindex="0"><table class="plain">{head}<tbody>\n{rest}\n</tbody></table></div>'
        )
    if problems:
        count = "1 file" if len(problems) == 1 else f"{len(problems):,} files"
        # where the runs folder lies on this machine is nobody's business
        listed = "\n".join(
            f"<li><code>{text('/'.join(problem.path.parts[-3:]))}</code>: {text(problem.message)}</li>"
            for problem in problems
        )
        parts.append(f"<p>{count} could not be read and is left out of the tables:</p>\n<ul>\n{listed}\n</ul>")
    return "\n".join(["<h2>What did not run, and why</h2>", *parts]) if parts else ""


def glossary(data: Mapping[str, Any]) -> str:
    """What the columns mean."""
    lines = [
        f'<tr><th scope="row">{text(metric["heading"])}</th><td><code>{text(metric["name"])}</code></td>'
        f"<td>{text(metric_of(metric['name']).unit or ABSENT)}</td><td>{text(_BETTER[metric['better']])}</td>"
        f"<td>{text(metric['meaning'])}</td></tr>"
        for metric in data["metrics"]
        if find_metric(metric["name"]) is not None and not metric["name"].startswith("base_")
    ]
    if not lines:
        return ""
    names = ("column", "name in the record", "unit", "better", "meaning")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return (
        '<details><summary>What every column means</summary>\n<div class="scroll" tabindex="0"><table class="plain">'
        f"<thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(lines) + "\n</tbody></table></div></details>"
    )


_BETTER = {"lower": "lower", "higher": "higher", "none": ABSENT}


def _number(strings: Sequence[str], metric: Mapping[str, Any], i: int) -> str:
    if metric["texts"][i] is None:
        return f'<td class="number">{ABSENT}</td>'
    best = i in metric["best"]
    shown = text(strings[metric["texts"][i]])
    shown = f"<strong>{shown}</strong>" if best else shown
    if "error_texts" in metric and (error := metric["error_texts"][i]) is not None:
        shown += f' <span class="error">± {text(strings[error])}</span>'
    shown += ' <span class="tie">≈</span>' if i in metric.get("unresolved", ()) else ""
    if "against" in metric and (against := metric["against"][i]) is not None:
        shown += f'<span class="against">{text(strings[against])}</span>'
    return f'<td class="number">{shown}</td>'


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def _versions(rows: Iterable[Row]) -> str:
    result: dict[str, dict[str, None]] = {}
    for row in rows:
        for package, version in row.noted("versions").items():
            result.setdefault(str(package), {})[str(version)] = None
    return ", ".join(f"{package} {' and '.join(versions)}" for package, versions in result.items())

"""The report as one HTML file for the browser: sorted, filtered and plotted there, with nothing fetched from anywhere.

What a record holds reaches the page twice, as text that Python has escaped and as one block of JSON. The script makes
elements and sets their text; it never parses a string as markup, and the page's own policy lets no other script run.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from left_bench.core.files import write_atomically
from left_bench.report.axes import Axis, find_axes
from left_bench.report.axes import labels as name_rows
from left_bench.report.baseline import find_baseline
from left_bench.report.cells import Row
from left_bench.report.curves import Target
from left_bench.report.load import Problem, Sweep
from left_bench.report.page.data import page_data
from left_bench.report.page.markup import (
    along_training,
    commands,
    confounding,
    constants,
    failures,
    glossary,
    introduction,
    leaderboard,
    learning_rates,
    notices,
    versions,
)
from left_bench.report.values import one_line

_STYLE = "page.css"
# One script, in this order: each part uses what stands above it.
_SCRIPTS = (
    "core.js",
    "address.js",
    "table.js",
    "axes.js",
    "detail.js",
    "scatter.js",
    "bars.js",
    "lines.js",
    "rates.js",
    "start.js",
)
# What could end the block early, or a line of the script that some parsers take the block for.
_IN_JSON = {character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def write_page(
    rows: Sequence[Row],
    *,
    title: str,
    path: Path,
    axes: Sequence[Axis] | None = None,
    labels: Sequence[str] | None = None,
    baseline: Row | None = None,
    sweep: Sweep | None = None,
    problems: Sequence[Problem] = (),
    notes: Sequence[str] = (),
    target: Target | None = None,
) -> Path:
    """Write the rows as one HTML file that needs nothing else; the same bytes for the same records.

    Args:
        title: the report's name.
        axes: the label columns; None: those in which the rows differ.
        labels: a name for every row, all different; None: made from the axes.
        baseline: one of `rows`, which the others are held against; None: `find_baseline`'s choice.
        sweep: what the launcher noted, for the command that repeats it.
        problems: files that could not be read, named on the page.
        notes: sentences in plain text to print above the table, a recommendation for instance.
        target: a quality; the page then tells when each row reached it along training.

    Returns:
        `path`.
    """
    axes = find_axes(rows) if axes is None else axes
    labels = name_rows(rows, axes) if labels is None else labels
    baseline = find_baseline(rows) if baseline is None else baseline
    page = render_page(
        rows,
        title=title,
        axes=axes,
        labels=labels,
        baseline=baseline,
        sweep=sweep,
        problems=problems,
        notes=notes,
        target=target,
    )
    return write_atomically(path, page)


def render_page(
    rows: Sequence[Row],
    *,
    title: str,
    axes: Sequence[Axis],
    labels: Sequence[str],
    baseline: Row | None = None,
    sweep: Sweep | None = None,
    problems: Sequence[Problem] = (),
    notes: Sequence[str] = (),
    target: Target | None = None,
) -> str:
    """The page as text; the arguments are those of `write_page`."""
    data = page_data(rows, axes=axes, labels=labels, baseline=baseline)
    style = "\n" + _asset(_STYLE)
    script = '\n"use strict";\n' + "\n".join(map(_asset, _SCRIPTS))
    return Template(_asset("template.html")).substitute(
        title=html.escape(one_line(title)),
        policy=_policy(style, script),
        style=style,
        introduction=introduction(rows, sweep),
        commands=commands(rows, sweep),
        versions=versions(rows),
        constants=constants(data),
        notices=notices(rows, labels, notes, data),
        leaderboard=leaderboard(data),
        learning_rates=learning_rates(rows, labels),
        along_training=along_training(rows, labels, target),
        confounders=confounding(rows, labels),
        failures=failures(rows, labels, problems),
        glossary=glossary(data),
        data=as_json(data),
        script=script,
    )


def as_json(data: Any) -> str:
    """JSON that may stand in a script element: no character in it means anything to an HTML parser."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return "".join(_IN_JSON.get(character, character) for character in text) if _IN_JSON.keys() & set(text) else text


def _asset(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """A Content-Security-Policy under which this page's own style and script work, and nothing else does."""
    return (
        f"default-src 'none'; style-src {_fingerprint(style)}; script-src {_fingerprint(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _fingerprint(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

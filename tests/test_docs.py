"""The documentation says what the code does: metric names, group options, commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from left_bench.grid import command_line
from left_bench.spec.record import METRICS

ROOT = Path(__file__).resolve().parents[1]


def test_every_metric_is_defined_in_the_docs_and_nothing_else_is():
    text = (ROOT / "docs" / "metrics.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(METRICS)


@pytest.mark.parametrize("page", ["README.md", "docs/extending.md", "docs/method.md"])
def test_options_and_sweeps_named_in_the_docs_exist(page, tmp_path):
    text = (ROOT / page).read_text().partition("\n## Code in a package of your own\n")[0]  # has options of its own
    groups = "sweep|tune|model|quantization|peft|precision|optimizer|training|data|eval"
    named = re.findall(rf"(?:^|\s)\+?({groups})=([\w,]+)", text)
    for group, options in named:
        unknown = set(options.split(",")) - set(command_line.options(group)) - {"NAME", "A", "OPTION", "mine"}
        assert not unknown, f"{page} names {group}={unknown}"


def test_the_readme_has_the_two_command_lines():
    text = (ROOT / "README.md").read_text()
    for mark, ending in (("run", "python -m left_bench +sweep=peft_methods"), ("test", "python -m pytest")):
        command = re.search(rf"<!-- {mark} -->\n```bash\n(.+)\n```", text)
        assert command and ending in command[1]
        assert "constraints.txt" in command[1]


def test_every_test_named_on_the_reliability_page_exists():
    import ast

    named = set(re.findall(r"`(tests/\w+\.py)::(\w+)`", (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")))
    assert len(named) > 50
    for file, test in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{test}"


def test_the_results_shown_first_are_the_reports_own_lines():
    if (ROOT / "runs" / "sweeps" / "peft_methods.json").exists():
        pytest.skip("peft_methods was run in this checkout: its report lies where the committed one was")
    text = (ROOT / "README.md").read_text()
    shown = text.partition("<!-- from reports/peft_methods.md -->\n")[2].partition("\n\n")[0].splitlines()
    report = (ROOT / "reports" / "peft_methods.md").read_text().splitlines()
    start = report.index(shown[0])
    assert len(shown) == 7
    assert shown == report[start : start + 7]


def room_table() -> str:
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    return page.split("| room | module | is |")[1].split("\n\n")[0]


def test_the_design_page_draws_the_rooms_in_the_order_import_linter_holds():
    layers = re.search(
        r"^layers = \[(.+?)^\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    held = re.findall(r"\w+", layers[1])
    drawn = [
        name for cell in re.findall(r"^\| (`.+?) \|", room_table(), re.MULTILINE) for name in re.findall(r"\w+", cell)
    ]
    assert drawn == held


@pytest.mark.parametrize(
    "room", ["cli", "launch", "grid", "worker", "evaluation", "training", "model", "measure", "core"]
)
def test_the_design_page_names_every_module_of_a_room(room):
    rows = room_table().split(f"\n| `{room}`")[1].split("\n| `")[0]
    modules = {path.stem for path in (ROOT / "left_bench" / room).glob("*.py")} - {"__init__"}
    assert modules <= set(re.findall(r"`(\w+)`", rows))

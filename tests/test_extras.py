"""What an extra brings, without it: one sentence says what to install, before anything runs; the rest works."""

from __future__ import annotations

import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from left_bench.cli.list_options import _verdict
from left_bench.core import extensions
from left_bench.core.errors import UserError
from left_bench.grid.compose import compose
from left_bench.spec import instantiate, row_scores
from left_bench.spec.task import TASKS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def composed_cell(composed, *overrides):
    config = composed(*overrides)
    return compose(config, config.hydra)[0]


@pytest.mark.parametrize(
    ("overrides", "module", "extra"),
    [
        (["data=lamini_docs"], "rouge_score", "text-metrics"),
        (["eval.metrics=[bleu]"], "sacrebleu", "text-metrics"),
        (["model=tiny_vit", "data=digits", "peft=full"], "sklearn", "digits"),
    ],
)
def test_a_cell_that_wants_a_missing_extra_is_told_to_install_it(overrides, module, extra, composed, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=re.escape(f"pip install 'left-bench[{extra}]'")):
        composed_cell(composed, *overrides)
    assert extra in PROJECT["optional-dependencies"]


def test_the_list_of_options_says_what_a_missing_extra_leaves_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    assert "[text-metrics]" in _verdict("data", "lamini_docs")
    assert "runs here" in _verdict("data", "chain_sum")


def test_a_cell_that_generates_nothing_wants_no_package_for_its_metrics(composed, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    assert composed_cell(composed, "data=lamini_docs", "eval=loss").id


def test_a_report_that_pairs_answers_by_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    row_scores._rouge_scorer.cache_clear()
    row_scores.rouge_l.cache_clear()
    with pytest.raises(UserError, match="text-metrics"):
        row_scores.rouge_l("a b", "a c")


def test_the_readmes_command_wants_no_extra(compose_cell, monkeypatch):
    for module in ("rouge_score", "sacrebleu", "sklearn", "llvmlite"):
        monkeypatch.setitem(sys.modules, module, None)
    assert compose_cell("tracker=none", "seed=11").id  # the defaults, as `+sweep=peft_methods` has them


def test_each_mandatory_dependency_has_its_reason_on_the_design_page():
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = page.split("## Why each dependency")[1].split("\n## ")[0]
    reasons = [
        name for row in re.findall(r"^\| (`.+?) \|", table, re.MULTILINE) for name in re.findall(r"`(.+?)`", row)
    ]
    assert sorted(reasons) == sorted(re.match(r"[\w-]+", line)[0] for line in PROJECT["dependencies"])


def adding(monkeypatch, *points: tuple[str, str, str]) -> None:
    """Entry points (name, object, group) as if a package that is installed had them."""
    monkeypatch.setattr(extensions, "_entry_points", lambda: tuple(EntryPoint(*point) for point in points))


def test_a_name_that_is_taken_stays_this_packages(monkeypatch):
    own = list(TASKS)
    adding(monkeypatch, ("causal_lm", "theirs:TASK", "left_bench.tasks"), ("other", "theirs:TASK", "left_bench.tasks"))
    assert list(TASKS) == [*own, "other"]
    assert TASKS["causal_lm"].auto_class == "AutoModelForCausalLM"


def test_an_extension_that_cannot_be_imported_is_named(monkeypatch):
    adding(monkeypatch, ("other", "no_such_package.task:TASK", "left_bench.tasks"))
    with pytest.raises(UserError, match=r"adds 'other' to left_bench\.tasks.*ModuleNotFoundError"):
        TASKS["other"]


def test_configurations_may_name_settings_of_an_installed_extension_and_nothing_else(monkeypatch):
    section = {"_target_": "theirs.layers.TheirConfig"}
    with pytest.raises(UserError, match="may be named"):
        instantiate.check_targets(section, key="quantization")
    adding(monkeypatch, ("theirs", "theirs.backend:BACKEND", "left_bench.quantizations"))
    instantiate.check_targets(section, key="quantization")
    with pytest.raises(UserError, match="may be named"):
        instantiate.check_targets({"_target_": "theirs.layers.Popen"}, key="quantization")

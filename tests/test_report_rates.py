"""What a report says of learning rates: how each was come by, what tuning took, and the plot of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from recorded.build import make_record, peft, write_runs, write_sweep

from left_bench.core.errors import UserError
from left_bench.report.axes import find_axes, labels
from left_bench.report.cells import Row, row_of
from left_bench.report.command import main, write_reports
from left_bench.report.compare import compare
from left_bench.report.master_weights import whom_rounding_hurts
from left_bench.report.page import write_page
from left_bench.report.plots import plot_style
from left_bench.report.rates import format_rate, how_rates_came, rates_told, tuned_of
from left_bench.report.seeds import pool
from left_bench.report.sensitivity_plot import sensitivity_figure
from left_bench.report.styles import COLOURS, method_style
from left_bench.spec.record import Record


def tuned(rate: float = 1.2e-3, **changes: Any) -> dict[str, Any]:
    """`provenance.tuned` of a method with four trials."""
    tried = [{"learning_rate": rate * step, "validation_loss": 1 + abs(step - 1)} for step in (0.1, 1, 3)]
    tried.append({"learning_rate": rate * 10, "ended": "diverged"})
    return {
        "trials": 4,
        "learning_rate": rate,
        "own_learning_rate": 1e-3,
        "space": [1e-4, 1e-2],
        "at_edge": False,
        "validation_loss": 1.0,
        "seconds": 90.0,
        "joules": 1500.0,
        "seed": 1000,
        "tried": tried,
    } | changes


def record(name: str, *, seed: int = 0, rate: float | None = None, **more: Any) -> Record:
    changes = peft(name) | {"seed": seed}
    if rate is not None:
        changes["training.learning_rate"] = rate
    return make_record(changes=changes, minute=seed, **more)


def rows_of(*records: Record) -> list[Row]:
    return pool([row_of(item) for item in records])


def test_a_row_says_how_its_rate_was_come_by():
    rows = rows_of(
        *(record("lora", seed=seed, rate=1.2e-3, provenance={"tuned": tuned()}) for seed in (0, 1)),
        record(
            "vera", rate=1.0, provenance={"tuned": tuned(1.0, edge="upper", widened={"trials": 2, "space": [0.1, 10]})}
        ),
        record("dora", rate=1e-3, provenance={"tuned": tuned(1e-3, size=0.5)}),
        record("oft", rate=1e-3, provenance={"tuned": tuned(1e-3, without_value=True)}),
        record("full"),
        record("ia3", rate=3e-3),
    )
    assert how_rates_came(rows) == [
        "tuned (4 trials, 1.2e-3, inside)",
        "tuned (4 + 2 trials, 1e0, at the upper edge)",
        "tuned (4 trials, 1e-3, size ×0.5, inside)",
        "own default, 1e-3 (4 trials, none with a value)",
        "own default, 1e-3",
        "set by hand, 3e-3",
    ]


def test_one_rate_for_several_methods_is_said_to_be_shared():
    rows = rows_of(record("lora", rate=5e-4), record("full", rate=5e-4), record("vera", rate=5e-4))
    assert set(how_rates_came(rows)) == {"shared, set by hand, 5e-4"}
    rows = rows_of(record("lora", rate=5e-4), record("full", rate=6e-4))
    assert how_rates_came(rows) == ["set by hand, 5e-4", "set by hand, 6e-4"]


def test_a_rate_that_was_typed_is_set_by_hand_although_it_is_the_methods_own():
    given = {"overrides": ["peft=full", "++peft.learning_rate=1e-3"]}
    assert how_rates_came(rows_of(record("full", provenance=given))) == ["set by hand, 1e-3"]


def test_optimizers_share_the_methods_own_default():
    records = [record("full") for _ in range(2)]
    for item, name in zip(records, ("adamw", "lion"), strict=True):
        item.config["optimizer"] = {"name": name}
        item.choices["optimizer"] = name
    assert {text.partition(",")[0] for text in how_rates_came([row_of(item) for item in records])} == {
        "shared by the optimizers"
    }


def test_the_table_tells_space_trials_and_what_they_took():
    rows = rows_of(record("lora", rate=1.2e-3, provenance={"tuned": tuned()}), record("full"))
    told = rates_told(rows, ["lora", "full"])
    assert told is not None
    by_name = {name: cells for name, *cells in told.lines}
    assert by_name["lora"] == [
        *("tuned (4 trials, 1.2e-3, inside)", "1e-3", "1e-4", "1e-2", "1.000", "4", "90.0 s", "1.50 kJ"),
    ]
    assert by_name["full"][0] == "own default, 1e-3" and set(by_name["full"][1:]) == {"–"}
    remarks = " ".join(told.remarks)
    assert "no test row was read before the comparison" in remarks and "seed 1000" in remarks
    assert "4 trials took 90.0 s and 1.50 kJ, beside 300 s of the cells compared" in remarks
    assert rates_told(rows_of(record("full")), ["full"]) is None


def test_unequal_trials_and_edges_are_told():
    edge = tuned(1.0, edge="upper", widened={"trials": 2, "space": [0.1, 10]}, trials=6)
    rows = rows_of(
        record("lora", rate=1.2e-3, provenance={"tuned": tuned()}), record("vera", rate=1.0, provenance={"tuned": edge})
    )
    told = rates_told(rows, ["lora", "vera"])
    assert told is not None
    remarks = " ".join(told.remarks)
    assert "Not every method had the same number of trials" in remarks
    assert "the space was widened there once" in remarks and "At an edge" in remarks
    assert {name: cells for name, *cells in told.lines}["vera"][5] == "6 + 2"


@pytest.mark.parametrize(
    "broken",
    [
        *("no dictionary", {}, {"learning_rate": "fast", "trials": 8}, {"learning_rate": -1.0, "trials": 8}),
        {"learning_rate": float("inf"), "trials": 8},
    ],
)
def test_what_cannot_be_read_of_a_tuning_is_no_tuning(broken):
    [row] = rows_of(record("full", provenance={"tuned": broken}))
    assert tuned_of(row) is None and how_rates_came([row]) == ["own default, 1e-3"]


def test_hostile_text_of_a_tuning_is_text(tmp_path):
    bad = tuned(seed="<script>alert(1)</script>", tried=[{"learning_rate": 1e-3, "ended": "</script>"}, 7, {"x": 1}])
    rows = rows_of(record("lora", rate=1.2e-3, provenance={"tuned": bad}), record("full"))
    told = rates_told(rows, ["lora", "full"])
    assert told is not None
    page = write_page(rows, title="t", path=tmp_path / "page.html").read_text()
    assert "<script>alert" not in page


@pytest.mark.parametrize(("rate", "text"), [(1e-3, "1e-3"), (1.25e-4, "1.25e-4"), (1.0, "1e0"), (0.316, "3.16e-1")])
def test_a_rate_as_text(rate, text):
    assert format_rate(rate) == text


def sweep_of(folder: Path, *records: Record) -> None:
    write_sweep(folder, "tuned", write_runs(folder, list(records)))


def test_a_report_has_the_rates_their_plot_and_no_trial(tmp_path):
    compared = [
        record("lora", rate=1.2e-3, provenance={"tuned": tuned()}),
        record("full", rate=3e-4, provenance={"tuned": tuned(3e-4)}),
    ]
    trial = record("lora", seed=1000, rate=4e-3)
    trial.config["eval"]["trial"] = True
    runs = tmp_path / "runs"
    sweep_of(runs, *compared)
    write_runs(runs, [trial])
    assert main([str(runs), "--out", str(tmp_path / "out"), "--format", "md,html"]) == 0
    assert {path.stem for path in (tmp_path / "out").glob("*.md")} == {"tuned"}
    text = (tmp_path / "out" / "tuned.md").read_text()
    board = text.partition("## Leaderboard")[2].partition("\n## ")[0]
    assert "| learning rate |" in board and "tuned (4 trials, 1.2e-3, inside)" in board
    assert "tuned (4 trials, 3e-4, inside)" in board
    section = text.partition("## Learning rates")[2].partition("\n## ")[0]
    assert "](tuned_rates.svg)" in section and "](tuned_rates.svg)" not in text.replace(section, "")
    assert trial.cell_id not in text
    assert "learning\\_rate" not in board.splitlines()[3], "a tuned rate is no axis"
    svg = (tmp_path / "out" / "tuned_rates.svg").read_text()
    assert 'id="row-0-best"' in svg and "Sensitivity to the learning rate" in svg and "diverged" in svg
    page = (tmp_path / "out" / "tuned.html").read_text()
    assert "Learning rates, and what finding them took" in page and '"rates":[[0,[[' in page


def test_trials_alone_make_no_report_and_match_nothing(tmp_path):
    trial = record("lora", seed=1000, rate=4e-3)
    trial.config["eval"]["trial"] = True
    write_runs(tmp_path / "a", [trial])
    with pytest.raises(UserError, match="1 trials of a tuning and no cell that is compared yet"):
        write_reports([tmp_path / "a"], out=tmp_path / "out")
    with pytest.raises(UserError, match="there is no record"):
        compare(tmp_path / "a", tmp_path / "a")


def test_the_plot_has_each_methods_own_colour_and_leaves_out_what_was_not_tuned():
    rows = rows_of(
        record("ia3", rate=1.2e-3, provenance={"tuned": tuned()}),
        record("full", rate=3e-4, provenance={"tuned": tuned(3e-4)}),
        record("vera"),
    )
    names = labels(rows, find_axes(rows))
    with plot_style():
        figure = sensitivity_figure(rows, names)
    assert figure is not None
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    lines = {line.get_label(): line for line in axes.lines if len(line.get_xdata()) > 1}
    assert set(lines) == {"ia3", "full"}
    assert lines["ia3"].get_color() == COLOURS[method_style("ia3").colour]
    assert list(lines["full"].get_xdata()) == pytest.approx([3e-5, 3e-4, 9e-4])
    assert sensitivity_figure(rows_of(record("full")), ["full"]) is None


def test_pruned_trials_are_not_in_the_line():
    more = [{"learning_rate": 5e-4, "validation_loss": 9.0, "ended": "pruned after 5 steps"}]
    [row] = rows_of(record("lora", provenance={"tuned": tuned(tried=tuned()["tried"] + more)}))
    with plot_style():
        figure = sensitivity_figure([row], ["lora"])
    assert figure is not None
    assert 9.0 not in [y for line in figure.axes[0].lines for y in line.get_ydata()]


def test_a_report_says_whom_missing_master_weights_hurt(tmp_path):
    full = record("full", effective={"trainable_dtype": "bfloat16"})
    lora = record("lora", effective={"trainable_dtype": "float32"})
    rows = rows_of(full, lora)
    told = whom_rounding_hurts(rows, {id(row): name for row, name in zip(rows, ("full", "lora"), strict=True)})
    assert told is not None and "unfair to full" in told and "precision=bf16_mixed" in told
    sweep_of(tmp_path / "runs", full, lora)
    [path] = write_reports([tmp_path / "runs"], out=tmp_path / "out")
    assert "**Master weights**: Trained in bfloat16 without a float32 master copy: full" in path.read_text()
    both = rows_of(record("full", effective={"trainable_dtype": "float32"}), lora)
    assert whom_rounding_hurts(both, {id(row): "x" for row in both}) is None

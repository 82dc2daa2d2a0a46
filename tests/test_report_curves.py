"""What a report makes of validation losses along training, from records whose curves are known."""

from __future__ import annotations

from typing import Any

import pytest
from recorded.build import LAPTOP, SERVER, make_record, peft, write_runs, write_sweep

from left_bench.core.errors import UserError
from left_bench.report.cells import Row, row_of
from left_bench.report.command import main, write_reports
from left_bench.report.curve_plot import curve_figure
from left_bench.report.curves import (
    Target,
    check_target,
    equal_cost,
    parse_target,
    spent_until,
    still_falling,
    to_target,
    value_at,
)
from left_bench.report.figure_style import plot_style
from left_bench.report.seeds import pool
from left_bench.spec.record import CurvePoint, Record


def curve(losses: list[float], *, step_seconds: float = 1.0, scores: list[float] | None = None) -> list[CurvePoint]:
    """A point every five steps; 100 tokens and 10 joules a step."""
    return [
        CurvePoint(
            step=5 * n,
            seconds=5 * n * step_seconds,
            tokens=500 * n,
            joules=50.0 * n,
            validation_loss=loss,
            scores=None if scores is None else {"exact_match": scores[n - 1]},
        )
        for n, loss in enumerate(losses, start=1)
    ]


def record(name: str, losses: list[float], *, seed: int = 0, peak_mib: float = 900, **how: Any) -> Record:
    machine = how.pop("machine", LAPTOP)
    made = make_record(changes=peft(name) | {"seed": seed}, peak_mib=peak_mib, machine=machine, minute=seed)
    return made.model_copy(update={"curve": curve(losses, **how)})


def rows_of(*records: Record) -> list[Row]:
    return pool([row_of(item) for item in records])


def test_between_two_points_the_line_is_straight_and_outside_of_them_there_is_none():
    known = curve([3.0, 2.0, 1.0, 1.0])
    assert value_at(known, "step", 10) == 2.0
    assert value_at(known, "seconds", 12.5) == pytest.approx(1.5)
    assert value_at(known, "joules", 75) == pytest.approx(2.5)
    assert value_at(known, "step", 4) is None is value_at(known, "step", 21)


@pytest.mark.parametrize(
    ("target", "axis", "spent"),
    [
        (Target("validation_loss", 1.5), "tokens", 1250),
        (Target("validation_loss", 3.0), "step", 5),  # what was before the first point is not known
        (Target("validation_loss", 0.5), "step", None),
        (Target("exact_match", 0.3), "seconds", 12.5),
        (Target("exact_match", 0.0), "step", 5),
    ],
)
def test_a_target_is_met_where_the_line_crosses_it(target, axis, spent):
    known = curve([3.0, 2.0, 1.0, 1.0], scores=[0.0, 0.2, 0.4, 0.4])
    assert spent_until(known, target, axis) == (None if spent is None else pytest.approx(spent))


def test_equal_costs_are_the_lowest_that_all_rows_spent():
    rows = rows_of(
        record("lora", [2.0, 1.0, 0.8, 0.75], peak_mib=500),
        record("full", [1.0, 0.6, 0.5, 0.45], step_seconds=3.0),
        record("ia3", [2.5, 2.0], peak_mib=400),
    )
    told = equal_cost(rows, ["lora", "full", "ia3"])
    assert told is not None
    assert told.header == ["cell", "at its end", "at 10 steps", "at 10.0 s", "at 100 J", "lowest within its memory"]
    by_name = {name: cells for name, *cells in told.lines}
    assert by_name["lora"] == ["0.750", "1.000", "1.000", "1.000", "0.750 lora"]
    # 10 seconds are three of its steps, and its first point came after five
    assert by_name["full"] == ["0.450 ↘", "0.600", "–", "0.600", "0.450 full"]
    assert by_name["ia3"][-1] == "2.000 ia3"
    assert "no loading, compiling, checkpoint or evaluation is in them" in " ".join(told.remarks)


def test_seeds_give_an_error_and_a_row_without_a_curve_is_left_out():
    rows = rows_of(
        *(record("lora", [2.0, 1.0 + 0.1 * seed], seed=seed) for seed in range(3)),
        record("full", [1.0, 0.5]),
        make_record(changes=peft("ia3")),
    )
    told = equal_cost(rows, ["lora", "full", "ia3"])
    assert told is not None
    assert [line[0] for line in told.lines] == ["lora", "full"]
    assert told.lines[0][1].startswith("1.100 ± 0.058")
    assert equal_cost(rows[:1], ["lora"]) is None


def test_time_is_not_compared_across_machines():
    rows = rows_of(record("lora", [2.0, 1.0]), record("full", [1.0, 0.5], machine=SERVER))
    told = equal_cost(rows, ["lora", "full"])
    assert told is not None and not any(name.endswith(" s") for name in told.header)
    assert any("No column at equal time" in remark for remark in told.remarks)
    figure = curve_figure(rows, ["lora", "full"])
    assert figure is not None and figure.get_supxlabel().startswith("tokens")


@pytest.mark.parametrize(
    ("losses", "falling"),
    [
        ([3.0, 2.0, 1.5, 1.0], True),
        ([3.0, 1.0, 0.9, 0.89], False),
        ([1.0, 1.0, 1.0, 0.995], False),
        ([2.0, 1.0, 1.2, 1.3], False),
    ],
)
def test_a_loss_that_falls_in_the_last_quarter_is_still_falling(losses, falling):
    [row] = rows_of(record("lora", losses))
    assert still_falling(row) is falling


def test_time_and_tokens_to_a_target_say_how_many_seeds_met_it():
    rows = rows_of(
        *(record("lora", [2.0, 1.0 + 0.1 * seed], seed=seed) for seed in range(3)), record("ia3", [2.0, 1.9])
    )
    told = to_target(rows, ["lora", "ia3"], Target("validation_loss", 1.1))
    assert told.header == ["cell", "met", "steps", "time", "tokens", "energy", "best on the way"]
    lora, ia3 = told.lines
    assert lora == ["lora", "2 of 3 seeds", "10 steps", "9.75 s", "975 tokens", "97.5 J", "1.000"]
    assert ia3 == ["ia3", "no", "–", "–", "–", "–", "1.900"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("exakt_match=0.4", "no such score.*exact_match"),
        ("exact_match", "is no number; write exact_match=0.5"),
        ("validation_loss=low", "'low' is no number"),
        ("train_steps=3", "no such score"),
    ],
)
def test_a_target_that_cannot_be_read_is_refused(text, words):
    with pytest.raises(UserError, match=words):
        parse_target(text)


def test_a_target_that_no_curve_has_names_what_it_takes():
    rows = rows_of(record("lora", [2.0, 1.0]))
    check_target(rows, Target("validation_loss", 0.1))
    with pytest.raises(UserError, match=r"they have validation_loss.*eval.curve_scores=true"):
        check_target(rows, Target("exact_match", 0.4))
    with pytest.raises(UserError, match="they have no curve, which takes validation rows"):
        check_target(rows_of(make_record()), Target("validation_loss", 0.4))


def test_the_report_has_the_tables_and_the_plot(tmp_path, capsys):
    records = [
        record(name, [2.0, 1.0, rate], seed=seed) for name, rate in (("lora", 0.8), ("full", 0.5)) for seed in (0, 1)
    ]
    write_sweep(tmp_path / "runs", "s", write_runs(tmp_path / "runs", records))
    command = ["--out", str(tmp_path / "out"), "--format", "md,html", "--target", "validation_loss=1.5"]
    assert main([str(tmp_path / "runs"), *command]) == 0, capsys.readouterr().err
    markdown, page = ((tmp_path / "out" / f"s.{ending}").read_text() for ending in ("md", "html"))
    for text in (markdown, page):
        assert "Validation loss at equal steps, time, energy and memory" in text
        assert "Time and tokens to validation loss ≤ 1.500" in text
    assert "s_curve.svg" in markdown and (tmp_path / "out" / "s_curve.svg").is_file()
    assert main([str(tmp_path / "runs"), *command[:-1], "exact_match=0.5"]) == 2
    assert "eval.curve_scores=true" in capsys.readouterr().err


def test_records_without_curves_are_reported_as_before(tmp_path):
    write_sweep(
        tmp_path / "runs", "s", write_runs(tmp_path / "runs", [make_record(), make_record(changes=peft("lora"))])
    )
    [markdown] = write_reports([tmp_path / "runs"], out=tmp_path / "out")
    assert "Along training" not in markdown.read_text()
    assert not list((tmp_path / "out").glob("*curve*"))


def test_seeds_that_stopped_after_different_steps_are_averaged_where_all_were_at_work():
    rows = rows_of(record("lora", [2.0, 1.0, 0.8]), record("lora", [2.2, 1.2], seed=1))
    with plot_style():
        figure = curve_figure(rows, ["lora"])
    assert figure is not None
    [line] = figure.axes[0].get_lines()
    x, y = line.get_data()
    assert (x[0], x[-1]) == (5, 10) and (y[0], y[-1]) == (pytest.approx(2.1), pytest.approx(1.1))

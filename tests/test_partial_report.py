"""The report grows with its sweep: partial after each cell, cheap, whole at the end."""

from __future__ import annotations

import pytest
from recorded.build import make_record
from test_launch import QUICK, place, runs  # noqa: F401

from left_bench.launch import partial_report
from left_bench.launch.partial_report import begin_partial, write_partial
from left_bench.report.cells import row_of, so_far
from left_bench.report.load import Sweep


@pytest.fixture
def clock(monkeypatch):
    """`clock.now` in seconds since 1970; a report takes `clock.cost` seconds to write."""

    class Clock:
        now, cost, spent = 1000.0, 2.0, 0.0

        @classmethod
        def write(cls, *_, **__):
            cls.spent += cls.cost
            cls.now += cls.cost

    monkeypatch.setattr(partial_report.time, "time", lambda: Clock.now)
    monkeypatch.setattr(partial_report.time, "perf_counter", lambda: Clock.now)
    monkeypatch.setattr("left_bench.report.command.write_reports", Clock.write)
    return Clock


@pytest.mark.parametrize("cost", [0.01, 0.1, 2.0, 30.0])
def test_it_takes_a_fiftieth_of_the_time_after_the_first(cost, clock, tmp_path):
    note = tmp_path / "note"
    begin_partial(note)
    clock.cost, begun = cost, clock.now
    written = 0
    for _ in range(500):
        clock.now += 7.0
        written += write_partial(note, runs_dir=tmp_path, name="s", out=tmp_path)
    assert written >= min(500, (clock.now - begun) / (60 * cost) - 1), "and is not put off for longer than that"
    assert clock.spent - cost <= (clock.now - begun) / 50


def test_the_first_waits_for_what_it_is_taken_to_cost(clock, tmp_path):
    note = tmp_path / "note"
    begin_partial(note)
    clock.now += 4.0
    assert not write_partial(note, runs_dir=tmp_path, name="s", out=tmp_path)
    assert write_partial(note, runs_dir=tmp_path, name="s", out=tmp_path, always=True)
    clock.now += 99.0
    assert not write_partial(note, runs_dir=tmp_path, name="s", out=tmp_path)
    clock.now += 2.0
    assert write_partial(note, runs_dir=tmp_path, name="s", out=tmp_path)


def test_nothing_in_its_way_ends_a_sweep(tmp_path):
    note = tmp_path / "note"
    assert not write_partial(note, runs_dir=tmp_path, name="s", out=tmp_path), "no shared storage, no note"
    begin_partial(note)
    assert not write_partial(note, runs_dir=tmp_path, name="s", out=tmp_path, always=True), "no record yet"
    note.write_text("[]")
    assert not write_partial(note, runs_dir=tmp_path, name="s", out=tmp_path, always=True)


def test_it_says_how_many_cells_there_are_so_far():
    sweep = Sweep(name="s", cells=("a", "b", "c"))
    rows = [row_of(make_record())]
    assert so_far(rows, sweep) == "Partial: 1 of 3 cells so far. The sweep had not finished when this was written."
    assert so_far(rows * 3, sweep) == "The sweep had not finished when this was written."


def test_a_sweep_shows_its_report_after_each_cell(place, runs, left_bench, monkeypatch):  # noqa: F811
    monkeypatch.setattr(partial_report, "_SHARE", 0)
    seen = []
    report = place / "reports" / "smoke.md"
    from left_bench.launch import run_cell

    isolated = run_cell.run_isolated

    def run_isolated(cell, run_dir, *, on_event):
        seen.append((report.read_text(), report.with_suffix(".html").read_text()) if report.exists() else None)
        return isolated(cell, run_dir, on_event=on_event)

    monkeypatch.setattr("left_bench.launch.run_cell.run_isolated", run_isolated)
    answer = left_bench("+sweep=smoke", *QUICK)
    assert answer.code == 0, answer
    assert seen[0] is None
    markdown, page = seen[1]
    assert "Partial: 1 of 2 cells so far." in markdown and "Partial: 1 of 2 cells so far." in page
    assert "![" not in markdown, "plots are most of what a report costs"
    whole = report.read_text()
    assert "Partial" not in whole and "Partial:" not in report.with_suffix(".html").read_text()
    assert not list((place / "runs" / "sweeps").glob("*.report"))


def test_an_interrupted_sweep_leaves_its_report(place, runs, left_bench, monkeypatch):  # noqa: F811
    from left_bench.launch import run_cell

    isolated = run_cell.run_isolated

    def run_isolated(cell, run_dir, *, on_event):
        if cell.peft.name == "ia3":
            raise KeyboardInterrupt
        return isolated(cell, run_dir, on_event=on_event)

    monkeypatch.setattr("left_bench.launch.run_cell.run_isolated", run_isolated)
    assert left_bench("+sweep=smoke", *QUICK).code == 130
    assert "Partial: 1 of 2 cells so far." in (place / "reports" / "smoke.md").read_text()

"""Reports, from the records in `recorded/` (see `recorded/build.py`) and from hostile ones."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from recorded.build import LAPTOP, SERVER, make_record, peft, write_runs, write_sweep
from rich.console import Console

from left_bench.core.errors import UserError
from left_bench.report import (
    format_value,
    load_records,
    main,
    print_summary,
    read_runs,
    read_sweeps,
    write_report,
)
from left_bench.report.axes import find_axes, labels
from left_bench.report.baseline import find_baseline
from left_bench.report.cells import Row, row_of, sweep_rows
from left_bench.report.command import Wanted, write_reports
from left_bench.report.confounders import confounders
from left_bench.report.document import write_document
from left_bench.report.figure_style import plot_style
from left_bench.report.markdown import code, escape, fence, table
from left_bench.report.placement import overlap
from left_bench.report.plots import write_plots
from left_bench.report.ranking import best_rows, family_of, pareto_front, places, standing
from left_bench.report.report import Report
from left_bench.report.scatter_plot import pareto_figure
from left_bench.report.seeds import pool
from left_bench.report.steps_and_rows import read_losses
from left_bench.report.values import format_against, format_error, format_share, significant
from left_bench.spec.record import METRICS, Record, Sample

RECORDED = Path(__file__).parent / "recorded"
REPORTS = Path(__file__).parents[1] / "reports"
MIB = 2**20


def rows_of(*records: Record) -> list[Row]:
    return [row_of(record) for record in records]


def document(rows: list[Row], **more: object) -> str:
    axes = find_axes(rows)
    named = {"name": "a sweep", "baseline": find_baseline(rows), "labels": labels(rows, axes)} | more
    return write_document(Report(rows=rows, axes=axes, **named))  # type: ignore[arg-type]


def section(text: str, heading: str) -> str:
    return text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


def table_rows(text: str, heading: str) -> list[dict[str, str]]:
    """The first table of a section, column -> cell."""
    lines = [line for line in section(text, heading).splitlines() if line.startswith("|")]
    header, _, *body = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [dict(zip(header, line, strict=True)) for line in body]


@pytest.fixture(scope="module")
def methods(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("reports")
    return write_report(RECORDED / "methods", name="peft_methods", out=out).read_text(encoding="utf-8")


# ---- reading


def test_frame_holds_what_the_records_hold() -> None:
    frame = load_records(RECORDED / "methods")
    runs, problems = read_runs(RECORDED / "methods")
    assert not problems and frame.attrs["unreadable"] == []
    assert list(frame["cell_id"]) == [run.record.cell_id for run in runs]
    for run, (_, row) in zip(runs, frame.iterrows(), strict=True):
        for name, value in run.record.metrics.items():
            assert row[name] == value
        for group, option in run.record.choices.items():
            assert row[f"choices.{group}"] == option
        assert row["config.training.steps"] == run.record.config["training"]["steps"]
        assert row["status"] == run.record.status
    lora = frame.set_index("choices.peft").loc["lora"]
    assert lora["config.peft.config.r"] == 16 and lora["machine.id"] == LAPTOP["id"] and lora["seed"] == 0
    assert lora["exact_match_stderr"] == pytest.approx(math.sqrt(0.6171875 * (1 - 0.6171875) / 128))
    assert str(frame["started_at"].dt.tz) == "UTC" and frame["started_at"].is_monotonic_increasing
    assert frame.loc[frame["status"] == "oom", "exact_match"].isna().all()
    assert frame.groupby("config.eval.metrics").size().sum() == len(frame)  # lists can be grouped by


def test_runs_cells_and_files_can_be_named_and_count_once() -> None:
    runs = RECORDED / "ranks"
    cell = next(path for path in sorted(runs.iterdir()) if (path / "record.json").exists())
    assert len(load_records(runs)) == 7
    assert len(load_records(cell)) == len(load_records(str(cell / "record.json"))) == 1
    assert len(load_records([runs, cell, cell / "record.json"])) == 7
    with pytest.raises(UserError, match="no/such"):
        load_records("no/such")


def test_unreadable_records_are_named_and_counted() -> None:
    with pytest.warns(UserWarning, match="2 records could not be read"):
        frame = load_records(RECORDED / "damaged")
    assert len(frame) == 1
    unreadable = frame.attrs["unreadable"]
    assert len(unreadable) == 2 and all("record.json" in problem for problem in unreadable)
    assert any("schema version 0" in problem for problem in unreadable)
    sweeps, problems = read_sweeps(RECORDED / "damaged")
    assert sweeps == [] and [problem.path.name for problem in problems] == ["torn.json"]


def test_damaged_records_are_named_in_the_report(tmp_path: Path) -> None:
    assert main([str(RECORDED / "damaged"), "--out", str(tmp_path)]) == 0
    text = section((tmp_path / "cells.md").read_text(encoding="utf-8"), "What did not run, and why")
    assert "3 files could not be read" in text and "schema version 0" in text and "torn.json" in text
    assert str(RECORDED) not in text


def test_an_empty_runs_folder_makes_an_empty_frame(tmp_path: Path) -> None:
    assert len(load_records(tmp_path)) == 0


def test_losses_are_read_with_tolerance(tmp_path: Path) -> None:
    lines = [
        '{"event": "step", "step": 1, "loss": 9.0}',
        '{"event": "step", "step": 2, "loss": 8.0}',
        '{"event": "start"}',
        '{"event": "step", "step": 1, "loss": 2.5}',  # another attempt
        '{"event": "step", "step": 2, "loss": NaN}',
        '{"event": "step", "step": 3, "loss": 1.5, "extra": []}',
        '{"event": "step", "step": 4, "lo',
        '["step"]',
    ]
    (tmp_path / "events.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert read_losses(tmp_path / "record.json") == ([1, 3], [2.5, 1.5])
    assert read_losses(tmp_path / "elsewhere" / "record.json") == ([], [])


# ---- values


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("peak_memory_bytes", 812 * MIB, "812 MiB"),
        ("peak_memory_bytes", 1.5 * 2**30, "1.50 GiB"),
        ("peak_memory_bytes", 1023.9 * MIB, "1.00 GiB"),
        ("adapter_file_bytes", 46_080, "45.0 KiB"),
        ("adapter_file_bytes", 0, "0 B"),
        ("trainable_params", 4_884_480, "4.88 M"),
        ("total_params", 134_515_008, "135 M"),
        ("total_params", 999_800, "1.00 M"),
        ("trainable_params", 960, "960"),
        ("exact_match", 0.625, "0.625"),
        ("base_exact_match", 0.0, "0.000"),
        ("quantization_error", 0.00034, "0.00034"),
        ("eval_loss", 0.67149, "0.671"),
        ("eval_loss", math.nan, "nan"),
        ("train_tokens_per_second", 1234.4, "1,234"),
        ("train_tokens_per_second", 99.96, "100"),
        ("wall_seconds", 0.01234, "0.0123 s"),
        ("stored_bits_per_param", 4.127, "4.13"),
        ("train_steps", 1000, "1,000"),
        ("exact_match", None, "–"),
    ],
)
def test_values_carry_their_units(metric: str, value: float | None, text: str) -> None:
    assert format_value(metric, value) == text


@given(st.sampled_from(sorted(METRICS)), st.floats(min_value=0, max_value=1e15))
def test_a_printed_value_is_the_value(metric: str, value: float) -> None:
    number, _, unit = format_value(metric, value).partition(" ")
    powers = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "k": 1e3, "M": 1e6, "B": 1e9 if "params" in metric else 1}
    powers |= {"kJ": 1e3, "MJ": 1e6}
    read = float(number.replace(",", "")) * powers.get(unit, 1)
    assert read == pytest.approx(
        value, rel=0.0051, abs=0.00051 if METRICS[metric].unit in ("fraction", "nats") else 0.5
    )


@pytest.mark.parametrize(
    ("metric", "value", "error", "text"),
    [
        ("eval_perplexity", 1.7734, 0.08867, "0.09"),
        ("eval_perplexity", 25.31, 1.308, "1.3"),
        ("exact_match", 0.547, 0.0442, "0.044"),
        ("train_tokens_per_second", 1234.4, 56.7, "57"),
        ("wall_seconds", 61.62, 2.345, "2.3 s"),
        ("peak_memory_bytes", 972 * 2**20, 12.34 * 2**20, "12 MiB"),
        ("peak_memory_bytes", 1.57 * 2**30, 16.2 * 2**20, "0.02 GiB"),
        ("peak_memory_bytes", 1.17 * 2**30, 591 * 2**10, "591 KiB"),  # nothing, in the value's digits
        ("peak_memory_bytes", 512, 3, "3 B"),
        ("trainable_params", 4.88e6, 1.234e6, "1.23 M"),
        ("eval_loss", 0.573, 0.0, "0.000"),
    ],
)
def test_an_error_has_no_finer_digit_than_its_value(metric: str, value: float, error: float, text: str) -> None:
    assert format_error(metric, value, error) == text


@pytest.mark.parametrize(
    ("value", "text"), [(-0.0042, "\u22120.004"), (-1.5, "\u22121.500"), (-0.0, "0.000"), (-0.00004, "\u22120.000040")]
)
def test_a_number_below_zero_has_a_minus_and_no_hyphen(value: float, text: str) -> None:
    assert format_value("forgetting_nats", value) == text


def test_numbers_stand_against_the_baseline() -> None:
    assert format_against("exact_match", 0.625, 0.575) == "+0.050"
    assert format_against("eval_loss", 0.5, 0.512) == "\u22120.012"
    assert format_against("eval_loss", 0.5, 0.5) == "0.000"
    assert format_against("peak_memory_bytes", 610, 1000) == "0.61\u00d7"
    assert format_against("trainable_params", 36, 10_000) == "0.0036\u00d7"
    assert format_against("train_tokens_per_second", 16, 1) == "16.0\u00d7"
    for value, baseline in ((None, 1.0), (1.0, None), (1.0, 0.0), (math.nan, 1.0)):
        assert format_against("wall_seconds", value, baseline) == ""
    assert format_share(4_884_480, 139_399_488) == "3.50%" and format_share(5, 5) == "100%"
    assert significant(0) == "0" and significant(0.99951) == "1.00"


# ---- which columns


def test_axes_are_what_varies_and_is_not_explained() -> None:
    def keys(name: str) -> list[str]:
        runs, _ = read_runs(RECORDED / name)
        return [axis.key for axis in find_axes([row_of(run) for run in runs])]

    # learning rates and ranks vary with the method, and are therefore no columns
    assert keys("methods") == ["quantization", "peft"]
    assert keys("ranks") == ["peft.config.r", "peft.config.lora_alpha"]
    assert keys("two_machines") == ["peft", "machine"]


def test_a_leaf_that_varies_within_an_option_is_a_column() -> None:
    rows = rows_of(
        make_record(),
        make_record(changes=peft("lora", r=8)),
        make_record(changes=peft("lora", r=16)),
        make_record(changes=peft("lora", r=16) | {"seed": 1}),
    )
    axes = {axis.key: axis.values for axis in find_axes(rows)}
    absent = format_value("exact_match", None)
    assert axes == {
        "peft": ("full", "lora", "lora", "lora"),
        "seed": ("0", "0", "0", "1"),
        "peft.config.r": (absent, "8", "16", "16"),
    }
    assert labels(rows, find_axes(rows)) == ["full seed 0", "lora seed 0 r=8", "lora seed 0 r=16", "lora seed 1 r=16"]


def test_headings_are_short_unless_two_would_be_alike() -> None:
    rows = rows_of(
        make_record(changes={"training.steps": 4, "data.seed": 1}),
        make_record(changes={"training.steps": 8, "data.seed": 1}),
        make_record(changes={"training.steps": 8, "data.seed": 2, "seed": 3}),
    )
    headings = [axis.heading for axis in find_axes(rows)]
    assert "steps" in headings and len(set(headings)) == len(headings)


def test_cells_run_twice_are_told_apart() -> None:
    rows = rows_of(make_record(minute=1), make_record(minute=2, wall=99), make_record(changes=peft("lora")))
    assert len(set(labels(rows, find_axes(rows)))) == 3


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.sampled_from(["lora", "none", "a b", "–"]), st.integers(1, 3), st.integers(0, 1)),
        min_size=1,
        max_size=8,
    )
)
def test_labels_are_always_different(cells: list[tuple[str, int, int]]) -> None:
    rows = rows_of(*(make_record(changes=peft(name, r=rank) | {"seed": seed}) for name, rank, seed in cells))
    axes = find_axes(rows)
    assert len(set(labels(rows, axes))) == len(rows)
    assert all(len(axis.values) == len(rows) for axis in axes)
    assert len({axis.heading for axis in axes}) == len(axes)


def test_a_cell_without_a_record_keeps_its_place_and_what_its_id_tells(tmp_path: Path) -> None:
    records = [make_record(), make_record(changes=peft("lora", r=8)), make_record(changes=peft("dora", r=8))]
    cells = write_runs(tmp_path, records[:2])
    write_sweep(tmp_path, "s", [records[2].cell_id, *cells])
    text = write_report(tmp_path, name="s", out=tmp_path / "out").read_text(encoding="utf-8")
    assert [(row["peft"].split(" ")[0], row["status"]) for row in table_rows(text, "Quality")] == [
        ("dora", "**not run**"),
        ("full", "ok"),
        ("lora", "ok"),
    ]


def test_an_unreadable_cell_of_a_sweep_is_a_row(tmp_path: Path) -> None:
    records = [make_record(), make_record(changes=peft("lora"))]
    cells = write_runs(tmp_path, records)
    write_sweep(tmp_path, "s", cells)
    (tmp_path / cells[1] / "record.json").write_text("{", encoding="utf-8")
    text = write_report(tmp_path, name="s", out=tmp_path / "out").read_text(encoding="utf-8")
    assert [row["status"] for row in table_rows(text, "Quality")] == ["ok", "**unreadable**"]
    assert text.count("unreadable (") == 1


# ---- numbers of the tables


def test_tables_show_the_records_numbers_in_the_sweeps_order(methods: str) -> None:
    (sweep,), _ = read_sweeps(RECORDED / "methods")
    runs, problems = read_runs(RECORDED / "methods")
    rows = sweep_rows(sweep, runs, problems)
    baseline = find_baseline(rows)
    assert baseline is not None and baseline.record is not None and baseline.record.choices["peft"] == "full"
    quality, memory, speed = (table_rows(methods, name) for name in ("Quality", "Memory and size", "Speed"))
    assert len(quality) == len(memory) == len(speed) == len(sweep.cells) == 13
    columns = {
        "exact match": (quality, "exact_match"),
        "eval loss (nats)": (quality, "eval_loss"),
        "peak memory": (memory, "peak_memory_bytes"),
        "base weights": (memory, "weights_bytes"),
        "trainable params": (memory, "trainable_params"),
        "adapter file": (memory, "adapter_file_bytes"),
        "train tokens/s": (speed, "train_tokens_per_second"),
        "wall time": (speed, "wall_seconds"),
    }
    for heading, (lines, metric) in columns.items():
        for row, line in zip(rows, lines, strict=True):
            cell = re.sub(r"\*\*|</?u>", "", line[heading])
            value = row.value(metric)
            assert format_value(metric, value) in cell, (heading, cell)
            if value is not None and row.ok and row is not baseline:
                told = format_against(metric, value, baseline.value(metric))
                judged = family_of(rows, metric).of(row, baseline)
                same = format_value(metric, value) == format_value(metric, baseline.value(metric))
                if judged is not None and judged.word == "not resolved":
                    assert re.search(r"\(not resolved, [−+]?[\d.]+×? to [−+]?[\d.]+×?\)$", cell)
                else:
                    assert cell.endswith(f"({'same' if same else told})")
            if row.stderr(metric) is not None:
                assert f" ± {format_error(metric, value, row.stderr(metric))}" in cell
            if row.base_value(metric) is not None:
                assert cell.startswith(f"{format_value(metric, row.base_value(metric))} → ")
        assert sum("**" in line[heading] for line in lines) == 1, heading
    assert [line["status"].strip("*").lower() for line in quality] == [row.status for row in rows]
    lora = memory[1]
    assert lora["peak memory"] == "848 MiB (0.61\u00d7)" and "3.50%" in lora["trainable params"]


def test_every_status_has_its_row_and_reason(methods: str) -> None:
    failures = {row["status"]: row for row in table_rows(methods, "What did not run, and why")}
    assert set(failures) == {"failed", "OOM", "diverged", "crashed", "timeout", "unsupported", "not run"}
    assert failures["OOM"]["reason"] == "DefaultCPUAllocator: not enough memory (machine memory 15.5 GiB)"
    assert failures["diverged"]["reason"] == "loss is nan at step 7"
    assert "ValueError: total_step is 0\n```" in methods  # the log's end
    assert "The sweep had not finished" in methods


def test_every_number_can_be_traced(methods: str) -> None:
    (sweep,), _ = read_sweeps(RECORDED / "methods")
    traced = table_rows(methods, "Where each number comes from")
    assert [row["id"].strip("`") for row in traced] == list(sweep.cells)
    for row in traced:
        if row["status"] != "not run":
            assert (RECORDED / row["record"].strip("`")).is_file()


def test_the_head_tells_machine_versions_command_and_constants(methods: str) -> None:
    head = methods.split("## Recommendation")[0]
    for told in ("AMD Ryzen 7 7840U", "8 cores", "16.0 GiB", "2026-03-14"):
        assert told in head
    head = methods.split("## Settings")[1].split("\n## ")[0]
    for told in ("torch 2.13.0+cpu", "steps 40", "bfloat16"):
        assert told in head
    assert "```bash\nleft-bench +sweep=peft_methods\n```" in head
    assert "learning_rate" not in head  # it varies with the method
    assert "peft 0.21.0" in head and "| peft |" not in head


def test_phases_samples_and_glossary(methods: str) -> None:
    phases = table_rows(methods, "Phases")
    assert phases[0]["train"] == format_value("wall_seconds", 0.65 * 233.4)
    assert methods.count("<details>") == 12 and "| prompt_tuning | The final answer is | 33 |" in methods
    glossary = {row["name in the record"].strip("`"): row["meaning"] for row in table_rows(methods, "Metrics")}
    assert glossary["exact_match"] == METRICS["exact_match"].meaning
    assert "generate_tokens_per_second" not in glossary


def test_missing_metrics_are_dashes_and_absent_columns_are_left_out() -> None:
    rows = rows_of(make_record(eval_loss=None), make_record(changes=peft("lora"), exact_match=None, eval_loss=None))
    text = document(rows)
    lines = table_rows(text, "Quality")
    assert "eval loss (nats)" not in lines[0]
    assert lines[1]["exact match"] == format_value("exact_match", None)


def test_perplexity_stands_in_only_without_its_loss() -> None:
    record = make_record()
    alone = record.model_copy(update={"metrics": {"eval_perplexity": 2.0}, "scores": []})
    assert "perplexity" not in table_rows(document(rows_of(record)), "Quality")[0]
    assert table_rows(document(rows_of(alone)), "Quality")[0]["perplexity"] == "2.00"


def test_scores_that_are_no_numbers_are_shown_and_not_ranked() -> None:
    rows = rows_of(
        make_record(eval_loss=math.nan),
        make_record(changes=peft("lora")),
        make_record(changes=peft("ia3"), eval_loss=0.9),
    )
    assert [row.record.choices["peft"] for row in best_rows(rows, "eval_loss") if row.record] == ["lora"]
    assert "nan" in table_rows(document(rows), "Quality")[0]["eval loss (nats)"]


# ---- ranking


def test_values_that_print_alike_share_the_bold() -> None:
    rows = rows_of(
        make_record(exact_match=0.62504, eval_loss=None),
        make_record(changes=peft("lora"), exact_match=0.625, eval_loss=None),
        make_record(changes=peft("ia3"), exact_match=0.3, eval_loss=None),
    )
    assert best_rows(rows, "exact_match") == rows[:2]
    assert best_rows(rows[:2], "exact_match") == []  # nothing is best where all are alike


def test_lower_is_better_where_the_metric_says_so() -> None:
    rows = rows_of(
        make_record(peak_mib=900, eval_loss=0.4), make_record(changes=peft("lora"), peak_mib=800, eval_loss=0.5)
    )
    assert best_rows(rows, "peak_memory_bytes") == [rows[1]] and best_rows(rows, "eval_loss") == [rows[0]]


def test_failed_cells_are_never_best() -> None:
    oom = make_record(changes=peft("lora"), status="oom", reason="x", metrics={"peak_memory_bytes": MIB})
    rows = rows_of(make_record(peak_mib=900), make_record(changes=peft("ia3"), peak_mib=800), oom)
    assert best_rows(rows, "peak_memory_bytes") == [rows[1]]
    assert "1.00 MiB" in table_rows(document(rows), "Memory and size")[2]["peak memory"]


def test_what_independent_errors_leave_open_is_not_resolved() -> None:
    scores = [0.640625, 0.55, 0.5, 0.3]
    rows = rows_of(*(make_record(changes=peft(f"m{i}"), exact_match=score) for i, score in enumerate(scores)))
    result = standing(rows, "exact_match")

    def error(score: float) -> float:
        return score * (1 - score) / 128

    expected = [i for i in (1, 2, 3) if scores[0] - scores[i] < 1.96 * math.sqrt(error(scores[0]) + error(scores[i]))]
    assert result is not None and result.best is rows[0] and result.family.how == ["standard errors"]
    assert [row for row, _ in result.unresolved] == [rows[i] for i in expected] and expected == [1]
    assert "best is **m0**; not resolved from it: m1 (−0.210, +0.029)." in document(rows)


def test_equal_scores_without_spread_are_not_resolved() -> None:
    rows = rows_of(make_record(exact_match=1.0), make_record(changes=peft("lora"), exact_match=1.0))
    result = standing(rows, "exact_match")
    assert result is not None and [row for row, _ in result.unresolved] == [rows[1]]


def test_one_seed_is_said_to_be_one_seed() -> None:
    one = rows_of(make_record(), make_record(changes=peft("lora")))
    two = rows_of(make_record(), make_record(changes={"seed": 1}))
    assert "One seed only" in document(one) and "One seed only" not in document(two)


def test_speed_is_not_ranked_across_machines(tmp_path: Path) -> None:
    assert main([str(RECORDED / "two_machines"), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "cells.md").read_text(encoding="utf-8")
    speed = {row["peft"]: row for row in table_rows(text, "Speed")}
    assert "**" not in "".join(row["train tokens/s"] for row in speed.values())
    assert speed["lora"]["train tokens/s"] == "655 (1.59\u00d7)"  # the baseline's machine
    assert speed["ia3"]["train tokens/s"] == "2,301"  # another one: no ratio
    assert "**" in "".join(row["exact match"] for row in table_rows(text, "Quality"))  # quality does not depend on it
    assert "speed is not ranked, nor" in text and SERVER["cpu"] in text and LAPTOP["cpu"] in text


def test_scores_on_different_rows_are_not_ranked() -> None:
    rows = rows_of(make_record(exact_match=0.6), make_record(changes={"data.task": "other"}, exact_match=0.7))
    assert best_rows(rows, "exact_match") == [] and standing(rows, "exact_match") is None
    assert "(" not in table_rows(document(rows), "Quality")[1]["exact match"]


def test_losses_of_different_models_are_not_ranked() -> None:
    other = make_record(changes={"model.name": "b", "model.name_or_path": "b"}, eval_loss=0.1, exact_match=0.9)
    rows = rows_of(make_record(), other)
    assert best_rows(rows, "eval_loss") == [] and best_rows(rows, "exact_match") == [rows[1]]
    assert "losses per token are not ranked" in section(document(rows), "Quality")


def test_confounders_are_named_with_their_cells() -> None:
    rows = rows_of(
        make_record(provenance={"notes": ["both", "one"]}),
        make_record(
            changes=peft("lora") | {"training.batch_size": 2, "hardware.threads": 2, "training.batching": "grouped"},
            effective={"attention": "eager", "threads": 4, "batching": "padded"},
            provenance={"notes": ["both"]},
        ),
    )
    result = confounders(rows, dict(zip(map(id, rows), ["full", "lora"], strict=True)))
    told = [f"{what}: {how}" for what, how in result]
    assert "training.batch_size: 8: full; 2: lora" in told
    assert "training.batching: padded: full; grouped: lora" in told
    assert "attention: sdpa: full; eager: lora" in told
    assert "not as asked: threads: asked for 2, got 4 (lora)" in told
    assert "not as asked: batching: asked for grouped, got padded (lora)" in told
    assert "note: both (all cells)" in told and "note: one (full)" in told


def test_nothing_is_said_to_confound_a_clean_sweep() -> None:
    rows = [row_of(run) for run in read_runs(RECORDED / "ranks")[0]]
    assert confounders(rows, {id(row): "" for row in rows}) == []
    assert "Confounders" not in document(rows)


def test_quantized_weights_are_no_unfulfilled_request() -> None:
    changes = {"quantization.name": "nf4", "quantization._target_": "transformers.BitsAndBytesConfig"}
    rows = rows_of(make_record(changes=changes, effective={"weights_dtype": "uint8"}))
    assert confounders(rows, {id(row): "" for row in rows}) == []
    rows = rows_of(make_record(effective={"weights_dtype": "float32"}))
    [(what, _)] = confounders(rows, {id(row): "" for row in rows})
    assert what == "not as asked"


def test_who_decodes_five_bits_confounds_only_where_there_are_five_bits() -> None:
    changes = {"quantization.name": "nf5", "quantization._target_": "left_bench.fivebit.FiveBitConfig"}
    dense, fast, slow = rows_of(
        make_record(),
        *(make_record(changes=changes, effective={"five_bit_decoder": name}) for name in ("llvm-avx512", "torch")),
    )
    names = {id(dense): "dense", id(fast): "fast", id(slow): "slow"}
    assert confounders([dense, fast], names) == []
    assert confounders([dense, fast, slow], names) == [("five_bit_decoder", "llvm-avx512: fast; torch: slow")]


def test_random_weights_have_no_quality(tmp_path: Path) -> None:
    text = write_report(RECORDED / "random_weights", name="random_weights", out=tmp_path).read_text(encoding="utf-8")
    assert "**Random weights: no quality is scored**" in section(text, "Quality")
    assert "exact match" not in text and "**8.40 MiB**" in text
    assert not (tmp_path / "random_weights_pareto.svg").exists()
    rows = rows_of(
        make_record(changes={"model.weights": "random"}, metrics={"exact_match": 0.9}),
        make_record(changes=peft("lora")),
        make_record(changes=peft("ia3"), exact_match=0.1),
    )
    assert best_rows(rows, "exact_match") == [rows[1]] and rows[0].value("exact_match") is None
    assert "no quality is scored** in full." in document(rows)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=2, max_size=9))
@settings(max_examples=60)
def test_the_front_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    rows = rows_of(
        *(make_record(peak_mib=100 * x, exact_match=y / 6, eval_loss=None, minute=i) for i, (x, y) in enumerate(points))
    )
    front = {rows.index(row) for row in pareto_front(rows, "exact_match")}
    for i, (x, y) in enumerate(points):
        beaten = any(a <= x and b >= y and (a < x or b > y) for a, b in points)
        assert (i in front) != beaten


# ---- baseline


def test_the_default_baseline_is_full_then_the_first_that_is_ok() -> None:
    full, lora = make_record(), make_record(changes=peft("lora"))
    nf4 = make_record(changes={"quantization.name": "nf4"})
    oom = make_record(status="oom", reason="x")
    assert find_baseline(rows_of(lora, nf4, full)).record is full  # type: ignore[union-attr]
    assert find_baseline(rows_of(oom, lora, nf4)).record is lora  # type: ignore[union-attr]
    assert find_baseline(rows_of(oom)) is None
    assert "In brackets" not in document(rows_of(oom, make_record(status="failed", reason="y", minute=3)))


def test_a_baseline_can_be_selected() -> None:
    rows = [row_of(run) for run in read_runs(RECORDED / "ranks")[0]]
    assert find_baseline(rows, rows[3].cell_id) is rows[3]
    assert find_baseline(rows, rows[3].cell_id[:-2]) is rows[3]
    assert find_baseline(rows, "peft=lora,peft.config.r=8") is rows[2]
    assert find_baseline(rows, "seed=0") is rows[0]
    assert find_baseline(rows, "training.activation_checkpointing=false") is rows[0]


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("peft=lorra", "did you mean 'lora'"),
        ("pefd=lora", "did you mean 'peft'"),
        ("smollm2_135m", "ids begin so"),
        ("smollm2_135m-none-full-bf17", "did you mean 'smollm2_135m-none-full-bf16"),
        ("peft=prefix_tuning", "is oom; choose a cell that is ok"),
        ("", "no cell has an id"),
    ],
)
def test_a_baseline_that_fits_nothing_is_refused(selector: str, message: str) -> None:
    rows = [row_of(run) for run in read_runs(RECORDED / "methods")[0]]
    with pytest.raises(UserError, match=re.escape(message)):
        find_baseline(rows, selector)


# ---- hostile text

HOSTILE = [
    "a | b || c",
    "<script>alert(1)</script>",
    "![x](http://example.org/x.png) [y](javascript:alert(1)) <http://example.org> www.example.org",
    "``` \n\n# heading\n\n- item\n| a | b |\n|---|---|",
    "`code` ``x`` \\| \\",
    "</details>\n<details>",
    "1. one\n2. two",
    "# heading",
    "---",
    "*bold* _it_ ~~no~~ $x^2$ @someone &lt;b&gt;",
    "\x00\x1b[31m\ud800\u202e\u2028",
    "",
    "&#124;<!-- -->",
]
hostile = st.one_of(st.sampled_from(HOSTILE), st.text(alphabet=st.characters(), max_size=30)).map(
    lambda text: text.replace("\ud800", "") or "-"
)


HEADINGS = {
    *("Recommendation", "Leaderboard", "Quality", "Memory and size", "Speed", "Seeds", "Phases", "Plots", "Samples"),
    *("What did not run, and why", "Settings", "Metrics", "Where each number comes from", "Quantization × peft"),
    *(f"By {group}" for group in ("quantization", "peft", "precision", "training", "optimizer")),
}


def tokens(text: str) -> list:
    result = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)
    return [token for top in result for token in (top, *(top.children or ()))]


def assert_harmless(text: str) -> None:
    """Only the report's own markup takes effect: its folds, its plots, tables with as many cells as columns."""
    result = tokens(text)
    for token in result:
        if token.type in ("html_block", "html_inline"):
            # a fold's summary is text with its own entities
            rest = re.sub(r"^</?u>$|^<details>\n<summary>[^<>\n]*</summary>\n?$|^</details>\n?$", "", token.content)
            assert rest.strip() == "", token.content
        assert token.type not in ("link_open", "s_open"), text
        if token.type == "image":
            assert re.fullmatch(r"[\w.]+\.svg", str(token.attrs["src"]))
    columns = width = 0
    for token in result:
        if token.type == "thead_open":
            width = 0
        if token.type == "th_open":
            width += 1
        if token.type == "tr_open":
            columns = 0
        if token.type == "td_open":
            columns += 1
        if token.type == "tr_close" and columns:
            assert columns == width
    for row in re.findall(r"^\|.*\|$", text, flags=re.MULTILINE):
        assert row.count("|") == len(re.split(r"\|", row)) - 1


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(hostile, min_size=8, max_size=8))
def test_a_record_can_write_nothing_into_the_report_but_text(texts: list[str]) -> None:
    a, b, c, d, e, f, g, h = texts
    good = make_record(choices={"peft": a, "quantization": b}, provenance={"notes": [c, d], "command": e})
    good = good.model_copy(
        update={
            "samples": [Sample(prompt=f, reference=g, prediction=h, base_prediction=a)],
            "environment": {"machine": LAPTOP | {"cpu": b}, "versions": {"torch": c}, "effective": {d: e}},
        }
    )
    bad = make_record(
        status="failed", reason=a, choices={"peft": h}, provenance={"log_tail": b, "command": c, "notes": [g]}, minute=2
    )
    bad = bad.model_copy(update={"cell_id": f"{d}", "started_at": e})
    rows = rows_of(good, bad, make_record(changes=peft("lora")))
    text = document(rows, name=f)
    text.encode("utf-8")
    assert_harmless(text)
    result = tokens(text)
    headings = [result[i + 1].content for i, token in enumerate(result) if token.type == "heading_open"]
    assert set(headings[1:]) <= HEADINGS


@given(hostile)
def test_escaped_text_shows_exactly_itself(text: str) -> None:
    rendered = (
        MarkdownIt("commonmark")
        .enable(["table", "strikethrough"])
        .parse(table(["a", "b"], [[escape(text), code(text)]], labels=2))
    )
    cells = [token for token in rendered if token.type == "inline"][2:]
    assert len(cells) == 2
    from left_bench.report.values import one_line

    for cell in cells:
        shown = "".join(child.content for child in cell.children or ())
        assert shown.strip() == one_line(text).strip()


@given(st.text(alphabet=st.sampled_from("`a\n~ "), max_size=30))
def test_a_fence_cannot_be_closed_from_inside(text: str) -> None:
    (token,) = MarkdownIt("commonmark").parse(fence(text, "text"))
    assert token.type == "fence"


# ---- files


PLOTS = ("loss", "memory", "parameters", "pareto", "steps")


def test_the_same_records_make_the_same_bytes(tmp_path: Path) -> None:
    for out in ("a", "b"):
        write_report(REPORTS / "records", name="peft_methods", out=tmp_path / out)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    plots = [f"peft_methods_{plot}.svg" for plot in PLOTS]
    assert files == sorted(["peft_methods.md", "peft_methods.html", *plots])
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    text = (tmp_path / "a" / "peft_methods.md").read_text(encoding="utf-8")
    assert all(f"]({name})" in text for name in plots)


def test_main_writes_each_sweep_and_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    swept = write_runs(runs, [make_record(), make_record(changes=peft("lora"))])
    write_runs(runs, [make_record(changes=peft("ia3"))])
    write_sweep(runs, "one", swept)
    write_sweep(runs, "two/../evil", swept[:1])
    assert main([str(runs), "--out", str(tmp_path / "out")]) == 0
    printed = [Path(line).name for line in capsys.readouterr().out.splitlines()]
    assert sorted(printed) == ["cells.md", "one.md", "two_.._evil.md"] and printed[-1] == "cells.md"
    assert all(path.parent == tmp_path / "out" for path in tmp_path.rglob("*.md"))
    assert "ia3" in (tmp_path / "out" / "cells.md").read_text(encoding="utf-8")
    assert "ia3" not in (tmp_path / "out" / "one.md").read_text(encoding="utf-8")


def test_a_sweep_over_two_folders_is_one_report(tmp_path: Path) -> None:
    for folder, record in (("a", make_record()), ("b", make_record(machine=SERVER)), ("c", make_record(minute=5))):
        write_sweep(tmp_path / folder, "s", write_runs(tmp_path / folder, [record]))
    assert main([str(tmp_path / name) for name in "abc"] + ["--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "s.md").read_text(encoding="utf-8")
    assert len(table_rows(text, "Speed")) == 3
    assert sorted(path.name for path in (tmp_path / "out").glob("*.md")) == ["s.md"]


def test_a_sweep_of_which_nothing_ran_is_still_reported(tmp_path: Path) -> None:
    write_runs(tmp_path, [make_record(), make_record(changes=peft("lora"))])
    write_sweep(tmp_path, "s", [make_record(changes=peft("ia3")).cell_id])
    (tmp_path / "sweeps" / "torn.json").write_text("{", encoding="utf-8")
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "s.md").read_text(encoding="utf-8")
    assert "1 cell (1 not run)" in text and "torn.json" not in text
    assert "torn.json" in (tmp_path / "out" / "cells.md").read_text(encoding="utf-8")


def test_what_cannot_be_read_is_told_even_where_every_cell_is_in_a_sweep(tmp_path: Path) -> None:
    write_sweep(tmp_path, "s", write_runs(tmp_path, [make_record()]))
    (tmp_path / "stray").mkdir()
    (tmp_path / "stray" / "record.json").write_text("[]", encoding="utf-8")
    text = write_report(tmp_path, name="s", out=tmp_path / "out").read_text(encoding="utf-8")
    assert "stray/record.json" in section(text, "What did not run, and why")


def test_main_refuses_what_cannot_be_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = str(RECORDED / "ranks")
    for argv, message in (
        ([str(tmp_path / "none")], "there is no such folder"),
        ([str(tmp_path)], "there is no record"),
        ([runs, "--baseline", "peft=lorra"], "did you mean 'lora'"),
        ([runs, "--name", "lora_rang"], "did you mean 'lora_rank'"),
    ):
        assert main([*argv, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_name_picks_the_sweep_or_names_the_report(tmp_path: Path) -> None:
    assert main([str(RECORDED / "two_machines"), "--out", str(tmp_path), "--name", "mine"]) == 0
    assert (tmp_path / "mine.md").read_text(encoding="utf-8").startswith("# mine\n")
    with pytest.raises(UserError, match="lora_rank"):
        write_report(RECORDED / "ranks", name="other", out=tmp_path)


def test_a_baseline_named_on_the_command_line_is_the_reports(tmp_path: Path) -> None:
    assert main([str(RECORDED / "ranks"), "--out", str(tmp_path), "--baseline", "peft.config.r=16"]) == 0
    lines = table_rows((tmp_path / "lora_rank.md").read_text(encoding="utf-8"), "Memory and size")
    assert "*(baseline)*" in lines[3]["lora_alpha"] and "(" not in lines[3]["peak memory"]
    assert lines[4]["trainable params"].endswith("(2.00\u00d7)")


def test_reading_and_reporting_need_no_torch_and_the_summary_no_pandas() -> None:
    script = (
        "import sys, json\n"
        "from left_bench.report import main, print_summary, read_runs\n"
        f"print_summary([run.record for run in read_runs({str(RECORDED / 'ranks')!r})[0]])\n"
        "print(json.dumps([name for name in ('torch', 'pandas', 'matplotlib', 'transformers') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []


# ---- plots


def test_no_two_labels_overlap_even_where_points_coincide() -> None:
    spots = [(900, 0.5)] * 5 + [(903, 0.51)] * 3 + [(700, 0.2), (1000, 0.9), (1001, 0.9), (1380, 0.4)]
    rows = rows_of(
        *(make_record(changes=peft(f"method_{i}"), peak_mib=x, exact_match=y) for i, (x, y) in enumerate(spots))
    )
    names = labels(rows, find_axes(rows))
    with plot_style():
        figure = pareto_figure(rows, names)
        assert figure is not None
        figure.draw_without_rendering()
        (axes,) = figure.axes
        texts = [text for text in axes.texts if (text.get_gid() or "").startswith("label-")]
        assert sorted(text.get_text() for text in texts) == sorted(names) and len(names) == 12
        boxes = [text.get_window_extent().extents for text in texts]
        inside = axes.get_window_extent().extents
    for i, box in enumerate(boxes):
        assert not any(overlap(tuple(box), tuple(other)) for other in boxes[:i])
        assert box[0] >= inside[0] and box[1] >= inside[1] and box[2] <= inside[2] and box[3] <= inside[3]
        for x, y in spots:
            px, py = axes.transData.transform((x / (1024 if max(s[0] for s in spots) >= 1024 else 1), y))
            assert not (box[0] < px < box[2] and box[1] < py < box[3])


def test_plots_bear_any_label(tmp_path: Path) -> None:
    names = ["$x$ \\frac{", "<script>&]]>-->", "\x00\ud800 odd\nlabel" + "x" * 200]
    rows = rows_of(*(make_record(changes=peft(f"m{i}"), peak_mib=800 + i) for i in range(3)))
    written = write_plots(rows, names, out=tmp_path, name="odd")
    from xml.etree import ElementTree

    assert [name for name, _ in written] == ["odd_pareto.svg", "odd_memory.svg"]
    for name, _ in written:
        elements = list(ElementTree.parse(tmp_path / name).iter())
        kinds = {element.tag.rpartition("}")[2] for element in elements}
        assert "text" in kinds and "script" not in kinds  # letters, not their outlines, and nothing that runs
        assert any("<script>" in (element.text or "") for element in elements)


def test_loss_stands_in_for_a_score_that_is_missing() -> None:
    rows = rows_of(
        make_record(exact_match=None, eval_loss=0.5, peak_mib=900),
        make_record(changes=peft("lora"), exact_match=None, eval_loss=0.4, peak_mib=1000),
        make_record(changes=peft("ia3"), exact_match=None, eval_loss=0.6, peak_mib=1000),
    )
    with plot_style():
        figure = pareto_figure(rows, ["a", "b", "c"])
    assert figure is not None and "eval loss" in figure.axes[0].get_ylabel() and figure.axes[0].yaxis_inverted()
    assert pareto_front(rows, "eval_loss") == rows[:2]


def test_drawing_leaves_no_trace_in_the_process(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    write_plots(rows_of(make_record()), ["a"], out=tmp_path, name="x")
    assert dict(matplotlib.rcParams) == before


# ---- the terminal


def printed(records: list[Record], **options: object) -> str:
    stream = io.StringIO()
    print_summary(records, console=Console(file=stream, **({"width": 120} | options)))  # type: ignore[arg-type]
    return stream.getvalue()


def test_the_summary_has_a_line_per_cell_and_the_reasons_beneath() -> None:
    records = [run.record for run in read_runs(RECORDED / "methods")[0]]
    text = printed(records)
    lines = text.splitlines()
    assert "\x1b" not in text
    assert all(len(line) <= 120 for line in lines) and not re.search(r"[│┃─━┏╭]", text)
    lora = next(line for line in lines if line.startswith("lora"))
    for told in ("ok", "0.617 ± 0.043", "848 MiB", "655", "4.88 M (3.50%)", "171 s"):
        assert told in lora
    assert "prefix_tuning: oom: DefaultCPUAllocator: not enough memory (machine memory 15.5 GiB)" in lines
    assert lines.index(lora) == 2 and lines[0].split()[:4] == ["cell", "status", "exact", "match"]
    assert len(lines) == 1 + len(records) + sum(record.status != "ok" for record in records)


def test_the_summary_is_plain_and_whole_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    long = make_record(choices={"peft": "a_very_long_method_name_" * 4})
    print_summary([long, make_record(changes=peft("lora"), status="failed", reason="r" * 250)])
    out = capsys.readouterr().out
    assert "a_very_long_method_name_" * 4 in out and "r" * 250 in out and "\x1b" not in out


def test_the_summary_obeys_no_text() -> None:
    text = printed(
        [make_record(choices={"peft": "[red]x[/red]"}), make_record(status="failed", reason="\x1b[2J[bold]\nnext")],
        force_terminal=True,
        width=100,
        color_system=None,
    )
    assert "[red]x[/red]" in text and "\x1b[2J" not in text and "[bold] next" in text


def test_the_summary_of_very_many_is_cut_and_says_so() -> None:
    records = [make_record(changes={"seed": seed}, status="failed", reason="r") for seed in range(205)]
    text = printed(records)
    assert len(re.findall(r"^seed \d+ +failed ", text, re.MULTILINE)) == text.count(": failed: r\n") == 200
    assert "and 5 more cells\n" in text and "and 5 more that are not ok\n" in text


def test_thousands_of_records_fit_in_memory(tmp_path: Path) -> None:
    import tracemalloc

    record = json.loads(next((RECORDED / "methods").glob("*-none-lora-*/record.json")).read_text(encoding="utf-8"))
    for number in range(200):
        record["config"]["seed"] = number
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "record.json").write_text(json.dumps(record))
    tracemalloc.start()
    try:
        runs, _ = read_runs(tmp_path)
        rows = pool([row_of(run) for run in runs])
        find_axes([row_of(run) for run in runs])
        used, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (len(runs), len(rows)) == (200, 1)
    assert used < 200 * 25_000, used  # ten thousand: 250 MB
    assert peak < 200 * 35_000, peak


def test_the_summary_of_nothing_is_nothing() -> None:
    assert printed([]) == ""
    assert "random weights: no quality is scored" in printed([make_record(changes={"model.weights": "random"})])


def test_recorded_records_are_of_this_schema() -> None:
    for path in RECORDED.glob("*/*/record.json"):
        if path.parent.parent.name != "damaged":
            Record.model_validate_json(path.read_text(encoding="utf-8"))


def test_scores_on_other_generated_rows_are_not_ranked() -> None:
    """The held-out rows come after the training rows: with fewer of those they are others."""
    rows = rows_of(make_record(exact_match=0.5), make_record(changes={"data.train_rows": 128}, exact_match=0.9))
    assert best_rows(rows, "exact_match") == []
    assert "scored on different rows" in section(document(rows), "Quality")
    stored = {"data.source": "jsonl", "data.content": "x"}
    rows = rows_of(
        make_record(changes=stored, exact_match=0.5),
        make_record(changes=stored | {"data.train_rows": 128}, exact_match=0.9),
    )
    assert best_rows(rows, "exact_match") == [rows[1]]


def test_the_circumstances_of_every_seed_confound() -> None:
    beside = {"threads": 1, "concurrent_cells": 2}
    lora = [
        make_record(changes=peft("lora") | {"seed": 0}, effective={"threads": 2}),
        make_record(
            changes=peft("lora") | {"seed": 1},
            effective=beside,
            provenance={"notes": ["late"]},
            metrics={"other_cpu_share": 0.12},
        ),
        make_record(changes=peft("lora") | {"seed": 2}, effective=beside),
    ]
    other = [make_record(changes=peft("ia3") | {"seed": seed}, effective={"threads": 2}) for seed in range(3)]
    rows = pool(rows_of(*lora, *other))
    results = dict(confounders(rows, dict(zip(map(id, rows), ["lora", "ia3"], strict=True))))
    assert results["threads"] == "2: lora seed 0, ia3; 1: lora seed 1, lora seed 2"
    assert results["note"] == "late (lora seed 1)"
    assert "12 %: lora seed 1" in results["other processes"]
    assert best_rows(rows, "train_tokens_per_second") == []  # a mean over unlike circumstances


def test_a_difference_that_nothing_judges_ranks_nothing() -> None:
    rows = rows_of(*(make_record(changes=peft(name), peak_mib=mib) for name, mib in (("lora", 858), ("ia3", 860))))
    assert set((places(rows, "peak_memory_bytes") or {}).values()) == {1}
    counted = rows_of(*(make_record(changes=peft(name), trainable=n) for name, n in (("lora", 9), ("ia3", 5))))
    assert (places(counted, "trainable_params") or {})[id(counted[0])] == 2


def test_a_condition_does_not_hide_what_cannot_be_read(tmp_path: Path) -> None:
    runs = shutil.copytree(RECORDED / "ranks", tmp_path / "runs")
    torn = sorted(runs.glob("*/record.json"))[0]
    torn.write_text("{")
    write_reports([runs], out=tmp_path / "out", wanted=Wanted(where="exact_match > 0"))
    assert torn.parent.name in "".join(path.read_text() for path in (tmp_path / "out").glob("*.md"))


def test_a_sweep_may_be_named_as_the_cells_of_none_are(tmp_path: Path) -> None:
    swept, _ = write_runs(tmp_path / "runs", [make_record(), make_record(changes=peft("lora"))])
    write_sweep(tmp_path / "runs", "cells", [swept])
    assert len(write_reports([tmp_path / "runs"], out=tmp_path / "out", name="cells")) == 1


def test_a_report_says_what_became_of_each_data_sets_rows(tmp_path: Path) -> None:
    counts = {"train_rows": 1100.0, "test_rows": 128.0, "dropped_rows": 0.0, "repeated_rows": 12.0}
    counts |= {"truncated_rows": 3.0, "truncated_test_rows": 0.0, "train_epochs": 0.291}
    told = "train 1,100, test 128, left out 12 (a test row's question), cut 3 (longer than training.max_length="
    text = document(rows_of(make_record(metrics=counts), make_record(changes=peft("lora"), metrics=counts)))
    assert text.count("Rows: ") == 1 and f"{told}" in text and "0.29 epochs." in text
    other = make_record(choices={"data": "mine"}, metrics=counts | {"dropped_rows": 5.0})
    lines = document(rows_of(make_record(metrics=counts), other)).partition("Rows:\n\n")[2].splitlines()
    assert lines[0].startswith("- ") and "dropped" not in lines[0] and "dropped 5" in lines[1]
    assert "Rows:" not in document(rows_of(make_record()))  # a record from before the counts

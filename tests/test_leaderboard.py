"""The tables a reader decides by, the recommendation, and the command's options."""

from __future__ import annotations

import re
from pathlib import Path

import pandas
import pytest
from recorded.build import LAPTOP, make_record, peft, seeded, write_rows, write_runs, write_steps, write_sweep

from left_bench.core.errors import UserError
from left_bench.report import main, write_report
from left_bench.report.cells import Row, row_of
from left_bench.report.judgement import take_margins
from left_bench.report.load import read_runs
from left_bench.report.recommend import Need, how_sure, recommend, sentence, take_needs
from left_bench.report.seeds import pool
from left_bench.report.settle import what_would_settle
from left_bench.report.values import format_against_both, format_value
from left_bench.spec.record import METRICS, Record

RECORDED = Path(__file__).parent / "recorded"
MIB = 2**20


def rows_of(*records: Record) -> list[Row]:
    return [row_of(record) for record in records]


def section(text: str, heading: str) -> str:
    return text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


def tables(text: str) -> list[list[dict[str, str]]]:
    """Every table of a text, column -> cell."""
    results = []
    for block in re.findall(r"(?:^\|.*\|\n?)+", text, flags=re.MULTILINE):
        header, _, *body = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in block.splitlines()]
        results.append([dict(zip(header, line, strict=True)) for line in body])
    return results


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    cells = write_runs(folder, seeded())
    write_sweep(folder, "grid", cells)
    for i, cell in enumerate(cells):
        write_steps(folder / cell, [1 + 0.01 * ((7 * k + i) % 13) for k in range(12)])
    return folder


@pytest.fixture(scope="module")
def page(grid: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(grid, name="grid", out=tmp_path_factory.mktemp("out")).read_text(encoding="utf-8")


# ---- tables


def test_the_leaderboard_is_sorted_marked_and_keeps_failures_in_place(page: str) -> None:
    [lines] = tables(section(page, "Leaderboard"))
    assert len(lines) == 16
    scores = [line["exact match"] for line in lines]
    shown = [float(re.sub(r"[*]|</?u>", "", score).split(" ")[0]) for score in scores[:13]]
    assert shown == sorted(shown, reverse=True)
    assert scores[0].startswith("**0.602**") and scores[1].startswith("<u>0.523</u>")
    assert scores[13:] == ["**unsupported**"] * 3
    places = [int(line["#"]) for line in lines[:13]]
    assert places == sorted(places) and places[:2] == [1, 2] and [line["#"] for line in lines[13:]] == [*"–––"]
    assert all(place == i + 1 or place == places[i - 1] for i, place in enumerate(places))
    full, lora = lines[0], lines[1]
    assert full["peft"] == "full *(baseline)*" and lora["peft"] == "lora"
    assert lora["exact match"] == "<u>0.523</u> ± 0.044 (−0.078, 0.87×)"
    assert lora["peak memory"] == "1.17 GiB ± 591 KiB (−200 MiB, 0.86×)"


def test_an_axis_is_compared_with_the_others_held_equal(page: str) -> None:
    text = section(page, "By quantization")
    [lines] = tables(text)
    blocks: dict[str, list[str]] = {}
    for line in lines:
        blocks.setdefault(line["peft"], []).append(line["quantization"])
    assert blocks == {
        method: ["none *(reference)*", "int8", "nf4", "nf4_dq"] for method in ("lora", "ia3", "prompt_tuning")
    }  # of full one alone ran: there is nothing to compare
    int8 = next(line for line in lines if line["peft"] == "lora" and line["quantization"] == "int8")
    assert int8["base weights"] == "131 MiB (0.51×)"
    lora = [line["base weights"] for line in lines if line["peft"] == "lora"]
    assert lora[3].startswith("**78.0 MiB**") and lora[2].startswith("<u>84.0 MiB</u>")


def test_what_is_the_same_in_every_row_is_told_once(page: str) -> None:
    text = section(page, "By peft")
    assert "trainable params" in tables(text)[0][0] and "precision" not in tables(text)[0][0]
    runs = rows_of(make_record(), make_record(changes=peft("lora"), peak_mib=800))
    from left_bench.report.axes import find_axes, labels
    from left_bench.report.document import write_document
    from left_bench.report.report import Report

    axes = find_axes(runs)
    text = write_document(Report(name="x", rows=runs, axes=axes, labels=labels(runs, axes), baseline=runs[0]))
    memory = section(text, "Memory and size")
    assert "The same in every row: base weights 257 MiB" in memory and "base weights" not in tables(memory)[0][0]


def test_two_axes_are_crossed_for_quality_memory_and_speed(page: str) -> None:
    text = section(page, "Quantization × peft")
    result = tables(text)
    assert len(result) == 3 and re.findall(r"^\*\*(.*?)\*\*", text, flags=re.MULTILINE) == [
        *("Exact match", "Peak memory", "Train tokens/s")
    ]
    quality = {line[""]: line for line in result[0]}
    assert quality["full"]["int8"] == "**unsupported**" and quality["full"]["none"].startswith("**0.602**")
    assert set(quality) == {"full", "lora", "ia3", "prompt_tuning"}


def test_a_star_is_not_crossed(tmp_path: Path) -> None:
    text = write_report(RECORDED / "methods", name="peft_methods", out=tmp_path).read_text(encoding="utf-8")
    assert "## Quantization" not in text
    assert "**OOM**" in section(text, "Leaderboard") and "## By quantization" not in text  # qlora differs in r too


def test_qlora_is_held_against_lora() -> None:
    nf4 = {"name": "nf4_dq", "_target_": "x", "nominal_bits": 4, "config": {}}
    qlora = make_record(changes=peft("lora") | {"quantization": nf4}, choices={"peft": "qlora"})
    rows = rows_of(make_record(), make_record(changes=peft("lora")), qlora)
    from left_bench.report.axes import find_axes, labels
    from left_bench.report.leaderboard import axis_tables
    from left_bench.report.report import Report

    axes = find_axes(rows)
    text = "\n\n".join(axis_tables(Report(name="x", rows=rows, axes=axes, labels=labels(rows, axes), baseline=rows[0])))
    assert "## By quantization\n\nHeld equal: peft lora." in text


def test_seeds_are_told_one_by_one_and_one_failure_is_named(page: str) -> None:
    [lines] = tables(section(page, "Seeds"))
    full = lines[0]
    assert full["cell"] == "full" and full["seeds"] == "0, 1, 2"
    assert re.fullmatch(r"0\.602 \[0\.582, 0\.621\]: 0\.594, 0\.602, 0\.609", full["exact match"])
    assert "| nf4 ia3 seed 2 | OOM | not enough memory |" in page
    assert "2 of 3 ok" in section(page, "Quality")
    assert "One seed only" not in page


def test_confounders_stand_under_the_table_they_touch() -> None:
    rows = rows_of(
        make_record(),
        make_record(changes=peft("lora") | {"hardware.threads": 2}, effective={"threads": 2, "attention": "eager"}),
    )
    from left_bench.report.axes import find_axes, labels
    from left_bench.report.document import write_document
    from left_bench.report.report import Report

    axes = find_axes(rows)
    text = write_document(Report(name="x", rows=rows, axes=axes, labels=labels(rows, axes), baseline=rows[0]))
    assert "learning\\_rate" in section(text, "Quality") or "learning_rate" in section(text, "Quality")
    assert "threads" not in section(text, "Quality") and "threads" in section(text, "Speed")
    assert "attention" in section(text, "Memory and size") and "threads" not in section(text, "Memory and size")


def test_what_the_noise_covers_is_not_resolved_and_no_rank() -> None:
    scores = (0.50, 0.53, 0.47, 0.10)
    rows = rows_of(
        *(
            make_record(changes=peft(f"m{i}"), exact_match=score, peak_mib=900, weights_mib=257)
            for i, score in enumerate(scores)
        )
    )
    from left_bench.report.axes import find_axes, labels
    from left_bench.report.document import write_document
    from left_bench.report.report import Report

    axes = find_axes(rows)
    text = write_document(Report(name="x", rows=rows, axes=axes, labels=labels(rows, axes), baseline=rows[0]))
    lines = {line["peft"]: line for line in tables(section(text, "Leaderboard"))[0]}
    assert [lines[name]["#"] for name in ("m1", "m0 *(baseline)*", "m2", "m3")] == ["1", "1", "1", "4"]
    assert lines["m1"]["exact match"].endswith("(not resolved, −0.092 to +0.152)")
    assert lines["m3"]["exact match"].endswith("(−0.400, 0.20×)")
    assert "2 cells are not resolved from the best, m1: m0, m2" in text
    assert "peak memory 900 MiB" in text and "Each cell was run once" in text
    assert "the leaderboard is this table" in section(text, "By peft") and "base weights" in section(
        text, "Leaderboard"
    )


def test_long_tables_are_cut_and_say_so(tmp_path: Path) -> None:
    records = [make_record(changes=peft("lora", r=r), exact_match=(r % 128) / 128) for r in range(1, 231)]
    write_runs(tmp_path, records)
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "cells.md").read_text(encoding="utf-8")
    assert len(tables(section(text, "Leaderboard"))[0]) == 200
    assert "30 more rows are left out here" in section(text, "Leaderboard")


def test_differences_and_ratios_are_written_together() -> None:
    assert format_against_both("exact_match", 0.5, 0.4) == "+0.100, 1.25×"
    assert format_against_both("peak_memory_bytes", 512 * MIB, 1024 * MIB) == "−512 MiB, 0.50×"
    assert format_against_both("peak_memory_bytes", 5, 5) == "0 B, 1.00×"
    assert format_against_both("forgetting_nats", -0.1, 0.1) == "−0.200"
    assert format_against_both("exact_match", None, 0.1) == ""


# ---- recommendation


def test_bounds_are_any_metrics() -> None:
    needs, rest = take_needs(
        ["runs", "--budget-memory", "8GiB", "--min-exact-match", "0.5", "--max-wall-seconds=60", "--out", "x"]
    )
    assert rest == ["runs", "--out", "x"]
    assert needs == [
        Need("peak_memory_bytes", False, 8 * 2**30),
        Need("exact_match", True, 0.5),
        Need("wall_seconds", False, 60.0),
    ]
    for metric in METRICS:
        assert take_needs([f"--min-{metric.replace('_', '-')}", "5MiB" if METRICS[metric].unit == "bytes" else "5"])[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--min-exact-mach", "0.5"], "no metric 'exact_mach'; did you mean 'exact_match'?"),
        (["--min-exact-match"], "a value is missing"),
        (["--min-exact-match", "--out"], "a value is missing"),
        (["--min-exact-match", "half"], "half: not a number"),
        (["--budget-memory", "much"], "not a memory size"),
        (["--max-", "1"], "no metric ''"),
    ],
)
def test_bounds_that_cannot_be_kept_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        take_needs(arguments)


def test_the_best_is_taken_and_with_a_margin_the_cheapest_shown_to_be_within_it() -> None:
    rows = rows_of(
        make_record(exact_match=0.60, peak_mib=1400),
        make_record(changes=peft("lora"), exact_match=0.58, peak_mib=900),
        make_record(changes=peft("ia3"), exact_match=0.50, peak_mib=700),
    )
    names = {id(rows[0]): "full", id(rows[1]): "lora", id(rows[2]): "ia3"}
    result = recommend(rows)
    assert result is not None and result.chosen is rows[0] and set(result.front) == set(map(id, rows))
    assert sentence(result, [], names, rows) == (
        "Take full (0.600 exact match, 1.37 GiB peak memory, 800 training tokens/s): it has the best exact match of 3 "
        "cells; 2 others are not resolved from it."
    )
    sure = " ".join(how_sure(result, names))
    assert "Not resolved from full: lora −0.020 [−0.140, +0.100] with less memory (900 MiB)" in sure
    assert "All 3 pairs are judged together" in sure and "false-discovery rate" in sure
    margins = take_margins(["0.15"])  # the interval reaches 0.140 below the best
    result = recommend(rows, margins=margins)
    assert result is not None and result.chosen is rows[1] and list(result.as_good) == [rows[1]]
    assert sentence(result, [], names, rows) == (
        "Take lora (0.580 exact match, 900 MiB peak memory, 800 training tokens/s): of 3 cells, 2 are shown to be "
        "within 0.150 exact match of the best (full, 0.600), and of these it needs the least memory."
    )
    result = recommend(rows, margins=take_margins(["exact_match=0.05"]))
    assert result is not None and result.chosen is rows[0]
    assert "no cheaper cell is shown to be within 0.050 exact match" in sentence(result, [], names, rows)
    needs = [Need("peak_memory_bytes", False, 800 * MIB)]
    result = recommend(rows, needs)
    assert result is not None and result.chosen is rows[2]
    assert "the only one of 3 cells that fits peak memory ≤ 800 MiB" in sentence(result, needs, {}, rows)


def test_what_would_settle_a_choice_is_said(tmp_path: Path) -> None:
    records = [make_record(changes=peft(name) | {"seed": s}) for name in ("lora", "ia3") for s in range(3)]
    write_runs(tmp_path, records)
    for i, record in enumerate(records):
        right = [(7 * k + 3 * (i % 3) + (k % 5 == 0) * (i >= 3)) % 11 < 5 + (i >= 3) * (k % 9 == 0) for k in range(128)]
        write_rows(tmp_path / record.cell_id, right=right, nll=[1.0] * 128)
    rows = pool([row_of(run) for run in read_runs(tmp_path)[0]])
    score = {id(row): row.scored_rows("exact_match").values.mean() for row in rows}  # type: ignore[union-attr]
    assert len(rows) == 2 and len(set(score.values())) == 2
    told = what_would_settle(rows[0], rows[1], "exact_match", margin=None, confidence=0.95)
    assert told is not None and "instead of" in told and "with a probability of 80 %" in told
    assert what_would_settle(rows[0], rows[0], "exact_match", margin=None, confidence=0.95) is None


def test_where_nothing_fits_the_nearest_is_named() -> None:
    rows = rows_of(make_record(exact_match=0.6, peak_mib=900), make_record(changes=peft("lora"), exact_match=0.5))
    needs = [Need("exact_match", True, 0.9), Need("bleu", True, 0.1)]
    result = recommend(rows, needs)
    assert result is not None and result.chosen is None
    told = sentence(result, needs, {id(rows[0]): "full"}, rows)
    assert told == (
        "No cell fits exact match ≥ 0.900 and BLEU ≥ 0.100: the highest exact match is 0.600 (full); BLEU was not "
        "measured in any cell."
    )


def test_what_may_not_be_ranked_is_not_recommended() -> None:
    rows = rows_of(make_record(exact_match=0.6), make_record(changes={"data.task": "other"}, exact_match=0.7))
    assert recommend(rows) is None
    assert recommend(rows_of(make_record(status="failed", reason="x"))) is None


# ---- the command


def test_the_command_writes_every_format_and_recommends(
    grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(grid), "--out", str(tmp_path), "--format", "md,csv,parquet", "--group-by", "quantization"]
    arguments += ["--where", "status == 'ok' and choices.quantization in ('none', 'nf4')"]
    assert main([*arguments, "--budget-memory", "1.2GiB", "--min-exact-match", "0.3"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("grid: Take lora (")
    assert out[1:] == [str(tmp_path / f"grid.{ending}") for ending in ("md", "csv", "parquet")]
    frame, same = pandas.read_csv(tmp_path / "grid.csv"), pandas.read_parquet(tmp_path / "grid.parquet")
    assert len(frame) == len(same) == 20 and set(frame["choices.quantization"]) == {"none", "nf4"}
    assert list(frame["exact_match"]) == pytest.approx(list(same["exact_match"]))
    text = (tmp_path / "grid.md").read_text(encoding="utf-8")
    assert section(text, "Leaderboard").count("### `quantization`") == 2
    assert "(`--where`)" in text and "unsupported" not in text
    assert "**Take lora" in section(text, "Recommendation")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "pdf"], "--format pdf: no such format"),
        (["--format", "mdd"], "did you mean 'md'"),
        (["--group-by", "pefd"], "did you mean 'peft'"),
        (["--where", "exact_mach > 1"], "did you mean 'exact_match'"),
        (["--where", "exact_match > 5"], "none of the 48 records fulfils it"),
        (["--min-speed", "5"], "no metric 'speed'"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([str(grid), "--out", str(tmp_path / "none"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "none").exists()


# ---- plots


def test_a_crowded_scatter_names_the_unbeaten_and_tells_the_others_when_pointed_at(tmp_path: Path) -> None:
    from left_bench.report.figure_style import plot_style
    from left_bench.report.plots import write_plots
    from left_bench.report.ranking import pareto_front
    from left_bench.report.scatter_plot import pareto_figure

    rows = rows_of(
        *(
            make_record(
                changes=peft(method) | {"quantization.name": quantization},
                choices={"quantization": quantization},
                exact_match=0.1 + 0.02 * ((7 * i + 3 * j) % 19),
                peak_mib=600 + 10 * i + 70 * j,
            )
            for i, method in enumerate(("full", "lora", "dora", "ia3", "vera", "oft", "prompt", "prefix"))
            for j, quantization in enumerate(("none", "int8", "nf4", "nf5"))
        )
    )
    front = pareto_front(rows, "exact_match", "peak_memory_bytes")
    with plot_style():
        figure = pareto_figure(rows, [f"cell {i}" for i in range(len(rows))])
    assert figure is not None
    names = {text.get_text() for text in figure.axes[0].texts if text.get_text()}
    assert names == {f"cell {rows.index(row)}" for row in front} and len(names) < len(rows) // 2
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert told == ["dora", "full", "ia3", "lora", "oft", "prefix", "prompt", "vera", "", "none", "int8", "nf4", "nf5"]
    write_plots(rows, [f"cell {i}" for i in range(len(rows))], out=tmp_path, name="x")
    tips = re.findall(
        r"<title>(cell \d+): exact match [^<]*peak memory", (tmp_path / "x_pareto.svg").read_text("utf-8")
    )
    assert sorted(tips) == sorted(f"cell {i}" for i in range(len(rows)))


def test_no_names_overlap_in_the_plots_of_seeds(grid: Path) -> None:
    from left_bench.report.axes import find_axes, labels
    from left_bench.report.figure_style import plot_style
    from left_bench.report.load import read_runs
    from left_bench.report.placement import overlap
    from left_bench.report.scatter_plot import parameters_figure, pareto_figure
    from left_bench.report.steps_plot import steps_figure

    rows = pool([row_of(run) for run in read_runs(grid)[0]])
    names = labels(rows, find_axes(rows))
    with plot_style():
        for draw in (pareto_figure, parameters_figure):
            figure = draw(rows, names)
            assert figure is not None
            texts = [text for text in figure.axes[0].texts if text.get_text()]
            assert len(texts) == 13
            boxes = [tuple(text.get_window_extent().extents) for text in texts]
            assert not any(overlap(box, other) for i, box in enumerate(boxes) for other in boxes[:i])
        ticks = [tick.get_text() for tick in parameters_figure(rows, names).axes[0].get_xticklabels()]  # type: ignore[union-attr]
        assert "100 k" in ticks and not any("$" in tick for tick in ticks)
        steps = steps_figure(rows, names)
        assert steps is not None and len(steps.axes[0].get_yticklabels()) == 13


def test_a_recommendation_says_what_it_went_by() -> None:
    rows = rows_of(
        make_record(exact_match=0.60, tokens_per_second=400),
        make_record(changes=peft("lora"), exact_match=0.59, machine=LAPTOP | {"device": "cuda"}),
    )
    result = recommend(rows)
    assert result is not None and "peak_memory_bytes" not in result.metrics
    told = sentence(result, [], {id(rows[0]): "full", id(rows[1]): "lora"}, rows)
    assert "memory" not in told and "best exact match" in told


def test_budgets_are_bounds_in_their_own_units_and_money_wants_a_price(
    grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--budget-time", "2h", "--budget-joules=5kJ", "--budget-money", "0.5", "--budget-memory", "8GiB"]
    assert [(need.metric, need.at_least, need.bound) for need in take_needs(words)[0]] == [
        *(("wall_seconds", False, 7200.0), ("cell_joules", False, 5000.0)),
        *(("cell_cost", False, 0.5), ("peak_memory_bytes", False, 8 * 2**30)),
    ]
    for arguments, message in (
        (["--budget-tme", "2h"], "no such budget; did you mean '--budget-time'?"),
        (["--budget-time", "long"], "not a time"),
        (["--budget-joules", "5 mAh"], "not an energy"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            take_needs(arguments)
    assert main([str(grid), "--out", str(tmp_path), "--budget-money", "1"]) == 2
    assert "wants a price" in capsys.readouterr().err
    arguments = [str(grid), "--out", str(tmp_path), "--price-per-hour", "3.6", "--budget-money", "1"]
    assert main(arguments) == 0
    text = (tmp_path / "grid.md").read_text(encoding="utf-8")
    [costs] = tables(section(text, "Cost"))
    assert "cost of a point" in costs[0] and "cost ≤ 1" in text
    full = next(line for line in costs if line["peft"].startswith("full") and line["quantization"] == "none")
    runs = [run.record for run in read_runs(grid)[0] if run.record.choices["peft"] == "full" and run.record.metrics]
    each = [r.metrics["wall_seconds"] / 1000 / (100 * (r.metrics["exact_match"] - 0.0625)) for r in runs]
    assert full["cost of a point"].strip("*").startswith(format_value("cost_per_point", sum(each) / len(each)))


def test_a_file_of_records_makes_the_same_report_as_their_folder(grid: Path, tmp_path: Path) -> None:
    folder = tmp_path / "records"
    assert main([str(grid), "--out", str(folder), "--format", "jsonl"]) == 0
    of_folder = write_report(grid, name="grid", out=tmp_path / "a")
    of_file = write_report(folder / "grid.jsonl", name="grid", out=tmp_path / "b")
    of_files = write_report(folder, name="grid", out=tmp_path / "c")
    told = of_folder.read_text(encoding="utf-8").replace(f"{grid.name}/", "")
    assert told == of_file.read_text(encoding="utf-8") == of_files.read_text(encoding="utf-8")
    for plot in (tmp_path / "a").glob("*.svg"):
        assert plot.read_bytes() == (tmp_path / "b" / plot.name).read_bytes()
    again = tmp_path / "again"
    assert main([str(folder / "grid.jsonl"), "--out", str(again), "--format", "jsonl"]) == 0
    assert (again / "grid.jsonl").read_bytes() == (folder / "grid.jsonl").read_bytes()
    broken = folder / "broken.jsonl"
    broken.write_text((folder / "grid.jsonl").read_text(encoding="utf-8") + '{"torn\n[1]\n', encoding="utf-8")
    runs, problems = read_runs(broken)
    assert len(runs) == 48 and [problem.message.partition(":")[0] for problem in problems] == ["line 50", "line 51"]
    assert problems[1].message.endswith("neither a cell with its record nor a sweep")


def test_every_method_that_ships_has_a_colour_and_marker_of_its_own() -> None:
    from left_bench.report.styles import COLOURS, MARKERS, method_style

    shipped = {path.stem for path in (Path(__file__).parents[1] / "conf" / "peft").glob("*.yaml")}
    styles = {method: method_style(method) for method in shipped}
    assert len(set(styles.values())) == len(shipped) <= len(COLOURS) * len(MARKERS)
    assert method_style("a_method_of_ones_own") == method_style("a_method_of_ones_own")

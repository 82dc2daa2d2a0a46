"""What a launch is expected to take: added up from rates, timed once, corrected by cells that ran, told in a line."""

from __future__ import annotations

import io
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded.committed import committed_runs
from rich.console import Console

from left_bench.launch.estimate import Planned, calibrate, experience, say_estimate, tell
from left_bench.launch.estimate.arithmetic import Factors, Line, Measured, Rates, Row, Rows, seconds_of, total_of
from left_bench.launch.estimate.experience import Experience, base_of, gathered
from left_bench.launch.estimate.tell import added_up, how_to_narrow
from left_bench.spec.record import Phase, Record

ROOT = Path(__file__).resolve().parents[1]
RATES = Rates(
    load=0.0,
    forward=Line(0, 1),
    step=Line(0, 10),
    decode=Line(0, 100),
    update=0.001,
    parameters=1000,
    threads=1,
)
ROWS = Rows(train=[Row(3, 1)] * 8, test=[Row(3, 1)] * 4, test_rows=4, general=[5, 5])
MEASURED = Measured(RATES, ROWS)


def told(planned, runs_dir, *, terminal=False, **how) -> list[str]:
    out = io.StringIO()
    say_estimate(planned, runs_dir, console=Console(file=out, force_terminal=terminal, width=300), **how)
    return out.getvalue().splitlines()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("LEFT_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_process(monkeypatch):
    def start(*_, **__):
        raise AssertionError("a process was started")

    monkeypatch.setattr("left_bench.launch.estimate.calibrate.processes.start", start)


def keep(cell, measured=MEASURED) -> None:
    """Leave in the cache what a calibration would."""
    paths = calibrate.rates_path(cell, at_once=1), calibrate.rows_path(cell)
    for path, result in zip(paths, measured, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(result.model_dump_json())


# --- arithmetic ---


@given(st.floats(0.001, 10), st.floats(0.001, 10), st.integers(1, 50), st.integers(1, 1000))
def test_a_line_goes_through_what_was_measured(fixed, each, small, more):
    line = Line(fixed, each)
    result = Line.through([(small, line.of(small)), (small + more, line.of(small + more))])
    assert result.of(3000) == pytest.approx(line.of(3000), rel=1e-3)


@given(st.lists(st.tuples(st.integers(1, 1000), st.floats(0.001, 100)), min_size=1, max_size=3))
def test_a_line_through_noise_is_never_negative_and_meets_the_largest(points):
    points = sorted(points)
    result = Line.through(points)
    assert min(result) >= 0
    assert result.of(points[-1][0]) == pytest.approx(points[-1][1])


def test_steps_are_passes_of_padded_rows(tiny_cell):
    cell = tiny_cell("training.steps=3", "training.batch_size=4", "training.gradient_accumulation=2")
    assert seconds_of(cell, RATES, ROWS)["train"] == 3 * 8 * 4 * 10
    assert seconds_of(cell, RATES, ROWS, Factors(2, 1))["train"] == 2 * 3 * 8 * 4 * 10
    checkpointing = tiny_cell("training=checkpointing", "training.steps=1", "training.batch_size=4")
    assert seconds_of(checkpointing, RATES, ROWS)["train"] == 4 * 4 * (10 + 1)
    full = tiny_cell("peft=full", "training.steps=1", "training.batch_size=4")
    assert seconds_of(full, RATES, ROWS)["train"] == 4 * 4 * (10 + 1) + 0.001 * 1000
    uneven = ROWS.model_copy(update={"train": [Row(1, 1), Row(9, 1)] * 4})
    whole = tiny_cell("training.steps=1", "training.batch_size=8")
    assert seconds_of(whole, RATES, uneven)["train"] == 8 * 10 * 10
    packed = tiny_cell("training=packed", "training.steps=1", "training.batch_size=8")
    assert seconds_of(packed, RATES, uneven)["train"] == (4 * 2 + 4 * 10) * 10


def test_an_evaluation_is_losses_answers_and_general_text(tiny_cell):
    cell = tiny_cell("eval.batch_size=2", "eval.max_new_tokens=3", "eval.forgetting=true")
    losses, answers, checked, general = 4 * 4, 4 * 3 + 2 * 2 * 100 * 2, 4 * 4, 2 * 5
    speed = 2 * 4 * 3 + 16 * 100 * 4
    assert seconds_of(cell, RATES, ROWS)["evaluate"] == losses + answers + checked + general + speed
    assert seconds_of(tiny_cell("eval=loss"), RATES, ROWS)["evaluate"] == losses
    of_many = ROWS.model_copy(update={"test_rows": 40})  # of which four stand for all
    assert seconds_of(tiny_cell("eval=loss", "data.test_rows=40"), RATES, of_many)["evaluate"] == 10 * losses
    assert seconds_of(tiny_cell("eval=loss", "eval.rows=2"), RATES, of_many)["evaluate"] == losses / 2


def test_preference_tuning_reads_two_answers_and_has_a_reference(tiny_cell):
    rows = ROWS.model_copy(update={"train": [Row(3, 1, 2)] * 8, "test": [Row(3, 1, 2)] * 4})
    cell = tiny_cell("training=dpo", "data=chain_sum_pairs", "training.sft_steps=2", "training.batch_size=4")
    result = seconds_of(cell, RATES, rows)
    assert result["sft"] == 2 * 4 * 4 * 10
    assert result["train"] == 2 * 8 * 5 * 10, "padded to the longer, two steps"
    assert result["reference"] == 8 * 5 + 8 * 4


def test_kto_reads_another_rows_answers_too(tiny_cell):
    rows = ROWS.model_copy(update={"train": [Row(3, 1, 2)] * 8, "test": [Row(3, 1, 2)] * 4})
    pairs = ("data=chain_sum_pairs", "training.sft_steps=0", "training.batch_size=4")
    result = seconds_of(tiny_cell("training=kto", *pairs), RATES, rows)
    assert result["train"] == 2 * 8 * 5 * (10 + 1), "and the same without a gradient"
    assert result["reference"] == 2 * (8 * 5 + 8 * 4)


def test_a_policys_steps_sample_their_answers(tiny_cell):
    cell = tiny_cell("training=grpo", "training.sft_steps=0", "training.batch_size=8", "training.group_size=4")
    rows = ROWS.model_copy(update={"train": [Row(3, 3)] * 8})
    trained, reference = 8 * 6 * 10, 8 * 6
    sampled = 8 * 3 + 2 * 8 * 100  # the prompts, and two more tokens of each of eight answers
    assert seconds_of(cell, RATES, rows)["train"] == 2 * (trained + reference + sampled)


def test_what_only_some_methods_have(tiny_cell):
    assert "merge" in seconds_of(tiny_cell("peft=lora"), RATES, ROWS)
    for peft in ("full", "prefix_tuning", "llama_adapter", "pfeiffer"):
        assert "merge" not in seconds_of(tiny_cell(f"peft={peft}"), RATES, ROWS), peft
    assert "reload" in seconds_of(tiny_cell("eval=thorough"), RATES, ROWS)
    assert "evaluate_base" not in seconds_of(tiny_cell(), RATES, ROWS), "random weights have no quality"


@given(st.integers(1, 500), st.integers(1, 20))
def test_time_goes_with_the_steps(steps, times):
    def of(steps):
        training = CELL[0].training.model_copy(update={"steps": steps})
        return seconds_of(CELL[0].model_copy(update={"training": training}), RATES, ROWS)["train"]

    assert of(steps * times) == pytest.approx(times * of(steps))


CELL: list = []


@pytest.fixture(autouse=True, scope="module")
def _cell(tiny_cell):
    CELL[:] = [tiny_cell()]


def test_cells_of_one_base_model_score_it_once():
    parts = {"train": 10.0, "evaluate": 5.0, "evaluate_base": 4.0}
    assert total_of(parts, cells=3, bases=1) == 3 * 15 + 4


def test_a_base_model_is_scored_by_the_first_cell_alone(compose_cell):
    cells = [compose_cell(f"peft={peft}", "precision=fp32", "hardware=cpu") for peft in ("full", "ln_tuning")]
    planned = [(Planned(cell, 2), MEASURED) for cell in cells]
    alone = added_up(planned[:1], Experience()).seconds
    done = added_up(planned[:1], Experience(bases=frozenset([base_of(cells[1])]))).seconds
    once = seconds_of(cells[0], RATES, ROWS)["evaluate_base"]
    assert alone == pytest.approx(done + once)
    second = added_up(planned[1:], Experience(bases=frozenset([base_of(cells[0])]))).seconds
    assert added_up(planned, Experience()).seconds == pytest.approx(alone + second)


# --- what is told ---


def test_the_line(tiny_cell):
    item = added_up([(Planned(tiny_cell(), 1), MEASURED)], Experience())
    assert str(item._replace(seconds=44)) == "1 cell, about 40 s on this machine (measured)"
    assert str(item._replace(cells=12, seconds=540)) == "12 cells, about 9 min on this machine (measured)"


@pytest.mark.parametrize(
    ("quantization", "native", "said"),
    [
        ("nf4", True, "about"),
        ("nf4", False, "at least"),
        ("hqq_4", True, "at least"),
        ("none", False, "about"),
    ],
)
def test_a_quantization_that_nobody_has_timed_makes_it_a_lower_bound(
    quantization, native, said, compose_cell, monkeypatch
):
    monkeypatch.setattr(experience, "emulated", lambda device, dtype: not native)
    cell = compose_cell(f"quantization={quantization}", "precision=bf16", "hardware=cpu")
    line = str(added_up([(Planned(cell, 3), MEASURED)], Experience()))
    assert line.startswith(f"3 cells, {said} ")
    assert (f"the slowdown by quantization={quantization} is known after its first cell" in line) is (
        said == "at least"
    )


@pytest.mark.parametrize(
    ("share", "said"),
    [(0.12, "(measured while other programs took 12% of the processor)"), (0.5, "will be known after")],
)
def test_a_number_measured_beside_other_programs_says_so_and_half_of_a_processor_gives_none(
    share, said, cache, tmp_path, tiny_cell, monkeypatch
):
    monkeypatch.setattr(calibrate, "calibrate", lambda *_, **__: True)  # as busy when it is measured again
    cell = tiny_cell()
    keep(cell, MEASURED._replace(rates=RATES.model_copy(update={"disturbed_by": share})))
    [line] = told([Planned(cell, 1)], tmp_path)
    assert said in line
    assert ("about" in line) == (share < 0.25)


def test_what_is_not_known_of_some_makes_it_a_lower_bound_and_of_all_no_number(tiny_cell):
    unknown = Planned(tiny_cell("seed=1"), 2), "x is not on this machine yet"
    line = str(added_up([(Planned(tiny_cell(), 1), MEASURED), unknown], Experience()))
    assert line.startswith("3 cells, at least ") and line.endswith("(measured; x is not on this machine yet)")
    assert str(added_up([unknown], Experience())) == (
        "2 cells; the duration will be known after the first, because x is not on this machine yet"
    )


def test_nothing_to_run_is_nothing_to_say(cache, no_process, tmp_path):
    assert told([], tmp_path) == []
    assert not cache.exists()


def test_a_launcher_that_goes_elsewhere_is_told_no_number(cache, no_process, tmp_path, tiny_cell):
    [line] = told([Planned(tiny_cell(), 4)], tmp_path, elsewhere=True)
    assert line == (
        "4 cells; the duration will be known after the first, because the launcher may run them on other machines"
    )


def test_what_the_cache_knows_starts_no_process(cache, no_process, tmp_path, tiny_cell):
    cell = tiny_cell()
    keep(cell)
    [line] = told([Planned(cell, 2)], tmp_path)
    seconds = total_of(seconds_of(cell, RATES, ROWS, Experience().factors(cell)[0]), cells=2, bases=0)
    assert line == f"2 cells, about {tell.rounded_time(seconds + tell.PEAK_SECONDS)} on this machine (measured)"
    [halved] = told([Planned(tiny_cell("training.steps=4000"), 2)], tmp_path)
    assert halved != line, "other steps, the same rates"


def test_patience_is_for_a_terminal(cache, no_process, tmp_path, tiny_cell):
    slow, patient = tiny_cell("training.steps=4000"), tiny_cell("training.steps=4000", "hardware.patience=null")
    keep(slow)
    assert len(told([Planned(slow, 3)], tmp_path)) == 1
    line, hint = told([Planned(slow, 3)], tmp_path, terminal=True)
    assert "3 cells" in line
    assert hint == (
        "that is more than hardware.patience=30 min; shorter with fewer seeds (seed=), training.steps= (4000 now), "
        "eval.rows= or eval=loss"
    )
    assert len(told([Planned(patient, 3)], tmp_path, terminal=True)) == 1
    assert (
        len(told([Planned(tiny_cell("training.steps=4000", "hardware.patience=1e9"), 3)], tmp_path, terminal=True)) == 1
    )


def test_how_to_narrow_names_what_can_be_made_less(tiny_cell):
    cells = [tiny_cell("eval=loss", f"peft={peft}") for peft in ("lora", "ia3")]
    assert how_to_narrow([Planned(cell, 1) for cell in cells], limit=60) == (
        "that is more than hardware.patience=60 s; shorter with fewer methods (peft=, 2 now), training.steps= (2 now)"
    )


# --- timing ---


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_opt", "tiny_t5", "tiny_vit"])
def test_every_kind_of_model_is_timed(model, tiny_cell, tmp_path):
    from left_bench.model import load as models

    data = ["data=digits"] if model == "tiny_vit" else []
    cell = tiny_cell(f"model={model}", "quantization=none", *data)
    folder, tokenizer = models.open_pretrained(cell)
    splits = models.load_rows_of(cell, tokenizer, folder=folder)
    rates = calibrate.measure(cell, splits, tokenizer, folder=folder, seconds=0.0)
    rows = calibrate.count_rows(cell, splits, tokenizer)
    assert rates.forward.of(100) > 0 and rates.step.of(100) > rates.forward.of(100) * 0.5
    assert (rates.decode.of(8) > 0) is (model != "tiny_vit")
    assert rates.parameters > 1000 and rates.update > 0
    assert [len(rows.train), len(rows.test), rows.test_rows] == [8, 4, 4]
    assert rows.train[0].length == splits.train[0].length
    assert all(seconds > 0 for seconds in seconds_of(cell, rates, rows).values())


def test_a_ladder_grows_as_far_as_there_is_time(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(calibrate, "_short", lambda row: row)
    taken = []

    def take(rows):
        taken.append(len(rows))
        clock.now += 1 + 0.1 * len(rows)
        return len(rows), 1 + 0.1 * len(rows)

    def climb(until):
        clock.now = 0.0
        taken.clear()
        how = {"guess": lambda size, took: Line(0.0, took / size), "cost": lambda line, count: line.of(count)}
        return calibrate.ladder(take, range(64), until=until, **how)

    assert climb(0.0) == Line(0.0, pytest.approx(1.1)) and taken == [1], "no time: what one pass took"
    result = climb(40.0)
    assert taken == [1, 1, 32, 64, 64], "the largest again, for there is time"
    assert result == (pytest.approx(1), pytest.approx(0.1))


def test_a_large_pass_that_takes_longer_for_each_token_than_a_short_one_is_taken_again(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(calibrate, "_short", lambda row: row)
    taken = []

    def take(rows):
        taken.append(len(rows))
        seconds = (1 + 0.1 * len(rows)) * (20 if taken.count(64) == 1 else 1)  # the processor was away
        clock.now += seconds
        return len(rows), seconds

    how = {"guess": lambda size, took: Line(0.0, took / size), "cost": lambda line, count: line.of(count)}
    assert calibrate.ladder(take, range(64), until=12.0, **how) == (pytest.approx(1), pytest.approx(0.1))
    assert taken[-2:] == [64, 64] and clock.now > 12


def test_a_process_of_its_own_times_a_model_once(tiny_cell, tmp_path, monkeypatch):
    """Real, with its imports, which take minutes on a machine that does ten other things."""
    monkeypatch.setattr(calibrate, "_PATIENCE_SECONDS", 900.0)
    cell = tiny_cell("data.seed=77")
    for path in (calibrate.rates_path(cell, at_once=1), calibrate.rows_path(cell)):
        path.unlink(missing_ok=True)
    assert calibrate.kept(cell, at_once=1) is None
    assert calibrate.why_not(cell) is None
    assert calibrate.calibrate([cell], at_once=1, cells_follow=False) is False
    result = calibrate.kept(cell, at_once=1)
    assert result is not None and result.rates.threads == 1 and result.rates.start > 0
    assert len(result.rows.train) == 8
    [line] = told([Planned(cell, 1)], tmp_path)
    assert line.startswith("1 cell, about ")


def test_what_others_disturbed_is_measured_again(cache, tiny_cell, monkeypatch):
    asked = []
    monkeypatch.setattr(calibrate, "_delegate", lambda cell, answers, **_: asked.append(sorted(answers)))
    cell = tiny_cell()
    calibrate.calibrate([cell, tiny_cell("seed=1"), tiny_cell("data.seed=3")], at_once=1, cells_follow=True)
    assert asked == [["rates.json", "rows.json"], ["rows.json"]], "one model, two sets of rows"
    asked.clear()
    keep(cell)
    assert calibrate.calibrate([cell], at_once=1, cells_follow=True) is False
    keep(cell, MEASURED._replace(rates=RATES.model_copy(update={"disturbed_by": 0.4})))
    assert calibrate.calibrate([cell], at_once=1, cells_follow=True) is True
    assert asked == [["rates.json", "rows.json"]]


def test_a_calibration_that_dies_stops_nothing(cache, tmp_path, tiny_cell, monkeypatch):
    monkeypatch.setattr(calibrate, "worker_environment", lambda cell: {"PATH": "", "PYTHONHOME": os.devnull})
    [line] = told([Planned(tiny_cell(), 1)], tmp_path, cells_follow=False)
    assert line == "1 cell; the duration will be known after the first, because the model could not be timed"


def test_an_interrupt_ends_the_calibration_and_its_process(cache, tiny_cell, monkeypatch):
    ended = []

    def asked_to_stop():
        raise KeyboardInterrupt(2)

    process = SimpleNamespace(wait=lambda seconds: None, end=lambda: ended.append(True))
    monkeypatch.setattr(calibrate.processes, "start", lambda *_, **__: process)
    monkeypatch.setattr(calibrate.interrupt, "check", asked_to_stop)
    with pytest.raises(KeyboardInterrupt):
        calibrate.calibrate([tiny_cell()], at_once=1, cells_follow=True)
    assert ended == [True]


def test_cells_that_run_at_once_are_timed_on_a_share_of_the_cores(cache, tiny_cell, monkeypatch):
    seen = []

    def start(folder, *, environment, **_):
        seen.append(environment)
        return SimpleNamespace(wait=lambda seconds: 0, end=lambda: 0)

    monkeypatch.setattr(calibrate.processes, "start", start)
    monkeypatch.setattr(calibrate, "available_cores", lambda: [0, 1, 2, 3])
    cell = tiny_cell("hardware.threads=null")
    calibrate.calibrate([cell], at_once=2, cells_follow=False)
    assert [(item["LEFT_BENCH_CORES"], item["LEFT_BENCH_AT_ONCE"]) for item in seen] == [("0,1", "2")]
    assert calibrate.rates_path(cell, at_once=1) != calibrate.rates_path(cell, at_once=2)


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["hardware.device=cuda"], "cuda is not timed beforehand"),
        (["hardware.processes=2"], "a cell has several processes"),
        (["model=pythia_70m"], "pythia_70m is not on this machine yet"),
    ],
)
def test_what_is_not_timed(overrides, why, tiny_cell, monkeypatch):
    monkeypatch.setattr("left_bench.pretrained.fetched", lambda model, **_: None)
    assert calibrate.why_not(tiny_cell(*overrides)) == why


def test_weights_of_gibibytes_are_not_loaded_for_it(tiny_cell, monkeypatch):
    monkeypatch.setattr(calibrate, "_LARGEST_WEIGHTS", 1000)
    assert "the weights of tiny_llama take more than" in str(calibrate.why_not(tiny_cell()))


# --- experience ---


def recorded(cell, *, train: float, evaluate: float, threads: int = 1) -> Record:
    now = experience.what_makes_it_fast()
    phases = [("train", train), ("evaluate", evaluate)]
    return Record(
        cell_id=cell.id,
        status="ok",
        started_at="2026-01-01T00:00:00+00:00",
        finished_at="2026-01-01T00:00:01+00:00",
        choices=cell.choices,
        config=cell.sections(),
        phases=[Phase(name=name, seconds=seconds) for name, seconds in phases],
        environment={
            "machine": {"cpu": now["cpu"], "instruction_sets": list(now["sets"] or ()), "device": "cpu"},
            "versions": experience.versions_of(["torch", "transformers"]),
            "effective": {"threads": threads, "concurrent_cells": 1},
        },
        provenance={"base_scores_from": "measured here"},
    )


def test_a_cell_that_has_run_corrects_those_to_come(cache, tmp_path, tiny_cell, monkeypatch):
    for limit in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(limit, raising=False)
    ran = tiny_cell("quantization=nf4", "peft=lora")
    keep(ran)
    expected = seconds_of(ran, RATES, ROWS)
    twice = recorded(ran, train=2 * expected["train"], evaluate=3 * expected["evaluate"])
    twice.write(tmp_path / "runs" / ran.id)
    result = gathered(tmp_path / "runs", at_once=1)
    assert base_of(ran) in result.bases
    assert result.factors(tiny_cell("quantization=nf4", "peft=lora", "training.steps=9")) == ((2, 3), True)
    assert result.factors(tiny_cell("quantization=nf4", "peft=ln_tuning")) == (
        (pytest.approx(2 / 1.37), pytest.approx(3 / 1.42)),
        True,
    )
    assert result.factors(tiny_cell("quantization=nf4_dq", "peft=lora"))[1] is False
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")  # of which a record tells nothing
    assert not gathered(tmp_path / "runs", at_once=1).of_kinds
    monkeypatch.delenv("ATEN_CPU_CAPABILITY")
    other = recorded(ran, train=1.0, evaluate=1.0, threads=8)
    other.write(tmp_path / "others" / ran.id)
    (tmp_path / "others" / "broken").mkdir()
    (tmp_path / "others" / "broken" / "record.json").write_text("{")
    assert not gathered(tmp_path / "others", at_once=1).of_kinds, "eight threads are another machine"
    assert gathered(tmp_path / "nothing", at_once=1) == Experience()


def test_the_committed_cells_are_told_within_twofold():
    """From one method's cell of a sweep, whatever the rates: the others of that sweep, quantized or not."""
    records = [run.record for run in committed_runs() if run.record.status == "ok" and run.record.config["seed"] == 0]
    records = [record for record in records if record.config["training"]["steps"] == 20]
    rows = Rows(train=[Row(38, 4)] * 64, test=[Row(38, 4)] * 128, test_rows=128, general=[80] * 8)
    rates = RATES.model_copy(
        update={"forward": Line(0.02, 0.0005), "step": Line(0.05, 0.0015), "decode": Line(0.03, 0.0005)}
    )
    told_of = {}
    for record in records:
        cell = experience.Cell.model_validate({"choices": record.choices, **record.config})
        parts = seconds_of(cell, rates, rows)
        measured = {phase.name: phase.seconds for phase in record.phases}
        told_of[cell.quantization.name, cell.peft.name] = cell, parts, measured
    _, parts, measured = told_of["none", "ln_tuning"]
    scale = Factors(measured["train"] / parts["train"], measured["evaluate"] / parts["evaluate"])
    assert len(told_of) > 40
    for (quantization, peft), (cell, parts, measured) in told_of.items():
        if peft == "full":  # its update is not in these rates
            continue
        method = experience.of_method(cell)
        weights = Factors() if quantization == "none" else experience.of_quantization(quantization)
        assert weights is not None, quantization
        expected = parts["train"] * scale.train * method.train * weights.train
        expected += parts["evaluate"] * scale.evaluate * method.evaluate * weights.evaluate
        took = measured["train"] + measured["evaluate"]
        assert 0.6 < expected / took < 1.67, (quantization, peft, expected, took)


# --- a launch ---


def test_a_launch_plans_what_is_left_and_not_refused(tmp_path, monkeypatch, left_bench):
    planned: list[list[Planned]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "left_bench.launch.launching.say_estimate", lambda cells, runs_dir, **_: planned.append(list(cells))
    )

    def run_isolated(cell, run_dir, *, on_event):
        run_dir.mkdir(parents=True, exist_ok=True)
        return recorded(cell, train=1.0, evaluate=1.0)

    monkeypatch.setattr("left_bench.launch.run_cell.run_isolated", run_isolated)
    monkeypatch.setattr(
        "left_bench.launch.composed.why_unsupported", lambda cell: "no" if cell.peft.name == "ia3" else None
    )
    quick = ["model=tiny_llama", "precision=fp32", "hardware=cpu", "tracker=none", "training.steps=1"]
    assert left_bench("-m", *quick, "peft=lora,ia3", "seed=0,1", "data.train_rows=8").code == 0
    assert [(item.cell.peft.name, item.cells) for item in planned[-1]] == [("lora", 2)]
    assert left_bench("-m", *quick, "peft=lora,full", "seed=0,1,2", "data.train_rows=8").code == 0
    assert [(item.cell.peft.name, item.cells) for item in planned[-1]] == [("lora", 1), ("full", 3)]
    assert left_bench("-m", *quick, "peft=lora,full", "seed=0,1,2", "data.train_rows=8").code == 0
    assert len(planned) == 2, "nothing is left"
    assert left_bench(*quick, "seed=5", "data.train_rows=8").code == 0
    assert [(item.cell.peft.name, item.cells) for item in planned[-1]] == [("lora", 1)]
    before = len(planned)
    assert left_bench(*quick, "seed=5", "data.train_rows=8").code == 0
    assert len(planned) == before, "a cell that is done"

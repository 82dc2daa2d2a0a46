"""`+tune=`: as many trials for each method, chosen between by validation loss; then the comparison with the best."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest

from left_bench.core.errors import UserError
from left_bench.grid.tuning import Point, Tuning, chosen_overrides, sizes_of, trial_overrides
from left_bench.launch.tuner import Search
from left_bench.spec.record import RECORD_NAME, CurvePoint, Record, read_record

pytest.importorskip("optuna", reason="needs left-bench[tune]")

BEST = {"lora": 2e-3, "ia3": 1.0, "full": 2e-4}
"""Where the validation loss of a method is least; its test loss is least elsewhere."""
SMALL = [
    *("precision=fp32", "hardware=cpu", "tracker=none", "training.steps=2", "data.train_rows=8", "data.test_rows=4"),
    *("data.validation_rows=4", "-m", "seed=0,1"),
]


class Runs(list[Any]):
    """Cells that were run, by what stands for a worker."""

    diverges_above = math.inf
    status = "ok"

    def __call__(self, cell: Any, run_dir: Path, *, on_event: Any) -> Record:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.append(cell)
        loss = 1 + abs(math.log10(cell.learning_rate / BEST[cell.peft.name]))
        status = "diverged" if cell.learning_rate > self.diverges_above else self.status if cell.eval.trial else "ok"
        metrics = {"validation_loss": loss, "wall_seconds": 2.0, "cell_joules": 5.0, "train_steps": 2.0}
        if not cell.eval.trial:
            metrics |= {"eval_loss": cell.learning_rate, "exact_match": 0.5}
        return Record(
            cell_id=cell.id,
            status=status,
            reason=None if status == "ok" else "as the test has it",
            started_at="2026-01-01T00:00:00+00:00",
            finished_at="2026-01-01T00:00:01+00:00",
            choices=cell.choices,
            config=cell.sections(),
            metrics=metrics if status == "ok" else {"wall_seconds": 2.0, "train_steps": 1.0},
            curve=[CurvePoint(step=2, seconds=1.0, tokens=10, validation_loss=loss)] if status == "ok" else [],
        )

    @property
    def trials(self) -> list[Any]:
        return [cell for cell in self if cell.eval.trial]

    @property
    def compared(self) -> list[Any]:
        return [cell for cell in self if not cell.eval.trial]


@pytest.fixture
def runs(monkeypatch, tmp_path) -> Runs:
    runs = Runs()
    monkeypatch.setattr("left_bench.launch.run_cell.run_isolated", runs)
    monkeypatch.setattr("left_bench.launch.run_cell._fetch_model", lambda cell: None)
    monkeypatch.chdir(tmp_path)
    return runs


def records_of(folder: Path) -> list[Record]:
    return [read_record(path) for path in folder.glob(f"runs/*/{RECORD_NAME}")]


def tuned_of(folder: Path, method: str, seed: int = 0) -> dict[str, Any]:
    [record] = [
        item
        for item in records_of(folder)
        if "tuned" in item.provenance and item.choices["peft"] == method and item.config["seed"] == seed
    ]
    return record.provenance["tuned"]


# --- the search ---


def tuning(**changes: Any) -> Tuning:
    return Tuning.model_validate({"name": "rates", "trials": 8, "lower": 0.1, "upper": 10} | changes)


def run_search(search: Search, loss: Any) -> list[Any]:
    asked = []
    while (item := search.ask()) is not None:
        assert search.ask() is item, "it asks the same until it is told"
        asked.append(item)
        search.tell(loss(item))
    return asked


def valley(at: float) -> Any:
    return lambda asked: 1 + abs(math.log10(asked.point.rate / at))


def test_trials_begin_evenly_over_the_space_with_the_own_rate_first():
    asked = run_search(Search(tuning(), own=1e-3, sizes=[1.0], steps=40, name="a"), valley(1e-3))
    assert [item.point.rate for item in asked[:5]] == pytest.approx([1e-3, 3.16e-4, 3.16e-3, 1e-4, 1e-2], rel=1e-2)
    assert len(asked) == 8 and all(1e-4 <= item.point.rate <= 1e-2 for item in asked)
    assert {item.steps for item in asked} == {40}


def test_every_method_is_tried_at_the_same_multiples_of_its_own_rate_at_first():
    multiples = [
        [
            item.point.rate / own
            for item in run_search(Search(tuning(), own=own, sizes=[1.0], steps=1, name="a"), valley(own))
        ]
        for own in (1e-3, 5e-2)
    ]
    assert multiples[0][:5] == pytest.approx(multiples[1][:5], rel=1e-2)
    assert len(multiples[0]) == len(multiples[1]) == 8


def test_the_same_answers_lead_to_the_same_questions():
    first, second = (
        run_search(Search(tuning(), own=1e-3, sizes=[0.5, 1.0], steps=1, name="a"), valley(2e-3)) for _ in range(2)
    )
    assert first == second
    other = run_search(Search(tuning(seed=1), own=1e-3, sizes=[0.5, 1.0], steps=1, name="a"), valley(2e-3))
    assert other != first


@pytest.mark.parametrize(("at", "end", "beyond"), [(1.0, "upper", (1e-2, 1e-1)), (1e-9, "lower", (1e-5, 1e-4))])
def test_a_space_is_widened_once_where_the_best_lies_at_its_end(at, end, beyond):
    search = Search(tuning(), own=1e-3, sizes=[1.0], steps=1, name="a")
    asked = run_search(search, valley(at))
    assert len(asked) == 12, "half as many again, and no third time"
    assert search.widened == end == search.edge
    assert search.widened_to == pytest.approx(beyond)
    assert all(beyond[0] <= item.point.rate * 1.001 and item.point.rate <= beyond[1] * 1.001 for item in asked[8:])
    assert [item.widening for item in asked] == [False] * 8 + [True] * 4


def test_a_best_that_lies_inside_a_widened_space_is_no_longer_at_its_edge():
    search = Search(tuning(), own=1e-3, sizes=[1.0], steps=1, name="a")
    run_search(search, valley(3e-2))
    assert search.widened == "upper" and search.edge is None


def test_a_rate_beyond_at_which_training_diverges_ends_the_space():
    search = Search(tuning(), own=1e-3, sizes=[1.0], steps=1, name="a")
    asked = run_search(search, lambda item: math.inf if item.point.rate > 5e-3 else -item.point.rate)
    assert len(asked) == 8 and search.edge is None and search.best.point.rate < 5e-3


def test_no_widening_where_none_is_wanted():
    search = Search(tuning(widening=0), own=1e-3, sizes=[1.0], steps=1, name="a")
    assert len(run_search(search, valley(1.0))) == 8
    assert search.edge == "upper" and search.widened is None


def test_trials_without_a_value_leave_no_best():
    search = Search(tuning(), own=1e-3, sizes=[1.0], steps=1, name="a")
    assert len(run_search(search, lambda item: None)) == 8
    assert search.best is None and search.edge is None


@pytest.mark.parametrize("pruner", ["halving", "hyperband"])
def test_a_pruner_gives_all_steps_to_the_better_trials_alone(pruner):
    search = Search(tuning(pruner=pruner, trials=12, widening=0), own=1e-3, sizes=[1.0], steps=45, name="a")
    asked = run_search(search, valley(1e-3))
    assert len(search.tried) == 12
    assert {item.steps for item in asked} <= {5, 15, 45}
    whole = [item for item in asked if item.steps == 45]
    assert 0 < len(whole) < 12 and any(item.pruned for item in search.tried)
    assert search.best.steps == 45 and not search.best.pruned


def test_a_size_is_a_multiple_of_the_own_and_its_scale_follows(compose_cell):
    wide = tuning(sizes=[0.5, 1, 2])
    lora = compose_cell("peft=lora")
    assert sizes_of(lora, wide) == [0.5, 1.0, 2.0] and sizes_of(lora, tuning()) == [1.0]
    assert list(chosen_overrides(lora, Point(1e-3, 0.5))) == [
        *("++training.learning_rate=0.001", "++peft.config.r=8", "++peft.config.lora_alpha=16"),
    ]
    prompt = compose_cell("peft=prompt_tuning")
    assert "++peft.config.num_virtual_tokens=32" in chosen_overrides(prompt, Point(1e-3, 2.0))
    assert sizes_of(compose_cell("peft=full"), wide) == [1.0], "it has none"


def test_a_trial_is_a_cell_of_its_own_seed_that_reads_no_test_row(compose_cell):
    cell = compose_cell("peft=lora", "seed=3")
    made = trial_overrides(["peft=lora", "seed=3"], cell, tuning(), Point(5e-4), steps=10)
    trial = compose_cell(*made)
    assert (trial.seed, trial.learning_rate, trial.training.steps, trial.eval.trial) == (1000, 5e-4, 10, True)
    assert trial.curve_points(32) == 1
    patient = compose_cell("peft=lora", "training.stop_patience=2", "eval.every=5")
    kept = trial_overrides(["training.stop_patience=2", "eval.every=5"], patient, tuning(), Point(5e-4), steps=40)
    assert compose_cell(*kept).eval.every == 5, "early stopping is a part of the recipe"


# --- a launch ---


def test_each_method_has_the_same_trials_and_the_comparison_what_they_found(runs, left_bench, tmp_path):
    answer = left_bench(*SMALL, "peft=lora,full", "+tune=rates")
    assert answer.code == 0, answer
    for method in ("lora", "full"):
        assert sum(cell.peft.name == method for cell in runs.trials) == 8
        assert {cell.seed for cell in runs.trials} == {1000}
        rates = {cell.learning_rate for cell in runs.compared if cell.peft.name == method}
        assert len(rates) == 1, "every seed has it"
        best = min(
            (abs(math.log10(cell.learning_rate / BEST[method])), cell.learning_rate)
            for cell in runs.trials
            if cell.peft.name == method
        )
        assert rates == {best[1]}, "by validation loss; the test loss is lowest at the lowest rate"
    assert [(cell.peft.name, cell.seed) for cell in runs.compared] == [
        *(("lora", 0), ("full", 0), ("lora", 1), ("full", 1)),
    ]
    first_compared = next(i for i, cell in enumerate(runs) if not cell.eval.trial)
    assert not any(cell.eval.trial for cell in runs[first_compared:]), "all trials come before"
    told = tuned_of(tmp_path, "lora", seed=1)
    assert told["trials"] == 8 == len(told["tried"]) and not told["at_edge"]
    assert (told["seconds"], told["joules"], told["steps"]) == (16.0, 40.0, 16)
    assert told["own_learning_rate"] == 1e-3 and told["space"] == [1e-4, 1e-2]
    assert told["validation_loss"] == min(item["validation_loss"] for item in told["tried"])
    trials = [item for item in records_of(tmp_path) if "tuning" in item.provenance]
    assert len(trials) == 16
    assert {item.provenance["sweep"] for item in trials} != {
        item.provenance["sweep"] for item in records_of(tmp_path) if "tuned" in item.provenance
    }
    assert "tuning: 8 trials for each of 2 methods before the comparison" in answer.out


def test_trials_are_in_no_report_and_in_no_manifest(runs, left_bench, tmp_path):
    from left_bench.report import main as report

    assert left_bench(*SMALL, "peft=lora", "+tune=rates", "hydra.job.name=tuned").code == 0
    manifest = json.loads((tmp_path / "runs/sweeps/tuned.json").read_text())
    assert sorted(manifest["cells"]) == sorted(cell.id for cell in runs.compared)
    assert "+tune=rates" in manifest["command"]
    text = (tmp_path / "reports/tuned.md").read_text()
    assert not any(cell.id in text for cell in runs.trials)
    assert report(["runs", "--out", "again"]) == 0
    assert [path.name for path in (tmp_path / "again").glob("*.md")] == ["tuned.md"], "no report of loose cells"


def test_the_same_command_again_keeps_all_trials(runs, left_bench, tmp_path, monkeypatch):
    monkeypatch.setattr(Runs, "diverges_above", 5e-3)
    command = [*SMALL, "peft=lora,full", "+tune=rates"]
    first = left_bench(*command)
    assert first.code == 0, first
    assert any(item.status == "diverged" for item in records_of(tmp_path))
    before = len(runs)
    again = left_bench(*command)
    assert again.code == 0 and len(runs) == before, "a rate at which training diverges is an answer too"
    assert "16 runs of them are kept" in again.out


def test_an_interrupted_tuning_goes_on_where_it_stopped(runs, left_bench, tmp_path):
    command = [*SMALL, "peft=lora,full", "+tune=rates"]
    assert left_bench(*command).code == 0
    asked = [cell.id for cell in runs.trials]
    lost = {asked[5], asked[11]}
    for name in lost:
        (tmp_path / "runs" / name / RECORD_NAME).unlink()
    runs.clear()
    assert left_bench(*command).code == 0
    assert {cell.id for cell in runs.trials} == lost
    assert runs.compared == []


def test_a_trial_that_had_failed_is_run_again_and_diverged_ones_behind_it_are_not(
    runs, left_bench, tmp_path, monkeypatch
):
    monkeypatch.setattr(Runs, "diverges_above", 5e-3)
    command = [*SMALL, "peft=lora", "+tune=rates"]
    assert left_bench(*command).code == 0
    first = runs.trials[0].id
    path = tmp_path / "runs" / first / RECORD_NAME
    record = read_record(path)
    record.model_copy(update={"status": "crashed", "reason": "x"}).write(path.parent)
    runs.clear()
    assert left_bench(*command).code == 0
    assert [cell.id for cell in runs.trials] == [first]


def test_a_method_at_the_edge_is_widened_and_the_others_are_not(runs, left_bench, tmp_path):
    assert left_bench(*SMALL, "peft=lora,ia3", "+tune=rates", "peft.learning_rate=1e-2").code == 0
    assert sum(cell.peft.name == "lora" for cell in runs.trials) == 8
    assert sum(cell.peft.name == "ia3" for cell in runs.trials) == 12
    told = tuned_of(tmp_path, "ia3")
    assert told["trials"] == 8 and told["widened"]["trials"] == 4 and told["widened"]["end"] == "upper"
    assert len(told["tried"]) == 12 and told["at_edge"] and told["edge"] == "upper"
    assert "widened" not in tuned_of(tmp_path, "lora")


def test_a_record_that_was_there_before_learns_how_its_rate_was_found(runs, left_bench, tmp_path, monkeypatch):
    monkeypatch.setitem(BEST, "lora", 1e-3)
    assert left_bench(*SMALL, "peft=lora").code == 0
    runs.clear()
    assert left_bench(*SMALL, "peft=lora", "+tune=rates").code == 0
    assert runs.compared == [], "its own rate was the best"
    assert tuned_of(tmp_path, "lora")["learning_rate"] == 1e-3


def test_a_method_without_a_value_keeps_its_own_rate_and_says_so(runs, left_bench, tmp_path, monkeypatch):
    monkeypatch.setattr(Runs, "status", "oom")
    assert left_bench(*SMALL, "peft=lora", "+tune=rates").code == 0
    told = tuned_of(tmp_path, "lora")
    assert told["without_value"] and told["learning_rate"] == 1e-3
    assert {cell.learning_rate for cell in runs.compared} == {1e-3}


def test_a_comparisons_command_makes_its_cell_without_tuning(runs, left_bench, tmp_path):
    assert left_bench(*SMALL, "peft=lora", "+tune=rates", "tune.trials=4").code == 0
    record = next(item for item in records_of(tmp_path) if "tuned" in item.provenance)
    assert "tune" not in record.provenance["command"]
    runs.clear()
    assert left_bench(*shlex.split(record.provenance["command"])[1:], "force=true").code == 0
    assert [cell.id for cell in runs] == [record.cell_id]


def test_what_a_rule_refuses_is_not_tuned(runs, left_bench):
    answer = left_bench(*SMALL, "peft=lora,full", "quantization=nf4", "+tune=rates", "tune.trials=2", "tune.widening=0")
    assert answer.code == 0, answer
    assert {cell.peft.name for cell in runs} == {"lora"}, "full fine-tuning of quantized weights is a rule's row"


def test_the_estimate_counts_the_trials(runs, left_bench, monkeypatch):
    told: list[Any] = []

    def say(planned: Any, runs_dir: Path, **_: Any) -> None:
        told.append([(item.cell.eval.trial, item.cells) for item in planned])

    monkeypatch.setattr("left_bench.launch.launching.say_estimate", say)
    answer = left_bench(*SMALL, "peft=lora,full", "+tune=rates")
    assert answer.code == 0, answer
    assert told == [[(True, 8), (True, 8), (False, 2), (False, 2)]], "once, before the first of them"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["+tune=rate"], "unknown tune 'rate'; did you mean 'rates'?"),
        (["+tune=rates", "tune.trial=4"], "tune.trial: no such key; did you mean 'trials'?"),
        (["+tune=rates", "tune.trials=0"], "tune.trials=0: input should be greater than or equal to 2"),
        (["+tune=rates", "tune.lower=10", "tune.upper=0.1"], "tune.lower=10: the space ends at tune.upper=0.1"),
        (["+tune=rates", "tune.sampler=tep"], "tune.sampler='tep'"),
        (["+tune=rates", "tune.sizes=[0]"], "above 0"),
        (["+tune=rates", "tune.seed=1"], "tune.seed=1: the comparison has a cell with this seed"),
        (["+tune=rates", "training.learning_rate=1e-3"], "training.learning_rate=1e-3: +tune=rates looks for"),
        (["+tune=rates", "training.learning_rate=1e-3,1e-2"], "looks for each method's learning rate"),
        (["+tune=rates,halving"], "a comparison is tuned once"),
        (["tune.trials=4"], "tune.trials: nothing is tuned yet; choose what is with +tune=rates"),
        (["+tune=rates", "model=tiny_llama"], "model.weights=random is not scored"),
        (["+tune=halving", "training.max_seconds=9"], "training.max_seconds=9 ends training by the clock"),
        (["+tune=rates", "data.validation_rows=0"], "data.validation_rows=0: +tune=rates chooses by the loss"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_anything_is_written(given, said, runs, left_bench, tmp_path):
    named = {item.partition("=")[0] for item in given}
    answer = left_bench(*(item for item in SMALL if item.partition("=")[0] not in named), "peft=lora", *given)
    assert answer.code == 2, answer
    assert said in answer.err and len(answer.err.strip().splitlines()) == 1
    assert runs == [] and list(tmp_path.iterdir()) == []


def test_files_without_validation_rows_are_refused(runs, left_bench, tmp_path):
    rows = "".join(json.dumps({"prompt": f"{n} + {n}", "answer": str(2 * n)}) + "\n" for n in range(20))
    (tmp_path / "rows.jsonl").write_text(rows)
    small = [item for item in SMALL if not item.startswith("data")]
    answer = left_bench(*small, "data=jsonl", "data.path=rows.jsonl", "data.test_rows=4", "+tune=rates", "peft=lora")
    assert answer.code == 2 and "there are none; give data.validation_rows=64" in answer.err, answer


def test_a_single_cell_is_no_comparison(runs, left_bench):
    answer = left_bench("peft=lora", "+tune=rates", "hardware=cpu", "tracker=none")
    assert answer.code == 2 and "add -m, or +sweep=NAME" in answer.err


def test_without_optuna_its_extra_is_named(left_bench, monkeypatch):
    monkeypatch.setattr("left_bench.grid.command_line.is_installed", lambda module: False)
    answer = left_bench("+sweep=smoke", "+tune=rates")
    assert answer.code == 2 and "pip install 'left-bench[tune]'" in answer.err


def test_a_sampler_that_the_installed_optuna_lacks_is_refused(runs, left_bench, monkeypatch):
    import optuna

    monkeypatch.delattr(optuna.samplers, "QMCSampler", raising=False)
    answer = left_bench(*SMALL, "peft=lora", "+tune=rates", "tune.sampler=qmc")
    assert answer.code == 2 and "has no such sampler" in answer.err and runs == []


# --- the trial's own run ---


def test_a_trial_measures_the_validation_loss_and_leaves_test_rows_and_model_alone(work_in_process, tiny_cell):
    run = work_in_process(tiny_cell("peft=lora", "eval.trial=true", "eval.points=1", "data.validation_rows=4"))
    assert run["metrics"]["validation_loss"] > 0 and run["metrics"]["test_rows"] == 0
    assert not any(name in run["metrics"] for name in ("eval_loss", "exact_match", "adapter_file_bytes"))
    assert not (run["run_dir"] / "adapter").exists() and not (run["run_dir"] / "rows.jsonl").exists()
    assert {"evaluate", "evaluate_base", "save", "merge"}.isdisjoint(phase.name for phase in run["phases"])
    splits = run["provenance"]["splits"]
    assert "test" not in splits
    assert "the choice between the trials of a tuning" in splits["validation"]["used_for"]
    with pytest.raises(UserError, match="there are no validation rows"):
        work_in_process(tiny_cell("peft=lora", "eval.trial=true", "data.validation_rows=0"))


def test_a_trials_estimate_has_no_evaluation(tiny_cell):
    from left_bench.launch.estimate.arithmetic import Line, Rates, Row, Rows, seconds_of

    line = Line(0.1, 0.001)
    rates = Rates(load=1, forward=line, step=line, decode=line, update=1e-9, parameters=1000, threads=1)
    rows = Rows(train=[Row(20, 4)] * 8, test=[Row(20, 4)] * 4, test_rows=4, validation_rows=4, general=[50])
    trial = seconds_of(tiny_cell("eval.trial=true", "eval.points=1"), rates, rows)
    assert set(trial) == {"load", "around", "train", "validate"}

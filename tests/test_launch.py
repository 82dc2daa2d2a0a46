"""From a composed configuration to records, with a stand-in for the measured run."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from left_bench.grid.sweep import command_of
from left_bench.spec.record import RECORD_NAME, Record, read_record

QUICK = ["model=tiny_llama", "precision=fp32", "hardware=cpu", "tracker=none", "training.steps=1", "data.train_rows=8"]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def runs(monkeypatch):
    """Cells that were run; `runs.status[peft name]` decides how they end."""

    class Runs(list):
        status: dict[str, str] = {}  # noqa: RUF012

    started = Runs()

    def run_isolated(cell, run_dir, *, on_event):
        run_dir.mkdir(parents=True, exist_ok=True)
        started.append(cell)
        on_event({"event": "step", "step": 1, "loss": 2.0, "tokens_per_second": 5.0, "seconds": 1.0, "tokens": 5})
        status = Runs.status.get(cell.peft.name, "ok")
        return Record(
            cell_id=cell.id,
            status=status,
            reason=None if status == "ok" else f"{status} for a reason",
            started_at="2026-01-01T00:00:00+00:00",
            finished_at="2026-01-01T00:00:01+00:00",
            choices=cell.choices,
            config=cell.sections(),
            metrics={"wall_seconds": 1.0},
        )

    Runs.status = {}
    monkeypatch.setattr("left_bench.launch.run_cell.run_isolated", run_isolated)
    return started


def records(place: Path) -> list[Record]:
    return [read_record(path) for path in sorted(place.glob(f"runs/*/{RECORD_NAME}"))]


def test_one_cell(place, runs, left_bench):
    answer = left_bench(*QUICK)
    assert answer.code == 0, answer
    [record] = records(place)
    [cell] = runs
    assert (record.cell_id, record.status, record.attempt) == (cell.id, "ok", 1)
    assert record.provenance["sweep"] is None
    assert shlex.split(record.provenance["command"]) == ["left-bench", *QUICK]
    assert cell.id in answer.out
    assert not (place / "runs" / "sweeps").exists()
    assert not (place / "reports").exists()


def test_what_is_emulated_is_said_once_and_done(place, runs, left_bench, monkeypatch):
    monkeypatch.setenv("LEFT_BENCH_CPU_FLAGS", "avx2")
    monkeypatch.setattr(
        "left_bench.measure.auto_precision.product_speeds", lambda _device, dtype: {"float32": 60e9, dtype: 3e9}
    )
    quick = [item for item in QUICK if not item.startswith("precision=")]
    slow = "20 times as long as float32's (measured here); precision=auto chooses precision=fp32 here"
    answer = left_bench(*quick, "precision=bf16")
    assert answer.code == 0, answer
    assert f"note: precision=bf16: bfloat16 is emulated on this CPU, and its matrix products take {slow}" in answer.err
    assert [cell.precision.name for cell in runs] == ["bf16"]
    assert "emulated" not in left_bench(*quick, "precision=bf16").err, "the cell is done"
    assert "emulated" not in left_bench(*quick).err
    assert runs[-1].choices["precision"] == "fp32"
    answer = left_bench("-m", *quick, "precision=fp32,bf16,bf16_mixed,fp16", "seed=0,1")
    assert answer.err.count("emulated") == 2
    assert "precision=bf16,bf16_mixed: bfloat16" in answer.err and "precision=fp16: float16" in answer.err
    assert "emulated" not in left_bench("-m", *quick, "precision=fp32,bf16,bf16_mixed,fp16", "seed=0,1").err


def test_a_sweep_has_the_precision_of_the_machine_that_launches_it(place, runs, left_bench, monkeypatch):
    """Its jobs run where other instruction sets are found: they are composed where the launch began."""
    from left_bench.launch import job
    from left_bench.measure.auto_precision import fast_precision

    monkeypatch.setenv("LEFT_BENCH_CPU_FLAGS", "avx2 avx512_bf16")
    quick = [item for item in QUICK if not item.startswith("precision=")]
    take = job.take

    def elsewhere(*how, **named):
        monkeypatch.setenv("LEFT_BENCH_CPU_FLAGS", "avx2")
        assert fast_precision("cpu").option == "fp32"
        return take(*how, **named)

    monkeypatch.setattr(job, "take", elsewhere)
    answer = left_bench("-m", *quick, "seed=0,1")
    assert answer.code == 0, answer
    assert [cell.choices["precision"] for cell in runs] == ["bf16", "bf16"]


def test_a_sweep_that_may_go_elsewhere_says_what_it_takes_along(place, runs, left_bench, monkeypatch):
    monkeypatch.setenv("LEFT_BENCH_CPU_FLAGS", "avx2 avx512_bf16")
    monkeypatch.setattr("left_bench.launch.launching.runs_elsewhere", lambda hydra: True)
    quick = [item for item in QUICK if not item.startswith("precision=")]
    answer = left_bench("-m", *quick, "seed=0,1")
    assert answer.code == 0, answer
    assert answer.err.count("precision=auto is bf16 on cpu (avx512_bf16)") == 1
    assert [cell.choices["precision"] for cell in runs] == ["bf16", "bf16"]


def test_a_job_whose_files_are_others_elsewhere_is_refused(place, runs, left_bench, monkeypatch):
    from left_bench.launch import job

    rows = "".join(json.dumps({"prompt": f"{n} + {n}", "answer": str(2 * n)}) + "\n" for n in range(20))
    (place / "rows.jsonl").write_text(rows)
    monkeypatch.setattr("left_bench.launch.launching.runs_elsewhere", lambda hydra: True)
    quick = [*(item for item in QUICK if not item.startswith("data")), "data=jsonl", "data.path=rows.jsonl"]
    quick += ["data.train_rows=8", "data.test_rows=4"]
    assert left_bench("-m", *quick, "seed=0,1").code == 0
    take = job.take

    def elsewhere(*how, **named):
        (place / "rows.jsonl").write_text(rows.replace("2 + 2", "2+2"))
        return take(*how, **named)

    monkeypatch.setattr(job, "take", elsewhere)
    answer = left_bench("-m", *quick, "seed=2,3")
    assert answer.code == 2 and "this machine resolves it differently" in answer.err, answer


@pytest.mark.parametrize("sweep", [[], ["-m", "seed=0,1,2"]], ids=["one cell", "a sweep"])
def test_a_cell_is_composed_once_and_its_files_are_read_once(sweep, place, runs, left_bench, monkeypatch):
    """By whoever composes: nothing is composed again to check it, to run it or to sum it up."""
    from left_bench.grid import compose as composing
    from left_bench.launch import launching

    composed, looked_at = [], []
    compose, with_content = launching.compose, composing.model_with_content
    monkeypatch.setattr(launching, "compose", lambda *a, **k: composed.append(a) or compose(*a, **k))
    monkeypatch.setattr(composing, "model_with_content", lambda model: looked_at.append(model) or with_content(model))
    assert left_bench(*sweep, *QUICK).code == 0
    assert len(runs) == len(composed) == len(looked_at) == (3 if sweep else 1)


def test_hydra_composes_a_sweeps_jobs_before_the_launcher_has_them(place, runs, left_bench, monkeypatch):
    """A launcher asks a loader for every job; what it gets was composed for the launch."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    composed, load = [], ConfigLoaderImpl.load_sweep_config
    monkeypatch.setattr(
        ConfigLoaderImpl, "load_sweep_config", lambda self, *a: composed.append(len(runs)) or load(self, *a)
    )
    assert left_bench("-m", *QUICK, "peft=lora,ia3", "seed=0,1").code == 0
    assert len(runs) == 4
    assert composed == [0, 0], "once for each option, before the first cell runs"


def test_the_name_in_configurations_of_earlier_versions_goes_on_working(place, runs, left_bench):
    (place / "conf" / "recipe").mkdir(parents=True)
    body = "hydra:\n  callbacks:\n    launch:\n      _target_: left_bench.launch.Launch\n"
    body = f"# @package _global_\n# As before.\n{body}"
    (place / "conf" / "recipe" / "before.yaml").write_text(body)
    for sweep in ([], ["-m", "seed=0,1"]):
        answer = left_bench("--config-dir", "conf", *sweep, *QUICK, "+recipe=before")
        assert answer.code == 0, answer
    assert [cell.seed for cell in runs] == [0, 1]
    assert list((place / "reports").glob("multirun_*.md"))


def test_a_dollar_sign_in_a_cell_is_no_interpolation(place, runs, left_bench):
    answer = left_bench("-m", *QUICK, "seed=0,1", r"data.template='costs \${question} \\$ {question}'")
    assert answer.code in (0, 2), answer
    if answer.code == 0:
        assert "$" in runs[0].data.template


def test_a_sweep(place, runs, left_bench):
    answer = left_bench("+sweep=smoke", *QUICK)
    assert answer.code == 0, answer
    assert [cell.peft.name for cell in runs] == ["lora", "ia3"]
    manifest = json.loads((place / "runs" / "sweeps" / "smoke.json").read_text())
    assert manifest["cells"] == [cell.id for cell in runs]
    assert manifest["finished_at"] >= manifest["started_at"]
    assert shlex.split(manifest["command"]) == ["left-bench", "+sweep=smoke", *QUICK]
    assert {record.provenance["sweep"] for record in records(place)} == {"smoke"}
    assert (place / "reports" / "smoke.md").is_file()
    assert "[2/2]" in answer.out


def test_a_sweeps_own_report_has_costs_where_a_price_is_given(place, runs, left_bench):
    assert left_bench("+sweep=smoke", *QUICK).code == 0
    assert "## Cost" not in (place / "reports" / "smoke.md").read_text()
    runs.clear()
    assert left_bench("+sweep=smoke", *QUICK, "price_per_hour='7200'").code == 0
    assert runs == [], "a price is no part of a cell"
    report = (place / "reports" / "smoke.md").read_text()
    assert "The same in every row: cost 2.00." in report
    assert "7,200 per hour" in report


def test_a_grid_passes_by_what_is_done(place, runs, left_bench, monkeypatch):
    """Done jobs are not even composed for the launcher; the others keep their places in the sweep."""
    left_bench("-m", *QUICK, "seed=1,3")
    runs.clear()
    launched = []
    from left_bench.launch import job

    take = job.take
    monkeypatch.setattr(job, "take", lambda item, **named: launched.append(item.cell.seed) or take(item, **named))
    answer = left_bench("-m", *QUICK, "seed=0,1,2,3")
    assert answer.code == 0, answer
    assert [cell.seed for cell in runs] == launched == [0, 2]
    kept = [line.split()[0] for line in answer.out.splitlines() if "kept from an earlier run" in line]
    assert kept == ["[2/4]", "[4/4]"]
    assert "[1/4] start" in answer.out and "[3/4] start" in answer.out
    launched.clear()
    assert left_bench("-m", *QUICK, "seed=0,1,2,3").code == 0
    assert launched == []
    assert left_bench("-m", *QUICK, "seed=0,1", "force=true").code == 0
    assert launched == [0, 1]
    assert left_bench("-m", *QUICK, "seed=0,1", "force=true,false").code == 0
    assert launched == [0, 1, 0, 1], "the forced ones are run again, and the same cells are then done"


def test_the_command_of_a_record_makes_the_same_cell(place, runs, left_bench):
    left_bench("+sweep=lora_rank", *QUICK, "peft.config.r=2,4")
    first = list(runs)
    command = next(record.provenance["command"] for record in records(place) if record.cell_id == first[1].id)
    runs.clear()
    answer = left_bench(*shlex.split(command)[1:], "force=true")
    assert answer.code == 0, answer
    assert [cell.id for cell in runs] == [first[1].id]


def test_an_ok_record_is_kept(place, runs, left_bench):
    left_bench(*QUICK)
    answer = left_bench(*QUICK)
    assert answer.code == 0
    assert len(runs) == 1
    assert "kept from an earlier run" in answer.out
    left_bench(*QUICK, "force=true")
    assert len(runs) == 2
    assert records(place)[0].attempt == 2


@pytest.mark.parametrize("override", ["seed=1", "training.steps=2", "data.train_rows=9", "peft.config.r=3"])
def test_any_changed_setting_is_another_run(override, place, runs, left_bench):
    left_bench(*QUICK)
    left_bench(*(item for item in QUICK if item.split("=")[0] != override.split("=")[0]), override)
    assert len({cell.id for cell in runs}) == 2


def test_an_edited_data_file_is_another_run_and_a_moved_one_is_none(place, runs, left_bench):
    quick = [item for item in QUICK if not item.startswith("data")]
    rows = [json.dumps({"prompt": f"{n} + {n}", "answer": str(2 * n)}) for n in range(20)]

    def launch(name: str, lines: list[str]) -> None:
        (place / name).write_text("\n".join(lines))
        answer = left_bench(*quick, "data=jsonl", f"data.path={name}", "data.train_rows=8", "data.test_rows=4")
        assert answer.code == 0, answer

    launch("rows.jsonl", rows)
    launch("elsewhere.jsonl", rows)
    assert len(runs) == 1
    launch("rows.jsonl", rows[::-1])
    assert len({cell.id for cell in runs}) == 2


def test_a_failed_cell_is_run_again(place, runs, left_bench):
    type(runs).status = {"lora": "oom"}
    assert left_bench(*QUICK).code == 1
    type(runs).status = {}
    assert left_bench(*QUICK).code == 0
    [record] = records(place)
    assert (record.status, record.attempt, len(runs)) == ("ok", 2, 2)


@pytest.mark.parametrize(
    ("status", "code"),
    [("ok", 0), ("unsupported", 0), ("oom", 1), ("failed", 1), ("crashed", 1), ("timeout", 1), ("diverged", 1)],
)
def test_the_exit_code_of_a_sweep(status, code, place, runs, left_bench):
    type(runs).status = {"lora": status}
    answer = left_bench("+sweep=smoke", *QUICK)
    assert answer.code == code, answer
    assert len(runs) == 2  # a cell's failure does not end the sweep
    assert {record.status for record in records(place)} == {status, "ok"}
    assert (place / "reports" / "smoke.md").is_file()


def test_an_unsupported_cell_is_a_record_and_not_started(place, runs, left_bench):
    answer = left_bench(*QUICK, "peft=full", "quantization=nf4")
    assert answer.code == 0, answer
    assert runs == []
    [record] = records(place)
    assert record.status == "unsupported"
    assert "full fine-tuning" in record.reason
    left_bench(*QUICK, "peft=full", "quantization=nf4", "force_unsupported=true")
    assert len(runs) == 1


def test_a_model_that_cannot_be_had_is_a_failed_record(place, runs, left_bench, monkeypatch):
    from left_bench.core.errors import UserError

    def unreachable(model, *, dtype):
        raise UserError("no network\nsecond line")

    monkeypatch.setattr("left_bench.pretrained.model_folder", unreachable)
    assert left_bench(*QUICK).code == 1
    [record] = records(place)
    assert (record.status, record.reason, runs) == ("failed", "no network", [])


@pytest.mark.parametrize("damage", ["", "{", '{"schema_version": 0}', "[]"])
def test_a_damaged_record_is_said_and_run_again(damage, place, runs, left_bench):
    left_bench(*QUICK)
    [path] = place.glob(f"runs/*/{RECORD_NAME}")
    path.write_text(damage)
    answer = left_bench(*QUICK)
    assert answer.code == 0, answer
    assert "the cell is run again" in answer.err
    assert len(runs) == 2
    assert records(place)[0].status == "ok"


def test_an_interrupted_sweep_goes_on(place, runs, left_bench, monkeypatch):
    from left_bench.launch import run_cell as run

    whole = run.run_isolated

    def interrupted(cell, run_dir, *, on_event):
        if cell.peft.name == "ia3":
            raise KeyboardInterrupt
        return whole(cell, run_dir, on_event=on_event)

    monkeypatch.setattr("left_bench.launch.run_cell.run_isolated", interrupted)
    answer = left_bench("+sweep=smoke", *QUICK)
    assert answer.code == 130, answer
    assert "the same command goes on" in answer.err
    assert [record.status for record in records(place)] == ["ok"]
    monkeypatch.setattr("left_bench.launch.run_cell.run_isolated", whole)
    assert left_bench("+sweep=smoke", *QUICK).code == 0
    assert [cell.peft.name for cell in runs] == ["lora", "ia3"]


def test_a_multirun_of_ones_own_has_a_name_of_its_own(place, runs, left_bench):
    answer = left_bench("-m", *QUICK, "seed=0,1")
    assert answer.code == 0, answer
    [manifest] = (place / "runs" / "sweeps").glob("*.json")
    assert manifest.stem.startswith("multirun_")
    assert json.loads(manifest.read_text())["command"].startswith("left-bench -m ")
    left_bench("-m", *QUICK, "seed=0,2")
    assert len(list((place / "runs" / "sweeps").glob("*.json"))) == 2


def test_folders_can_be_elsewhere(place, runs, left_bench):
    left_bench("+sweep=smoke", *QUICK, "runs_dir=there/r u n s", "reports_dir=there/out")
    assert len(list(place.glob(f"there/r u n s/*/{RECORD_NAME}"))) == 2
    assert (place / "there" / "out" / "smoke.md").is_file()
    assert not (place / "runs").exists()
    assert not list(place.rglob(".hydra"))


def test_a_broken_tracker_costs_nothing(place, runs, left_bench, monkeypatch):
    import left_bench.tracker.kinds.wandb as tracker

    def broken(self, *arguments, **named):
        raise RuntimeError("no wandb today")

    monkeypatch.setattr(tracker.WandbTracker, "start", broken)
    answer = left_bench(*[item for item in QUICK if not item.startswith("tracker")], "tracker=wandb")
    assert answer.code == 0, answer
    assert "no wandb today" in answer.err
    assert records(place)[0].status == "ok"


def test_equal_cells_of_a_sweep_run_once(place, runs, left_bench):
    answer = left_bench("-m", *QUICK, "peft=qlora,lora", "quantization=nf4_dq")
    assert answer.code == 0, answer
    assert len(runs) == 1
    assert len(records(place)) == 1


def test_commands_are_quoted():
    command = command_of(["++peft.config.r=2", "data.template='a b'", "+sweep=smoke"])
    assert shlex.split(command) == ["left-bench", "peft.config.r=2", "data.template='a b'", "+sweep=smoke"]


def test_a_report_that_cannot_be_written_is_an_error(place, runs, left_bench):
    """Hydra swallows what its callbacks raise: a gate would take a sweep with failed cells for a good one."""
    runs.status["ia3"] = "oom"
    (place / "reports" / "smoke.md").mkdir(parents=True)
    answer = left_bench("+sweep=smoke", *QUICK)
    assert answer.code == 2, answer
    assert "reports_dir=reports" in answer.err and "smoke.md" in answer.err


def test_retrained_weights_are_another_cell_and_a_moved_folder_is_none(place, runs, left_bench, compose_cell):
    from left_bench.pretrained import folder as of_folder
    from left_bench.pretrained import model_folder
    from left_bench.spec.cell import Cell

    made = model_folder(compose_cell(*QUICK).model, dtype="float32")
    shutil.copytree(made, place / "mine")

    def launch(folder: str) -> str:
        of_folder.content_of.cache_clear()  # as by another launch
        quick = [item for item in QUICK if not item.startswith("model=")]
        answer = left_bench(*quick, f"model.name_or_path=./{folder}")
        assert answer.code == 0, answer
        cell: Cell = runs[-1]
        return cell.id

    first = launch("mine")
    shutil.copytree(place / "mine", place / "moved" / "mine")
    before = len(runs)
    assert launch("moved/mine") == first and len(runs) == before
    weights = place / "mine" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert launch("mine") != first


def test_a_model_that_a_sweep_of_ones_own_names_is_that_model(place, runs, left_bench, monkeypatch):
    monkeypatch.setattr("left_bench.launch.run_cell._fetch_model", lambda cell: None)
    (place / "conf" / "sweep").mkdir(parents=True)
    body = "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      seed: 0,1\nmodel:\n  name_or_path: some/neox\n"
    (place / "conf" / "sweep" / "mine.yaml").write_text("# @package _global_\n" + body)
    quick = [item for item in QUICK if not item.startswith("model=")]
    answer = left_bench("--config-dir", "conf", "+sweep=mine", *quick)
    assert answer.code == 0, answer
    assert {(cell.model.name, cell.model.config) for cell in runs} == {("neox", None)}
    command = records(place)[0].provenance["command"]
    assert command.startswith("left-bench --config-dir conf ")
    manifest = json.loads((place / "runs" / "sweeps" / "mine.json").read_text())
    assert manifest["command"].startswith("left-bench --config-dir conf +sweep=mine")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.name_or_path=some/body", "model.weights=random"], "leave one of the two out"),
        (["model.name_or_path=some/body", "model.config.num_hidden_layers=7"], "leave one of the two out"),
        (["model=pythia_70m", "model.config.num_hidden_layers=9"], "combine it with model.weights=random"),
        (["optimizer.config.lr=0.5"], "set it with training.learning_rate="),
        (["hardware.memory_limit=6iB"], "not a memory size"),
        (["-m", "quantization=[nf4,none]"], "separate them by commas, quantization=A,B"),
    ],
)
def test_what_would_be_passed_over_in_silence_is_refused(overrides, words, place, runs, left_bench):
    quick = [one for one in QUICK if not (one.startswith("model=") and any("model" in two for two in overrides))]
    answer = left_bench(*quick, *overrides)
    assert answer.code == 2 and words in answer.err, answer
    assert not runs


def test_an_option_named_as_one_that_ships_is_refused(place, runs, left_bench):
    (place / "conf" / "peft").mkdir(parents=True)
    (place / "conf" / "peft" / "lora.yaml").write_text("name: lora\n")
    answer = left_bench("--config-dir", "conf", *QUICK, "peft=lora")
    assert answer.code == 2 and "an option of this name ships" in answer.err, answer


def test_another_launch_of_the_same_sweep_takes_nothing_from_this_one(place, runs, left_bench, monkeypatch):
    """Its manifest comes to lie over this one's while the cells run."""
    from left_bench.launch import job as launching

    inner = launching.run_cell

    def run_cell(cell, settings, **named):
        other = {"name": "smoke", "command": "", "overrides": [], "started_at": "2026-01-01T00:00:00", "cells": ["x-1"]}
        (settings.runs_dir / "sweeps" / "smoke.json").write_text(json.dumps(other))
        return inner(cell, settings, **named)

    monkeypatch.setattr(launching, "run_cell", run_cell)
    answer = left_bench("+sweep=smoke", *QUICK)
    assert answer.code == 0, answer
    assert [cell.peft.name for cell in runs] == ["lora", "ia3"]
    left = {path.name for path in (place / "runs" / "sweeps").iterdir()}
    assert left == {"smoke.json", "multirun.yaml"}  # Hydra's own; nothing of the launch's


def test_what_a_sweep_says_otherwise_than_a_chosen_option_is_told(place, runs, left_bench):
    quick = [item for item in QUICK if not item.startswith("training")]
    answer = left_bench("+sweep=smoke", *quick, "training=long")
    assert answer.code == 0, answer
    assert "note: training.steps=4 comes from the sweep, not the 1000 of training=long" in answer.err
    assert "note" not in left_bench("+sweep=smoke", *quick, "training=long", "training.steps=3").err
    assert "note" not in left_bench("+sweep=smoke", *QUICK).err

"""What the person waiting sees while a cell runs, and what an evaluation tells of how far it is."""

from __future__ import annotations

import io
import json
import time

import pytest
from recorded.build import make_record
from rich.console import Console

from left_bench.evaluation import evaluate
from left_bench.launch import progress
from left_bench.launch.progress import say_end, still_at_work, watch
from left_bench.launch.run_cell import Pace
from left_bench.spec import events
from left_bench.spec.events import EventReader, EventWriter, progress_of
from left_bench.spec.record import Phase, Record


@pytest.fixture
def clock(monkeypatch):
    """`clock.now`, which stands still until it is set."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(events.time, "monotonic", lambda: Clock.now)
    return Clock


def test_progress_is_written_twice_a_second_and_where_something_begins(tmp_path, clock):
    writer = EventWriter(tmp_path / "events.jsonl")
    tell = progress_of(writer)
    for row in range(100):
        clock.now = 100 + row / 100
        tell("loss", row, 100)
    tell("answers", 0, 100)
    told = [(item["event"], item["work"], item["done"], item["total"]) for item in EventReader(writer.path).new()]
    assert told == [
        ("progress", "loss", 0, 100),
        ("progress", "loss", 50, 100),
        ("progress", "answers", 0, 100),
    ]


def test_an_evaluation_tells_rows_of_each_work_in_turn(tiny_cell, load_tiny, addition_rows):
    cell = tiny_cell("eval.batch_size=3", "eval.max_new_tokens=4", "eval.forgetting=true")
    model, tokenizer = load_tiny(cell)
    told: list[tuple[str, int, int]] = []
    result = evaluate.evaluate_model(
        model, tokenizer, addition_rows, cell, device="cpu", tell=lambda *what: told.append(what)
    )
    assert list(dict.fromkeys(work for work, _, _ in told)) == ["loss", "answers", "general text"]
    assert [done for work, done, _ in told if work == "loss"] == [0, 3, 6, 8]
    answers = [done for work, done, _ in told if work == "answers"]
    assert answers == sorted(answers) and answers[0] == 0 and answers[-1] == len(addition_rows)
    assert {1, 2} & set(answers), "within a batch, too: one of them can take minutes"
    assert {total for work, _, total in told if work != "general text"} == {len(addition_rows)}
    untold = evaluate.evaluate_model(model, tokenizer, addition_rows, cell, device="cpu")
    assert result == untold


def test_classes_are_told_too(tiny_cell, load_tiny, monkeypatch):
    from types import SimpleNamespace

    import torch

    told: list[tuple[str, int, int]] = []
    batch = SimpleNamespace(inputs=dict, to=lambda device: batch)
    monkeypatch.setattr(evaluate, "collate", lambda rows, pad_id: batch)

    class Model:
        config = SimpleNamespace(id2label={0: "a", 1: "b"})

        def __call__(self, **_):
            return SimpleNamespace(logits=torch.tensor([[0.0, 1.0]]))

    cell = tiny_cell("eval.batch_size=1")
    result = evaluate.classify(Model(), None, [1, 2], cell, device="cpu", tell=lambda *what: told.append(what))
    assert result == ["b", "b"]
    assert told == [("classes", 0, 2), ("classes", 1, 2), ("classes", 2, 2)]


def told_in(path) -> list[tuple[str, str]]:
    """Phase and work of each progress event, each once."""
    phase, told = "", []
    for event in map(json.loads, path.read_text().splitlines()):
        phase = event["name"] if event["event"] == "phase" else phase
        if event["event"] == "progress":
            told.append((phase, event["work"]))
    return list(dict.fromkeys(told))


def test_a_cell_tells_how_far_its_evaluation_is_and_no_timed_generation(tiny_cell, work_in_process):
    result = work_in_process(tiny_cell())
    assert "generate_tokens_per_second" in result["metrics"]
    assert told_in(result["run_dir"] / "events.jsonl") == [
        ("peak", "matrix products, measured"),
        ("train", "validation loss"),
        ("evaluate", "loss"),
        ("evaluate", "answers"),
    ]


def test_the_base_models_evaluation_is_told_too(tiny_cell, load_tiny, addition_rows, tmp_path):
    from left_bench.evaluation.shared_baseline import evaluate_base
    from left_bench.measure.device import CpuDevice
    from left_bench.measure.meter import Meter

    cell = tiny_cell()
    model, tokenizer = load_tiny(cell)
    meter = Meter(CpuDevice(), EventWriter(tmp_path / "events.jsonl"))
    evaluate_base(model, tokenizer, addition_rows, cell, meter=meter, runs_dir=tmp_path)
    assert told_in(tmp_path / "events.jsonl") == [("evaluate_base", "loss"), ("evaluate_base", "answers")]


def test_an_evaluation_that_goes_on_is_no_hang(tiny_cell, tmp_path):
    import sys

    from left_bench.launch.supervise import run_isolated

    worker = """
import json, sys, time
with open(sys.argv[1] + "/events.jsonl", "w", buffering=1) as file:
    file.write(json.dumps({"event": "phase", "name": "evaluate_base"}) + "\\n")
    for done in range(3):
        time.sleep(0.5)
        file.write(json.dumps({"event": "progress", "work": "loss", "done": done, "total": 9}) + "\\n")
    time.sleep(9)
"""
    seen = []
    cell = tiny_cell("hardware.phase_timeout=1")
    command = [sys.executable, "-I", "-S", "-c", worker]
    record = run_isolated(cell, tmp_path / "run", on_event=seen.append, command=command)
    assert record.reason == "no progress for hardware.phase_timeout=1 s in phase evaluate_base"
    assert [event["event"] for event in seen] == ["phase", *["progress"] * 3]
    assert record.metrics["wall_seconds"] > 2


EVALUATION = [
    {"event": "phase", "name": "evaluate_base"},
    {"event": "progress", "work": "loss", "done": 0, "total": 128},
    {"event": "progress", "work": "answers", "done": 70, "total": 128},
]
STEP = {"event": "step", "step": 1, "loss": 2.0, "tokens_per_second": 5.0}


def test_plain_lines_tell_of_an_evaluation_every_ten_seconds(tiny_cell, clock):
    out = io.StringIO()
    with watch(tiny_cell("training.steps=1"), number=2, total=3, console=Console(file=out)) as view:
        for event in EVALUATION[:2]:
            view.event(event)
        clock.now += progress._LINE_EVERY_SECONDS
        view.event(EVALUATION[2])
        view.event(EVALUATION[2] | {"done": 80})
        view.event(STEP)
    told = out.getvalue().splitlines()[1:]
    assert told == ["[2/3] evaluate_base answers 70/128", "[2/3] step 1/1 loss 2.000  5 tokens/s"]


def test_bars_count_rows_and_then_steps(tiny_cell):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=200)
    with watch(tiny_cell("training.steps=4"), number=1, total=1, console=console) as view:
        bars, task = view._bars, view._task
        for event in EVALUATION:
            view.event(event)
        shown = bars.tasks[task]
        assert (shown.completed, shown.total) == (70, 128)
        assert "evaluate_base: answers" in shown.fields["facts"]
        view.event(STEP)
        assert (shown.completed, shown.total) == (1, 4)
        assert "loss 2.000" in shown.fields["facts"]


ROWS = {"train_rows": 6, "test_rows": 4, "dropped_rows": 0, "repeated_rows": 0, "truncated_rows": 0}
ROWS |= {"event": "data", "truncated_test_rows": 0, "train_epochs": 2.6667}


@pytest.mark.parametrize(
    ("number", "lost", "said"),
    [
        (1, {}, "rows: train 6, test 4, 2.7 epochs"),
        (2, {}, None),
        (2, {"dropped_rows": 10}, "rows: train 6, test 4, dropped 10 (no prompt or answer), 2.7 epochs"),
        (
            2,
            {"repeated_rows": 1, "truncated_rows": 1, "truncated_test_rows": 2},
            "rows: train 6, test 4, left out 1 (a test row's question), "
            "cut 3 (longer than training.max_length=512), 2.7 epochs",
        ),
    ],
)
@pytest.mark.parametrize("terminal", [True, False])
def test_what_became_of_the_rows_is_said_before_the_steps(number, lost, said, terminal, tiny_cell):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=200)
    with watch(tiny_cell("training.max_length=512"), number=number, total=3, console=console) as view:
        view.event(ROWS | lost)
    assert (f"{said}\n" in out.getvalue()) if said else ("rows:" not in out.getvalue())


def test_what_is_left_of_a_launch_follows_from_its_cells_so_far():
    def ended(overhead: float, **phases: float) -> Record:
        record = make_record(metrics={"overhead_seconds": overhead})
        kept = [Phase(name=name, seconds=seconds, peak_memory_bytes=0) for name, seconds in phases.items()]
        return record.model_copy(update={"phases": kept})

    pace = Pace(3)
    assert pace.seconds_left is None
    pace.ended(ended(25, evaluate_base=40, peak=2, train=8, evaluate=2))  # imports, and what the others share
    assert pace.seconds_left == 20
    pace.ended(ended(4, train=10, evaluate=6))
    assert pace.seconds_left == 15
    pace.ended(ended(4, train=10))
    assert pace.seconds_left is None
    assert Pace().seconds_left is None  # a launcher's process knows of no launch


@pytest.mark.parametrize(
    ("seconds", "said"), [(3, "10 s"), (44, "40 s"), (89, "90 s"), (95, "2 min"), (3000, "50 min"), (9000, "2.5 h")]
)
def test_the_time_left_is_told_to_what_a_guess_is_worth(seconds, said, tiny_cell):
    out = io.StringIO()
    console = Console(file=out, width=200)
    say_end(make_record(), number=1, total=2, seconds_left=seconds, console=console)
    assert out.getvalue().endswith(f"about {said} left\n")


def test_long_work_says_what_it_is_at_again_and_again(monkeypatch):
    monkeypatch.setattr(progress, "_SIGN_EVERY_SECONDS", 0.02)
    stream = io.StringIO()
    with still_at_work(stream) as tell:
        for what in ("composing the cells", "planning 1 of 2: lora [nf4]"):
            tell(what)
            end = time.monotonic() + 10
            while what not in stream.getvalue() and time.monotonic() < end:
                time.sleep(0.01)
    lines = stream.getvalue().splitlines()
    assert any(line.startswith("composing the cells (") for line in lines)
    assert lines[-1].startswith("planning 1 of 2: lora [nf4] (") and lines[-1].endswith(" s)")


def test_short_work_says_nothing():
    stream = io.StringIO()
    with still_at_work(stream) as tell:
        tell("composing the cells")
    assert stream.getvalue() == ""


def test_a_terminal_shows_one_line_and_is_left_as_it_was():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with still_at_work(stream) as tell:
        tell("planning 1 of 1: lora")
        shown = stream.getvalue()
    assert "planning 1 of 1: lora" in stream.getvalue()
    assert "\x1b[2K" in stream.getvalue()[len(shown) :]  # the line is erased

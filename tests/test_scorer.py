"""A scorer of the user's own: named on the command line, checked before anything runs; what becomes of its scores."""

from __future__ import annotations

import json
import math
import textwrap

import pytest
import yaml

from left_bench.core.errors import UserError
from left_bench.core.paths import file_sha256
from left_bench.data import Example, load_rows
from left_bench.evaluation import scorer
from left_bench.report.changes import compare
from left_bench.report.gate import parse_gate
from left_bench.report.ranking import headline_quality, qualities
from left_bench.report.uncertainty import scored_rows
from left_bench.spec.record import METRICS, Record, Score, find_metric

LENGTHS = """
def score(prediction: str, reference: str, row: dict) -> dict[str, float]:
    return {"shorter": float(len(prediction) < len(reference)), "hint": float(row["hint"] in prediction)}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with rows of two columns beside question and answer, and `write(name, source)`."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"q{i}", "answer": f"answer {i}", "hint": str(i), "level": i} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def write(name, source):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(source))
        return tmp_path / name

    return write


@pytest.fixture
def own_cell(compose_cell, here):
    """`own_cell(scorer)`: a tiny cell on the rows of `here`."""

    def own_cell(named, *overrides):
        compose_cell.cache_clear()
        return compose_cell(
            *("model=tiny_llama", "precision=fp32", "hardware=cpu", "data=jsonl", "data.path=rows.jsonl"),
            *("data.test_rows=4", "data.train_rows=6", "tracker=none", f"eval.scorer={named}", *overrides),
        )

    return own_cell


def rows_of(cell):
    test = load_rows(cell.data)[1]
    return [Example(prompt_ids=[1], answer_ids=[2], prompt=row.prompt, reference=row.answer) for row in test]


def called(cell, answers, base=None):
    return scorer.score_answers(cell, rows_of(cell), answers, base, tell=lambda *_: None)


# --- finding it ---


def test_a_file_is_known_by_its_content_and_its_function(own_cell, here):
    path = here("score.py", LENGTHS)
    cell = own_cell("score.py:score")
    assert cell.eval.scorer == "score.py:score"
    assert cell.eval.scorer_content == file_sha256(path)
    here("moved/elsewhere.py", LENGTHS)
    assert own_cell("moved/elsewhere.py:score").id == cell.id
    here("score.py", LENGTHS + "\n# edited\n")
    assert own_cell("score.py:score").id != cell.id


def test_a_module_is_found_without_importing_it(own_cell, here):
    here("mine/__init__.py", "raise RuntimeError('imported')")
    path = here("mine/judge.py", "raise RuntimeError('imported')\n" + LENGTHS)
    assert own_cell("mine.judge:score").eval.scorer_content == file_sha256(path)


def test_a_file_is_found_in_the_folder_of_options(here, left_bench, monkeypatch, tmp_path):
    path = here("conf/score.py", LENGTHS)
    seen = []
    monkeypatch.setattr("left_bench.launch.run_cell._fetch_model", lambda cell: None)

    def run_isolated(cell, run_dir, *, on_event):
        seen.append(cell)
        return Record(
            cell_id=cell.id, status="ok", started_at="s", finished_at="f", choices=cell.choices, config=cell.sections()
        )

    monkeypatch.setattr("left_bench.launch.run_cell.run_isolated", run_isolated)
    options = ["model=tiny_llama", "hardware=cpu", "tracker=none", "data=jsonl", "data.path=rows.jsonl"]
    answer = left_bench("--config-dir", "conf", *options, "data.test_rows=4", "eval.scorer=score.py:score")
    assert answer.code == 0, answer
    assert seen[0].eval.scorer == f"{path}:score"


@pytest.mark.parametrize(
    ("named", "source", "words"),
    [
        ("scroe.py:score", LENGTHS, ["no file scroe.py", "did you mean 'score.py'?"]),
        ("score.py:scroe", LENGTHS, ["score.py has no function 'scroe'", "did you mean 'score'?"]),
        ("nowhere:score", LENGTHS, ["no module 'nowhere'", "nowhere.py:score"]),
        ("score.py", LENGTHS, ["name a function", "score.py:score"]),
        (":score", LENGTHS, ["name a function"]),
        ("score.py:score", "def score(answer, truth): ...", ["score(answer, truth)", "three arguments"]),
        ("score.py:score", "def score(a, b, c, d): ...", ["score(a, b, c, d)", "three arguments"]),
        ("score.py:score", "def score(a, b, c, *, d): ...", ["three arguments"]),
        ("score.py:score", "async def score(a, b, c): ...", ["asynchronous"]),
        ("score.py:score", "def score(:", ["score.py, line 1 is not Python"]),
        ("score.py:score", "x = 1", ["has no function 'score'; it defines none"]),
    ],
)
def test_what_is_no_scorer_is_refused(named, source, words, own_cell, here):
    here("score.py", source)
    with pytest.raises(UserError) as refused:
        own_cell(named)
    message = str(refused.value)
    assert message.startswith(f"eval.scorer={named}: ")
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "source",
    [
        "def score(a, b, c=None, d=None, *, e=1): ...",
        "def score(*given): ...",
        "from operator import methodcaller as score",
        "score = lambda prediction, reference, row: 1.0",
        "try:\n    def score(a, b, c): ...\nfinally:\n    pass",
        "class score:\n    pass",
    ],
)
def test_what_may_be_a_scorer_is_taken(source, own_cell, here):
    here("score.py", source)
    assert own_cell("score.py:score").eval.scorer_content


def test_a_scorer_without_answers_is_refused(own_cell, here):
    here("score.py", LENGTHS)
    with pytest.raises(UserError, match=r"eval\.scorer=score\.py:score: .*eval\.generate=false"):
        own_cell("score.py:score", "eval.generate=false")


@pytest.mark.parametrize("chosen", [["eval=theirs"], ["+sweep=sly"]])
def test_a_scorer_in_a_file_is_refused(chosen, here, left_bench, monkeypatch):
    monkeypatch.setattr("left_bench.launch.job.run_cell", None)
    here("score.py", LENGTHS)
    here("conf/eval/theirs.yaml", "defaults: [default]\nname: theirs\nscorer: score.py:score\n")
    parameters = {"++eval.scorer": "score.py:score"}
    sweep = {"hydra": {"mode": "MULTIRUN", "sweeper": {"params": parameters}}}
    here("conf/sweep/sly.yaml", "# @package _global_\n" + yaml.safe_dump(sweep))
    answer = left_bench("--config-dir", "conf", *chosen, "model=tiny_llama", "hardware=cpu", "tracker=none")
    assert answer.code == 2, answer
    assert "eval.scorer=score.py:score is set in a file" in answer.err


# --- calling it ---


def test_scores_are_means_over_rows_beside_the_base_models(own_cell, here):
    here("score.py", LENGTHS)
    cell = own_cell("score.py:score")
    hints = [row.reference.split()[1] for row in rows_of(cell)]
    scores, by_row = called(cell, [hints[0], "nothing at all", hints[2], "no"], ["no"] * 4)
    assert by_row == {"scorer_shorter": [1, 0, 1, 1], "scorer_hint": [1, 0, 1, 0]}
    by_name = {score.metric: score for score in scores}
    assert (by_name["scorer_shorter"].value, by_name["scorer_shorter"].base_value) == (0.75, 1)
    assert by_name["scorer_hint"].stderr == pytest.approx(math.sqrt(0.25 / 4))
    assert (by_name["scorer_hint"].n, by_name["scorer_hint"].task) == (4, cell.data.name)


def test_a_plain_number_bears_the_functions_name(own_cell, here):
    here("score.py", "def helpful(prediction, reference, row):\n    return row['level'] >= 0")
    scores, _ = called(own_cell("score.py:helpful"), ["a"] * 4)
    assert [(score.metric, score.value, score.base_value) for score in scores] == [("scorer_helpful", 1.0, None)]


def test_neighbours_of_the_file_can_be_imported(own_cell, here):
    here("judges/left_bench_test_neighbour.py", "VALUE = 0.5")
    here("judges/score.py", "import left_bench_test_neighbour\ndef score(*_): return left_bench_test_neighbour.VALUE")
    scores, _ = called(own_cell("judges/score.py:score"), ["a"] * 4)
    assert scores[0].value == 0.5


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def score(p, r, row): return row['absent']", ["failed on row 1", "KeyError", "absent"]),
        ("import sys\ndef score(p, r, row): sys.exit(3)", ["failed on row 1", "SystemExit"]),
        ("import absent_package\ndef score(p, r, row): return 1", ["cannot be imported", "absent_package"]),
        ("def score(p, r, row): return 'good'", ["score='good' on row 1", "finite number"]),
        ("def score(p, r, row): return float('nan')", ["score=nan", "finite number"]),
        ("def score(p, r, row): return None", ["score=None"]),
        ("def score(p, r, row): return {}", ["scored nothing on row 1"]),
        ("def score(p, r, row): return {'a b': 1}", ["named a score 'a b'"]),
        ("def score(p, r, row): return {p: 1}", ["scored b on row 2 and a before"]),
        ("score = 5", ["score is not a function"]),
    ],
)
def test_a_fault_of_the_scorer_is_one_sentence(source, words, own_cell, here):
    here("score.py", source)
    with pytest.raises(scorer.ScorerFailed) as failed:
        called(own_cell("score.py:score"), ["a", "b", "c", "d"])
    message = str(failed.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_scorer_that_was_edited_since_is_not_called(own_cell, here):
    here("score.py", LENGTHS)
    cell = own_cell("score.py:score")
    here("score.py", LENGTHS.replace("<", ">"))
    with pytest.raises(scorer.ScorerFailed, match="changed since this cell was launched"):
        called(cell, ["a"] * 4)


def test_data_that_changed_since_are_not_scored(own_cell, here, tmp_path):
    here("score.py", LENGTHS)
    cell = own_cell("score.py:score")
    rows = rows_of(cell)
    (tmp_path / "rows.jsonl").write_text((tmp_path / "rows.jsonl").read_text().replace("answer", "reply", 1))
    with pytest.raises((scorer.ScorerFailed, UserError)):
        scorer.score_answers(cell, rows[::-1], ["a"] * 4, None, tell=lambda *_: None)


# --- in a run ---


def trained(work_in_process, own_cell, load_tiny, tmp_path, source, here):
    """What a run on a folder of weights finds: random ones made here are scored as a folder's are."""
    here("score.py", source)
    plain = own_cell("score.py:score")
    model, tokenizer = load_tiny(plain)
    model.save_pretrained(tmp_path / "weights")
    tokenizer.save_pretrained(tmp_path / "weights")
    options = ["model.name_or_path=weights", "training.steps=1", "training.batch_size=2", "eval.max_new_tokens=2"]
    return work_in_process(own_cell("score.py:score", *options, "eval.forgetting=false"))


def test_a_runs_record_and_rows_have_the_scores(work_in_process, own_cell, load_tiny, tmp_path, here):
    result = trained(work_in_process, own_cell, load_tiny, tmp_path, LENGTHS, here)
    assert {"scorer_shorter", "base_scorer_shorter", "scorer_hint"} <= result["metrics"].keys()
    assert {score.metric for score in result["scores"]} >= {"eval_loss", "exact_match", "scorer_shorter", "scorer_hint"}
    lines = [json.loads(line) for line in (result["run_dir"] / "rows.jsonl").read_text().splitlines()]
    assert [line["scores"].keys() for line in lines] == [{"scorer_shorter", "scorer_hint"}] * 4
    mean = sum(line["scores"]["scorer_shorter"] for line in lines) / 4
    assert result["metrics"]["scorer_shorter"] == mean
    kept = scored_rows([result["run_dir"] / "record.json"], "scorer_shorter")
    assert kept.values.mean() == mean
    assert "score" in [phase.name for phase in result["phases"]]


def test_a_crash_in_it_costs_the_score_and_not_the_cell(work_in_process, own_cell, load_tiny, tmp_path, here):
    source = "def score(prediction, reference, row):\n    return 1 / 0"
    result = trained(work_in_process, own_cell, load_tiny, tmp_path, source, here)
    assert not [name for name in result["metrics"] if "scorer" in name]
    assert {"exact_match", "adapter_file_bytes"} <= result["metrics"].keys()
    assert "ZeroDivisionError" in result["environment"]["effective"]["scorer"]
    events = [json.loads(line) for line in (result["run_dir"] / "events.jsonl").read_text().splitlines()]
    [note] = [event["text"] for event in events if event["event"] == "note"]
    assert "eval.scorer: no score, it failed on row 1: ZeroDivisionError" in note


# --- in reports ---


def record_of(value, *, cell_id="a", seed=0):
    config = {"seed": seed, "model": {"name": "m"}, "data": {"name": "d"}, "eval": {"scorer": "s.py:score"}}
    scores = [Score(task="d", metric="scorer_tone", value=value, stderr=0.01, n=4, base_value=0.1)]
    return Record(
        cell_id=cell_id,
        status="ok",
        started_at="2026-01-01",
        finished_at="2026-01-01",
        choices={"model": "m"},
        config=config,
        metrics={"scorer_tone": value, "base_scorer_tone": 0.1, "exact_match": 0.5, "eval_loss": 1.0},
        scores=scores,
    )


def test_a_higher_score_of_ones_own_is_better_everywhere(tmp_path):
    from left_bench.report.cells import row_of

    assert find_metric("scorer_tone").better == find_metric("base_scorer_tone").better == "higher"
    assert find_metric("scored_tone") is None
    rows = [row_of(record_of(0.2)), row_of(record_of(0.4))]
    assert qualities(rows)[0] == headline_quality(rows) == "scorer_tone"
    assert "scorer_tone" not in METRICS
    for name, value in (("before", 0.4), ("after", 0.2)):
        (tmp_path / name / "a").mkdir(parents=True)
        record_of(value).write(tmp_path / name / "a")
    [change] = [
        item for item in compare(tmp_path / "before", tmp_path / "after").changes if item.metric == "scorer_tone"
    ]
    assert (change.before, change.after, change.judgement) == (0.4, 0.2, "worse")
    assert parse_gate("scorer_tone<-0.02").hit(0.4, 0.2)


def test_a_report_shows_and_explains_it(tmp_path):
    from left_bench.report import write_report

    (tmp_path / "runs" / "a").mkdir(parents=True)
    record_of(0.4).write(tmp_path / "runs" / "a")
    markdown = write_report(tmp_path / "runs", name="cells", out=tmp_path / "reports")
    text = markdown.read_text()
    assert "tone (own scorer)" in text
    assert "`scorer_tone`" in text
    assert "eval.scorer makes of an answer" in text
    assert "tone (own scorer)" in markdown.with_suffix(".html").read_text()

"""Tasks of lm-evaluation-harness: named, checked, asked of the base model and of the adapted one. Offline."""

from __future__ import annotations

import json
import math
import textwrap

import pytest
import torch

from left_bench.core.errors import UserError
from left_bench.core.paths import is_installed
from left_bench.evaluation import harness
from left_bench.spec.record import Record, Score, find_metric

needs_harness = pytest.mark.skipif(not is_installed("lm_eval"), reason="the extra lm-eval is not installed")

CHOICES = """
task: left_bench_choices
dataset_path: json
dataset_kwargs:
  data_files: {test: questions.jsonl}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}\\n"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
ANSWERS = """
task: left_bench_answers
dataset_path: json
dataset_kwargs:
  data_files: {test: questions.jsonl}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}\\n"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 3, do_sample: false}
metric_list:
  - metric: !function judge.same
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with two tasks over six rows, and a folder of weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    rows = [{"question": f"{i} + 1 =", "choices": [str(i + 1), str(i + 5)], "label": i % 2} for i in range(6)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "choices.yaml").write_text(CHOICES)
    (tmp_path / "answers.yaml").write_text(ANSWERS)
    (tmp_path / "judge.py").write_text(
        "def same(references, predictions, **_):\n    return float(len(predictions[0]))\n"
    )
    return tmp_path


@pytest.fixture
def task_cell(compose_cell, here):
    def task_cell(tasks, *overrides):
        compose_cell.cache_clear()
        return compose_cell(
            *("model=tiny_llama", "precision=fp32", "hardware=cpu", "hardware.threads=1", "tracker=none"),
            *("training.steps=1", "training.batch_size=2", "data.train_rows=4", "data.test_rows=2"),
            *("eval.max_new_tokens=2", "eval.forgetting=false", f"eval.tasks=[{tasks}]", *overrides),
        )

    return task_cell


@pytest.fixture
def weights(here, task_cell, load_tiny):
    """Overrides that make a folder of it: what is random by name is not scored."""
    model, tokenizer = load_tiny(task_cell(""))
    model.save_pretrained(here / "weights")
    tokenizer.save_pretrained(here / "weights")
    return "model.name_or_path=weights"


# --- before anything runs ---


def test_without_the_package_it_says_what_to_install(task_cell, monkeypatch):
    monkeypatch.setattr(harness, "is_installed", lambda name: False)
    with pytest.raises(UserError, match=r"eval\.tasks=\[arc_easy\]: .*pip install 'left-bench\[lm-eval\]'"):
        task_cell("arc_easy")


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ("choice.yaml", ["no file choice.yaml", "did you mean 'choices.yaml'?"]),
        ("arc_easy,arc_easy", ["'arc_easy' is listed twice"]),
        ("broken.yaml", ["broken.yaml, line 2 is not valid YAML"]),
        ("empty.yaml", ["empty.yaml defines no task"]),
    ],
)
def test_what_is_no_task_is_refused(tasks, words, task_cell, here, monkeypatch):
    monkeypatch.setattr(harness, "is_installed", lambda name: True)
    monkeypatch.setattr(harness, "_check_name", lambda task: None)
    (here / "broken.yaml").write_text("task: a\n  b: [\n")
    (here / "empty.yaml").write_text("dataset_path: json\n")
    with pytest.raises(UserError, match=r"^eval\.tasks") as refused:
        task_cell(tasks)
    assert all(word in str(refused.value) for word in words), refused.value


@needs_harness
def test_a_mistyped_name_is_refused_with_the_nearest(task_cell):
    with pytest.raises(UserError, match=r"eval\.tasks: lm-evaluation-harness has no task 'arc_esay'; .*'arc_easy'"):
        task_cell("gsm8k,arc_esay")


@needs_harness
@pytest.mark.parametrize("name", ["gsm8k", "arc_easy", "mmlu", "mmlu_anatomy", "ai2_arc", "afrixnli", "acp_bench"])
def test_tasks_groups_and_tags_of_the_harness_are_known(name, task_cell):
    assert task_cell(name).eval.tasks == [name]


@needs_harness
@pytest.mark.parametrize(
    ("name", "folder"), [("gsm8k", "gsm8k"), ("arc_easy", "arc"), ("mmlu", None), ("math_word_problems", None)]
)
def test_a_task_alone_is_found_without_the_whole_index(name, folder):
    """A group's or a tag's members may lie in several folders, and a part of them would be scored in silence."""
    result = harness._folder_of(name)
    assert (result and result.name) == folder


def test_pictures_are_not_asked(compose_cell):
    options = ["model=tiny_vit", "data=digits", "hardware=cpu", "precision=fp32", "eval.tasks=[arc_easy]"]
    with pytest.raises(UserError, match="not a classifier"):
        compose_cell(*options)


def test_a_task_file_is_known_by_all_that_it_names(task_cell, here, monkeypatch):
    monkeypatch.setattr(harness, "is_installed", lambda name: True)
    before = task_cell("answers.yaml")
    for name in ("answers.yaml", "questions.jsonl", "judge.py"):
        text = (here / name).read_text()
        (here / name).write_text(text + "\n")
        assert task_cell("answers.yaml").id != before.id, name
        (here / name).write_text(text)
    (here / "moved").mkdir()
    for name in ("answers.yaml", "judge.py", "questions.jsonl"):
        (here / "moved" / name).write_text((here / name).read_text())
    assert task_cell("moved/answers.yaml").id == before.id
    assert task_cell("").id != before.id


def test_a_task_file_in_a_file_of_options_is_refused(here, left_bench, monkeypatch):
    monkeypatch.setattr("left_bench.launch.job.run_cell", None)
    (here / "conf" / "eval").mkdir(parents=True)
    (here / "conf" / "eval" / "theirs.yaml").write_text("defaults: [default]\nname: theirs\ntasks: [choices.yaml]\n")
    answer = left_bench("--config-dir", "conf", "eval=theirs", "model=tiny_llama", "hardware=cpu", "tracker=none")
    assert answer.code == 2, answer
    assert "eval.tasks=[choices.yaml] is set in a file" in answer.err


# --- asked ---


@needs_harness
def test_a_choice_is_the_likelier_continuation(task_cell, load_tiny, weights):
    """Each question by hand: the summed log-probability of both choices after the question."""
    cell = task_cell("choices.yaml", weights)
    model, tokenizer = load_tiny(cell)
    tasks = harness.load_tasks(cell)
    told = []
    [score] = harness.ask(
        tasks, model, tokenizer, cell, device="cpu", room=None, tell=lambda *event: told.append(event)
    )
    right = []
    for i in range(6):
        question = tokenizer(f"{i} + 1 =\n", add_special_tokens=False)["input_ids"]
        likely = []
        for choice in (str(i + 1), str(i + 5)):
            answer = tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
            ids = tokenizer(f"{i} + 1 =\n {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                steps = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
            places = range(len(question) - 1, len(ids) - 1)
            likely.append(sum(steps[place, ids[place + 1]].item() for place in places))
            assert len(answer) == len(ids) - len(question)
        right.append(float((likely[0] >= likely[1]) == (i % 2 == 0)))
    mean = sum(right) / 6
    assert (score.task, score.metric, score.n) == ("left_bench_choices", "lm_eval_left_bench_choices_acc", 6)
    assert score.value == pytest.approx(mean)
    assert score.stderr == pytest.approx(math.sqrt(sum((item - mean) ** 2 for item in right) / 5 / 6))
    assert told[-1][0] == "tasks" and told[0][1] == 0


@needs_harness
def test_a_runs_record_has_base_beside_adapted_and_the_next_cell_shares_the_base(
    task_cell, weights, here, work_in_process, monkeypatch
):
    asked = []
    ask = harness.ask
    monkeypatch.setattr(harness, "ask", lambda *given, **named: asked.append(1) or ask(*given, **named))
    cell = task_cell("choices.yaml,answers.yaml", weights, "eval.task_rows=4")
    result = work_in_process(cell)
    by_name = {score.metric: score for score in result["scores"]}
    choices, answers = by_name["lm_eval_left_bench_choices_acc"], by_name["lm_eval_left_bench_answers_same"]
    assert (choices.n, answers.n) == (4, 4)
    assert 0 <= choices.base_value <= 1
    assert 0 <= answers.value <= 3
    assert result["metrics"]["base_lm_eval_left_bench_choices_acc"] == choices.base_value
    assert result["environment"]["versions"]["lm-eval"]
    assert len(asked) == 2
    [kept] = [path for path in (result["run_dir"].parent / "base").glob("*.json") if not path.name.startswith("peak")]
    assert [score["metric"] for score in json.loads(kept.read_text())["tasks"]] == [choices.metric, answers.metric]


@needs_harness
def test_virtual_tokens_and_merged_heads_are_asked_as_they_are(task_cell, weights, work_in_process):
    result = work_in_process(task_cell("choices.yaml", weights, "peft=prompt_tuning"))
    assert {"lm_eval_left_bench_choices_acc", "base_lm_eval_left_bench_choices_acc"} <= result["metrics"].keys()


@needs_harness
def test_asking_changes_no_random_number_and_no_weight(task_cell, weights, load_tiny):
    cell = task_cell("choices.yaml", weights, "eval.task_rows=2")
    model, tokenizer = load_tiny(cell)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    side = tokenizer.padding_side
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    harness.ask(harness.load_tasks(cell), model, tokenizer, cell, device="cpu", room=None, tell=lambda *_: None)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert tokenizer.padding_side == side
    assert "tie_weights" not in vars(model)


@needs_harness
def test_a_task_whose_rows_are_missing_ends_the_cell_before_the_model_is_loaded(
    task_cell, weights, here, work_in_process, monkeypatch
):
    cell = task_cell("choices.yaml", weights)
    (here / "questions.jsonl").unlink()
    monkeypatch.setattr("left_bench.model.quantized_cache.load_base", None)
    with pytest.raises(UserError, match=r"eval\.tasks=\[choices\.yaml\]: cannot be loaded"):
        work_in_process(cell)


@needs_harness
def test_a_task_that_fails_after_training_costs_its_scores_alone(
    task_cell, weights, here, work_in_process, monkeypatch
):
    asked = []
    ask = harness.ask

    def second_fails(*given, **named):
        asked.append(1)
        if len(asked) == 2:
            raise ZeroDivisionError("nothing to divide")
        return ask(*given, **named)

    monkeypatch.setattr(harness, "ask", second_fails)
    result = work_in_process(task_cell("choices.yaml", weights))
    assert not [name for name in result["metrics"] if "lm_eval" in name]
    assert {"exact_match", "adapter_file_bytes"} <= result["metrics"].keys()
    assert result["environment"]["effective"]["tasks"] == "failed: ZeroDivisionError: nothing to divide"


def test_random_weights_are_not_asked(task_cell, monkeypatch):
    monkeypatch.setattr(harness, "is_installed", lambda name: True)
    assert harness.load_tasks(task_cell("choices.yaml")) is None
    assert harness.load_tasks(task_cell("")) is None


@needs_harness
@pytest.mark.slow
def test_a_group_of_ones_own_is_asked_and_has_one_score(task_cell, here, weights, load_tiny):
    group = "group: mine\ntask: [left_bench_choices]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    (here / "group.yaml").write_text(group)
    cell = task_cell("group.yaml", weights)
    model, tokenizer = load_tiny(cell)
    tasks = harness.load_tasks(cell)
    [score] = harness.ask(tasks, model, tokenizer, cell, device="cpu", room=None, tell=lambda *_: None)
    assert (score.task, score.metric, score.n) == ("mine", "lm_eval_mine_acc", 6)


# --- read ---


def test_a_groups_score_stands_for_its_members():
    class Group:
        def get_all_tasks(self):
            return [type("Task", (), {"task_name": name}) for name in ("m_a", "m_b")]

    results = {
        "results": {
            "m_a": {"alias": "a", "acc,none": 0.1, "acc_stderr,none": 0.2},
            "m_b": {"acc,none": 0.3, "acc_stderr,none": 0.2},
            "alone": {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": "N/A"},
        },
        "groups": {"m": {"alias": "m", "acc,none": 0.2, "acc_stderr,none": 0.1}},
        "n-samples": {name: {"original": 9, "effective": 3} for name in ("m_a", "m_b", "alone")},
    }
    tasks = {
        "tasks": dict.fromkeys(("m_a", "m_b", "alone")),
        "groups": {"m": Group()},
        "group_map": {"m": ["m_a", "m_b"]},
    }
    assert list(harness._scores(results, tasks)) == [
        Score(task="m", metric="lm_eval_m_acc", value=0.2, stderr=0.1, n=6),
        Score(task="alone", metric="lm_eval_alone_exact_match_strict_match", value=0.5, n=3),
    ]


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("lm_eval_arc_easy_acc_norm", "higher"),
        ("base_lm_eval_gsm8k_exact_match_strict_match", "higher"),
        ("lm_eval_wikitext_word_perplexity", "lower"),
        ("lm_eval_lambada_openai_perplexity", "lower"),
        ("lm_eval_wikitext_bits_per_byte", "lower"),
        ("lm_eval_wmt14_en_fr_ter", "lower"),
        ("lm_eval_interpretation_acc", "higher"),
    ],
)
def test_the_better_direction_of_a_tasks_metric(name, better):
    assert find_metric(name).better == better
    assert find_metric(name).kind == "quality"


def test_a_report_shows_tasks_after_the_held_out_rows_scores():
    from left_bench.report.cells import row_of
    from left_bench.report.headings import heading
    from left_bench.report.ranking import headline_quality, qualities

    scores = [Score(task="arc_easy", metric="lm_eval_arc_easy_acc", value=0.5, stderr=0.1, n=9, base_value=0.4)]
    record = Record(
        cell_id="a",
        status="ok",
        started_at="s",
        finished_at="f",
        choices={},
        config={},
        metrics={"lm_eval_arc_easy_acc": 0.5, "eval_loss": 1.0},
        scores=scores,
    )
    names = qualities([row_of(record)])
    assert names.index("exact_match") < names.index("lm_eval_arc_easy_acc") < names.index("eval_loss")
    assert headline_quality([row_of(record)]) == "lm_eval_arc_easy_acc"
    assert heading("lm_eval_arc_easy_acc") == "arc easy acc (lm-eval)"


def test_the_files_a_task_names_are_found(here):
    (here / "more.yaml").write_text(
        textwrap.dedent("""
        include: choices.yaml
        task: more
        doc_to_text: !function judge.same
    """)
    )
    read = {}
    harness._read(here / "more.yaml", read)
    assert {path.name for path in read} == {"more.yaml", "choices.yaml", "judge.py", "questions.jsonl"}

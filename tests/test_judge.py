"""A language model as judge, a stub server on this machine standing for it."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from left_bench.core.errors import UserError
from left_bench.data import Example
from left_bench.evaluation import judge
from left_bench.spec.record import METRICS

KEY = "sk-left-bench-test-0123456789"


@pytest.fixture
def served(monkeypatch):
    """`served(reply)`: the address of a server that answers each request by `reply(prompt, headers)`, and what it saw.

    A number is sent as a status.
    """
    monkeypatch.setattr(judge, "_PAUSE_SECONDS", 0.001)
    servers: list[ThreadingHTTPServer] = []

    def served(reply):
        seen: list[dict[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                seen.append({"path": self.path, "body": body, "key": self.headers["Authorization"]})
                answer = reply(body["messages"][0]["content"])
                status, text = answer if isinstance(answer, tuple) else (200, answer)
                if status == 200 and not text.startswith("{"):
                    text = json.dumps({"choices": [{"message": {"content": text}}]})
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", text)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/v1", seen

    yield served
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def judged_cell(compose_cell):
    def judged_cell(address, *overrides):
        return compose_cell(
            *("model=smollm2_135m", "precision=fp32", "hardware=cpu", "tracker=none"),
            *(f"eval.judge={address}", "eval.judge_model=stub", *overrides),
        )

    return judged_cell


def rows(number):
    return [
        Example(prompt_ids=[1], answer_ids=[2], prompt=f"question {i}", reference=f"right {i}") for i in range(number)
    ]


def asked(cell, answers, base):
    return judge.judge_answers(cell, rows(len(answers)), answers, base, tell=lambda *_: None)


def shown(prompt):
    """Answers A and B of a prompt."""
    a = prompt.partition("[Answer A]\n")[2].partition("\n[End of answer A]")[0]
    return a, prompt.partition("[Answer B]\n")[2].partition("\n[End of answer B]")[0]


# --- verdicts ---


def test_each_pair_is_shown_in_both_orders(served, judged_cell):
    def prefers_good(prompt):
        return "So: [[A]]" if shown(prompt)[0] == "good" else "So: [[B]]"

    address, seen = served(prefers_good)
    [score], facts = asked(judged_cell(address), ["good", "bad"], ["bad", "good"])
    assert (score.metric, score.value, score.n) == ("judge_win_rate", 0.5, 2)
    assert facts == {"judged_rows": 2, "judge_agreement": 1.0}
    assert sorted(shown(item["body"]["messages"][0]["content"]) for item in seen) == sorted(
        [("good", "bad"), ("bad", "good")] * 2
    )
    assert {item["path"] for item in seen} == {"/v1/chat/completions"}
    assert {item["body"]["model"] for item in seen} == {"stub"}
    assert all("right" in item["body"]["messages"][0]["content"] for item in seen)


def test_a_judge_that_leans_to_a_place_agrees_with_nobody(served, judged_cell):
    address, _ = served(lambda prompt: "[[A]] or rather [[A]]")
    [score], facts = asked(judged_cell(address), ["x", "y", "z"], ["a", "b", "c"])
    assert (score.value, score.stderr) == (0.5, 0.0)
    assert facts == {"judged_rows": 3, "judge_agreement": 0.0}


def test_a_win_in_one_order_and_a_tie_in_the_other_is_three_quarters(served, judged_cell):
    address, _ = served(lambda prompt: "[[A]]" if shown(prompt)[0] == "new" else "[[c]]")
    [score], facts = asked(judged_cell(address), ["new"], ["old"])
    assert score.value == 0.75
    assert facts["judge_agreement"] == 0


def test_equal_answers_are_a_tie_and_are_not_sent(served, judged_cell):
    address, seen = served(lambda prompt: "[[B]]")
    [score], facts = asked(judged_cell(address), ["same", "same"], ["same", "same"])
    assert (score.value, facts, seen) == (0.5, {"judged_rows": 2}, [])


def test_rows_without_a_verdict_do_not_count(served, judged_cell):
    address, _ = served(lambda prompt: "[[A]]" if shown(prompt)[0] == "new" else "[[B]]" if "new" in prompt else "hm")
    [score], facts = asked(judged_cell(address), ["new", "odd"], ["old", "even"])
    assert (score.value, score.n, facts["judged_rows"]) == (1.0, 1, 1)


def test_no_more_rows_are_sent_than_asked_for(served, judged_cell):
    address, seen = served(lambda prompt: "[[A]]")
    [score], _ = asked(judged_cell(address, "eval.judge_rows=2"), list("abcd"), list("wxyz"))
    assert (score.n, len(seen)) == (2, 4)


# --- faults ---


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ("no verdict here", ["stub ended none of its replies with [[A]]"]),
        ('{"choices": []}', ["no chat completion"]),
        ((401, "who are you?"), ["answered 401: who are you?"]),
        ((503, "busy"), ["answered 503: busy"]),
    ],
)
def test_a_fault_is_one_sentence(reply, words, served, judged_cell):
    address, seen = served(lambda prompt: reply)
    with pytest.raises(judge.JudgeFailed) as failed:
        asked(judged_cell(address), ["a"], ["b"])
    message = str(failed.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    if reply == (503, "busy"):
        assert len(seen) >= judge._ATTEMPTS


def test_a_busy_server_is_asked_again(served, judged_cell):
    calls = []

    def busy_at_first(prompt):
        calls.append(prompt)
        return (429, "slow down") if len(calls) <= 2 else "[[C]]"

    address, _ = served(busy_at_first)
    assert asked(judged_cell(address), ["a"], ["b"])[0][0].value == 0.5


def test_a_server_that_is_not_there_is_named(judged_cell, monkeypatch):
    monkeypatch.setattr(judge, "_PAUSE_SECONDS", 0.001)
    with pytest.raises(judge.JudgeFailed, match=r"127\.0\.0\.1:9/v1/chat/completions cannot be reached"):
        asked(judged_cell("http://127.0.0.1:9/v1"), ["a"], ["b"])


# --- the key ---


def test_the_key_comes_from_the_environment_and_stands_nowhere(served, judged_cell, compose_cell, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    address, seen = served(lambda prompt: (400, f"bad request with {KEY}"))
    compose_cell.cache_clear()
    cell = judged_cell(address, "eval.judge_key_from=JUDGE_API_KEY")
    with pytest.raises(judge.JudgeFailed) as failed:
        asked(cell, ["a"], ["b"])
    assert seen[0]["key"] == f"Bearer {KEY}"
    assert KEY not in str(failed.value)
    assert KEY not in cell.model_dump_json()
    assert cell.id == judged_cell(address).id
    assert asked_without_key(judged_cell(address), seen) is None


def asked_without_key(cell, seen):
    with pytest.raises(judge.JudgeFailed):
        asked(cell, ["a"], ["b"])
    return seen[-1]["key"]


def test_a_redirect_is_not_followed(served, judged_cell, compose_cell, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    thief, stolen = served(lambda prompt: "[[A]]")
    address, _ = served(lambda prompt: (302, thief))
    compose_cell.cache_clear()
    with pytest.raises(judge.JudgeFailed, match="answered 302"):
        asked(judged_cell(address, "eval.judge_key_from=JUDGE_API_KEY"), ["a"], ["b"])
    assert stolen == []


# --- before anything runs ---


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["eval.judge=127.0.0.1/v1"], ["is not an address"]),
        (["eval.judge=ftp://host/v1"], ["is not an address"]),
        (["eval.judge=http://127.0.0.1:1/v1", "eval.judge_model=null"], ["eval.judge_model=NAME"]),
        (["eval.judge=http://127.0.0.1:1/v1", "eval.generate=false"], ["generates none"]),
        (["eval.judge=http://127.0.0.1:1/v1", "model=tiny_llama"], ["model.weights=random"]),
        (["eval.judge=https://judge.example/v1", "eval.judge_key_from=NO_SUCH_KEY"], ["no such environment variable"]),
        (["eval.judge=https://judge.example/v1", "eval.judge_key_from=sk-123"], ["not the key"]),
        (["eval.judge=http://judge.example/v1", "eval.judge_key_from=JUDGE_API_KEY"], ["unencrypted", "https"]),
    ],
)
def test_what_cannot_be_judged_is_refused(overrides, words, compose_cell, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    named = {override.partition("=")[0] for override in overrides}
    plain = ["model=smollm2_135m", "hardware=cpu", "precision=fp32", "eval.judge_model=stub"]
    with pytest.raises(UserError, match=r"^eval\.judge") as refused:
        compose_cell(*(item for item in plain if item.partition("=")[0] not in named), *overrides)
    assert all(word in str(refused.value) for word in words), refused.value


def test_a_judge_in_a_file_is_refused(tmp_path, left_bench, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("left_bench.launch.job.run_cell", None)
    (tmp_path / "conf" / "eval").mkdir(parents=True)
    for name, line in (("a", "judge: https://thief.example/v1"), ("b", "judge_key_from: HF_TOKEN")):
        (tmp_path / "conf" / "eval" / f"{name}.yaml").write_text(f"defaults: [default]\nname: {name}\n{line}\n")
        answer = left_bench("--config-dir", "conf", f"eval={name}", "model=tiny_llama", "hardware=cpu", "tracker=none")
        assert answer.code == 2, answer
        assert "is set in a file" in answer.err


def test_what_leaves_is_said_before_it_does(judged_cell, compose_cell, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    compose_cell.cache_clear()
    here = judge.what_leaves(judged_cell("http://127.0.0.1:8000/v1", "eval.rows=5"))
    assert "up to 5 held-out rows of each cell to http://127.0.0.1:8000/v1 (a server on this machine)" in here
    there = judge.what_leaves(judged_cell("https://judge.example/v1", "eval.judge_key_from=JUDGE_API_KEY"))
    assert "(another machine, with the key in JUDGE_API_KEY)" in there
    assert "question, reference, the base model's answer and the adapted model's" in there
    assert judge.what_leaves(compose_cell("model=tiny_llama", "hardware=cpu", "precision=fp32")) is None


@pytest.mark.parametrize("sweep", [[], ["-m", "peft=lora,ia3"]], ids=["one cell", "a sweep"])
def test_a_launch_says_it_first(sweep, left_bench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = []

    def run_cell(cell, settings, **_):
        said.append(cell.eval.judge)
        raise UserError("stopped here")

    monkeypatch.setattr("left_bench.launch.job.run_cell", run_cell)
    monkeypatch.setattr("left_bench.launch.launching.check_cell", lambda cell: None)
    options = ["model=smollm2_135m", "hardware=cpu", "precision=fp32", "tracker=none", "eval.judge_model=stub"]
    answer = left_bench(*sweep, *options, "eval.judge=http://127.0.0.1:1/v1")
    assert said == ["http://127.0.0.1:1/v1"]
    assert answer.err.count("note: eval.judge sends up to 64 held-out rows") == 1
    assert answer.err.index("note: eval.judge sends") < answer.err.index("stopped here")


# --- in a run ---


def test_a_run_is_judged_and_a_server_that_fails_costs_no_cell(
    served, compose_cell, load_tiny, work_in_process, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    plain = ["model=tiny_llama", "precision=fp32", "hardware=cpu", "hardware.threads=1", "tracker=none"]
    plain += ["training.steps=2", "training.batch_size=4", "data.train_rows=8", "data.test_rows=4", "peft=full"]
    plain += [
        "eval.max_new_tokens=3",
        "eval.forgetting=false",
        "training.learning_rate=0.05",
        "training.warmup_ratio=0",
    ]
    model, tokenizer = load_tiny(compose_cell(*plain))
    model.save_pretrained(tmp_path / "weights")
    tokenizer.save_pretrained(tmp_path / "weights")
    options = [*plain, "model.name_or_path=weights", "eval.judge_model=stub"]

    address, seen = served(lambda prompt: "[[C]]")
    result = work_in_process(compose_cell(*options, f"eval.judge={address}"))
    assert seen
    assert (result["metrics"]["judge_win_rate"], result["metrics"]["judge_agreement"]) == (0.5, 1.0)
    assert "judge" in [phase.name for phase in result["phases"]]

    address, _ = served(lambda prompt: (400, "no"))
    result = work_in_process(compose_cell(*options, f"eval.judge={address}"))
    assert "judge_win_rate" not in result["metrics"]
    assert "answered 400" in result["environment"]["effective"]["judge"]
    assert "exact_match" in result["metrics"]


def test_the_metrics_say_what_they_are():
    assert METRICS["judge_win_rate"].better == "higher"
    assert METRICS["judge_agreement"].kind == "fact"

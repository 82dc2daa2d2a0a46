"""Secrets are refused in a configuration and cut out of what a cell printed."""

from __future__ import annotations

import json

import pytest

from left_bench.core.errors import UserError
from left_bench.spec.record import Record
from left_bench.spec.redact import redact_file, redacted, redacted_record, refuse_secrets, secret_values

TOKEN = "hf_secretsecretsecretsecret"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        (f"data.config.token={TOKEN}", "data.config.token"),
        (f"data.template='{{prompt}} {TOKEN}'", "data.template"),
        (f"tracker.wandb.entity={TOKEN}", "tracker.wandb.entity"),
        ("+data.config.token=another", "data.config.token"),
        ("tracker.mlflow.tracking_uri=https://me:pass@example.org", "tracker.mlflow.tracking_uri"),
    ],
)
def test_a_secret_in_an_override_is_refused_and_never_written(override, key, left_bench, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("left_bench.launch.job.run_cell", None)
    monkeypatch.chdir(tmp_path)
    answer = left_bench("model=tiny_llama", "tracker=[wandb,jsonl]", override)
    assert answer.code == 2, answer
    assert key in answer.err
    assert "recorded" in answer.err
    for value in (TOKEN, "another", "pass@"):
        assert value not in answer.out + answer.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_words_like_tokens_are_no_secret(composed):
    from left_bench.grid.compose import compose

    config = composed("peft=prompt_tuning", "peft.config.num_virtual_tokens=8", "eval.max_new_tokens=4", "tracker=none")
    assert compose(config, config.hydra)[0].eval.max_new_tokens == 4


def test_only_variables_named_like_secrets():
    environment = {
        "HF_TOKEN": TOKEN,
        "TOKENIZERS_PARALLELISM": "false-false",
        "WANDB_API_KEY": "x",
        "KEYBOARD": "k" * 9,
    }
    assert secret_values(environment) == {TOKEN: "HF_TOKEN"}


def test_what_a_library_printed_is_cut_out(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    record = Record(
        cell_id="x-1",
        status="failed",
        reason=f"401 for {TOKEN}",
        started_at="a",
        finished_at="b",
        choices={},
        config={},
        provenance={"log_tail": f"GET https://me:{TOKEN}@example.org"},
    )
    safe = redacted_record(record)
    assert TOKEN not in safe.model_dump_json()
    assert safe.reason == "401 for [HF_TOKEN]"
    log = tmp_path / "worker.log"
    log.write_bytes(b"\xff " + TOKEN.encode())
    redact_file(log)
    assert log.read_bytes() == b"\xff [HF_TOKEN]"
    assert redacted("nothing here") == "nothing here"


@pytest.mark.parametrize("secret", ['p"ss\\word99', "-----BEGIN KEY-----\nabcdefgh\n-----END", "schlüssel\tgeheim"])
def test_a_secret_is_found_as_json_writes_it(secret, monkeypatch):
    monkeypatch.setenv("DB_PASSWORD", secret)
    times = {"started_at": "a", "finished_at": "b"}
    record = Record(cell_id="x-1", status="failed", reason=f"with {secret}", choices={}, config={}, **times)
    assert redacted_record(record).reason == "with [DB_PASSWORD]"
    with pytest.raises(UserError, match="DB_PASSWORD"):
        refuse_secrets(overrides=[], config=json.dumps({"data": {"template": secret}}))

from __future__ import annotations

import json
import os
import stat
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from left_bench.core.files import write_atomically
from left_bench.spec.record import METRICS, RECORD_NAME, STATUSES, Phase, Record, Sample, Score, read_record

NAMES = st.text(string.ascii_lowercase + "_", min_size=1, max_size=12)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
COUNTS = st.integers(0, 2**62)
RECORDS = st.builds(
    Record,
    cell_id=NAMES,
    status=st.sampled_from(STATUSES),
    reason=st.none() | TEXTS,
    attempt=st.integers(1, 99),
    started_at=TEXTS,
    finished_at=TEXTS,
    choices=st.dictionaries(NAMES, TEXTS, max_size=3),
    config=st.dictionaries(NAMES, NUMBERS | TEXTS | st.booleans() | st.lists(COUNTS, max_size=2), max_size=3),
    metrics=st.dictionaries(NAMES, NUMBERS, max_size=3),
    phases=st.lists(
        st.builds(
            Phase,
            name=NAMES,
            seconds=NUMBERS,
            steps=st.none() | COUNTS,
            tokens=st.none() | COUNTS,
            peak_memory_bytes=st.none() | COUNTS,
            peak_reserved_bytes=st.none() | COUNTS,
        ),
        max_size=2,
    ),
    memory_breakdown=st.dictionaries(NAMES, COUNTS, max_size=2),
    scores=st.lists(
        st.builds(
            Score, task=NAMES, metric=NAMES, value=NUMBERS, stderr=st.none() | NUMBERS, n=COUNTS, base_value=st.none()
        ),
        max_size=2,
    ),
    samples=st.lists(st.builds(Sample, prompt=TEXTS, reference=TEXTS, prediction=TEXTS), max_size=2),
    environment=st.dictionaries(NAMES, TEXTS, max_size=2),
    provenance=st.dictionaries(NAMES, TEXTS, max_size=2),
)


def small(**changes: object) -> Record:
    return Record.model_validate(
        {"cell_id": "x", "status": "ok", "started_at": "a", "finished_at": "b", "choices": {}, "config": {}} | changes
    )


@given(record=RECORDS)
def test_a_record_survives_the_disk(record, tmp_path_factory):
    folder = tmp_path_factory.mktemp("record")
    assert read_record(record.write(folder)) == record
    assert [path.name for path in folder.iterdir()] == [RECORD_NAME]


@given(first=RECORDS, second=RECORDS)
def test_records_that_share_their_parts_are_the_same_records(first, second, tmp_path_factory):
    known = {}
    folder = tmp_path_factory.mktemp("record")
    for record in (first, second, first):
        assert read_record(record.write(folder), known=known) == record


def test_equal_parts_are_one_object(tmp_path):
    sections = {"model": {"name": "tiny", "layers": 1}, "seed": 0}
    known = {}
    read = [
        read_record(small(config=config, environment={"versions": {"torch": "2"}}).write(tmp_path), known=known)
        for config in (sections, sections | {"seed": 1}, sections | {"model": {"name": "tiny", "layers": 1.0}})
    ]
    assert read[0].config["model"] is read[1].config["model"]
    assert read[0].environment["versions"] is read[2].environment["versions"]
    assert type(read[2].config["model"]["layers"]) is float
    assert [record.config["seed"] for record in read] == [0, 1, 0]


def test_what_was_not_measured_is_absent(tmp_path):
    small().write(tmp_path)
    plain = json.loads((tmp_path / RECORD_NAME).read_text())
    assert "reason" not in plain
    assert None not in plain.values()
    assert plain["metrics"] == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "unreadable"),
        ('{"schema_version": 1, "cell', "unreadable"),
        ("[1, 2]", "schema version None"),
        ('{"cell_id": "x"}', "schema version None"),
        ('{"schema_version": 99}', "schema version 99, this left_bench reads 1"),
        ('{"schema_version": 1}', "cell_id: Field required"),
        (small().model_dump_json().replace('"ok"', '"done"'), "status: "),
        (small(metrics={"a": 1}).model_dump_json().replace("1.0", '"much"'), "metrics.a: "),
        (small().model_dump_json()[:-1] + ', "extra": 1}', "extra: "),
    ],
)
def test_what_is_no_record_is_said_in_one_line(text, words, tmp_path):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r".") as refused:
        read_record(path)
    message = str(refused.value)
    assert message.startswith(str(path))
    assert words in message
    assert "\n" not in message


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "record.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="unreadable"):
        read_record(tmp_path / "record.json")
    with pytest.raises(ValueError, match="unreadable"):
        read_record(tmp_path / "nowhere.json")


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(failing, tmp_path, monkeypatch):
    path = write_atomically(tmp_path / "deep" / "x.json", "old")

    def fail(*_: object) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_text_that_cannot_be_encoded_leaves_the_old_file(tmp_path):
    path = write_atomically(tmp_path / "x.json", "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_has_the_users_own_mask(tmp_path):
    before = os.umask(0o027)
    try:
        path = write_atomically(tmp_path / "x", "y")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_metrics_say_their_unit():
    for name, metric in METRICS.items():
        assert metric.meaning, name
        for ending in ("_bytes", "_seconds", "_per_second", "_params", "_joules", "_watts"):
            if name.endswith(ending):
                assert ending.strip("_") in metric.unit or metric.unit.endswith("/s"), name
    assert {"base_eval_loss"}.isdisjoint(METRICS)

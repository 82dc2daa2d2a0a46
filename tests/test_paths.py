"""Folders known by what is in them."""

from __future__ import annotations

import shutil

import pytest

from left_bench.core.paths import contents_of


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LEFT_BENCH_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "one"
    (folder / "in").mkdir(parents=True)
    (folder / "a").write_text("1")
    (folder / "in" / "b").write_text("2")
    return folder


def found(folder) -> str:
    return contents_of((path for path in folder.rglob("*") if path.is_file()), root=folder)


def test_names_and_bytes_decide_and_the_place_does_not(folder, tmp_path):
    first = found(folder)
    shutil.copytree(folder, tmp_path / "two")
    assert found(tmp_path / "two") == first
    (tmp_path / "two" / "a").rename(tmp_path / "two" / "c")
    assert found(tmp_path / "two") != first
    (folder / "in" / "b").write_text("3")
    assert found(folder) != first


def test_a_file_is_read_once(folder, monkeypatch):
    first = found(folder)
    monkeypatch.setattr("left_bench.core.paths.file_sha256", None)
    assert found(folder) == first
    monkeypatch.undo()


@pytest.mark.parametrize("text", ["", "[1", "[1]", "3"])
def test_a_damaged_note_costs_reading_again(text, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LEFT_BENCH_CACHE", str(tmp_path / "cache"))
    first = found(folder)
    (tmp_path / "cache" / "hashes.json").write_text(text)
    assert found(folder) == first


def test_a_cache_that_cannot_be_written_is_done_without(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LEFT_BENCH_CACHE", str(tmp_path / "file" / "cache"))
    assert found(folder) == found(folder)
    assert (tmp_path / "file").read_text() == ""

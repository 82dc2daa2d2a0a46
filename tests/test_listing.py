"""`left-bench list`: every option in one line, with a verdict."""

from __future__ import annotations

import pytest

from left_bench import cli
from left_bench.cell import GROUPS
from left_bench.errors import UserError
from left_bench.listing import main


def test_every_option_of_every_group_is_one_line(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for group in ("sweep", *GROUPS, "tracker"):
        start = lines.index(group)
        for option in cli.options(group):
            (line,) = [line for line in lines[start + 1 :][: len(cli.options(group))] if line.split()[0] == option]
            assert len(line.split()) > 3, f"{group}={option} says nothing of itself"


def test_what_this_machine_cannot_run_says_why(capsys, monkeypatch):
    monkeypatch.setattr("left_bench.launch.find_device", lambda asked: "cpu")
    main(["precision"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert "not here" in lines["tf32"] and "CUDA" in lines["tf32"]
    assert "runs here" in lines["bf16"]


def test_a_group_that_is_none():
    with pytest.raises(UserError, match="unknown group 'pft'"):
        main(["pft"])

"""A small soak; `benchmarks/soak.py` runs the large one and writes reports/soak.md."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks and kills")


def test_twenty_launches_killed_at_random(tmp_path):
    # in a process of its own: the launches are forks, and this one has torch's threads in it

    out = tmp_path / "soak.md"
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--cells", "40", "--launches", "20"]
    done = subprocess.run(
        [*command, "--kills", "40", "--seed", "1", "--out", str(out)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = read(out)
    assert figures["cells"] == 40
    assert figures["kills"] >= 10  # it ends when all are done, however few
    assert figures["attempts begun"] > 40


@pytest.mark.parametrize(
    ("broken", "noticed"), [("claims", "cells doubled"), ("writes", "records torn"), ("records", "cells lost")]
)
def test_a_broken_promise_is_noticed(broken, noticed, tmp_path):
    """A soak that counts nothing may be blind: without claims, whole writes or records it has to count."""
    out = tmp_path / "soak.md"
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--break", broken, "--out", str(out)]
    done = subprocess.run(
        [*command, "--cells", "4", "--launches", "3", "--kills", "0"], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert read(out)[noticed] > 0, done.stdout


@pytest.mark.parametrize("path", [ROOT / "reports" / "soak.md"])
def test_the_page_says_what_it_must(path):
    figures = read(path)
    assert figures["cells"] >= 200
    assert figures["kills"] >= 100
    for name in ("cells lost", "cells doubled", "records torn", "workers that outlived their launch"):
        assert figures[name] == 0


def read(path: Path) -> dict[str, int]:
    rows = re.findall(r"^\| ([^|]+) \| (\d+) \|$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {name.strip(): int(value) for name, value in rows}

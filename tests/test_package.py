"""The installed wheel finds its own conf/ and sweeps/."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from left_bench import __version__
from left_bench.core.paths import cache_dir, config_root

ROOT = Path(__file__).resolve().parents[1]


def shell(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--wheel-dir", str(folder)]
    if importlib.util.find_spec("hatchling"):
        options.append("--no-build-isolation")
    shell(sys.executable, "-m", "pip", "wheel", "-q", *options, str(ROOT), cwd=folder)
    [made] = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The package alone in a folder, as `pip install` lays it out."""
    target = tmp_path_factory.mktemp("installed")
    shell(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel), cwd=target)
    return target


@pytest.mark.slow
def test_the_wheel_holds_every_option_and_nothing_of_the_tests(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("conf", "sweeps"):
        for path in (ROOT / folder).rglob("*.yaml"):
            assert f"left_bench/{path.relative_to(ROOT)}" in names
    assert "left_bench/general_text.txt" in names
    for path in (ROOT / "left_bench" / "report" / "page").glob("*.*"):
        assert str(path.relative_to(ROOT)) in names
    assert not [name for name in names if name.startswith(("tests/", "reports/", "docs/", "conf/", "benchmarks/"))]
    assert not [name for name in names if name.endswith((".pyc", ".safetensors", ".wandb"))]
    assert f"left_bench-{__version__}" in wheel.name


@pytest.mark.slow
def test_the_installed_package_finds_its_own_files(installed, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    where = {"cwd": tmp_path / "elsewhere", "PYTHONPATH": str(installed)}
    root = shell(sys.executable, "-c", "from left_bench.core.paths import config_root; print(config_root())", **where)
    assert Path(root.stdout.strip()) == installed / "left_bench"
    assert "smoke" in shell(sys.executable, "-m", "left_bench", "--help", **where).stdout
    composed = shell(sys.executable, "-m", "left_bench", "+sweep=smoke", "--cfg", "job", **where)
    assert yaml.safe_load(composed.stdout)["training"]["steps"] == 4
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.slow
def test_the_console_script(installed, tmp_path):
    [script] = (installed / "bin").glob("left-bench*")
    done = shell(sys.executable, str(script), "--version", cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.stdout == f"left-bench {__version__}\n"


def test_the_checkout_finds_its_own_files():
    assert config_root() == ROOT


def test_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LEFT_BENCH_CACHE", str(tmp_path / "named"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "named"
    monkeypatch.setenv("LEFT_BENCH_CACHE", "")
    assert cache_dir() == tmp_path / "xdg" / "left_bench"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "left_bench"


def test_importing_has_no_effects(tmp_path):
    program = "import left_bench, sys; sys.exit(bool({'torch', 'pandas', 'hydra'} & set(sys.modules)))"
    shell(sys.executable, "-c", program, cwd=tmp_path)
    assert not list(tmp_path.iterdir())

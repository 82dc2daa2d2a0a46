"""Locations and identities: conf/ and sweeps/, the user's cache, file hashes, package versions."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from left_bench.core.errors import UserError

_MOST_HASHES = 20_000
_SLOW_TO_HASH = 2**31  # bytes; a few seconds


def config_root() -> Path:
    """The folder that holds `conf/` and `sweeps/`: inside an installed wheel, else the checkout."""
    package = Path(__file__).resolve().parents[1]
    for root in (package, package.parent):
        if (root / "conf" / "config.yaml").is_file() and (root / "sweeps").is_dir():
            return root
    raise UserError(f"left_bench's conf/ and sweeps/ are missing next to {package}; reinstall left-bench")


def cache_dir() -> Path:
    """The user's cache: `LEFT_BENCH_CACHE`, else `$XDG_CACHE_HOME/left_bench`, else `~/.cache/left_bench`."""
    named = os.environ.get("LEFT_BENCH_CACHE")
    if named:
        return Path(named).expanduser().resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "left_bench"


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def contents_of(files: Iterable[Path], *, root: Path) -> str:
    """A fingerprint of files from their names below `root` and their bytes. Hashes of unchanged files are cached."""
    from left_bench.core.files import write_atomically  # imported here so that `--help` does not import it

    known = cache_dir() / "hashes.json"
    try:
        hashes: dict[str, str] = dict(json.loads(known.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # missing or damaged
        hashes = {}
    stats = {path: path.stat() for path in sorted(files)}
    keys = {path: f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats.items()}
    unread = sum(stats[path].st_size for path, key in keys.items() if key not in hashes)
    if unread > _SLOW_TO_HASH:
        print(f"left-bench: hashing {root} once, to recognize it later ({unread / 2**30:.1f} GiB)", file=sys.stderr)
    before, digest = len(hashes), hashlib.sha256()
    for path, key in keys.items():
        result = hashes.get(key) or hashes.setdefault(key, file_sha256(path))
        digest.update(f"{path.relative_to(root)} {result}\n".encode())
    if len(hashes) > before:
        latest = dict(list(hashes.items())[-_MOST_HASHES:])
        with contextlib.suppress(OSError):  # only a cache
            write_atomically(known, json.dumps(latest))
    return digest.hexdigest()


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """The installed version of each package; packages that are not installed are left out."""
    results = {}
    for name in packages:
        try:
            results[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return results


def is_installed(module: str) -> bool:
    """Whether a module could be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False

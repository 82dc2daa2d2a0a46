"""A cache of quantized weights on disk, written by the first cell that needs them and loaded by later ones.

They are next to the base-model files, in `models/quantized-<key>/` in the user's cache: a safetensors checkpoint as
`save_pretrained` writes it, and `load.json` with the time and memory of the quantizing load. Removing such a folder
only costs the time to quantize again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from left_bench.core.errors import UserError
from left_bench.core.files import write_atomically
from left_bench.core.paths import cache_dir, versions_of
from left_bench.measure.meter import Meter
from left_bench.model.load import load_model
from left_bench.pretrained import resolved_revision, source
from left_bench.pretrained.cache import made_once
from left_bench.quantization import backend_of
from left_bench.spec.cell import Cell, fingerprint, slugify

LAYOUT = 1
"""Part of every key: increase it when the stored content changes."""
LARGEST_TOTAL = 64 * 2**30
"""Maximum total bytes of cached weights; beyond it the least recently used are removed."""
_WORTH_KEEPING = 0.5  # minimum seconds of quantizing for which caching is worth the disk space
_IN_USE = 3600.0  # cached weights used within this many seconds are not removed
_FACTS = "load.json"
_DECIDING = ("torch", "transformers", "safetensors")


def load_base(
    cell: Cell,
    *,
    folder: str,
    device: str,
    meter: Meter,
    circumstances: Mapping[str, Any],
    classes: Sequence[str] | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """`load_model` as a measured phase: `load` from the checkpoint, or `load_cached` from cached quantized weights.

    `load_seconds` and `load_peak_memory_bytes` always mean the load from the checkpoint. A cell that uses cached
    weights takes over the measurements of that load if its `circumstances` (machine, threads, cells at once) were the
    same; otherwise it has neither metric.
    """
    kind = meter.device.kind
    path = kept(cell, folder=folder, device=kind)
    if path is not None:
        facts = _facts(path)
        with meter.phase("load_cached"):
            model, result = load_model(cell, folder=folder, device=device, quantized=path)
        if facts["circumstances"] == circumstances:
            meter.metrics |= facts["metrics"]
        if "load_cached_seconds" not in facts:  # measured once, to see whether it is faster at all
            facts["load_cached_seconds"] = meter.phases[-1].seconds
            with contextlib.suppress(OSError):
                write_atomically(path / _FACTS, json.dumps(facts) + "\n")
        return model, result
    with meter.phase("load"):
        model, result = load_model(cell, folder=folder, device=device, classes=classes)
    load = meter.phases[-1]
    path = _place(cell, folder=folder, device=kind)
    if path is not None and not path.exists() and load.seconds >= _WORTH_KEEPING:
        metrics = {"load_seconds": load.seconds, "load_peak_memory_bytes": load.peak_memory_bytes}
        known = {name: value for name, value in metrics.items() if value is not None}
        with meter.phase("keep_quantized"):
            _keep(model, path, facts={"metrics": known, "circumstances": dict(circumstances)})
    return model, result


def kept(cell: Cell, *, folder: str, device: str) -> Path | None:
    """The folder of the cell's cached weights; None if there are none, or loading them was not faster."""
    path = _place(cell, folder=folder, device=device)
    if path is None or not path.is_dir():
        return None
    try:
        facts = _facts(path)
        whole = all((path / name).stat().st_size == size for name, size in facts["files"].items())
        slower = facts.get("load_cached_seconds", 0) >= facts["metrics"]["load_seconds"]
    except (OSError, ValueError, KeyError, TypeError):  # damaged
        whole, slower = False, False
    if not whole:
        shutil.rmtree(path, ignore_errors=True)
    if not whole or slower:
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # mark it as recently used
    return path


def _keep(model: PreTrainedModel, path: Path, *, facts: dict[str, Any]) -> None:
    """Write `path` atomically; if the disk is full or read-only, later cells only lose time."""

    def build(folder: Path) -> None:
        folder.chmod(0o700)
        config = model.config
        before = config.dtype, config.architectures
        model.save_pretrained(folder, max_shard_size="5GB")
        config.dtype, config.architectures = before  # saving changes them
        sizes = {file.name: file.stat().st_size for file in folder.glob("*.safetensors")}
        (folder / _FACTS).write_text(json.dumps(facts | {"files": sizes}) + "\n", encoding="utf-8")

    with contextlib.suppress(UserError, OSError, SafetensorError):
        made_once(path.name, build)
        _make_room(path)


def _make_room(newest: Path) -> None:
    """Remove the least recently used weights until the total is within `LARGEST_TOTAL`."""
    total = 0
    for path in sorted(newest.parent.glob("quantized-*"), key=lambda path: path.stat().st_mtime, reverse=True):
        total += sum(file.stat().st_size for file in path.iterdir())
        if total > LARGEST_TOTAL and time.time() - path.stat().st_mtime > _IN_USE:
            shutil.rmtree(path, ignore_errors=True)


def _facts(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((path / _FACTS).read_text(encoding="utf-8"))
    return facts


def _place(cell: Cell, *, folder: str, device: str) -> Path | None:
    """The cache folder for this cell's quantized weights; None if they are not cached."""
    quantization, model = cell.quantization, cell.model
    backend = backend_of(quantization)
    if not quantization.cache or backend is None or not backend.cacheable or model.trust_remote_code:
        return None
    if not cell.task.writes:  # its output layer is not the checkpoint's, or it leaves that out
        return None
    if cell.hardware.processes > 1:  # each rank would cache and measure its own
        return None
    if source(model) == "hub":
        weights: Any = [model.name_or_path, resolved_revision(model)]
        if weights[1] is None:  # not fetched yet
            return None
    else:  # a folder's content may change, and hashing it would take as long as loading
        files = sorted([*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.json")])
        stats = [(file.name, file.stat()) for file in files]
        weights = [os.path.realpath(folder), *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)]
    # the same instructions give the same rounding
    processor = torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability()
    identity = [LAYOUT, weights, quantization.target, quantization.config, cell.precision.weights_dtype]
    makers = [versions_of((*_DECIDING, *backend.packages)), backend.sources()]
    key = fingerprint([*identity, cell.training.attention, device, processor, *makers])
    return cache_dir() / "models" / f"quantized-{slugify(model.name)}-{slugify(quantization.name)}-{key}"

"""Checkpoints within a cell: a killed run resumes where it was, and ends with the same numbers.

Everything that training changes is saved: trainable tensors, optimizer, schedule, loss scaling, AdaLoRA's rank budget,
random state, and the measured steps. The order of the rows follows from the seed. Tensors are in one safetensors file,
everything else is JSON; nothing is pickled, so no file in a runs folder can run code. A checkpoint is a folder that is
renamed into place when it is complete.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from left_bench.core.errors import UserError
from left_bench.core.paths import versions_of
from left_bench.spec.cell import Cell, fingerprint

if TYPE_CHECKING:
    import torch

    from left_bench.measure.meter import Meter

CHECKPOINTS_NAME = "checkpoints"
_STATE, _TENSORS = "state.json", "tensors.safetensors"
_SAME = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
"""Packages whose versions affect the numbers: a checkpoint of another version is not resumed."""


def forget_checkpoints(run_dir: Path) -> None:
    """Delete a cell's checkpoints."""
    shutil.rmtree(run_dir / CHECKPOINTS_NAME, ignore_errors=True)


class Checkpoint:
    """Saves and restores one training loop, next to its events; does nothing if `checkpoint_every` is null."""

    def __init__(
        self,
        cell: Cell,
        *,
        model: torch.nn.Module,
        optimizer: Any,
        schedule: Any,
        scaler: Any,
        meter: Meter,
        curve: Any = None,
    ) -> None:
        self._every = cell.training.checkpoint_every
        self._optimizer_name = cell.optimizer.name
        self._key = fingerprint([cell.identity, versions_of(_SAME)])
        self._model, self._optimizer, self._schedule, self._scaler = model, optimizer, schedule, scaler
        self._meter, self._curve = meter, curve

    def resume(self) -> int:
        """Restore the newest state; returns its number of steps, 0 if there is no usable checkpoint."""
        if self._every is None:
            return 0
        for folder in sorted(self._folder().glob("step-*[0-9]"), reverse=True):
            try:
                state = _read(folder)
            except (OSError, ValueError, LookupError) as error:  # not written by this package, which writes atomically
                print(f"checkpoint {folder.name} cannot be read ({error}); it is skipped", flush=True)
                continue
            if state["key"] != self._key:
                print(f"checkpoint {folder.name} is of another cell or of other package versions; it is skipped")
                continue
            self._restore(state)
            return int(state["step"])
        return 0

    def save(self, step: int) -> None:
        """Save if `step` is a multiple of `checkpoint_every`.

        Raises:
            UserError: the optimizer's state cannot be written without pickle.
        """
        if self._every is None or step % self._every != 0:
            return
        with self._meter.energy.paused():
            self._save(step)

    def _save(self, step: int) -> None:
        from left_bench.compat.peft import allocator_state

        state = {
            "key": self._key,
            "step": step,
            "trainable": {name: p.data for name, p in self._model.named_parameters() if p.requires_grad},
            "optimizer": _optimizer_state(self._optimizer),
            "schedule": self._schedule.state_dict(),
            "scaler": self._scaler.state_dict(),
            "adalora": allocator_state(self._model),
            "random": _random_state(),
            "starts": self._meter.starts,
            "memory_breakdown": self._meter.memory_breakdown,
            "curve": [] if self._curve is None else self._curve.state(),
        }
        try:
            _write(self._folder() / f"step-{step:09d}", state, steps=_step_lines(self._meter.events.path))
        except TypeError as error:
            raise UserError(
                f"training.checkpoint_every={self._every}: the state of optimizer={self._optimizer_name} cannot be "
                f"written without pickle ({error}); leave checkpoint_every out"
            ) from error

    def _folder(self) -> Path:
        return self._meter.events.path.parent / CHECKPOINTS_NAME

    def _restore(self, state: dict[str, Any]) -> None:
        import torch

        from left_bench.compat.peft import restore_allocator

        parameters = dict(self._model.named_parameters())
        with torch.no_grad():
            for name, tensor in state["trainable"].items():
                parameters[name].copy_(tensor)
        _restore_optimizer(self._optimizer, state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._scaler.load_state_dict(state["scaler"])
        restore_allocator(self._model, state["adalora"])
        _restore_random(state["random"])
        self._meter.take_over(
            state["steps"][: state["step"]], starts=state["starts"], memory_breakdown=state["memory_breakdown"]
        )
        if self._curve is not None:
            self._curve.restore(state["curve"])


def _optimizer_state(optimizer: Any) -> dict[str, Any]:
    """The optimizer's own states in the order of its parameters; `state_dict` may wrap them (bitsandbytes)."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    states = [dict(inner.state.get(parameter, {})) for parameter in _parameters(inner)]
    return {"groups": inner.state_dict()["param_groups"], "states": states}


def _restore_optimizer(optimizer: Any, saved: dict[str, Any]) -> None:
    """Restore states in their own dtype; torch's `load_state_dict` casts them to their parameter's."""
    inner = getattr(optimizer, "optimizer", optimizer)
    inner.load_state_dict({"state": {}, "param_groups": saved["groups"]})
    for parameter, state in zip(_parameters(inner), saved["states"], strict=True):
        if state:
            inner.state[parameter] = state


def _parameters(optimizer: Any) -> list[Any]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _random_state() -> dict[str, Any]:
    import numpy as np
    import torch

    state: Any = np.random.get_state()
    algorithm, keys, *rest = state
    result: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [algorithm, torch.from_numpy(keys.astype("int64")), *rest],
    }
    result["torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        result["cuda"] = torch.cuda.get_rng_state_all()
    return result


def _restore_random(state: dict[str, Any]) -> None:
    import numpy as np
    import torch

    algorithm, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((algorithm, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


def _step_lines(events: Path) -> list[str]:
    lines = events.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith('{"event": "step"')]


def _write(folder: Path, state: dict[str, Any], *, steps: list[str]) -> None:
    """Write a new checkpoint, flush it to disk, rename it into place, and remove the earlier one."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    plain = _plain(state, tensors, {})
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a killed attempt
    unfinished.mkdir(parents=True)
    try:
        # safetensors writes storages, so only views and shared storages are copied first
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished / _TENSORS)
        (unfinished / _STATE).write_text(json.dumps(plain), encoding="utf-8")
        (unfinished / "steps.jsonl").write_text("".join(f"{line}\n" for line in steps), encoding="utf-8")
        for path in [*unfinished.iterdir(), unfinished]:
            _flush(path)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        _flush(folder.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    for other in folder.parent.glob("step-*"):
        if other.name != folder.name:
            shutil.rmtree(other, ignore_errors=True)


def _flush(path: Path) -> None:
    if sys.platform == "win32" and path.is_dir():  # a folder cannot be opened there, and its entries need no flush
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows flushes only writable files
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(folder: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / _TENSORS)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    state: dict[str, Any] = _restored(json.loads((folder / _STATE).read_text(encoding="utf-8")), tensors)
    lines = (folder / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    return state | {"steps": [json.loads(line) for line in lines]}


def _plain(value: Any, tensors: dict[str, torch.Tensor], seen: dict[int, dict[str, Any]]) -> Any:
    """`value` as JSON, with its tensors moved to `tensors`; a tensor that occurs twice is stored once.

    Raises:
        TypeError: a value is neither a tensor nor plain data; names its class.
    """
    import torch

    if isinstance(value, torch.Tensor):
        if id(value) not in seen:
            name = f"{len(tensors):06d}"
            seen[id(value)] = {"tensor": name, "device": str(value.device)}
            held = value.detach()
            part = held.numel() * held.element_size() != held.untyped_storage().nbytes()
            tensors[name] = held.clone() if part else held
        return seen[id(value)]
    if isinstance(value, dict):
        return {"dict": [[_plain(item, tensors, seen) for item in pair] for pair in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_plain(item, tensors, seen) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a {type(value).__name__}")


def _restored(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of `_plain`."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        name = value["tensor"]
        tensors[name] = tensors[name].to(value["device"])  # stored back, so that a shared tensor is shared again
        return tensors[name]
    if "dict" in value:
        return {_restored(key, tensors): _restored(item, tensors) for key, item in value["dict"]}
    if "tuple" in value:
        return tuple(_restored(item, tensors) for item in value["tuple"])
    return [_restored(item, tensors) for item in value["list"]]

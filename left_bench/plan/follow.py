"""Fake tensors followed through a step: the bytes that are alive, and what is answered to who asks for numbers."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from left_bench.compat.torch import FakeTensor, TorchDispatchMode, sparse_like, sparse_parts, storage_key

_aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
_ASKING = (_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.equal.default, _aten.rand.default)
"""What asks for numbers: `.item()` and `if tensor`, the places of a mask, a comparison, a draw."""


Place = tuple[str, int]
"""A part of a step, and the number of the layer it is in; -1 where it is in none."""


class Storages(TorchDispatchMode):
    """Bytes of all storages alive that were made while it is on, and the most there were at once at each place."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.stage = ""
        self.peaks: dict[Place, int] = {}
        """The most that there was at each place of the step since the first `begin`."""
        self._place: Place = ("", -1)
        self.answering = False
        """Whether questions about numbers have answers; an optimizer that has some is tried on real ones instead."""
        self._alive: dict[int, int] = {}

    def begin(self, stage: str) -> None:
        """The step comes to a stage of its own: a pass forward, a pass backward, the optimizer's part."""
        self.stage = stage
        self._come_to((stage, -1))

    def at(self, what: str, layer: int = -1) -> None:
        """The stage comes to another place: what is done, and in which layer."""
        self._come_to((f"{self.stage}: {what}", layer))

    def _come_to(self, place: Place) -> None:
        self._place = place
        self.peaks[place] = max(self.peaks.get(place, 0), self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own dispatch comes back with the local tensors
        if func is _DEVICE and isinstance(args[0], FakeTensor):  # asked twice for every operation
            return args[0].fake_device
        out = self._answer(func, args) if self.answering and func in _ASKING else None
        if out is None:
            out = _entries_kept(func, args)
        if out is None:
            out = func(*_without_masks(func, args), **(kwargs or {}))
        for tensor in _tensors_in(out):
            for part in sparse_parts(tensor) if tensor.layout == torch.sparse_coo else (tensor,):
                self._follow(part.untyped_storage())
        return out

    @staticmethod
    def _answer(func: Any, args: Any) -> Any:
        """What a method is told that asks tensors without numbers; None where they have some."""
        if func is _aten.rand.default:  # a single one decides whether a layer is dropped: it is not
            return torch.tensor(0.999).reshape(args[0]) if math.prod(args[0]) == 1 else None
        if not isinstance(args[0], FakeTensor) or args[0].constant is not None:
            return None
        if func is _aten.nonzero.default:  # all that it may choose
            return torch.empty((args[0].numel(), args[0].dim()), dtype=torch.long)
        if func is _aten.equal.default:  # aLoRA looks for its invocation: it begins a row, and all of it is adapted
            return True
        # checks ask whether something is out of bounds, infinite or empty: nothing is
        return False if args[0].dtype == torch.bool else 0.0 if args[0].is_floating_point() else 0

    def _follow(self, storage: Any) -> None:
        key = storage_key(storage)
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            if self._place in self.peaks:
                self.peaks[self._place] = max(self.peaks[self._place], self.now)
            weakref.finalize(storage, self._end, key)

    def resized(self, storage: Any) -> None:
        """A storage has another size: FSDP2 lets go of gathered weights so, and gathers them again."""
        key = storage_key(storage)
        if key in self._alive:
            self.now += storage.nbytes() - self._alive[key]
            self._alive[key] = storage.nbytes()
            if self._place in self.peaks:
                self.peaks[self._place] = max(self.peaks[self._place], self.now)

    def _end(self, key: int) -> None:
        self.now -= self._alive.pop(key)


def _tensors_in(out: Any) -> Iterator[torch.Tensor]:
    """What an operation gave: a tensor, or some in lists."""
    if isinstance(out, torch.Tensor):
        yield out
    elif isinstance(out, (list, tuple)):
        for item in out:
            yield from _tensors_in(item)


def _without_masks(func: Any, args: Any) -> Any:
    """Indexing by a mask as indexing by the places of all that it may choose: how many it does choose, numbers know."""
    if func is not _aten.index.Tensor:
        return args
    places: list[Any] = []
    for index in args[1]:
        mask = index is not None and index.dtype == torch.bool
        places += [torch.empty(index.numel(), dtype=torch.long)] * index.dim() if mask else [index]
    return args[0], places


def _entries_kept(func: Any, args: Any) -> Any:
    """A sparse matrix whose entries are those of another; torch leaves none of them where there are no numbers."""
    if func is _aten._coalesce.default:
        return args[0].detach()
    if func is not _aten.sparse_mask.default:
        return None
    values, mask = args
    return sparse_like(mask, dtype=values.dtype)


def as_on(device: str, *, autocasting: bool) -> contextlib.AbstractContextManager[Any]:
    """Inside, what CUDA's autocast widens to float32 is widened: fake tensors are a CPU's, whose lists are shorter."""
    return _Widening() if autocasting and device not in ("cpu", "mps") else contextlib.nullcontext()


# torch's list for CUDA ("ops that autocast to float32"), of which models use these
_WIDENED = {
    *(torch.nn.functional.layer_norm, torch.nn.functional.group_norm, torch.nn.functional.normalize),
    *(torch.nn.functional.softmax, torch.softmax, torch.nn.functional.log_softmax, torch.log_softmax),
    *(torch.nn.functional.cross_entropy, torch.nn.functional.nll_loss, torch.nn.functional.softplus),
    *(torch.pow, torch.Tensor.pow, torch.rsqrt, torch.Tensor.rsqrt, torch.exp, torch.log, torch.cumsum),
    *(torch.sum, torch.Tensor.sum, torch.norm, torch.reciprocal),
}


class _Widening(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _WIDENED:
            return func(*args, **(kwargs or {}))

        def wide(value: Any) -> Any:
            narrow = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
            return value.float() if narrow else value

        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})

"""Activations: what a forward pass keeps for its backward pass, told apart from all else that a peak holds."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from left_bench.measure.meter import stored_bytes

_LARGER = 1.05
"""How much larger than the largest counted before a pass has to be to be counted: the next one is, within a twentieth,
as large, and few passes after the first steps have to be."""


class Activations:
    """The tensors that autograd saves in the largest pass of a training, in bytes that their storages occupy.

    Counted by torch's hooks for saved tensors, on every device alike, when the pass has ended and its graph stands.
    What a layer keeps in another way than autograd's, as some kernels of other packages do, is not among them.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._largest = 0.0
        self.bytes: int | None = None
        """None: no pass was counted."""

    @contextmanager
    def of_pass(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Inside is a forward pass over `inputs`; the loss has to be alive at its end."""
        size = max((value.numel() for value in inputs.values() if isinstance(value, torch.Tensor)), default=0)
        if size <= _LARGER * self._largest:
            yield
            return
        saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

        def pack(tensor: torch.Tensor) -> _Saved:
            # the graph that made a tensor would keep itself alive through it
            item = _Saved(tensor if tensor.is_leaf else tensor.detach())
            if tensor.layout is torch.strided:  # a sparse tensor has no one storage: it is left to the workspace
                saved.add(item)
            return item

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda item: item.tensor):
            yield
        held = [*self._model.parameters(), *self._model.buffers()]  # saved too, and counted as weights
        both = stored_bytes([*held, *(item.tensor for item in saved)])
        self._largest, self.bytes = size, max(self.bytes or 0, both - stored_bytes(held))


class _Saved:
    """A saved tensor; gone when the graph lets go of it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

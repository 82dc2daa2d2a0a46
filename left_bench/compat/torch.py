"""torch, seen with 2.6 to 2.13.

- `FakeTensorMode` and related names: tensors with shapes and dtypes but without values have no public name
  (pytorch/pytorch#113456, open; #173671 proposed `torch.subclasses` and was closed).
- `TorchDispatchMode`: torch's own guide to extending it imports it from a private module.
- `storage_key`: identifies a storage on any device; `data_ptr` is 0 on the meta device and for fake tensors.
- `sparse_parts`, `sparse_like`: `indices()` and `values()` require a coalesced tensor.
- `one_of_many`: a process group of one process that stands for many and sends nothing is torch's own means of testing
  (torch/testing/_internal/distributed/fake_pg.py; torchtitan estimates memory with it).
- `watch_resizing`: a dispatch mode is not called when a storage is resized, which is how FSDP2 frees gathered weights
  (torch/distributed/_tools/mem_tracker.py replaces the same method).
- `watch_compiling`: `torch.compiler` has no callbacks for compilations; those of torch._dynamo are used
  (pytorch/pytorch#120764).
- `uncompile`, `run_eagerly`: `nn.Module.compile` has no undo (torch/nn/modules/module.py).
  `torch.compiler.set_stance("force_eager")` does not undo it: it applies to the whole process, and leaves a wrapper
  around every call of the layer.
- `leave_out_of_ddp`: there is no public way to exclude parameters from DDP (pytorch/pytorch#43690, open).
- `MovedNotCast`: `.to(dtype)`, `.half()` and similar calls all use `nn.Module._apply`, and a module has no public way
  to keep the dtype of a buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "DataDependentOutputException",
    "FakeTensor",
    "FakeTensorMode",
    "MovedNotCast",
    "TorchDispatchMode",
    "UnsupportedFakeTensorException",
    "leave_out_of_ddp",
    "one_of_many",
    "run_eagerly",
    "sparse_like",
    "sparse_parts",
    "storage_key",
    "uncompile",
    "watch_compiling",
    "watch_resizing",
]


def storage_key(storage: torch.UntypedStorage) -> int:
    """A number that is unique among existing storages."""
    key: int = storage._cdata
    return key


def sparse_parts(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two tensors that a sparse COO tensor is stored as, coalesced or not."""
    return tensor._indices(), tensor._values()


def sparse_like(mask: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """A sparse COO tensor with the indices of another one and its own uninitialized values."""
    make = torch.ops.aten._sparse_coo_tensor_with_dims_and_tensors.default
    result: torch.Tensor = make(
        mask.sparse_dim(),
        mask.dense_dim(),
        mask.shape,
        mask._indices(),
        torch.empty(mask._nnz(), dtype=dtype),
        layout=torch.sparse_coo,
        dtype=dtype,
    )
    return result


@contextmanager
def one_of_many(ranks: int) -> Iterator[None]:
    """Inside, this process is the first of so many to torch.distributed; what it sends or waits for goes nowhere."""
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        distributed.destroy_process_group()


@contextmanager
def watch_resizing(resized: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Inside, `resized` is called with every storage that has been given another size."""
    resize = torch.UntypedStorage.resize_

    def watched(storage: Any, size: int) -> Any:
        result = resize(storage, size)
        resized(storage)
        return result

    owner: Any = torch.UntypedStorage
    owner.resize_ = watched
    try:
        yield
    finally:
        owner.resize_ = resize


def watch_compiling(begin: Callable[[Any], None], end: Callable[[Any], None]) -> None:
    """Have torch call `begin` and `end` around every compilation in this process."""
    from torch._dynamo.callback import callback_handler

    callback_handler.register_start_callback(begin)
    callback_handler.register_end_callback(end)


def uncompile(module: torch.nn.Module) -> None:
    """Undo `module.compile()`."""
    module._compiled_call_impl = None


@contextmanager
def run_eagerly(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Inside the context, modules compiled by `compile()` run eagerly."""
    compiled: list[Any] = [module._compiled_call_impl for module in modules]
    for module in modules:
        uncompile(module)
    try:
        yield
    finally:
        for module, call in zip(modules, compiled, strict=True):
            module._compiled_call_impl = call


def leave_out_of_ddp(module: torch.nn.Module, names: Iterable[str]) -> None:
    """Make DDP, which will wrap `module` later, ignore these parameters and buffers."""
    ignore: Any = torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(module, list(names))


class MovedNotCast(torch.nn.Module):
    """A module whose buffers named in `constant_names` move to other devices with it but keep their dtype."""

    constant_names: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> MovedNotCast:
        before = {name: self.get_buffer(name) for name in self.constant_names}
        super()._apply(fn, recurse)
        for name, value in before.items():
            now = self.get_buffer(name)
            if now.dtype != value.dtype:
                setattr(self, name, value.to(now.device))
        self.after_moving()
        return self

    def after_moving(self) -> None:
        """Called when parameters and buffers may have been replaced by other tensors."""

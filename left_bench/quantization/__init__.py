"""Quantization backends: one module for each, with its `BACKEND`; this is where a new one goes.

Imports the five-bit formats and the rooms below, and torch only inside functions. Used by rules, plans, loading, the
cache of quantized weights and the checks after loading; other packages add backends by the entry point
`left_bench.quantizations`. The formats' own code is elsewhere: `fivebit`, `hqq`, or the library.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from left_bench.core.extensions import Registry
from left_bench.spec.cell import Cell, Precision, Quantization

if TYPE_CHECKING:
    import torch

StoredBytes: TypeAlias = Callable[[int, int], int]
"""(out features, in features) -> bytes of the weight as stored, constants included, without the bias."""
Rule: TypeAlias = tuple[Callable[[Cell], bool], str]
"""(whether it refuses a cell, the reason in words)."""
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_LEFT_ALONE = ("llm_int8_skip_modules", "modules_to_not_convert")
"""Names of the setting for unquantized modules in transformers' configurations."""


class QuantizationBackend:
    """How one library stores weights in fewer bits; subclasses override what differs from these defaults.

    The launching process imports these modules too, so they import torch only inside methods.
    """

    targets: tuple[str, ...] = ()
    """Its configuration classes (`quantization._target_`)."""
    needs: str | None = None
    """A module that must be installed; None: nothing besides left_bench's own dependencies."""
    extra: str | None = None
    """The extra of left_bench that installs it; None: install it by its own name."""
    packages: tuple[str, ...] = ()
    """Packages whose versions affect the quantized values, by their pip names."""
    readers: tuple[str, ...] = ()
    """Prefixes of modules whose code may read the stored integers."""
    cacheable: bool = False
    """Whether saved weights are restored bit for bit (tested), so that later cells can load them."""
    has_dense_shape: bool = True
    """Whether peft can read the layer's shape and values from its weight."""
    runs_on: tuple[str, ...] = ()
    """The torch device types it runs on; empty: all."""
    why_not_elsewhere: str = ""
    """The reason given to cells on other devices."""
    rules: tuple[Rule, ...] = ()
    """What cannot be combined with it; applied only to cells of this backend."""

    def is_of(self, quantization: Quantization) -> bool:
        """Whether a cell's quantization belongs to this backend."""
        return quantization.target in self.targets

    def leave_alone(self, config: Any, names: Sequence[str]) -> bool:
        """Set in the configuration which modules to leave unquantized; False: it has no such setting."""
        known = [key for key in _LEFT_ALONE if key in vars(config)]
        for key in known:
            setattr(config, key, list(names))
        return bool(known)

    def can_shard(self, quantization: Quantization) -> bool:
        """Whether FSDP2 can shard its weights over processes."""
        return True

    def trials(self, config: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[], object]]]:
        """Checks for arguments that its class accepts but its kernels may refuse: key in `quantization.config`,
        function."""
        yield from ()

    def make_ready(self, quantization: Quantization, *, device: str) -> None:
        """Compile its kernels before the baseline, so that no phase includes their seconds and bytes."""

    def sources(self) -> list[str]:
        """Source texts that affect the values, in addition to the packages' versions."""
        return []

    def stored_bytes(self, config: Mapping[str, Any], precision: Precision) -> StoredBytes | None:
        """Bytes of a layer with given output and input sizes; None: the layout is unknown."""
        return None

    def constants(self, weight: Any) -> Iterator[tuple[Any, str]]:
        """Tensors that belong to a quantized weight but are stored outside it: (object, attribute) of each."""
        yield from ()

    def dequantize(self, weight: Any) -> torch.Tensor | None:
        """The dense weight, shape (out, in), of a stored parameter; None: it is not a weight of this kind.

        Our own layers provide it by a function on their weight.
        """
        own: Callable[[], torch.Tensor] | None = getattr(weight, "left_dequantize", None)
        return None if own is None else own()


class _Other(QuantizationBackend):
    """A transformers configuration without a module here: only what every tensor subclass can do."""

    def dequantize(self, weight: Any) -> torch.Tensor | None:
        own = getattr(weight, "dequantize", None)
        return own() if callable(own) else None


BACKENDS: Registry[QuantizationBackend] = Registry(
    "left_bench.quantization", "BACKEND", group="left_bench.quantizations"
)
"""Name -> backend: a module of this package, or an entry point of another."""
_OTHER = _Other()


@functools.cache
def backends() -> tuple[QuantizationBackend, ...]:
    """All backends."""
    return tuple(BACKENDS.values())


def backend_of(quantization: Quantization) -> QuantizationBackend | None:
    """The backend of a cell's quantization; None if nothing is quantized."""
    result = next((backend for backend in backends() if backend.is_of(quantization)), None)
    return _OTHER if result is None and quantization.target is not None else result


def stored_bytes_of(cell: Cell) -> StoredBytes | None:
    """Bytes of a quantized layer of the cell, from its shape; None for a format whose layout is unknown.

    A test compares each of these with what the library really stores.
    """
    backend = backend_of(cell.quantization)
    return None if backend is None else backend.stored_bytes(cell.quantization.config, cell.precision)


def dequantized(weight: Any) -> torch.Tensor | None:
    """The dense float32 weight, shape (out, in), of a quantized parameter; None for an unknown kind."""
    for backend in (*backends(), _OTHER):
        if (dense := backend.dequantize(weight)) is not None:
            return dense.float()
    return None


def constants(weight: Any) -> Iterator[tuple[Any, str]]:
    """The places of a parameter's quantization constants: object and attribute."""
    for backend in backends():
        yield from backend.constants(weight)


def rules() -> Iterator[Rule]:
    """Every backend's rules, each of which refuses only cells of that backend."""
    for backend in backends():
        yield from ((_only_for(backend, refuses), reason) for refuses, reason in backend.rules)


def device_rules() -> Iterator[Rule]:
    """For each backend that does not run on every device, the rule that refuses the others."""
    for backend in backends():
        if backend.runs_on:
            yield _only_for(backend, partial(_is_elsewhere, backend)), backend.why_not_elsewhere


def _is_elsewhere(backend: QuantizationBackend, cell: Cell) -> bool:
    return cell.device_type not in backend.runs_on


def _only_for(backend: QuantizationBackend, refuses: Callable[[Cell], bool]) -> Callable[[Cell], bool]:
    return lambda cell: backend_of(cell.quantization) is backend and refuses(cell)


def rows_of_bytes(*, for_each_row: int, for_each_layer: int = 0) -> StoredBytes:
    """One byte per weight, plus constants for each output row and for the layer."""
    return lambda out, width: out * width + for_each_row * out + for_each_layer

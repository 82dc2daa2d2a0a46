"""What each quantization is to the rest of left_bench: one module of this folder for each, with its `BACKEND`.

Imports the five-bit formats and the rooms below, and torch only inside functions. Rules, plans, loading, the cache of
quantized weights and the checks of what is in force ask it; other packages add theirs (`left_bench.quantizations`).
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
"""What the configurations of transformers call the modules that are not quantized."""


class QuantizationBackend:
    """One library's way of storing weights in fewer bits; a subclass says what differs from this.

    A module that holds one is imported by the launching process too: it imports torch only inside its methods.
    """

    targets: tuple[str, ...] = ()
    """Configuration classes, `quantization._target_`, that are this backend's."""
    needs: str | None = None
    """A module that must be installed; None: this package brings what it takes."""
    extra: str | None = None
    """The extra of left_bench that installs it; None: it is installed by its own name."""
    packages: tuple[str, ...] = ()
    """Packages whose versions decide the quantized numbers, by the names that pip knows."""
    readers: tuple[str, ...] = ()
    """Modules, by the beginnings of their names, whose code knows how to read the stored integers."""
    cacheable: bool = False
    """Whether saved weights come back from disk bit for bit (tested): later cells then load them."""
    has_dense_shape: bool = True
    """Whether peft finds the layer's shape and values in its weight."""
    runs_on: tuple[str, ...] = ()
    """The devices it runs on, by torch's names; empty: all."""
    why_not_elsewhere: str = ""
    """The reason that a cell on another device gets."""
    rules: tuple[Rule, ...] = ()
    """What does not go together with it; each is asked of this backend's cells alone."""

    def is_of(self, quantization: Quantization) -> bool:
        """Whether a cell's quantization is this backend's."""
        return quantization.target in self.targets

    def leave_alone(self, config: Any, names: Sequence[str]) -> bool:
        """Tell the configuration which modules to leave unquantized; False: it cannot be told."""
        known = [key for key in _LEFT_ALONE if key in vars(config)]
        for key in known:
            setattr(config, key, list(names))
        return bool(known)

    def can_shard(self, quantization: Quantization) -> bool:
        """Whether FSDP2 can divide its weights over processes."""
        return True

    def trials(self, config: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[], object]]]:
        """Arguments that its class takes and its kernels refuse: the key in `quantization.config`, and what to call."""
        yield from ()

    def make_ready(self, quantization: Quantization, *, device: str) -> None:
        """Compile what its kernels compile, before the baseline: its seconds and bytes are no phase's."""

    def sources(self) -> list[str]:
        """Texts that decide the numbers besides the packages' versions."""
        return []

    def stored_bytes(self, config: Mapping[str, Any], precision: Precision) -> StoredBytes | None:
        """What a layer of so many outputs and inputs takes; None: the layout is not known."""
        return None

    def constants(self, weight: Any) -> Iterator[tuple[Any, str]]:
        """Tensors that belong to a quantized weight and lie outside it: the object that holds each, and its name."""
        yield from ()

    def dequantize(self, weight: Any) -> torch.Tensor | None:
        """The dense weight, shape (out, in), that a stored parameter stands for; None: it is no weight of this kind.

        A layer of our own says it itself, by a function on its weight.
        """
        own: Callable[[], torch.Tensor] | None = getattr(weight, "left_dequantize", None)
        return None if own is None else own()


class _Other(QuantizationBackend):
    """A configuration of transformers that has no module here: what every tensor subclass can do, and no more."""

    def dequantize(self, weight: Any) -> torch.Tensor | None:
        own = getattr(weight, "dequantize", None)
        return own() if callable(own) else None


BACKENDS: Registry[QuantizationBackend] = Registry(
    "left_bench.quantization", "BACKEND", group="left_bench.quantizations"
)
"""Name -> backend: a module of this folder, or an entry point of another package."""
_OTHER = _Other()


@functools.cache
def backends() -> tuple[QuantizationBackend, ...]:
    """All there are."""
    return tuple(BACKENDS.values())


def backend_of(quantization: Quantization) -> QuantizationBackend | None:
    """The backend of a cell's quantization; None where nothing is quantized."""
    result = next((backend for backend in backends() if backend.is_of(quantization)), None)
    return _OTHER if result is None and quantization.target is not None else result


def stored_bytes_of(cell: Cell) -> StoredBytes | None:
    """What a quantized layer of the cell takes from its shape alone; None for a format whose layout is not known.

    A test holds each of these against what the library really stores.
    """
    backend = backend_of(cell.quantization)
    return None if backend is None else backend.stored_bytes(cell.quantization.config, cell.precision)


def dequantized(weight: Any) -> torch.Tensor | None:
    """The dense float32 weight, shape (out, in), that a quantized parameter stands for; None for an unknown kind."""
    for backend in (*backends(), _OTHER):
        if (dense := backend.dequantize(weight)) is not None:
            return dense.float()
    return None


def constants(weight: Any) -> Iterator[tuple[Any, str]]:
    """Where a parameter's quantization constants are kept: object and attribute."""
    for backend in backends():
        yield from backend.constants(weight)


def rules() -> Iterator[Rule]:
    """Every backend's rules, each refusing cells of that backend alone."""
    for backend in backends():
        yield from ((_asked_of(backend, refuses), reason) for refuses, reason in backend.rules)


def device_rules() -> Iterator[Rule]:
    """For each backend that not every device runs, the rule that says so."""
    for backend in backends():
        if backend.runs_on:
            yield _asked_of(backend, partial(_is_elsewhere, backend)), backend.why_not_elsewhere


def _is_elsewhere(backend: QuantizationBackend, cell: Cell) -> bool:
    return cell.device_type not in backend.runs_on


def _asked_of(backend: QuantizationBackend, refuses: Callable[[Cell], bool]) -> Callable[[Cell], bool]:
    return lambda cell: backend_of(cell.quantization) is backend and refuses(cell)


def rows_of_bytes(*, for_each_row: int, for_each_layer: int = 0) -> StoredBytes:
    """A byte a weight, with constants for each output row and for the layer."""
    return lambda out, width: out * width + for_each_row * out + for_each_layer

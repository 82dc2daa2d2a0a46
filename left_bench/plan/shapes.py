"""A cell's model and adapter on the meta device: shapes and dtypes as in a run, and no numbers, or few."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from left_bench.data import Example
from left_bench.methods.attach import attach_adapter
from left_bench.model.load import DTYPES
from left_bench.pretrained import fetched, make, source, unloadable
from left_bench.spec.cell import Cell, Model

_STARTS_FROM_NUMBERS = ("pissa", "olora", "loftq", "eva", "corda", "lora_ga", "orthogonal")
"""peft's values of `init_lora_weights`, or their beginnings, that look at weights or rows."""
_MOST_NUMBERS = 2**29


def architecture(cell: Cell) -> Any:
    """The model's configuration: the cell's own, or the one in its folder or on the hub.

    Raises:
        UserError: it cannot be had, or a value in it is none of its architecture's.
    """
    model, folder = cell.model, fetched(cell.model, dtype=cell.precision.weights_dtype)
    if is_architecture_alone(model):
        folder = model.name_or_path
    elif source(model) in ("random", "wheel") and model.config is not None:
        return make.architecture(model.config)
    try:
        return AutoConfig.from_pretrained(
            folder or model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise unloadable(model, error) from error


def is_architecture_alone(model: Model) -> bool:
    """Whether the model is a configuration's file, without weights or a tokenizer."""
    return model.weights == "random" and model.name_or_path.endswith(".json")


def model_of_shapes(cell: Cell) -> Any:
    """The base model as it is before quantizing.

    Raises:
        UserError: its configuration cannot be had.
    """
    with torch.device("meta"):
        return getattr(transformers, cell.task.auto_class).from_config(
            architecture(cell),
            dtype=DTYPES[cell.precision.weights_dtype],
            attn_implementation=cell.training.attention,
            trust_remote_code=cell.model.trust_remote_code,
        )


def give_numbers(model: torch.nn.Module) -> None:
    """Put random numbers behind a model's shapes: one tensor for all parameters that are alike, however many there are.

    Raises:
        ValueError: that would be more than half a billion numbers.
    """
    numbers: dict[tuple[Any, ...], torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def real(tensor: torch.Tensor) -> torch.Tensor:
        kind = tuple(tensor.shape), tensor.dtype
        if kind not in numbers:
            if sum(number.numel() for number in numbers.values()) + tensor.numel() > _MOST_NUMBERS:
                raise ValueError(f"weights as large as this model's, {_MOST_NUMBERS:,} numbers and more, are not made")
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            numbers[kind] = empty.normal_(std=0.02, generator=generator) if empty.is_floating_point() else empty.zero_()
        return numbers[kind].view(tensor.shape)

    replace_tensors(model, real)


def replace_tensors(model: torch.nn.Module, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Put `make(tensor)` in the place of every parameter and buffer; what was tied stays tied."""
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            plain = make(tensor)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            new = torch.nn.Parameter(plain, requires_grad=tensor.requires_grad) if is_parameter else plain
            made[id(tensor)] = new, tensor  # the old one is kept, or its id would be another's
        return made[id(tensor)][0]

    for module in model.modules():
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        for name, tensor in {**own, **dict(module.named_buffers(recurse=False, remove_duplicate=False))}.items():
            setattr(module, name, of(tensor))


def adapter_of_shapes(model: Any, cell: Cell, *, rows: Sequence[Example] = ()) -> Any:
    """The adapter attached to `model`, without a start that asks for numbers (EVA's, PiSSA's, a prefix's do).

    It lies where the model does: on the meta device, or beside the numbers of `give_numbers`. `rows` are asked for by
    a method whose shape is made of them (`start.asks_for_rows`).

    Raises:
        Exception: the method refuses its arguments or the model, or needs more than shapes.
    """
    config = {name: value for name, value in cell.peft.config.items() if name not in ("eva_config", "loftq_config")}
    if str(config.get("init_lora_weights")).startswith(_STARTS_FROM_NUMBERS):  # a name that peft knows not is refused
        del config["init_lora_weights"]
    peft = cell.peft.model_copy(update={"config": config, "init_text": None})
    with next(model.parameters()).device:
        return attach_adapter(model, cell.model_copy(update={"peft": peft}), tokenizer=None, rows=rows)  # type: ignore[arg-type]

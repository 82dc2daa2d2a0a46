"""A cell's memory from shapes alone: the model, its adapter and its optimizer as tensors that hold nothing, and a step.

The parts of `memory_breakdown` are counted as a run counts them. The peak is that of one whole optimizer step of the
same code, carried out on fake tensors (torch's FakeTensorMode: shapes, dtypes and lifetimes, no numbers), with every
storage followed from its making to its end.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch

from left_bench.compat.torch import (
    DataDependentOutputException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    storage_key,
)
from left_bench.core.errors import Unsupported, UserError
from left_bench.data import Example, load_data, split_passes, step_rows
from left_bench.data.batches import at_positions
from left_bench.measure.meter import stored_bytes
from left_bench.measure.method_buffers import Modules, frozen_tensors, modules_of
from left_bench.methods import data_init
from left_bench.methods.attach import added_parameters, after_optimizer_step, regularization, trainable_parameters
from left_bench.model.load import DTYPES, autocast
from left_bench.plan.follow import Storages, as_on
from left_bench.plan.shapes import adapter_of_shapes, give_numbers, model_of_shapes, replace_tensors
from left_bench.pretrained import fetched, load_tokenizer, source
from left_bench.pretrained.make import byte_tokenizer
from left_bench.quantization import stored_bytes_of
from left_bench.spec.cell import Cell, fingerprint
from left_bench.training.loop import make_optimizer, state_tensors
from left_bench.training.loss import AnswerLoss

_SHOWN_STEPS = 1000
_FEW = 16
_LARGEST_TRIED = 2**26
_LEAST_PAGED = 100_000  # weights; bitsandbytes keeps the states of smaller parameters as they are (optim/optimizer.py)


@dataclass(frozen=True)
class Pass:
    """The shape of a step's largest pass."""

    rows: int
    length: int
    """Tokens of its longest row."""
    answer_tokens: int
    measured: bool
    """Whether the training rows were looked at; else every row is taken to be as long as `training.max_length` lets."""
    packed: bool = False
    """Rows end to end: planned as one row of `length` tokens, whose attention is the memory of its kernel alone."""


@dataclass
class Plan:
    """Bytes by the names of a record's `memory_breakdown`; what could not be predicted is absent and in `unknown`."""

    largest: Pass
    total_params: int = 0
    trainable_params: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    paged_optimizer_bytes: int = 0
    """Optimizer states in CUDA's managed memory, which no allocator counts: beside the parts and the peak."""
    unknown: list[str] = field(default_factory=list)
    """What was not predicted, and why, in words."""

    @property
    def peak_bytes(self) -> int | None:
        """The most that a step holds at once; None when a part of it is not known."""
        wanted = {"weights", "gradients", "optimizer", "activations_and_workspace"}
        return sum(self.parts.values()) if wanted <= self.parts.keys() else None


def predict(cell: Cell, *, followed: dict[str, Plan] | None = None) -> Plan:
    """What `cell` will hold in memory while it trains.

    Args:
        followed: what was worked out for other cells; a step is the same over every quantization, and is taken from it.

    Raises:
        UserError: the model's configuration cannot be had.
    """
    plan = Plan(largest_pass(cell))
    model = model_of_shapes(cell)
    quantized = quantizable(model) if cell.quantization.target is not None else {}
    dense = bytes_of(chain(model.parameters(), model.buffers()))
    plan.total_params = sum(parameter.numel() for parameter in model.parameters())
    stored = stored_bytes_of(cell)
    workspace = 0
    if cell.quantization.checkpoint_method is not None or (quantized and stored is None):
        plan.unknown.append(f"weights: how {cell.quantization.name} stores a layer is not known here")
    else:
        dequantized = sum(layer.weight.nbytes for layer in quantized.values())
        kept = sum(stored(layer.out_features, layer.in_features) for layer in quantized.values()) if stored else 0
        plan.parts["weights"] = dense - dequantized + kept
        item = DTYPES[cell.precision.compute_dtype].itemsize
        workspace = max((layer.weight.numel() * item for layer in quantized.values()), default=0)
    followed = {} if followed is None else followed
    alike = fingerprint([cell.identity | dict.fromkeys(("quantization", "eval", "seed")), asdict(plan.largest)])
    if alike not in followed:
        followed[alike] = _with_method(plan.largest, model, cell)
    method = followed[alike]
    plan.parts |= method.parts
    if "activations_and_workspace" in plan.parts:
        plan.parts["activations_and_workspace"] += workspace
    plan.unknown += method.unknown
    plan.trainable_params, plan.paged_optimizer_bytes = method.trainable_params, method.paged_optimizer_bytes
    return plan


def _with_method(largest: Pass, model: Any, cell: Cell) -> Plan:
    """The parts that the method, its optimizer and a step add to the base model's weights."""
    try:
        plan = Plan(largest)
        _take_in_method(plan, model, cell)
    except (UserError, Unsupported):
        raise
    except Exception:  # a method that looks at the weights, or draws what decides a shape
        plan = Plan(largest)
        model = model_of_shapes(cell)
        try:
            give_numbers(model)
            _take_in_method(plan, model, cell)
        except (UserError, Unsupported):
            raise
        except Exception as error:
            attached = "adapter" in plan.parts or cell.peft.target is None
            what = "the step" if attached else f"the adapter of peft={cell.peft.name} and all that follows"
            plan.unknown.append(f"{what}: it cannot be followed without the model itself ({_short(error)})")
    return plan


def _take_in_method(plan: Plan, model: Any, cell: Cell) -> None:
    """Attach the cell's method to the base model, and take a step where steps can be followed."""
    of_base, modules = [name for name, _ in model.named_parameters()], modules_of(model)
    model = adapter_of_shapes(model, cell, rows=_rows_to_start_from(cell))
    trained = trainable_parameters(model)
    plan.trainable_params = sum(parameter.numel() for parameter in trained)
    if cell.peft.target is not None:
        plan.parts["adapter"] = bytes_of(added_parameters(model, base=of_base))
    if not cell.task.is_decoder or cell.training.objective != "sft":
        plan.unknown.append("the step: only a decoder's supervised fine-tuning is followed")
    elif cell.hardware.sharding is not None:
        plan.unknown.append(f"the step: hardware.sharding={cell.hardware.sharding} is not followed")
    else:
        _take_step(plan, model, cell, base=modules)


def largest_pass(cell: Cell) -> Pass:
    """The pass with the most tokens, padding included, over the cell's steps; an upper bound where rows are not here.

    Rows are read and tokenized only when the tokenizer and the data are on this machine already.
    """
    settings, rows = cell.training, _rows_at_hand(cell)
    each = max(1, settings.batch_size // cell.hardware.processes)
    packed = settings.batching == "packed"
    if rows is None:
        tokens = each * settings.max_length
        return Pass(1, tokens, tokens, False, True) if packed else Pass(each, settings.max_length, tokens, False)
    found = Pass(0, 0, 0, measured=True)
    for indices in step_rows(
        len(rows),
        rows_per_step=settings.batch_size * settings.gradient_accumulation,
        steps=min(settings.steps, _SHOWN_STEPS),
        seed=cell.seed,
    ):
        examples = [rows[index] for index in indices]
        for one in split_passes(examples, batch_size=settings.batch_size, batching=settings.batching):
            mine = one[:each]
            lengths = [example.length for example in mine]
            shape = (1, sum(lengths)) if packed else (len(mine), max(lengths))
            if shape[0] * shape[1] > found.rows * found.length:
                found = Pass(*shape, sum(example.labels for example in mine), True, packed)
    return found


def _rows_at_hand(cell: Cell) -> Sequence[Example] | None:
    folder = fetched(cell.model, dtype=cell.precision.weights_dtype)
    if cell.data.source == "hub" and cell.data.path is None:
        return None
    if folder is not None:
        tokenizer = load_tokenizer(folder, cell.model)
    elif source(cell.model) == "random":
        tokenizer = byte_tokenizer()
    else:
        return None
    splits = load_data(
        cell.data, tokenizer, max_length=cell.training.max_length, one_answer_a_row=cell.one_answer_a_row
    )
    return list(splits.train)


def _rows_to_start_from(cell: Cell) -> Sequence[Example]:
    """Rows for a method whose shape is made of some; as long as they may be where there are none at hand."""
    if not data_init.asks_for_rows(cell.peft.target, cell.peft.config):
        return []
    rows = _rows_at_hand(cell)
    whole = Example(prompt_ids=[0] * (cell.training.max_length - 1), answer_ids=[0], prompt="", reference="")
    return [whole] * data_init.CONTEXT_ROWS if rows is None else rows


def quantizable(model: Any) -> dict[str, torch.nn.Linear]:
    """The layers that quantizers replace: every linear one but the output head, and the encoder-side tied to it."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind some tensors that hold nothing, shared ones once."""
    storages = [one.untyped_storage() for one in tensors]
    return sum({storage_key(storage): storage.nbytes() for storage in storages}.values())


def _take_step(plan: Plan, model: Any, cell: Cell, *, base: Modules) -> None:
    """One optimizer step, every storage followed; fills in gradients, optimizer and what the peak holds beyond."""
    with FakeTensorMode(allow_non_fake_inputs=True), Storages() as storages:
        # autocast passes by tensors on the meta device
        replace_tensors(model, _fake)
        trained = trainable_parameters(model)
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        plan.parts["gradients"] = bytes_of(parameter.grad for parameter in trained if parameter.grad is not None)
        optimizer = None
        with contextlib.suppress(DataDependentOutputException, UnsupportedFakeTensorException, RuntimeError):
            optimizer = make_optimizer(model, _in_plain_memory(cell), device="cpu")
            optimizer.step()  # makes the states; the step that is followed is one that has them
            plan.parts["optimizer"] = bytes_of(state_tensors(optimizer))
        if "optimizer" not in plan.parts:
            optimizer = None
        storages.answering = True
        after_optimizer_step(model, 0)
        model.zero_grad(set_to_none=True)

        everywhere = cell.training.output_head == "all"
        loss = AnswerLoss(model, everywhere=True) if everywhere else AnswerLoss.assumed(model, kind=cell.device_type)
        held, kept = storages.now, bytes_of(frozen_tensors(model, base=base))
        storages.peak = held
        model.train()
        for _ in range(min(2, cell.training.gradient_accumulation)):  # the second pass has the first one's gradients
            with autocast(cell, device="cpu"), as_on(cell.device_type, autocasting=cell.autocast):
                total = loss.summed(_batch(plan.largest))
            penalty = regularization(model)
            (total if penalty is None else total + penalty).backward()
            del total, penalty
        storages.answering = False
        if len(trainable_parameters(model)) > len(trained):  # MonteCLoRA makes its samplers where there are numbers
            raise ValueError("a part that is trained is made in the first pass alone")
        _take_in_gradients(plan, trained, optimizer)
        torch.nn.utils.clip_grad_norm_(trained, cell.training.max_grad_norm or math.inf)
        if optimizer is not None:
            optimizer.step()
    if frozen := bytes_of(frozen_tensors(model, base=base)):
        plan.parts["adapter_frozen"] = frozen
    if optimizer is None:  # one whose states only numbers make
        plan.parts["optimizer"], _ = _states_by_trial(model, cell)
    if ".Paged" in cell.optimizer.target:  # counted apart, as a run does: the card's allocator does not hold them
        states, plan.paged_optimizer_bytes = _states_by_trial(model, cell)
        plan.parts["optimizer"] = states - plan.paged_optimizer_bytes
    beyond = storages.peak - held - plan.parts["gradients"] - (frozen - kept)  # made in the first pass
    plan.parts["activations_and_workspace"] = max(0, beyond)


def _take_in_gradients(plan: Plan, trained: Sequence[torch.Tensor], optimizer: Any) -> None:
    """Gradients as they are after a step's passes: some are slices of larger ones (OSF), and some never come.

    Trainable parameters that the loss does not reach have no optimizer's states either (ShadowPEFT has some).
    """
    plan.parts["gradients"] = bytes_of(parameter.grad for parameter in trained if parameter.grad is not None)
    untouched = [parameter for parameter in trained if parameter.grad is None]
    if optimizer is not None and untouched:
        for parameter in untouched:
            optimizer.state.pop(parameter, None)
        plan.parts["optimizer"] = bytes_of(state_tensors(optimizer))


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor like that one, a CPU's: autocast passes by what is on the meta device.

    A few whole numbers stay as they are: methods make shapes of them (FRoD's matrices' sizes).
    """
    if tensor.device.type == "cpu" and not tensor.is_floating_point() and tensor.numel() <= _FEW:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def _in_plain_memory(cell: Cell) -> Cell:
    """With the optimizer whose states are the same and not paged: paging is CUDA's, and no plan has a CUDA."""
    target = cell.optimizer.target.replace(".Paged", ".")
    return cell.model_copy(update={"optimizer": cell.optimizer.model_copy(update={"target": target})})


def _states_by_trial(model: torch.nn.Module, cell: Cell) -> tuple[int, int]:
    """Bytes of the optimizer's states, by a real step of it over one or two real parameters of every shape there is.

    The second number is how many of them a paged optimizer would have paged. Two parameters show what is shared, such
    as bitsandbytes' tables of 256 levels.
    """
    alike: dict[tuple[Any, ...], int] = {}
    tried = torch.nn.Module()
    kinds: list[tuple[Any, ...]] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = tuple(parameter.shape), parameter.dtype, "lora_B" in name, "lora_embedding_B" in name
        alike[kind] = alike.get(kind, 0) + 1
        if alike[kind] <= 2:
            if parameter.numel() > _LARGEST_TRIED:
                raise ValueError(f"{cell.optimizer.name} would have to be tried on {parameter.numel():,} numbers")
            real = torch.nn.Parameter(torch.zeros(kind[0], dtype=kind[1]))
            real.grad = torch.randn_like(real)
            tried.register_parameter(name.replace(".", "_"), real)
            kinds.append(kind)
    optimizer = make_optimizer(tried, _in_plain_memory(cell), device="cpu")
    optimizer.step()
    own: dict[tuple[Any, ...], int] = {}
    owners: Counter[int] = Counter()
    states = [
        [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
        for parameter in tried.parameters()
    ]
    for tensors in states:
        owners.update({tensor.untyped_storage().data_ptr() for tensor in tensors})
    shared = [one for tensors in states for one in tensors if owners[one.untyped_storage().data_ptr()] > 1]
    for kind, tensors in zip(kinds, states, strict=True):
        own[kind] = stored_bytes(one for one in tensors if owners[one.untyped_storage().data_ptr()] == 1)
    each = {kind: count * own[kind] for kind, count in alike.items()}
    paged = sum(held for kind, held in each.items() if math.prod(kind[0]) >= _LEAST_PAGED)
    return stored_bytes(shared) + sum(each.values()), paged


def _batch(largest: Pass) -> Any:
    """A pass of that shape, as `AnswerLoss` asks for it."""
    shape = (largest.rows, largest.length)
    places = torch.zeros(largest.answer_tokens, dtype=torch.long)
    inputs = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "attention_mask": None if largest.packed else torch.ones(shape, dtype=torch.long),
        "use_cache": False,
    }
    return SimpleNamespace(
        inputs=lambda: inputs,
        labelled=lambda states, after: at_positions(states, places, places + after),
        targets=places,
    )


def _short(error: Exception) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:160]}"

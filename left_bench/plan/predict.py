"""A cell's memory from shapes alone: the model, its adapter and its optimizer as tensors that hold nothing, and a step.

The parts of `memory_breakdown` are counted as a run counts them. The peak is that of one whole optimizer step of the
same code, carried out on fake tensors (torch's FakeTensorMode: shapes, dtypes and lifetimes, no numbers), with every
storage followed from its making to its end.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from left_bench.compat.torch import (
    DataDependentOutputException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    one_of_many,
    storage_key,
    watch_resizing,
)
from left_bench.core.errors import Unsupported, UserError
from left_bench.data import Example, load_data, split_passes, step_rows
from left_bench.data.batches import at_positions
from left_bench.measure.meter import stored_bytes
from left_bench.measure.method_buffers import Modules, frozen_tensors, modules_of
from left_bench.methods import data_init
from left_bench.methods.attach import added_parameters, after_optimizer_step, regularization, trainable_parameters
from left_bench.methods.partial import decoder_layers
from left_bench.model.load import DTYPES, autocast
from left_bench.plan.follow import Storages, as_on
from left_bench.plan.repeat import Walk, are_alike, extrapolated, repeats_of, shortened, tell_layers
from left_bench.plan.result import Pass, Plan, Rows
from left_bench.plan.shapes import (
    adapter_of_shapes,
    give_numbers,
    is_architecture_alone,
    model_of_shapes,
    replace_tensors,
)
from left_bench.pretrained import fetched, load_tokenizer, source
from left_bench.pretrained.make import byte_tokenizer
from left_bench.quantization import stored_bytes_of
from left_bench.spec.cell import Cell, fingerprint
from left_bench.training.loop import make_optimizer, state_tensors
from left_bench.training.loss import AnswerLoss
from left_bench.training.sharding import shard

_SHOWN_STEPS = 1000
_FEW = 16
_LARGEST_TRIED = 2**26
_ON_HOST = "boft_P"
"""BOFT's permutations: peft makes them on the host, and moves to the base layer's device what is trained alone."""
_LEAST_PAGED = 100_000  # weights; bitsandbytes keeps the states of smaller parameters as they are (optim/optimizer.py)


@dataclass
class Known:
    """What was worked out for other cells and stands for several: a step is the same over every quantization."""

    methods: dict[str, Plan] = field(default_factory=dict)
    passes: dict[str, tuple[Pass, Pass]] = field(default_factory=dict)


def predict(cell: Cell, *, known: Known | None = None, rows: Rows | None = None) -> Plan:
    """What `cell` will hold in memory while it trains.

    Args:
        known: what was worked out for other cells, and is to be taken from there.
        rows: how long they are, where the data is not to be asked.

    Raises:
        UserError: the model's configuration cannot be had.
    """
    known, rows = known or Known(), rows or Rows()
    largest, mean = _passes(cell, rows, known)
    plan = Plan(largest)
    model = model_of_shapes(cell)
    weights: int | None = bytes_of(chain(model.parameters(), model.buffers()))
    plan.total_params = sum(parameter.numel() for parameter in model.parameters())
    saved, workspace = 0, 0
    try:
        saved, workspace = _by_quantizing(model, cell)
    except ValueError as error:
        plan.unknown.append(f"weights: {error}")
    method = _with_method(largest, model, cell, known)
    if cell.hardware.sharding is not None:  # a step shows which part of them a process holds
        weights = method.parts.get("weights")
    if weights is not None and not plan.unknown:
        plan.parts["weights"] = weights - saved
    plan.parts |= {part: size for part, size in method.parts.items() if part != "weights"}
    if "activations_and_workspace" in plan.parts:
        plan.parts["activations_and_workspace"] += workspace
    plan.unknown += method.unknown
    plan.trainable_params, plan.paged_optimizer_bytes = method.trainable_params, method.paged_optimizer_bytes
    if rows.with_mean:
        plan.mean = mean
        ordinary = _with_method(mean, model_of_shapes(cell), cell, known).parts.get("activations_and_workspace")
        plan.mean_activations_bytes = None if ordinary is None else ordinary + workspace
    return plan


def _by_quantizing(model: Any, cell: Cell) -> tuple[int, int]:
    """Bytes that quantizing takes off the weights, and those of the largest layer decoded.

    Raises:
        ValueError: they are not known, and why.
    """
    published = getattr(model.config, "quantization_config", None)
    if published is not None and cell.quantization.checkpoint_method is None:
        raise ValueError("the checkpoint comes quantized, and how its layers are stored is not known here")
    if cell.quantization.target is None and cell.quantization.checkpoint_method is None:
        return 0, 0
    layers, stored = list(quantizable(model).values()), stored_bytes_of(cell)
    if cell.quantization.checkpoint_method is not None or stored is None:
        raise ValueError(f"how {cell.quantization.name} stores a layer is not known here")
    if cell.hardware.sharding is not None and not _stays_whole(cell):
        raise ValueError(f"how {cell.quantization.name} is divided over processes is not known here")
    item = DTYPES[cell.precision.compute_dtype].itemsize
    saved = sum(layer.weight.nbytes - stored(layer.out_features, layer.in_features) for layer in layers)
    return saved, max((layer.weight.numel() * item for layer in layers), default=0)


def _stays_whole(cell: Cell) -> bool:
    """Whether FSDP2 leaves the cell's quantized weights whole on every process (`compat.bitsandbytes.not_to_shard`)."""
    return bool(cell.quantization.config.get("load_in_4bit"))


def _with_method(largest: Pass, model: Any, cell: Cell, known: Known) -> Plan:
    """The parts that the method, its optimizer and a step add to the base model's weights."""
    other = ("eval", "seed") if cell.hardware.sharding is not None else ("quantization", "eval", "seed")
    alike = fingerprint([cell.identity | dict.fromkeys(other), asdict(largest)])
    if alike not in known.methods:
        walk = None
        with contextlib.suppress(Exception):  # whatever it is, the whole model tells it in its own words
            walk = _short_walk(largest, model, cell)
        known.methods[alike] = _plan_of(walk or _whole_walk(largest, model, cell), largest)
    return known.methods[alike]


def _short_walk(largest: Pass, model: Any, cell: Cell) -> Walk | None:
    """That of a model whose layers repeat, from two that have few of them; None where they do not."""
    repeats = repeats_of(model, cell)
    if repeats is None:
        return None
    lengths = repeats.kept, repeats.kept + repeats.period
    short, longer = (_walk(largest, shortened(model, layers), cell, period=repeats.period) for layers in lengths)
    return extrapolated(short, longer, repeats)


def _whole_walk(largest: Pass, model: Any, cell: Cell) -> Walk:
    try:
        return _walk(largest, model, cell)
    except (UserError, Unsupported):
        raise
    except Exception:  # a method that looks at the weights, or draws what decides a shape
        walk = Walk()
        model = model_of_shapes(cell)
        try:
            give_numbers(model)
            return _walk(largest, model, cell, into=walk)
        except (UserError, Unsupported):
            raise
        except Exception as error:
            attached = "adapter" in walk.amounts or cell.peft.target is None
            what = "the step" if attached else f"the adapter of peft={cell.peft.name} and all that follows"
            walk.unknown.append(f"{what}: it cannot be followed without the model itself ({_short(error)})")
    return walk


def _plan_of(walk: Walk, largest: Pass) -> Plan:
    """A walk's numbers by the names of a plan; a part that the walk did not come to is absent."""
    amounts = walk.amounts
    plan = Plan(largest, trainable_params=amounts.get("trainable_params", 0), unknown=walk.unknown)
    plan.paged_optimizer_bytes = amounts.get("paged_optimizer", 0)
    parts = ("weights", "adapter", "gradients", "optimizer")
    for key, part in {**dict(zip(parts, parts, strict=True)), "frozen": "adapter_frozen"}.items():
        if key in amounts and (key != "frozen" or amounts[key]):
            plan.parts[part] = amounts[key]
    if walk.peaks:
        made_in_step = amounts["frozen"] - amounts["frozen_before"]
        beyond = max(walk.peaks.values()) - amounts["held"] - amounts["gradients"] - made_in_step
        plan.parts["activations_and_workspace"] = max(0, beyond)
    return plan


def _walk(largest: Pass, model: Any, cell: Cell, *, into: Walk | None = None, period: int | None = None) -> Walk:
    """Attach the cell's method to the base model, and take a step where steps can be followed.

    Args:
        into: what is counted stays there when an exception ends the walk.
        period: of the layers, for a model that stands for one with more of them.
    """
    walk = Walk() if into is None else into
    layers = decoder_layers(model) if period is not None else []
    of_base, modules = [name for name, _ in model.named_parameters()], modules_of(model)
    model = adapter_of_shapes(model, cell, rows=_rows_to_start_from(cell))
    trained = trainable_parameters(model)
    walk.amounts["trainable_params"] = sum(parameter.numel() for parameter in trained)
    if cell.peft.target is not None:
        walk.amounts["adapter"] = bytes_of(added_parameters(model, base=of_base))
    if not cell.task.is_decoder or cell.training.objective != "sft":
        walk.unknown.append("the step: only a decoder's supervised fine-tuning is followed")
    else:
        if period is not None and not are_alike(layers, period=period):
            raise ValueError(f"peft={cell.peft.name} makes the layers differ")
        _take_step(walk, model, cell, largest=largest, base=modules, layers=layers)
    return walk


def _passes(cell: Cell, rows: Rows, known: Known) -> tuple[Pass, Pass]:
    """The largest pass and the ordinary one."""
    if rows.longest is not None:
        return tuple(_assumed_pass(cell, length) for length in (rows.longest, rows.mean or rows.longest))  # type: ignore[return-value]
    told_by = [cell.identity[group] for group in ("model", "data")]
    shape = cell.training.model_dump(include={"batch_size", "gradient_accumulation", "batching", "steps", "max_length"})
    key = fingerprint([*told_by, shape, rows.with_mean, cell.hardware.processes, cell.one_answer_a_row, cell.seed])
    if key not in known.passes:
        largest = largest_pass(cell)
        known.passes[key] = largest, mean_pass(cell) if rows.with_mean else largest
    return known.passes[key]


def _assumed_pass(cell: Cell, length: int) -> Pass:
    """The pass of rows that are all as long."""
    each = _rows_of_a_process(cell)
    if cell.training.batching == "packed":
        return Pass(1, each * length, each * length, False, True)
    return Pass(each, length, each * length, False)


def _rows_of_a_process(cell: Cell) -> int:
    return max(1, cell.training.batch_size // cell.hardware.processes)


def largest_pass(cell: Cell) -> Pass:
    """The pass with the most tokens, padding included, over the cell's steps; an upper bound where rows are not here.

    Rows are read and tokenized only when the tokenizer and the data are on this machine already.
    """
    result = None
    for item in _passes_at_hand(cell):
        if result is None or item.rows * item.length > result.rows * result.length:
            result = item
    return result or _assumed_pass(cell, cell.training.max_length)


def mean_pass(cell: Cell) -> Pass:
    """The pass of so many tokens, padding included, as the cell's passes have on the average."""
    passes = list(_passes_at_hand(cell))
    if not passes:
        return _assumed_pass(cell, cell.training.max_length)
    rows = max(batch.rows for batch in passes)
    length = round(sum(batch.rows * batch.length for batch in passes) / len(passes) / rows)
    answers = round(sum(batch.answer_tokens for batch in passes) / len(passes))
    return Pass(rows, max(1, length), max(1, answers), True, passes[0].packed)


def _passes_at_hand(cell: Cell) -> Iterator[Pass]:
    """The passes of the first steps, one after the other; none where the rows are not on this machine."""
    settings, rows = cell.training, _rows_at_hand(cell)
    if rows is None:
        return
    each, packed = _rows_of_a_process(cell), settings.batching == "packed"
    for indices in step_rows(
        len(rows),
        rows_per_step=settings.rows_per_step,
        steps=min(settings.steps, _SHOWN_STEPS),
        seed=cell.seed,
    ):
        examples = [rows[index] for index in indices]
        for batch in split_passes(examples, batch_size=settings.batch_size, batching=settings.batching):
            mine = batch[:each]
            lengths = [example.length for example in mine]
            shape = (1, sum(lengths)) if packed else (len(mine), max(lengths))
            yield Pass(*shape, sum(example.labels for example in mine), True, packed)


def _rows_at_hand(cell: Cell) -> Sequence[Example] | None:
    folder = fetched(cell.model, dtype=cell.precision.weights_dtype)
    if (cell.data.source == "hub" and cell.data.path is None) or is_architecture_alone(cell.model):
        return None
    if folder is not None and source(cell.model) == "hub" and not any(Path(folder).glob("token*")):
        return None  # the hub's configuration alone
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
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    storages = [tensor.untyped_storage() for tensor in local]
    return sum({storage_key(storage): storage.nbytes() for storage in storages}.values())


def _take_step(
    walk: Walk, model: Any, cell: Cell, *, largest: Pass, base: Modules, layers: Sequence[torch.nn.Module]
) -> None:
    """One optimizer step, every storage followed; fills in gradients, optimizer and the peak at each place."""
    amounts, sharded = walk.amounts, cell.hardware.sharding is not None
    with contextlib.ExitStack() as stack:
        if sharded:
            stack.enter_context(one_of_many(cell.hardware.processes))
            mesh = init_device_mesh("cpu", (cell.hardware.processes,))  # which is made of numbers
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        storages = stack.enter_context(Storages())
        # autocast passes by tensors on the meta device
        replace_tensors(model, _fake)
        if sharded:
            stack.enter_context(watch_resizing(storages.resized))
            _shard(model, cell, mesh)
            amounts |= _bytes_of_shards(model, attached=cell.peft.target is not None)
        left_on_host = _leave_on_host(model) if cell.device_type != "cpu" else 0
        trained = trainable_parameters(model)
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        amounts["gradients"] = bytes_of(parameter.grad for parameter in trained if parameter.grad is not None)
        optimizer = None
        with contextlib.suppress(DataDependentOutputException, UnsupportedFakeTensorException, RuntimeError):
            optimizer = make_optimizer(model, _in_plain_memory(cell), device="cpu")
            optimizer.step()  # makes the states; the step that is followed is one that has them
            amounts["optimizer"] = bytes_of(state_tensors(optimizer))
        if "optimizer" not in amounts:
            optimizer = None
        if sharded:  # of each operation on shards it is worked out once, on tensors of the whole shape, what it gives
            torch.nn.utils.clip_grad_norm_(trained, math.inf)
        storages.answering = True
        after_optimizer_step(model, 0)
        model.zero_grad(set_to_none=True)

        everywhere = cell.training.output_head == "all"
        kind = cell.device_type
        loss = (
            AnswerLoss(model, everywhere=True)
            if everywhere
            else AnswerLoss.assumed(model, kind=kind, in_chunks=not sharded)
        )
        amounts["held"] = storages.now
        amounts["frozen_before"] = bytes_of(frozen_tensors(model, base=base)) - left_on_host
        tell_layers(layers, storages)
        model.train()
        passes = min(2, cell.training.gradient_accumulation)
        for number in range(passes):  # the second has the first one's gradients
            if sharded:  # they go round once a step
                model.set_requires_gradient_sync(number == passes - 1)
            storages.begin(f"forward {number}")
            with autocast(cell, device="cpu"), as_on(cell.device_type, autocasting=cell.autocast):
                total = loss.summed(_batch(largest))
            penalty = regularization(model)
            storages.begin(f"backward {number}")
            (total if penalty is None else total + penalty).backward()
            del total, penalty
        storages.answering = False
        if len(trainable_parameters(model)) > len(trained):  # MonteCLoRA makes its samplers where there are numbers
            raise ValueError("a part that is trained is made in the first pass alone")
        _take_in_gradients(amounts, trained, optimizer)
        storages.begin("clip")
        torch.nn.utils.clip_grad_norm_(trained, cell.training.max_grad_norm or math.inf)
        if optimizer is not None:
            storages.begin("optimizer")
            optimizer.step()
    amounts["frozen"] = bytes_of(frozen_tensors(model, base=base)) - left_on_host
    if optimizer is None:  # one whose states only numbers make
        amounts["optimizer"], _ = _states_by_trial(model, cell)
    if ".Paged" in cell.optimizer.target:  # counted apart, as a run does: the card's allocator does not hold them
        states, amounts["paged_optimizer"] = _states_by_trial(model, cell)
        amounts["optimizer"] = states - amounts["paged_optimizer"]
    walk.peaks = storages.peaks


def _shard(model: Any, cell: Cell, mesh: DeviceMesh) -> None:
    """Divide the model over the cell's processes, of which this one holds the first part."""
    quantized: list[Any] = [layer.weight for layer in quantizable(model).values() if not layer.weight.requires_grad]
    shard(model, mesh, left_whole=quantized if _stays_whole(cell) else (), **cell.hardware.sharding_config)


def _bytes_of_shards(model: Any, *, attached: bool) -> dict[str, int]:
    """The parts `weights` and `adapter` as a process holds them (`training.loop.held_weights`)."""
    trained = trainable_parameters(model) if attached else []
    own = {id(parameter) for parameter in trained}
    others = [tensor for tensor in chain(model.parameters(), model.buffers()) if id(tensor) not in own]
    return {"weights": bytes_of(others)} | ({"adapter": bytes_of(trained)} if attached else {})


def _leave_on_host(model: torch.nn.Module) -> int:
    """Bytes that a method leaves on the host beside an accelerator, which its layers copy to it in each pass.

    A stand-in of a dtype that no layer computes in has them copied here too.
    """
    held = [module for module in model.modules() if isinstance(getattr(module, _ON_HOST, None), torch.Tensor)]
    for module in held:
        setattr(module, _ON_HOST, torch.empty_like(getattr(module, _ON_HOST), dtype=torch.float64))
    return bytes_of(getattr(module, _ON_HOST) for module in held)


def _take_in_gradients(amounts: dict[str, int], trained: Sequence[torch.Tensor], optimizer: Any) -> None:
    """Gradients as they are after a step's passes: some are slices of larger ones (OSF), and some never come.

    Trainable parameters that the loss does not reach have no optimizer's states either (ShadowPEFT has some).
    """
    amounts["gradients"] = bytes_of(parameter.grad for parameter in trained if parameter.grad is not None)
    untouched = [parameter for parameter in trained if parameter.grad is None]
    if optimizer is not None and untouched:
        for parameter in untouched:
            optimizer.state.pop(parameter, None)
        amounts["optimizer"] = bytes_of(state_tensors(optimizer))


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
    shared = [item for tensors in states for item in tensors if owners[item.untyped_storage().data_ptr()] > 1]
    for kind, tensors in zip(kinds, states, strict=True):
        own[kind] = stored_bytes(item for item in tensors if owners[item.untyped_storage().data_ptr()] == 1)
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

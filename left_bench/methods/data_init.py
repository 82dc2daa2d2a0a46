"""Adapters that are initialized from training rows: EVA, LoRA-GA, CorDA, and the context of CPT.

LoRA-GA and CorDA subtract their initial product B A from the base weights, so that the adapted model begins as the base
model. What they subtracted is saved next to the adapter, because it cannot be recomputed when the adapter is loaded.
"""

from __future__ import annotations

import io
import itertools
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file, save, save_file
from transformers import PreTrainedModel

from left_bench.compat.peft import put_corda_start
from left_bench.core.errors import UserError
from left_bench.data import Batch, Example, collate

START_NAME = "start.safetensors"
_WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_EIGENS = ("S_WC", "U_WC", "V_WC")
_EVA_ROWS = 256
_GRADIENT_ROWS = 64
_COVARIANCE_ROWS = 64
CONTEXT_ROWS = 4
_INPUT, _ANSWER, _KINDS = 2, 4, 4  # CPT's kinds of token; the numbers increase from example to example


def context_of(rows: Sequence[Example]) -> dict[str, list[int]]:
    """CPT's arguments: the first training rows as examples in the context (Blau et al. 2024).

    The embeddings of their prompts are trained, those of their answers are not.
    """
    ids: list[int] = []
    kinds: list[int] = []
    for number, row in enumerate(rows[:CONTEXT_ROWS]):
        ids += [*row.prompt_ids, *row.answer_ids]
        kinds += [_INPUT + _KINDS * number] * len(row.prompt_ids)
        kinds += [(_ANSWER if answers else _INPUT) + _KINDS * number for answers in row.of_answer]
    return {"cpt_token_ids": ids, "cpt_mask": [1] * len(ids), "cpt_tokens_type_mask": kinds}


def invocation_of(rows: Sequence[Example]) -> list[int]:
    """aLoRA's invocation: the tokens with which every prompt ends, such as a chat template's `assistant` header.

    Raises:
        UserError: the prompts of the training rows have no common end.
    """
    ends = zip(*(reversed(row.prompt_ids) for row in rows), strict=False)
    common = list(itertools.takewhile(lambda ids: len(set(ids)) == 1, ends))
    if not common:
        raise UserError(
            "peft.config.alora_invocation_tokens: the prompts of the training rows do not end with the "
            "same tokens; give the token ids, or a data.template with the same ending in every row"
        )
    return [ids[0] for ids in reversed(common)]


def arguments_from_rows(target: str, arguments: dict[str, Any], rows: Sequence[Example]) -> dict[str, Any]:
    """A method's arguments, with token ids taken from the rows where the option leaves them open."""
    if target == "peft.CPTConfig" and arguments.get("cpt_token_ids") is None:
        return arguments | context_of(rows)
    if arguments.get("alora_invocation_tokens", 0) is None:
        return arguments | {"alora_invocation_tokens": invocation_of(rows)}
    return arguments


def asks_for_rows(target: str | None, arguments: dict[str, Any]) -> bool:
    """Whether a method's arguments depend on the training rows, so that its shapes are unknown without them."""
    return target == "peft.CPTConfig" or arguments.get("alora_invocation_tokens", 0) is None


def look_at_rows(model: PreTrainedModel, config: Any, rows: Sequence[Example], *, batch_size: int, pad_id: int) -> None:
    """Collect what LoRA-GA (gradients of the weights) and CorDA (covariance of the inputs) need before attaching."""
    forward: Any = model
    kind = getattr(config, "init_lora_weights", None)

    def gradients() -> None:
        for batch in _batches(rows[:_GRADIENT_ROWS], batch_size, pad_id=pad_id, device=model.device):
            forward(**_inputs(batch)).loss.backward()

    def inputs() -> None:
        with torch.no_grad():  # one row at a time, because padding would count as input
            for batch in _batches(rows[:_COVARIANCE_ROWS], 1, pad_id=pad_id, device=model.device):
                forward(**_inputs(batch))

    if kind in ("lora_ga", "corda") and config.target_modules == "all-linear":  # only understood when attaching
        head = model.get_output_embeddings()
        linear = {
            name for name, item in model.named_modules() if isinstance(item, torch.nn.Linear) and item is not head
        }
        config.target_modules = linear
    if kind == "lora_ga":
        preprocess_loraga(model, config, gradients)
    elif kind == "corda":
        training = model.training
        preprocess_corda(model, config, inputs)
        model.train(training)
        results = {name: module.eigens for name, module in model.named_modules() if hasattr(module, "eigens")}
        _keep(model, {f"{name}.{part}": getattr(eigens, part) for name, eigens in results.items() for part in _EIGENS})


def start_from_rows(
    adapted: torch.nn.Module, config: Any, rows: Sequence[Example], *, batch_size: int, pad_id: int
) -> None:
    """EVA: set A to the leading directions of each layer's inputs. LoRA-GA: store its A and B for saving."""
    kind = getattr(config, "init_lora_weights", None)
    if kind == "eva":
        directions = math.ceil(config.r * config.eva_config.rho)
        device = next(adapted.parameters()).device
        batches = _first_batches(
            rows[:_EVA_ROWS], batch_size=batch_size, answer_tokens=directions, pad_id=pad_id, device=device
        )
        initialize_lora_eva_weights(adapted, batches, show_progress_bar=False)
    elif kind == "lora_ga":
        start: dict[str, torch.Tensor] = {}
        for name, layer in adapted.named_modules():
            if isinstance(layer, LoraLayer) and "default" in layer.lora_A:
                a, b = (factor["default"].get_parameter("weight") for factor in (layer.lora_A, layer.lora_B))
                dtype = layer.get_base_layer().get_parameter("weight").dtype  # peft has rounded them to it
                start |= {f"{name}.A": a.detach().to(dtype), f"{name}.B": b.detach().to(dtype)}
                start[f"{name}.scaling"] = torch.tensor(layer.scaling["default"], dtype=torch.float64)
        _keep(adapted, {key.removeprefix(_PREFIX): value for key, value in start.items()})


def save_start(model: torch.nn.Module, folder: Path) -> None:
    """Save, next to the adapter, what its initialization subtracted from the base weights, if anything."""
    start: Any = getattr(model, "left_start", None)
    if start is not None:
        start.seek(0)
        with (folder / START_NAME).open("wb") as file:
            shutil.copyfileobj(start, file)


def keep_start(model: Any, folder: Path) -> None:
    """Let an adapter that was loaded from `folder` be saved with its start again."""
    if (folder / START_NAME).is_file():
        model.left_start = io.BytesIO((folder / START_NAME).read_bytes())


def start_again(model: PreTrainedModel, folder: Path) -> None:
    """Prepare a fresh base model for loading an adapter with a file of `save_start`.

    The sums are peft's own, in the same order, so that the base weights are bit for bit as they were in training.
    """
    if not (folder / START_NAME).is_file():
        return
    start = load_file(folder / START_NAME)
    for name in sorted({key.rpartition(".")[0] for key in start}):
        module: Any = model.get_submodule(name)
        parts = {key.rpartition(".")[2]: value for key, value in start.items() if key.rpartition(".")[0] == name}
        if "S_WC" in parts:
            put_corda_start(module, parts)
            continue
        a, b = (parts[part].float().to(module.weight.device) for part in ("A", "B"))
        dense = module.weight.data.float() - parts["scaling"].item() * (b @ a)
        module.weight.data = dense.to(module.weight.dtype)


def save_as_plain_lora(adapted: Any, folder: Path, fresh: PreTrainedModel, out: Path) -> None:
    """Save an adapter, loaded from `folder`, as plain LoRA over the original base model (before `start_again`).

    Its change is B A - B0 A0, where B0 A0 is its initial product: LoRA of twice the rank (peft's own conversion).

    Args:
        fresh: another copy of the base model, on which the initial product is computed.
    """
    start = load_file(folder / START_NAME)
    with tempfile.TemporaryDirectory() as initial:
        if any(key.endswith(".S_WC") for key in start):
            start_again(fresh, folder)
            begun = get_peft_model(fresh, PeftConfig.from_pretrained(str(folder)))
            factors = get_peft_model_state_dict(begun)
        else:
            factors = {
                f"{_PREFIX}{name}.lora_{part}.weight": value.float()
                for (name, _, part), value in ((key.rpartition("."), value) for key, value in start.items())
                if part in "AB"
            }
        save_file({name: value.contiguous() for name, value in factors.items()}, Path(initial) / _WEIGHTS_NAME)
        adapted.save_pretrained(out, path_initial_model_for_weight_conversion=initial)


def _keep(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Store them in a temporary file: in memory they would count as the method's."""
    model.left_start = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the model
    model.left_start.write(save({name: value.contiguous() for name, value in tensors.items()}))


def _batches(rows: Sequence[Example], size: int, *, pad_id: int, device: torch.device) -> Iterator[Batch]:
    for first in range(0, len(rows), size):
        yield collate(rows[first : first + size], pad_id=pad_id).to(device)


def _inputs(batch: Batch) -> dict[str, Any]:
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}


def _first_batches(
    rows: Sequence[Example], *, batch_size: int, answer_tokens: int, pad_id: int, device: torch.device
) -> list[dict[str, Any]]:
    """Batches of the training rows in order, as many as EVA's decompositions may need.

    Every batch has at least `answer_tokens` answer tokens: peft skips smaller ones, and would loop forever.
    """
    batches, taken = [], []
    for row in rows:
        taken.append(row)
        if len(taken) >= batch_size and sum(row.labels for row in taken) >= answer_tokens:
            batches.append(_inputs(collate(taken, pad_id=pad_id).to(device)))
            taken = []
    if not batches:
        raise UserError(
            f"peft.config.r: EVA looks for {answer_tokens} directions in the inputs of answer tokens, and the training "
            "rows have fewer; lower the rank or give more rows"
        )
    return batches

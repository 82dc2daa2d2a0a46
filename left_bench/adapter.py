"""Attach a PEFT method to a base model, train-time hooks of methods that have them, and save what was trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftModel,
    PeftType,
    PromptLearningConfig,
    get_peft_model,
    initialize_kv_prefix_from_text,
    initialize_lora_eva_weights,
)
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from left_bench.cell import Cell
from left_bench.data import Example, collate
from left_bench.errors import UserError
from left_bench.in_force import stored_integers_are_not_read
from left_bench.instantiate import instantiate
from left_bench.methods import Method, load_attached, method_in
from left_bench.model import DTYPES, quantized_weights
from left_bench.task import TASKS, classifier_of

_EVA_ROWS = 256
_KEY_VALUE_PREFIX = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)


def attach_adapter(
    model: PreTrainedModel, cell: Cell, *, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example]
) -> torch.nn.Module:
    """Freeze the base model and attach the cell's method; full fine-tuning attaches nothing and freezes nothing.

    `rows` are the training rows, for a method that is initialized from data (EVA).

    Raises:
        UserError: an argument that the method's configuration does not have, or a method that does not fit the model.
    """
    if cell.training.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.config.use_cache = False
    if cell.peft.target is None:
        # a quantized weight cannot take a gradient; torch says so here when such a cell is forced
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model
    arguments = dict(cell.peft.config)
    if cell.peft.target.startswith("peft."):
        arguments.setdefault("task_type", TASKS[cell.model.task].peft_type)
        if (head := classifier_of(model)) is not None:  # new, so every method trains it whole
            arguments.setdefault("modules_to_save", [head])
            if arguments.get("target_modules") == "all-linear":  # peft would adapt the output layer too
                linear = [name for name, one in model.named_modules() if hasattr(one, "in_features")]
                arguments["target_modules"] = [name for name in linear if name != head]
    if arguments.get("adapter_layers", 0) is None:
        arguments["adapter_layers"] = model.config.num_hidden_layers
    if cell.peft.target == "peft.PrefixTuningConfig" and hasattr(model.config, "d_kv"):
        # peft takes the model's width for that of all heads together, which T5's need not be
        arguments.setdefault("token_dim", model.config.d_kv * model.config.num_heads)
    config = instantiate(cell.peft.target, arguments, key="peft")
    if quantized_weights(model):
        _prepare_quantized(model)
    torch.manual_seed(cell.seed)  # the adapter's initialization is the seed's, whatever was drawn before
    if isinstance(config, Method):
        return config.attach(model, adapter_dtype=DTYPES[cell.precision.adapter_dtype])
    in_float32 = cell.precision.adapter_dtype == "float32"  # what peft does of itself over half-precision weights
    with stored_integers_are_not_read(model):  # some methods start from the weight's values
        adapted = get_peft_model(model, config, autocast_adapter_dtype=in_float32)
    if not in_float32:
        for parameter in trainable_parameters(adapted):
            parameter.data = parameter.data.to(DTYPES[cell.precision.adapter_dtype])
    if cell.autocast:
        let_autocast_convert(adapted)
    if cell.peft.init_text is not None and not model.config.is_encoder_decoder:
        initialize_kv_prefix_from_text(adapted, tokenizer, text=cell.peft.init_text)
    if getattr(config, "init_lora_weights", None) == "eva":
        directions = math.ceil(config.r * config.eva_config.rho)
        batches = _first_batches(
            rows, cell, answer_tokens=directions, pad_id=tokenizer.pad_token_id, device=model.device
        )
        initialize_lora_eva_weights(adapted, batches, show_progress_bar=False)
    return adapted


def let_autocast_convert(model: torch.nn.Module) -> None:
    """Keep LoRA's layers from widening their inputs to the adapter's float32.

    Autocast would round the copies back before the product; without them a step of SmolLM2 in bfloat16 takes a fifth
    less time, and the losses are the same numbers.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False


def _first_batches(
    rows: Sequence[Example], cell: Cell, *, answer_tokens: int, pad_id: Any, device: torch.device
) -> list[dict[str, Any]]:
    """The training rows in their own order, as many as EVA's decompositions may ask for.

    Every batch has at least so many answer tokens: peft skips a smaller one, and would go on skipping for ever.
    """
    batches, taken = [], []
    for row in rows[:_EVA_ROWS]:
        taken.append(row)
        if len(taken) >= cell.training.batch_size and sum(len(row.answer_ids) for row in taken) >= answer_tokens:
            batches.append(collate(taken, pad_id=pad_id).to(device))
            taken = []
    if not batches:
        raise UserError(
            f"peft.config.r={cell.peft.config['r']}: EVA looks for {answer_tokens} directions in the inputs of answer "
            "tokens, and the training rows have fewer; lower the rank or give more rows"
        )
    return [batch.inputs() | {"labels": batch.labels} for batch in batches]


def _prepare_quantized(model: PreTrainedModel) -> None:
    """Freeze a quantized base model and keep what is left of it in the dtype it was loaded in.

    peft's `prepare_model_for_kbit_training` casts every unquantized parameter to float32; that doubles the bytes of a
    tied embedding (a fifth of a small model) and would make the quantized cell look larger than it is.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def virtual_positions(model: torch.nn.Module) -> int:
    """Positions that the method puts before the input and that appear in the logits.

    0 for key-value prefixes, and where virtual tokens are an encoder's.
    """
    if not isinstance(model, PeftModel) or model.config.is_encoder_decoder:
        return 0
    config = model.active_peft_config
    if not isinstance(config, PromptLearningConfig) or config.peft_type in _KEY_VALUE_PREFIX:
        return 0
    return int(config.num_virtual_tokens)


def regularization(model: torch.nn.Module) -> torch.Tensor | None:
    """The term that AdaLoRA adds to the loss, else None.

    Zhang et al. 2023, eq. 4: the mean over the factors P, Q of ||P P^T - I||_F, times `orth_reg_weight`. peft adds it
    only to a loss the model computed itself, and ours is computed outside the model.
    """
    if not _is_adalora(model):
        return None
    tuner: Any = model.base_model
    name = tuner.trainable_adapter_name
    distances = []
    for key, parameter in tuner.model.named_parameters():
        if name in key and ("lora_A" in key or "lora_B" in key):
            gram = parameter @ parameter.T if "lora_A" in key else parameter.T @ parameter
            distances.append(
                torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
            )
    weight = tuner.peft_config[name].orth_reg_weight
    return weight * torch.stack(distances).mean()


def after_optimizer_step(model: torch.nn.Module, step: int) -> None:
    """What a method does between the optimizer's step and zeroing the gradients: AdaLoRA moves its rank budget."""
    if _is_adalora(model):
        tuner: Any = model.base_model
        tuner.update_and_allocate(step)


def trainable_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that receive a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def save_trained(model: torch.nn.Module, folder: Path) -> int:
    """Save what training produced (the adapter, or the whole model) as safetensors.

    Returns:
        Bytes of the weight files on disk.
    """
    save: Any = model.save_pretrained
    save(folder)
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def load_trained(model: PreTrainedModel, folder: Path) -> torch.nn.Module:
    """Give a fresh base model what `save_trained` left in `folder`: an adapter, a part, or all of the weights.

    Raises:
        UserError: what was saved does not fit this base model.
    """
    method = method_in(folder)
    if method is not None:
        return load_attached(model, folder, method=method)
    if (folder / "adapter_config.json").is_file():
        return PeftModel.from_pretrained(model, folder)
    absent = {name for name, _ in model.named_parameters()}
    for path in sorted(folder.glob("*.safetensors")):
        weights = load_file(path)
        unexpected = set(weights) - set(model.state_dict())
        if unexpected and (folder / "config.json").is_file():
            # transformers saves some families under the names of their first checkpoints, and reads them back so (ViT)
            weights = type(model).from_pretrained(folder, dtype=model.dtype).state_dict()
            unexpected = set(weights) - set(model.state_dict())
        if unexpected:
            raise UserError(f"{path}: this base model has no '{min(unexpected)}'; load the model it was saved from")
        model.load_state_dict(weights, strict=False)
        absent -= weights.keys()
    if absent:
        raise UserError(f"{folder}: no weights for '{min(absent)}'; load the folder that save_trained wrote")
    return model


def _is_adalora(model: torch.nn.Module) -> bool:
    return isinstance(model, PeftModel) and isinstance(model.base_model, AdaLoraModel)

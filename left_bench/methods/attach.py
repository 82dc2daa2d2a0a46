"""Attach a PEFT method to a base model, run its training-time hooks, and save what was trained."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftModel,
    PeftType,
    PromptLearningConfig,
    get_peft_model,
    initialize_kv_prefix_from_text,
)
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.multitask_prompt_tuning import MultitaskPromptEmbedding
from peft.tuners.poly.layer import PolyLayer
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from left_bench.compat.peft import freeze_ranks, load_unrounded, method_loss, names_no_layer
from left_bench.core.errors import Unsupported, UserError
from left_bench.data import Example
from left_bench.methods import Method, data_init, load_attached, method_in
from left_bench.methods.verify import check_variant, stored_integers_are_not_read
from left_bench.model.load import DTYPES, quantized_weights
from left_bench.spec.cell import Cell
from left_bench.spec.instantiate import instantiate, takes_argument
from left_bench.spec.task import is_within, new_layers_of

_KEY_VALUE_PREFIX = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)


def attach_adapter(
    model: PreTrainedModel,
    cell: Cell,
    *,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    start: Path | None = None,
) -> torch.nn.Module:
    """Freeze the base model and attach the cell's method; full fine-tuning attaches nothing and freezes nothing.

    Args:
        rows: the training rows, for methods that are initialized from data (`data_init`).
        start: a folder of `save_trained` to continue from.

    Raises:
        UserError: an argument that the method's configuration does not have, or a method that does not fit the model.
        Unsupported: the method's library cannot attach it to this model, or not in combination with the cell's options.
    """
    if cell.training.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.config.use_cache = False
    if cell.peft.target is None:
        # a quantized weight cannot have a gradient; torch raises an error here if such a cell is forced
        adapted: torch.nn.Module = model if start is None else load_trained(model, start)
        for parameter in adapted.parameters():
            parameter.requires_grad_(True)
        return adapted
    if start is not None:
        return _continued(model, cell, start)
    arguments = dict(cell.peft.config)
    if cell.peft.target.startswith("peft."):
        arguments.setdefault("task_type", cell.task.peft_type)
        if new := new_layers_of(model):  # every method trains them in full
            if takes_argument(cell.peft.target, "modules_to_save"):  # otherwise peft adds them according to the task
                arguments.setdefault("modules_to_save", new)
            if arguments.get("target_modules") == "all-linear":  # peft would adapt the output layer too
                linear = [name for name, layer in model.named_modules() if hasattr(layer, "in_features")]
                arguments["target_modules"] = [name for name in linear if not is_within(name, new)]
    if cell.peft.target == "peft.LNTuningConfig":
        pattern = arguments.get("target_modules")
        if isinstance(pattern, str) and not any(re.fullmatch(pattern, name) for name, _ in model.named_modules()):
            arguments["target_modules"] = f"(?i:{pattern})"  # BERT writes `LayerNorm`
    if arguments.get("adapter_layers", 0) is None:
        arguments["adapter_layers"] = model.config.num_hidden_layers
    arguments = data_init.arguments_from_rows(cell.peft.target, arguments, rows)
    if cell.peft.target == "peft.PrefixTuningConfig" and hasattr(model.config, "d_kv"):
        # peft assumes that all heads together are as wide as the model, which may be wrong for T5
        arguments.setdefault("token_dim", model.config.d_kv * model.config.num_heads)
    config = instantiate(cell.peft.target, arguments, key="peft")
    if quantized_weights(model):
        _prepare_quantized(model)
    few: dict[str, Any] = {"batch_size": cell.training.batch_size, "pad_id": getattr(tokenizer, "pad_token_id", 0)}
    data_init.look_at_rows(model, config, rows, **few)
    torch.manual_seed(cell.seed)  # the adapter's initialization depends only on the seed
    if isinstance(config, Method):
        return config.attach(model, adapter_dtype=DTYPES[cell.precision.adapter_dtype])
    in_float32 = cell.precision.adapter_dtype == "float32"  # peft's default over half-precision weights
    try:
        with stored_integers_are_not_read(model):  # some methods are initialized from the weight's values
            adapted = get_peft_model(model, config, autocast_adapter_dtype=in_float32)
    except ValueError as error:  # how peft refuses what it does not support; its bugs raise other exceptions
        if names_no_layer(error) and isinstance(arguments.get("target_modules"), list):
            raise  # the user named layers that the model does not have
        text = " ".join(str(error).split())
        raise Unsupported(f"peft={cell.peft.name} on {type(model).__name__}: peft refuses it ({text[:300]})") from error
    check_variant(adapted)
    check_new_layers(adapted, new_layers_of(model), cell)
    if _is_adalora(adapted):
        freeze_ranks(adapted)
    _use_one_task(adapted)
    data_init.start_from_rows(adapted, config, rows, **few)
    if not in_float32:
        for parameter in trainable_parameters(adapted):
            parameter.data = parameter.data.to(DTYPES[cell.precision.adapter_dtype])
    if cell.autocast:
        let_autocast_convert(adapted)
    if cell.peft.init_text is not None and cell.task.is_decoder:  # peft has it read by a model that writes
        initialize_kv_prefix_from_text(adapted, tokenizer, text=cell.peft.init_text)
    return adapted


def _continued(model: PreTrainedModel, cell: Cell, start: Path) -> torch.nn.Module:
    """The base model with the adapter of an earlier cell, to be trained further."""
    if quantized_weights(model):
        _prepare_quantized(model)
    dtype = DTYPES[cell.precision.adapter_dtype]
    adapted = load_trained(model, start, adapter_dtype=dtype, trainable=True)
    data_init.keep_start(adapted, start)
    if isinstance(adapted, PeftModel) and dtype != torch.float32:
        for parameter in trainable_parameters(adapted):
            parameter.data = parameter.data.to(dtype)
    if cell.autocast:
        let_autocast_convert(adapted)
    return adapted


def combine_adapters(model: PreTrainedModel, cell: Cell, folders: Sequence[Path]) -> torch.nn.Module:
    """The base model with one adapter that peft makes of those in the folders; nothing of it takes a gradient.

    Raises:
        UserError: peft does not combine these.
    """
    settings, dtype = cell.training, DTYPES[cell.precision.adapter_dtype]
    if quantized_weights(model):
        _prepare_quantized(model)
    names = [f"part_{number}" for number in range(len(folders))]
    in_float32 = dtype == torch.float32
    adapted = PeftModel.from_pretrained(model, folders[0], adapter_name=names[0], autocast_adapter_dtype=in_float32)
    for name, folder in zip(names[1:], folders[1:], strict=True):
        adapted.load_adapter(str(folder), adapter_name=name, autocast_adapter_dtype=in_float32)
    keeps_a_part = settings.combine_by.startswith(("ties", "dare"))
    torch.manual_seed(cell.seed)  # DARE draws what it keeps
    tuner: Any = adapted.base_model
    try:
        tuner.add_weighted_adapter(
            names,
            settings.combine_weights or [1 / len(names)] * len(names),
            "default",
            combination_type=settings.combine_by,
            density=settings.combine_density if keeps_a_part else None,
        )
    except ValueError as error:
        text = " ".join(str(error).split())[:300]
        raise UserError(f"training.combine_by={settings.combine_by}: peft does not combine these ({text})") from error
    adapted.set_adapter("default")
    for name in names:  # else they would be saved with it
        adapted.delete_adapter(name)
    adapted.requires_grad_(False)
    if cell.autocast:
        let_autocast_convert(adapted)
    return adapted


def check_new_layers(adapted: torch.nn.Module, new: Sequence[str], cell: Cell) -> None:
    """Refuse a method that does not train a new, randomly initialized output layer: the model would only guess.

    Raises:
        Unsupported: names the layer.
    """
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    for layer in new:
        if not any(f".{layer}." in f".{name}" for name in trained):
            raise Unsupported(f"peft={cell.peft.name}: peft leaves the new output layer {layer} untrained")


def let_autocast_convert(model: torch.nn.Module) -> None:
    """Keep LoRA's layers from converting their inputs to the adapter's float32.

    Autocast would round the copies back before the product; without them a step of SmolLM2 in bfloat16 takes a fifth
    less time, and the losses are identical.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False


def _use_one_task(model: torch.nn.Module) -> None:
    """Methods for several tasks (Poly, multitask prompt tuning) need a task id in every pass: it is always 0."""

    def add_task_0(_module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        first = arguments[0]  # Poly: hidden states; prompt tuning: the virtual tokens' numbers
        return arguments[:1], named | {"task_ids": first.new_zeros(len(first), dtype=torch.long)}

    for module in model.modules():
        if isinstance(module, (PolyLayer, MultitaskPromptEmbedding)):
            module.register_forward_pre_hook(add_task_0, with_kwargs=True)


def _prepare_quantized(model: PreTrainedModel) -> None:
    """Freeze a quantized base model and keep its unquantized parameters in the dtype in which they were loaded.

    peft's `prepare_model_for_kbit_training` casts every unquantized parameter to float32; that doubles the bytes of a
    tied embedding (a fifth of a small model) and would make the quantized cell look larger than it is.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def virtual_positions(model: torch.nn.Module) -> int:
    """Number of positions that the method puts before the input and that appear in the logits.

    0 for key-value prefixes, and where virtual tokens belong to an encoder.
    """
    if not isinstance(model, PeftModel) or model.config.is_encoder_decoder:
        return 0
    config = model.active_peft_config
    if not isinstance(config, PromptLearningConfig) or config.peft_type in _KEY_VALUE_PREFIX:
        return 0
    return int(config.num_virtual_tokens)


def has_virtual_tokens(model: torch.nn.Module) -> bool:
    """Whether the method puts tokens, or keys and values, before the input."""
    return isinstance(model, PeftModel) and isinstance(model.active_peft_config, PromptLearningConfig)


def regularization(model: torch.nn.Module) -> torch.Tensor | None:
    """The term that a method adds to the loss, or None. Our loss is computed outside the model, so peft adds none
    itself.

    AdaLoRA (Zhang et al. 2023, eq. 4): the mean over the factors P, Q of ||P P^T - I||_F, times `orth_reg_weight`.
    KaSA (Wang et al. 2024, eq. 9 to 12) and MonteCLoRA: peft's own sums, with the weights of their configurations.
    """
    tuner: Any = model.base_model if isinstance(model, PeftModel) else None
    if not isinstance(tuner, LoraModel):
        return None
    if not isinstance(tuner, AdaLoraModel):
        return method_loss(tuner)
    name = tuner.trainable_adapter_name
    distances = []
    for key, parameter in tuner.model.named_parameters():
        if name in key and ("lora_A" in key or "lora_B" in key):
            gram = parameter @ parameter.T if "lora_A" in key else parameter.T @ parameter
            distances.append(
                torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
            )
    own: Any = tuner.peft_config[name]
    return own.orth_reg_weight * torch.stack(distances).mean()


def after_optimizer_step(model: torch.nn.Module, step: int) -> None:
    """Run a method's update between the optimizer's step and zeroing the gradients: AdaLoRA adjusts its rank budget."""
    if _is_adalora(model):
        tuner: Any = model.base_model
        tuner.update_and_allocate(step)


def trainable_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that receive a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def added_parameters(model: torch.nn.Module, *, base: Collection[str]) -> list[torch.nn.Parameter]:
    """The trainable parameters that a method has added, without those of the base model that it trains in place.

    Args:
        base: the names of the base model's parameters, before anything was attached.
    """

    def in_base(name: str) -> bool:
        own = name.removeprefix("base_model.").replace(".base_layer.", ".")
        return own in known or own.removeprefix("model.") in known  # peft's wrapper has one more level than ours

    known = set(base)
    return [parameter for name, parameter in model.named_parameters() if parameter.requires_grad and not in_base(name)]


def save_trained(model: torch.nn.Module, folder: Path, *, tokenizer: Any = None) -> int:
    """Save what training produced (the adapter, or the whole model) as safetensors.

    Args:
        tokenizer: the base model's tokenizer or image processor, saved together with a whole model to make it complete.

    Returns:
        Bytes of the weight files on disk.
    """
    save: Any = model.save_pretrained
    save(folder)
    data_init.save_start(model, folder)
    if tokenizer is not None and (folder / "config.json").is_file():
        tokenizer.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def load_trained(
    model: PreTrainedModel,
    folder: Path,
    *,
    adapter_dtype: torch.dtype = torch.float32,
    trainable: bool = False,
) -> torch.nn.Module:
    """Load into a fresh base model what `save_trained` wrote to `folder`: an adapter, some of the weights, or all of
    them.

    Args:
        adapter_dtype: `precision.adapter_dtype` of the cell that saved it.
        trainable: let an adapter take gradients.

    Raises:
        UserError: what was saved does not fit this base model.
    """
    method = method_in(folder)
    if method is not None:
        return load_attached(model, folder, method=method, adapter_dtype=adapter_dtype)
    if (folder / "adapter_config.json").is_file():
        data_init.start_again(model, folder)
        in_float32 = adapter_dtype == torch.float32
        adapted = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=in_float32, is_trainable=trainable)
        if _is_adalora(adapted):
            load_unrounded(adapted, folder)
        _use_one_task(adapted)
        return adapted
    absent = {name for name, _ in model.named_parameters()}
    for path in sorted(folder.glob("*.safetensors")):
        weights = load_file(path)
        unexpected = set(weights) - set(model.state_dict())
        if unexpected and (folder / "config.json").is_file():
            # transformers saves some families (ViT) under older weight names, and converts them when loading
            load: Any = type(model).from_pretrained
            saved, result = load(folder, dtype=model.dtype, output_loading_info=True)
            if not any(result.values()):  # nothing missing, unexpected or of another shape
                weights = saved.state_dict()
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

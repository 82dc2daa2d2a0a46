"""Load a base model with its quantization and precision, and check that they are in effect."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from left_bench.compat.bitsandbytes import keep_trainable
from left_bench.compat.transformers import attention_kernel, repeated_blocks
from left_bench.core.errors import NotInForce, UserError
from left_bench.core.extensions import named
from left_bench.data import Splits
from left_bench.measure.meter import constants, logical_numel, plain_parts, stored_bytes
from left_bench.pretrained import (
    check_vocabulary,
    load_text_reader,
    model_folder,
    resolved_revision,
    source,
    unloadable,
)
from left_bench.quantization import backend_of
from left_bench.spec.cell import Cell
from left_bench.spec.instantiate import instantiate
from left_bench.spec.task import TASKS, is_within, new_layers_of

_CLASSIFIERS = [  # the names of output layers
    *("classifier", "pre_classifier", "cls_classifier", "distillation_classifier", "classification_head", "score"),
    *("head", "pooler"),
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    cell: Cell, *, folder: str, device: str, quantized: Path | None = None, classes: Sequence[str] | None = None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load the base model from `folder` (see `pretrained.model_folder`) onto `device`.

    Args:
        quantized: a folder with the same model's quantized weights (see `quantized_cache`).
        classes: the data's classes; a new output layer is created for them from the cell's seed.

    Returns:
        The model, and its effective settings after loading: dtypes, attention kernel, quantized modules.

    Raises:
        NotInForce: the model was not loaded with the requested quantization or dtype.
    """
    arguments: dict[str, Any] = {"dtype": DTYPES[cell.precision.weights_dtype]}
    if cell.quantization.target is not None:
        config = instantiate(cell.quantization.target, cell.quantization.config, key="quantization")
        if quantized is None:  # otherwise it is in the folder's own configuration
            arguments["quantization_config"] = config
            backend = backend_of(cell.quantization)
            # a layer that is trained in full must not be quantized
            if classes is not None and backend is not None and not backend.leave_alone(config, _CLASSIFIERS):
                raise NotInForce(f"quantization={cell.quantization.name} would quantize the new output layer too")
    if cell.training.attention is not None:
        arguments["attn_implementation"] = cell.training.attention
    if device != "cpu":
        arguments["device_map"] = {"": device}  # weights go straight to the device, no copy on the host
    if source(cell.model) == "hub" and quantized is None:
        arguments["revision"] = cell.model.revision
    if classes is not None:
        names = dict(enumerate(classes))
        arguments |= {"id2label": names, "label2id": {name: label for label, name in names.items()}}
        arguments["ignore_mismatched_sizes"] = True
        if not cell.task.likelihood:
            arguments["problem_type"] = "regression"  # for whoever trains it on
        torch.manual_seed(cell.seed)
    try:
        auto_class = getattr(transformers, cell.task.auto_class)
        model: PreTrainedModel
        model, loading = auto_class.from_pretrained(
            quantized or folder,
            trust_remote_code=cell.model.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **arguments,
        )
    except OSError as error:
        raise unloadable(cell.model, error) from error
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise UserError(
            f"model.task={cell.model.task}: {cell.model.name_or_path} is not such a model; "
            f"set model.task to one of {', '.join(sorted(TASKS.keys() - {cell.model.task}))}"
        ) from error
    unexpected = _all_loaded(model, loading, cell, new_output=classes is not None)
    if model.can_generate():
        model.generation_config = _greedy(model.generation_config)
    if cell.task.reads == "text" and cell.task.new_output:
        # a decoder predicts the class from the last token that is not padding: its rows must be padded with that token
        model.config.pad_token_id = load_text_reader(folder, cell.model).pad_token_id
    _feed_head_contiguous(model)
    keep_trainable(model)
    if device == "cpu" and quantized_weights(model):
        _release_checkpoint(model, all_of_it=quantized is not None)
    if quantized is not None:
        model.config.name_or_path = model.name_or_path = folder  # an adapter's file names its base model
    result = _effective_settings(model, cell) | ({"unexpected_weights": unexpected} if unexpected else {})
    if cell.training.kernels is not None:
        from left_bench.model.liger import replace_layers

        result["kernels"] = replace_layers(model)
    return model, result | {"weights_from": "checkpoint" if quantized is None else "quantized_cache"}


def _all_loaded(model: PreTrainedModel, loading: dict[str, Any], cell: Cell, *, new_output: bool) -> int:
    """Refuse a model with weights that were not in its checkpoint; returns how many of the file's weights were unused.

    Raises:
        NotInForce: names the tensors that the checkpoint lacks.
    """
    unexpected = sorted(loading["unexpected_keys"])
    lacking = {*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])}
    if new_output:
        new = new_layers_of(model)
        lacking = {name for name in lacking if not is_within(name, new)}
    if not lacking:
        return len(unexpected)
    first = ", ".join(sorted(lacking)[:3])
    hint = f"; the file has {unexpected[0]} and others that are not in the model" if unexpected else ""
    raise NotInForce(
        f"model.name_or_path={cell.model.name_or_path}: {len(lacking)} tensors of the model are not in its checkpoint "
        f"and would be random ({first}{', …' if len(lacking) > 3 else ''}){hint}; give a folder with complete weights"
    )


def check_causal(model: PreTrainedModel, cell: Cell, *, device: str) -> None:
    """Refuse a causal language model whose earlier logits depend on a later token: its loss would see the answer.

    BERT's classes can be loaded as such, and attend to both sides unless their configuration says `is_decoder`.

    Raises:
        NotInForce: the model attends to later tokens.
    """
    if not cell.task.is_decoder:
        return
    last = min(7, model.config.get_text_config().vocab_size - 1)
    ids = torch.tensor([[1, 2], [1, last]], device=device)
    with torch.no_grad(), autocast(cell, device=device):
        one, other = (model(input_ids=row[None], use_cache=False).logits[0, 0].float() for row in ids)
    moved = (one - other).abs().max() / one.std()
    # 8-bit products handle outliers of the whole matrix, so their results change slightly; other products are identical
    if moved.item() > (0.1 if quantized_weights(model) else 1e-3):
        raise NotInForce(
            f"model.name_or_path={cell.model.name_or_path}: {type(model).__name__} is not a causal language model as "
            "configured (a later token changes earlier predictions); give a decoder, or set is_decoder in its "
            "config.json if it was trained as one"
        )


def _greedy(config: GenerationConfig) -> GenerationConfig:
    """Keep only the checkpoint's special tokens: with its penalties, bans, beams or sampling, decoding is not
    greedy."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    return GenerationConfig(do_sample=False, **{name: getattr(config, name, None) for name in names})


def make_ready(cell: Cell, *, device: str) -> None:
    """Compile a quantization's kernels before the baseline, so that no phase includes their seconds and bytes."""
    if (backend := backend_of(cell.quantization)) is not None:
        backend.make_ready(cell.quantization, device=device)


def apply_precision(cell: Cell, *, device: str) -> None:
    """Set the rounding of matrix products; raises NotInForce if the device has no such mode."""
    if cell.precision.tf32 and device != "cuda":
        raise NotInForce(f"precision.tf32=true has no effect on {device}: it is a mode of CUDA matrix products")
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = cell.precision.tf32
        torch.backends.cudnn.allow_tf32 = cell.precision.tf32


def autocast(cell: Cell, *, device: str) -> contextlib.AbstractContextManager[Any]:
    """A context that runs matrix products in the compute dtype, if some weights have another dtype."""
    if not cell.autocast:
        return contextlib.nullcontext()
    return torch.autocast(device_type=device, dtype=DTYPES[cell.precision.compute_dtype])


def layers_of(model: Any) -> list[torch.nn.Module]:
    """The model's repeated blocks, or the model itself if it names none."""
    return repeated_blocks(model) or [model]


def quantized_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Module name -> the weight parameter of every layer that is stored quantized."""
    results = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        # tensor subclasses (torchao, quanto) report the dequantized dtype, so look at their inner tensors
        if isinstance(weight, torch.Tensor) and any(not part.is_floating_point() for part in plain_parts(weight)):
            results[name] = weight
    return results


def base_metrics(model: torch.nn.Module) -> dict[str, float]:
    """`weights_bytes`, `total_params` and bits per parameter of the base model, before anything is attached."""
    tensors = [*model.parameters(), *model.buffers()]
    total = sum(logical_numel(parameter) for parameter in model.parameters())
    weights = stored_bytes(tensors)
    metrics: dict[str, float] = {
        "total_params": total,
        "weights_bytes": weights,
        "stored_bits_per_param": 8 * weights / total,
    }
    quantized = list(quantized_weights(model).values())
    if quantized:
        numel = sum(logical_numel(weight) for weight in quantized)
        metrics["quantized_modules"] = len(quantized)
        metrics["quantized_bits_per_param"] = 8 * stored_bytes(quantized) / numel
    return metrics


def _release_checkpoint(model: PreTrainedModel, *, all_of_it: bool) -> None:
    """Copy tensors that are not quantized out of the memory-mapped checkpoint, so that the mapping can be released.

    A single embedding that is a view of it keeps every page resident that quantizing has read: all unquantized weights,
    203 MiB in addition to SmolLM2's 107 MiB of NF4, would count as the quantized model's memory. If the quantized
    weights are views too (`all_of_it`), they are copied as well: a partly copied file would count twice, and products
    of weights with another alignment may be rounded differently.
    """
    copies: dict[tuple[Any, ...], torch.Tensor] = {}

    def place(tensor: torch.Tensor) -> tuple[Any, ...]:
        return tensor.data_ptr(), tensor.dtype, tensor.shape

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        if place(tensor) not in copies:  # int8 weights have two names for the same storage
            copied = tensor.data.clone()
            copies[place(tensor)] = copies[place(copied)] = copied
        return copies[place(tensor)]

    def stays(tensor: torch.Tensor) -> bool:
        return not all_of_it and any(not part.is_floating_point() for part in plain_parts(tensor))

    # replace the references: a view that is assigned new data keeps its base, and the base keeps the mapping
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not stays(buffer):
                setattr(module, name, copy(buffer))
    for parameter in model.parameters():
        if not stays(parameter):
            parameter.data = copy(parameter)
            for owner, name in constants(parameter):
                constant = getattr(owner, name)
                if copy(constant) is not constant:  # a 5-bit layer's constants are its buffers, copied above
                    setattr(owner, name, copy(constant))


def _feed_head_contiguous(model: PreTrainedModel) -> None:
    """Give the output head a contiguous input.

    The first step of generation passes it a strided slice, and torch's `linear` on a three-dimensional strided input
    with a frozen weight becomes a batched product over a copy of the weight for every row: 3.4 GiB and 10 s for 64 rows
    of SmolLM2 (torch 2.13, CPU). A base model whose weights require gradients does not have this cost.
    """
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(lambda _module, inputs: (inputs[0].contiguous(), *inputs[1:]))


def _effective_settings(model: PreTrainedModel, cell: Cell) -> dict[str, Any]:
    quantized = quantized_weights(model)
    requested = cell.quantization.target or cell.quantization.checkpoint_method
    if requested is not None and not quantized:
        raise NotInForce(
            f"quantization={cell.quantization.name}: no module of the loaded model is quantized; "
            "is the quantization's library installed, and does it support the model's linear layers?"
        )
    if cell.quantization.target is None and cell.quantization.checkpoint_method is None and quantized:
        raise NotInForce(f"quantization=none: {len(quantized)} modules of the checkpoint are already quantized")
    dtypes: Counter[str] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            dtypes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    wanted = cell.precision.weights_dtype
    main = dtypes.most_common(1)[0][0] if dtypes else wanted
    if not quantized and main != wanted:
        raise NotInForce(f"precision.weights_dtype={wanted}: the weights were loaded as {main}")
    results = {
        "weights_dtype": "+".join(name for name, _ in sorted(dtypes.items())) or None,
        "attention": attention_kernel(model),
        "five_bit_decoder": "+".join(sorted(_decoders(model))) or None,
        "architecture": type(model).__name__,
        "model_type": model.config.model_type,
        "revision": resolved_revision(cell.model),
    }
    return {key: value for key, value in results.items() if value is not None}


def _decoders(model: torch.nn.Module) -> set[str]:
    """Names of the decoders used by the model's 5-bit layers."""
    result = (getattr(module, "decoded_by", None) for module in model.modules())
    return {name for name in result if isinstance(name, str)}


def open_pretrained(cell: Cell) -> tuple[str, Any]:
    """Ensure that the base model's files are present, and load its tokenizer or image processor.

    This happens outside all measured phases.
    """
    folder = model_folder(cell.model, dtype=cell.precision.weights_dtype)
    return folder, named(cell.task.open_reader)(folder, cell.model)


def config_of(cell: Cell, folder: str) -> dict[str, Any]:
    """The model's configuration, as in `config.json`."""
    revision = cell.model.revision if source(cell.model) == "hub" else None
    code = cell.model.trust_remote_code
    result = AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=code)
    text: dict[str, Any] = result.get_text_config().to_dict()
    return text


def load_rows_of(cell: Cell, tokenizer: Any, *, folder: str) -> Splits:
    """The cell's rows, ready for its model (see `model.rows`)."""
    splits: Splits = named(cell.task.load_rows)(cell, tokenizer, folder=folder)
    return splits


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Refuse a tokenizer with ids that the embedding does not have."""
    embedding: Any = model.get_input_embeddings()
    check_vocabulary(tokenizer, embedding.weight.shape[0])

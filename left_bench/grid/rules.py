"""What cannot be combined: one table of rules, applied to each cell before anything runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from left_bench.core.paths import is_installed, versions_of
from left_bench.data.files import check_source
from left_bench.quantization import backend_of, backends, device_rules
from left_bench.quantization import rules as quantization_rules
from left_bench.spec.cell import Cell
from left_bench.spec.device import DEVICES
from left_bench.spec.row_scores import check_installed
from left_bench.spec.task import REWARD_TASK
from left_bench.spec.task import rules as task_rules

# methods for which peft fills the cache, or puts tokens before the input, during generation
_THROUGH_THE_CACHE = (
    "PrefixTuning",
    "PromptTuning",
    "MultitaskPromptTuning",
    "PromptEncoder",
    "Cartridge",
    "CPT",
    "Shadow",
)
BOTTLENECK_FAMILIES = {"llama", "mistral", "qwen2", "qwen3", "gpt_neox", "opt", "bert"}
_FAMILIES_WITHOUT_BIAS = {"llama", "mistral", "t5"}
ENCODERS = {
    "albert",
    "bert",
    "deberta",
    "deberta-v2",
    "distilbert",
    "electra",
    "modernbert",
    "mpnet",
    "roberta",
    "xlm-roberta",
}
"""Families whose tokens see those behind them, and whose layers have other names than a decoder's."""
_WITH_POOLER = ("sequence_classification", "regression", "embeddings")
_SEEN = "(seen with peft 0.21.2, bitsandbytes 0.50.2)"
# option -> the module it needs, and the package that contains it
_FLASH_ATTENTION = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}
# Families whose layers liger-kernel replaces (0.8.5: liger_kernel.transformers.monkey_patch).
LIGER_FAMILIES = {
    *("deepseek_v2", "deepseek_v3", "deepseek_v4", "exaone4", "falcon_h1", "gemma", "gemma2", "gemma3", "gemma3_text"),
    *("gemma4", "gemma4_text", "glm4", "glm4v", "glm4v_moe", "gpt_oss", "granite", "hunyuan_v1_dense"),
    *("hunyuan_v1_moe", "internvl", "llama", "llama4", "llama4_text", "llava", "ministral", "mistral", "mixtral"),
    *("mllama", "mllama_text_model", "muse_glimmer", "nemotron", "olmo2", "olmo3", "paligemma", "phi3", "pixtral"),
    *("qwen2", "qwen2_5_vl", "qwen2_5_vl_text", "qwen2_vl", "qwen2_vl_text", "qwen3", "qwen3_5", "qwen3_5_moe"),
    *("qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next", "qwen3_vl", "qwen3_vl_moe", "qwen3_vl_moe_text"),
    *("qwen3_vl_text", "smollm3", "smolvlm"),
}
# Seen with peft 0.21: `peft.tuners.adaption_prompt` only patches the attention of these families.
_ADAPTION_PROMPT_FAMILIES = {"llama", "mistral", "gpt2"}


def model_type(cell: Cell) -> str | None:
    """The architecture's family, if it is known without loading the model."""
    return cell.model.family


# What an option needs in addition to the project's dependencies: (prefix of the target, module, what to install).
EXTRAS = (
    *(
        (target, backend.needs, f"'left-bench[{backend.extra}]'" if backend.extra else backend.needs)
        for backend in backends()
        for target in backend.targets
        if backend.needs is not None
    ),
    ("galore_torch.", "galore_torch", "'left-bench[galore]'"),
    ("apollo_torch.", "apollo_torch", "'left-bench[apollo]'"),
)


def _wants(cell: Cell, target: str) -> bool:
    named = (cell.quantization.target, cell.peft.target, cell.optimizer.target)
    return any((item or "").startswith(target) for item in named)


def _quantized(cell: Cell) -> bool:
    return backend_of(cell.quantization) is not None


def _is(cell: Cell, *names: str) -> bool:
    return cell.peft.is_one_of(*names)


def release(version: str) -> tuple[int, ...]:
    """`5.24.0.dev0` as `(5, 24, 0)`."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def loses_virtual_tokens(versions: Mapping[str, str]) -> bool:
    """Whether these versions of transformers and peft generate without what a method puts before the input.

    transformers 5.24 passes the cache as `cache`. peft up to 0.21 looks for `past_key_values`, does not find it, and
    leaves prefixes out, or puts virtual tokens before every new token again (seen with 5.24.0 and 0.21.2).
    """
    if not {"transformers", "peft"} <= versions.keys():
        return False
    return release(versions["transformers"]) >= (5, 24) and release(versions["peft"]) < (0, 22)


def _lacks_dense_shape(cell: Cell) -> bool:
    backend = backend_of(cell.quantization)
    return backend is not None and not backend.has_dense_shape


def _cannot_shard(cell: Cell) -> bool:
    backend = backend_of(cell.quantization)
    return backend is not None and not backend.can_shard(cell.quantization)


def _lora_with(cell: Cell, key: str, *values: object) -> bool:
    return cell.peft.is_lora_with(key, *values)


def _names_decoders_layers(cell: Cell) -> bool:
    """Whether the method names the layers that it changes, as decoders call them."""
    named = cell.peft.config.get("use_bdlora" if _lora_with(cell, "use_bdlora") else "target_modules")
    return (_is(cell, "Beft") or _lora_with(cell, "use_bdlora")) and "v_proj" in str(named)


def _starts_from_text(cell: Cell) -> bool:
    return _lora_with(cell, "init_lora_weights", "lora_ga", "corda") or "alora_invocation_tokens" in cell.peft.config


def _sharded(cell: Cell) -> bool:
    return cell.hardware.sharding is not None


def _liger(cell: Cell) -> bool:
    return "liger" in (cell.training.kernels, cell.training.output_head)


def _grpo(cell: Cell) -> bool:
    return cell.training.objective == "grpo"


RULES: tuple[tuple[Callable[[Cell], bool], str], ...] = (
    *(
        (
            lambda cell, target=target, module=module: _wants(cell, target) and not is_installed(module),
            f"needs the package {module.split('.')[0]}, which is not installed: pip install {what}",
        )
        for target, module, what in EXTRAS
    ),
    *device_rules(),
    (
        lambda cell: cell.peft.target is None and _quantized(cell),
        "full fine-tuning needs unquantized weights: integer storage takes no gradient",
    ),
    (
        lambda cell: cell.precision.tf32 and cell.device_type != "cuda",
        "TF32 is a rounding mode of CUDA matrix products; this device has none",
    ),
    (
        lambda cell: _is(cell, "AdaptionPrompt") and model_type(cell) not in _ADAPTION_PROMPT_FAMILIES | {None},
        "peft's LLaMA-Adapter only supports the attention of Llama, Mistral and GPT-2 models",
    ),
    (
        lambda cell: (
            (cell.eval.generate or _grpo(cell))
            and _is(cell, *_THROUGH_THE_CACHE)
            and loses_virtual_tokens(versions_of(["transformers", "peft"]))
        ),
        "peft up to 0.21 generates without this method's tokens on transformers 5.24 and later: "
        "pip install 'transformers<5.24', or eval.generate=false",
    ),
    (
        lambda cell: ".Paged" in cell.optimizer.target and cell.device_type != "cuda",
        "optimizer states can only be paged on CUDA; elsewhere bitsandbytes silently does not page them",
    ),
    (
        lambda cell: cell.training.attention in _FLASH_ATTENTION and cell.device_type != "cuda",
        "FlashAttention 2 and 3 run only on CUDA",
    ),
    *(
        (
            # with the package `kernels`, transformers downloads a build from the hub
            lambda cell, name=name, module=module: (
                cell.training.attention == name and not is_installed(module) and not is_installed("kernels")
            ),
            f"training.attention={name} needs the package {package}, which is not installed",
        )
        for name, (module, package) in _FLASH_ATTENTION.items()
    ),
    (
        lambda cell: _liger(cell) and not DEVICES[cell.hardware.device].has_triton,
        "Liger's kernels need Triton: they run only on CUDA and XPU",
    ),
    (
        lambda cell: _liger(cell) and not is_installed("liger_kernel"),
        "needs the package liger-kernel, which is not installed: pip install 'left-bench[liger]'",
    ),
    (
        lambda cell: cell.training.kernels == "liger" and model_type(cell) not in LIGER_FAMILIES | {None},
        "training.kernels=liger: Liger has no kernels for models of this family (seen with liger-kernel 0.8.5)",
    ),
    (
        lambda cell: cell.training.output_head == "liger" and not cell.task.writes,
        "training.output_head=liger is a loss over a vocabulary, and a classifier has classes",
    ),
    (
        lambda cell: cell.training.output_head == "liger" and cell.training.objective != "sft",
        "Liger's loss sums tokens and cannot weight pairs; training.output_head=labelled is chunked as well",
    ),
    (
        lambda cell: cell.training.output_head == "liger" and cell.precision.compute_dtype == "float16",
        "Liger's loss rounds float16 gradients before they are scaled; training.output_head=labelled does not",
    ),
    (
        lambda cell: cell.training.output_head == "liger" and _sharded(cell),
        "Liger's loss needs the head's whole weight, and hardware.sharding gives each process only a part",
    ),
    (
        lambda cell: cell.training.float8 and cell.device_type != "cuda",
        "products in 8-bit floating point are only supported by CUDA GPUs",
    ),
    (
        lambda cell: cell.training.float8 and not is_installed("torchao"),
        "needs the package torchao, which is not installed: pip install 'left-bench[torchao]'",
    ),
    (
        lambda cell: cell.training.float8 and cell.peft.target is not None,
        "training.float8=true is for full fine-tuning: an adapter's matrices are too small to benefit",
    ),
    (
        lambda cell: cell.training.float8 and cell.precision.weights_dtype != "bfloat16",
        "training.float8=true rounds the products of bfloat16 weights; set precision=bf16",
    ),
    (
        lambda cell: cell.training.float8 and _sharded(cell),
        "training.float8=true is not implemented for hardware.sharding; DDP (sharding=null) supports it",
    ),
    (
        lambda cell: _lora_with(cell, "init_lora_weights", "loftq") and cell.device_type not in ("cuda", "xpu"),
        f"peft's LoftQ only rounds weights on CUDA or XPU {_SEEN}",
    ),
    (
        lambda cell: (
            _quantized(cell)
            and (
                _is(cell, "Psoft", "Delora", "Adamss", "TinyLora", "Glora", "Supertuning", "OSF", "Frod")
                or _lora_with(cell, "init_lora_weights", "pissa", "corda", "lora_ga", "mica", "orthogonal")
                or (_is(cell, "Lora") and cell.peft.config.get("velora_config") is not None)  # {}: its defaults
            )
        ),
        f"peft's implementation of this method needs floating-point weights {_SEEN}",
    ),
    (
        lambda cell: _quantized(cell) and _is(cell, "HRA", "Deft", "Peanut", "UniLora"),
        f"over quantized weights peft applies this method to the stored integers or trains nothing {_SEEN}",
    ),
    (
        lambda cell: _quantized(cell) and (_lora_with(cell, "kasa_config") or _lora_with(cell, "use_bdlora")),
        f"peft's quantized layers do not support this variant of LoRA and would be plain LoRA {_SEEN}",
    ),
    (
        lambda cell: (
            _lacks_dense_shape(cell)
            and (_is(cell, "LoHa", "LoKr", "Shira", "Hira") or _lora_with(cell, "init_lora_weights", "olora"))
        ),
        f"peft reads this method's shape or values from the dense weight, which 5-bit and HQQ layers lack {_SEEN}",
    ),
    *quantization_rules(),
    (
        lambda cell: (
            (not cell.task.is_decoder and (_lora_with(cell, "init_lora_weights", "eva") or _is(cell, "CPT")))
            or (not cell.task.writes and _starts_from_text(cell))
        ),
        f"this method is initialized from training rows, which only works for decoders {_SEEN}",
    ),
    (
        lambda cell: (cell.task.reads == "pictures") != (cell.data.image_column is not None),
        "images need an image classifier (model=vit_base, data=digits), and text needs a language model",
    ),
    (
        lambda cell: _names_decoders_layers(cell) and model_type(cell) in ENCODERS,
        "this option names layers as decoders call them; name the encoder's with peft.config",
    ),
    (
        lambda cell: _is(cell, "Shadow") and model_type(cell) in ENCODERS,
        f"ShadowPEFT runs beside a decoder's layers, and an encoder has none {_SEEN}",
    ),
    (
        lambda cell: _is(cell, "Poly") and model_type(cell) in ENCODERS and cell.model.task in _WITH_POOLER,
        f"Poly changes layers that are given a sequence, and an encoder's pooler is given one vector {_SEEN}",
    ),
    (
        lambda cell: _is(cell, "TrainableTokens", "AdaptionPrompt") and cell.task.new_output,
        f"peft trains nothing beside this method's own, and the new output layer would stay as it was drawn {_SEEN}",
    ),
    *task_rules(),
    (
        lambda cell: cell.training.stop_patience is not None and _sharded(cell),
        "training.stop_patience keeps whole weights, and hardware.sharding gives each process only a part of them",
    ),
    (
        lambda cell: cell.training.stop_patience is not None and cell.eval.points == 0 and cell.eval.every is None,
        "training.stop_patience uses the validation-loss curve; set eval.points or eval.every",
    ),
    (
        lambda cell: cell.training.max_seconds is not None and _is(cell, "AdaLora"),
        "AdaLoRA plans its ranks over a fixed number of steps, which training.max_seconds does not give",
    ),
    (
        lambda cell: cell.eval.curve_scores and (cell.hardware.processes > 1 or cell.training.batching == "packed"),
        "eval.curve_scores generates answers between steps, which needs a single process and padded rows",
    ),
    (
        lambda cell: cell.training.objective in ("dpo", "orpo") and not cell.data.pairs,
        "this training.objective needs rows with a better and a worse answer: data.pairs=true, as in data=preferences",
    ),
    (
        lambda cell: cell.training.objective == "kto" and not cell.data.pairs and cell.data.label_column is None,
        "training.objective=kto needs pairs of answers (data.pairs=true) or rows that are good or bad "
        "(data.label_column=NAME)",
    ),
    (
        lambda cell: cell.training.objective == "reward" and cell.model.task != REWARD_TASK,
        "training.objective=reward makes a decoder into a reward model; leave model.task out, or set "
        "model.task=reward_model",
    ),
    (
        lambda cell: cell.training.objective == "reward" and cell.training.sft_steps > 0,
        "a reward model's output layer writes no answers to fine-tune before; training.sft_steps=0",
    ),
    (
        lambda cell: _grpo(cell) and not cell.task.is_decoder,
        "training.objective=grpo samples answers that are trained on as they stand, which a decoder's are",
    ),
    (
        lambda cell: (
            _grpo(cell)
            and cell.data.source != "reasoning_gym"
            and cell.training.reward is None
            and cell.training.reward_model is None
        ),
        "training.objective=grpo needs to know what an answer is worth: data of reasoning_gym, "
        "training.reward=FILE:NAME or training.reward_model=CELL",
    ),
    (
        lambda cell: (
            _grpo(cell)
            and (cell.training.batch_size * cell.training.gradient_accumulation) % cell.training.group_size != 0
        ),
        "the rows of a step (training.batch_size x gradient_accumulation) are answers in groups, and must be a "
        "multiple of training.group_size",
    ),
    (
        lambda cell: _grpo(cell) and cell.hardware.processes > 1,
        "training.objective=grpo samples its answers in one process; hardware.processes=1",
    ),
    (
        lambda cell: (
            _grpo(cell) and (cell.training.compile or cell.training.float8 or cell.training.batching == "packed")
        ),
        "training.objective=grpo generates answers between steps, which compiled, float8 and packed layers do not",
    ),
    (
        lambda cell: cell.training.updates_per_sample > 1 and cell.training.checkpoint_every is not None,
        "training.checkpoint_every keeps no sampled answers; training.updates_per_sample=1 has none to go on with",
    ),
    (
        lambda cell: (
            not _grpo(cell)
            and bool(cell.training.reward or cell.training.reward_model or cell.training.updates_per_sample > 1)
        ),
        "training.reward, training.reward_model and training.updates_per_sample belong to training.objective=grpo",
    ),
    (
        lambda cell: cell.training.reward is not None and cell.training.reward_model is not None,
        "training.reward and training.reward_model both say what an answer is worth; give one of them",
    ),
    (
        lambda cell: cell.eval.verifier and (cell.data.source != "reasoning_gym" or not cell.generates),
        "eval.verifier asks reasoning_gym about answers to its own questions: data=chain_sum and the like, "
        "eval.generate=true",
    ),
    (
        lambda cell: cell.data.margin_column is not None and cell.training.objective != "reward",
        "data.margin_column is for reward models: training=reward",
    ),
    (
        lambda cell: cell.data.label_column is not None and (cell.training.objective != "kto" or cell.data.pairs),
        "data.label_column names rows whose answers are bad, which training.objective=kto alone learns from, and not "
        "as pairs",
    ),
    (
        lambda cell: cell.data.label_column is not None and cell.training.sft_steps > 0,
        "training.sft_steps would train on the answers that data.label_column calls bad; training.sft_steps=0",
    ),
    (
        lambda cell: cell.training.compares and not cell.task.writes,
        "preference tuning compares written answers, and this task names classes",
    ),
    (
        lambda cell: cell.training.objective == "combine" and not _is(cell, "Lora"),
        "training.objective=combine makes one adapter of several of LoRA's (peft's add_weighted_adapter)",
    ),
    (
        lambda cell: (
            cell.training.objective == "combine"
            and (cell.training.sft_steps > 0 or cell.training.start_from is not None or cell.hardware.processes > 1)
        ),
        "training.objective=combine trains nothing: leave out training.sft_steps, training.start_from and "
        "hardware.processes",
    ),
    (
        lambda cell: cell.training.start_from is not None and _is(cell, *_THROUGH_THE_CACHE, "AdaLora"),
        "training.start_from: peft trains no loaded prompt further, and AdaLoRA plans its ranks over one training",
    ),
    (
        lambda cell: (
            cell.peft.target == "left_bench.methods.BottleneckConfig"
            and model_type(cell) not in BOTTLENECK_FAMILIES | {None}
        ),
        "bottleneck adapters only support Llama, Mistral, Qwen, GPT-NeoX, OPT and BERT",
    ),
    (
        lambda cell: cell.peft.target == "left_bench.methods.LayerFreezeConfig" and _quantized(cell),
        "training whole layers needs unquantized weights: integer storage takes no gradient",
    ),
    (
        lambda cell: (
            cell.peft.target == "left_bench.methods.BitFitConfig" and model_type(cell) in _FAMILIES_WITHOUT_BIAS
        ),
        "BitFit trains bias terms, and this model's layers have none",
    ),
    (
        lambda cell: any(
            size % cell.hardware.processes for size in (cell.training.batch_size, cell.training.sft_batch_size or 0)
        ),
        "training.batch_size counts the rows of all hardware.processes and must be a multiple of their number, and so "
        "must sft_batch_size",
    ),
    *(
        (
            lambda cell, name=name: cell.hardware.processes > 1 and cell.hardware.device == name,
            f"each process needs its own accelerator, and {name.upper()} has only one; set hardware.processes=1 or "
            "hardware=cpu",
        )
        for name, kind in DEVICES.items()
        if kind.one_for_all
    ),
    (
        lambda cell: _sharded(cell) and cell.hardware.processes == 1,
        "hardware.sharding divides a model over processes; set hardware.processes to more than one",
    ),
    (
        lambda cell: _sharded(cell) and _cannot_shard(cell),
        "hardware.sharding cannot divide these quantized weights (seen with torch 2.13); sharding=null can train them",
    ),
    (
        lambda cell: _sharded(cell) and cell.training.checkpoint_every is not None,
        "one process saves checkpoints, and none has all of a sharded state; leave out training.checkpoint_every",
    ),
    (
        lambda cell: _sharded(cell) and (_is(cell, "AdaLora") or cell.optimizer.target.startswith("apollo_torch.")),
        "AdaLoRA and APOLLO need whole gradients, and hardware.sharding gives each process only a part",
    ),
    (
        lambda cell: _sharded(cell) and cell.optimizer.target.startswith("bitsandbytes."),
        "bitsandbytes' optimizers do not support sharded weights (seen with bitsandbytes 0.50.2, torch 2.13)",
    ),
    (
        lambda cell: _sharded(cell) and (cell.precision.loss_scaling or cell.training.compile),
        "float16 loss scaling and compiled layers do not work with hardware.sharding; DDP (sharding=null) has both",
    ),
)


def check_extras(cell: Cell) -> None:
    """Refuse data and metrics whose package is not installed, because no cell of the grid could run.

    Raises:
        UserError: names what to install.
    """
    check_source(cell.data)
    if cell.generates or not cell.task.writes:
        check_installed(cell.eval.metrics or [])


def why_unsupported(cell: Cell) -> str | None:
    """The first rule that refuses the cell, or None."""
    return next((reason for refuses, reason in RULES if refuses(cell)), None)

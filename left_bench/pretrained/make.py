"""Create base-model folders: random weights, or an unpacked GGUF file. Run by `cache.in_fresh_process`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from left_bench.core.errors import UserError, nearest
from left_bench.core.extensions import named
from left_bench.spec.task import TASKS

PAD, EOS = "<pad>", "<eos>"  # the byte-level tokenizer's special tokens, ids 0 and 1; bytes follow
BYTE_VOCABULARY = 2 + 256


def _main() -> int:
    order = json.load(sys.stdin)
    folder = Path(order["folder"])
    try:
        if order["make"] == "random":
            save_random(order["config"], folder, dtype=order["dtype"], task=order["task"])
        else:
            save_dense(Path(order["gguf"]), folder)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def architecture(config: dict[str, Any]) -> Any:
    """The `transformers` configuration of `Model.config`.

    Raises:
        UserError: transformers does not know `model_type`, a key or a value.
    """
    from transformers import AutoConfig

    settings = dict(config)
    model_type = settings.pop("model_type", None)
    try:
        known = set(vars(AutoConfig.for_model(model_type))) | set(AutoConfig.for_model(model_type).attribute_map)
    except ValueError:
        raise UserError(f"model.config.model_type={model_type}: transformers knows no such architecture") from None
    for key in settings:
        if key not in known:  # transformers would keep it as an attribute that nothing reads
            raise UserError(f"model.config.{key}: {model_type} has no such setting{nearest(key, known)}")
    try:
        return AutoConfig.for_model(model_type, **settings)
    except Exception as error:  # its own validation errors share no base class
        raise UserError(f"model.config cannot be used ({' '.join(str(error).split())[:300]})") from error


def save_random(config: dict[str, Any], folder: Path, *, dtype: str, task: str = "causal_lm") -> None:
    """Save a model of this architecture with transformers' own initialisation from seed 0, and its input reader.

    Weights are created in `dtype`: seven billion parameters in bfloat16 never need more than 14 GB.
    """
    named(TASKS[task].save_random)(architecture(config), folder, dtype=dtype, task=task)


def save_random_writer(settings: Any, folder: Path, *, dtype: str, task: str) -> None:
    """A model that reads text, with random weights and a byte-level tokenizer."""
    import transformers

    if settings.vocab_size < BYTE_VOCABULARY:
        raise UserError(
            f"model.config.vocab_size={settings.vocab_size}: random weights are used with a byte-level tokenizer of "
            f"{BYTE_VOCABULARY} ids; make it at least that"
        )
    settings.pad_token_id, settings.eos_token_id, settings.bos_token_id = 0, 1, None
    start = {"decoder_start_token_id": 0} if TASKS[task].has_encoder else {}
    settings.update(start)
    model = random_model(settings, task, dtype=dtype)
    if model.can_generate():
        ends = {"pad_token_id": 0, "eos_token_id": 1}
        model.generation_config = transformers.GenerationConfig(do_sample=False, **ends, **start)
    model.save_pretrained(folder, max_shard_size="5GB")
    byte_tokenizer().save_pretrained(folder)


def random_model(settings: Any, task: str, *, dtype: str) -> Any:
    """The model with transformers' own initialisation from seed 0."""
    import torch
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            auto_class = getattr(transformers, TASKS[task].auto_class)
            return auto_class.from_config(settings, dtype=getattr(torch, dtype))
        except ValueError as error:
            first = str(error).splitlines()[0]
            raise UserError(
                f"model.config.model_type={settings.model_type}: no model for model.task={task} ({first})"
            ) from error


def save_random_classifier(settings: Any, folder: Path, *, dtype: str, task: str) -> None:
    """A model that classifies images, with random weights and an image processor."""
    from transformers import ViTImageProcessorPil

    model = random_model(settings, task, dtype=dtype)
    model.save_pretrained(folder, max_shard_size="5GB")
    size = {"height": settings.image_size, "width": settings.image_size}
    ViTImageProcessorPil(size=size).save_pretrained(folder)


def byte_tokenizer() -> Any:
    """A byte-level tokenizer: lossless for any text, ids below `BYTE_VOCABULARY`, no chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = [PAD, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: id for id, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def save_dense(gguf: Path, folder: Path) -> None:
    """Unpack a GGUF file to plain bfloat16 safetensors with its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    where, name = str(gguf.parent), gguf.name
    unpacked = AutoModelForCausalLM.from_pretrained(
        where,
        gguf_file=name,
        dtype=torch.bfloat16,
        attn_implementation="sdpa",  # otherwise an installed `kernels` package inserts its own
        quantization_config=GgufConfig(dequantize=True),
    )
    settings = unpacked.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    # The loaded model cannot be saved, because it keeps its quantizer. A new one takes the weights, and a strict load
    # ensures that they are complete, dense and of the right shapes.
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.bfloat16)
    model.load_state_dict(unpacked.state_dict(), strict=True)
    ids = {key: settings.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(do_sample=False, **ids)
    model.save_pretrained(folder, max_shard_size="5GB")
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    tokenizer.model_max_length = settings["max_position_embeddings"]
    _split_digits(tokenizer, gguf)
    tokenizer.save_pretrained(folder)


def _split_digits(tokenizer: Any, gguf: Path) -> None:
    """Restore the digit splitting that transformers' GGUF reader drops for SmolLM.

    SmolLM's text is split at every digit before the GPT-2 pattern is applied (`tokenizer.ggml.pre` is "smollm";
    llama.cpp does the same). Without it, white space before a number becomes tokens that the model has never seen
    there.
    """
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf.reader import read_gguf_metadata

    metadata, _ = read_gguf_metadata(str(gguf))
    if metadata.get("tokenizer.ggml.pre") == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


if __name__ == "__main__":
    sys.exit(_main())

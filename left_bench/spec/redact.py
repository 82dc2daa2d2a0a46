"""Secrets stay out of records, reports, logs and trackers: refused in a configuration, cut out of what a cell printed.

What is recorded of the environment is an allow-list (`device.describe_machine`), so that a secret can only come in
through what a person writes into an override or a file, or through what a library prints.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from left_bench.core.errors import UserError
from left_bench.spec.record import Record

_SECRET_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)
_SECRET_KEY = re.compile(
    r"(?:^|[.+~])((?:hf_|auth_|access_|use_auth_)?token|(?:\w*_)?api_?key|\w*password|\w*passwd|(?:\w*_)?secret)="
    r"(?!(?:null|true|false)?$)",
    re.IGNORECASE,
)
_URL_PASSWORD = re.compile(r"://[^/\s:@'\"]+:[^/\s@'\"]+@")
_SHORTEST = 8  # a shorter value stands in too many words that are no secret


def secret_values(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Value -> name of every environment variable that is named like a secret."""
    return {
        value: name
        for name, value in environment.items()
        if _SECRET_VARIABLE.search(name) and len(value.strip()) >= _SHORTEST and "/" not in value[:1]
    }


def refuse_secrets(*, overrides: Iterable[str], config: str) -> None:
    """Refuse a configuration that a secret stands in, for it is written into every record.

    Args:
        overrides: as on the command line.
        config: the composed cell, as JSON.

    Raises:
        UserError: naming the place and never the value.
    """
    fix = "leave it out: libraries read it from the environment (HF_TOKEN, WANDB_API_KEY, MLFLOW_TRACKING_TOKEN)"
    secrets = secret_values()
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        name = next((name for value, name in secrets.items() if value in override), None)
        if name is not None:
            raise UserError(f"{key}: it holds the value of {name}, and overrides are recorded; {fix}")
        if _SECRET_KEY.search(override):
            raise UserError(f"{key}: a secret, and overrides are recorded; {fix}")
        if _URL_PASSWORD.search(override):
            raise UserError(f"{key}: a URL with a password in it, and overrides are recorded; {fix}")
    name = next(
        (name for value, name in secrets.items() if any(spelling in config for spelling in _spellings(value))), None
    )
    if name is not None:
        raise UserError(f"the configuration holds the value of {name}, and configurations are recorded; {fix}")


def _spellings(value: str) -> list[str]:
    """A value as it is, and as JSON writes it: quotes, backslashes and line breaks are others there."""
    return list(dict.fromkeys([value, *(json.dumps(value, ensure_ascii=ascii)[1:-1] for ascii in (False, True))]))


def redacted(text: str) -> str:
    """The text without the values of secret environment variables and without passwords in URLs."""
    for value, name in secret_values().items():
        for written in _spellings(value):
            text = text.replace(written, f"[{name}]")
    return _URL_PASSWORD.sub("://[password]@", text)


def redacted_record(record: Record) -> Record:
    """The record, its texts redacted: an error's message or a log's tail may quote what a library was given."""
    plain = record.model_dump_json()
    safe = redacted(plain)
    return record if safe == plain else Record.model_validate_json(safe)


def redact_file(path: Path) -> None:
    """A log in place, where it needs it."""
    if not path.is_file():
        return
    plain = path.read_text(encoding="utf-8", errors="surrogateescape")
    safe = redacted(plain)
    if safe != plain:
        path.write_text(safe, encoding="utf-8", errors="surrogateescape")

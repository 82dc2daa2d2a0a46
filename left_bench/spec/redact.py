"""Keeps secrets out of records, reports, logs and trackers: refuses them in configurations, removes them from output.

Only an allow-list of the environment is recorded (`device.describe_machine`), so a secret can only enter through an
override, a configuration file, or what a library prints.
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
_SHORTEST = 8  # shorter values occur in too many ordinary words


def secret_values(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Value -> name of every environment variable whose name suggests a secret."""
    return {
        value: name
        for name, value in environment.items()
        if _SECRET_VARIABLE.search(name) and len(value.strip()) >= _SHORTEST and "/" not in value[:1]
    }


def refuse_secrets(*, overrides: Iterable[str], config: str) -> None:
    """Refuse a configuration that contains a secret, because it is written into every record.

    Args:
        overrides: as on the command line.
        config: the composed cell, as JSON.

    Raises:
        UserError: names the key, never the value.
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
    """A value as it is and as JSON escapes it (quotes, backslashes, line breaks)."""
    return list(dict.fromkeys([value, *(json.dumps(value, ensure_ascii=ascii)[1:-1] for ascii in (False, True))]))


def redacted(text: str) -> str:
    """The text without the values of secret environment variables and without passwords in URLs."""
    for value, name in secret_values().items():
        for written in _spellings(value):
            text = text.replace(written, f"[{name}]")
    return _URL_PASSWORD.sub("://[password]@", text)


def redacted_record(record: Record) -> Record:
    """The record with its texts redacted: an error message or the end of a log may quote a library's arguments."""
    plain = record.model_dump_json()
    safe = redacted(plain)
    return record if safe == plain else Record.model_validate_json(safe)


def redact_file(path: Path) -> None:
    """Redact a log file in place if it contains a secret."""
    if not path.is_file():
        return
    plain = path.read_text(encoding="utf-8", errors="surrogateescape")
    safe = redacted(plain)
    if safe != plain:
        path.write_text(safe, encoding="utf-8", errors="surrogateescape")

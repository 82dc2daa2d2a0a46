"""`left-bench init DIR`: a small project of the user's own, whose options lie beside left_bench's."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from left_bench.core.errors import UserError

_STARTER = Path(__file__).resolve().parents[1] / "starter"


def main(argv: list[str]) -> int:
    """Write the project into `DIR` and print the command that runs it."""
    if len(argv) != 1 or argv[0].startswith("-"):
        print("usage: left-bench init DIR")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    folder = Path(argv[0])
    for path in write_project(folder):
        print(path)
    print(f"\nleft-bench --config-dir {shlex.quote(str(folder / 'conf'))} +sweep=mine")
    return 0


def write_project(folder: Path) -> list[Path]:
    """Write options, a sweep, rows and a README into `folder`, which need not be there; returns the files.

    Raises:
        UserError: one of the files is there already, or the folder cannot be written.
    """
    texts = {path.relative_to(_STARTER): path.read_text(encoding="utf-8") for path in sorted(_STARTER.rglob("*.*"))}
    there = [folder / name for name in texts if (folder / name).exists()]
    if there:
        raise UserError(f"init {folder}: {there[0]} is there already and is not overwritten; give another folder")
    # JSON strings are YAML's too, and Hydra reads `${` as the start of an interpolation
    rows = json.dumps(str(folder / "rows.jsonl"), ensure_ascii=False).replace("${", "\\\\${")
    try:
        for name, text in texts.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            text = text.replace("@ROWS@", rows).replace("@CONF@", shlex.quote(str(folder / "conf")))
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"init {folder}: cannot be written ({error.strerror}); give another folder") from error
    return [folder / name for name in texts]

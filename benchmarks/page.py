"""Put the parts that the other benchmarks wrote onto one page: `python benchmarks/page.py [reports/benchmarks]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

HEAD = """# Benchmarks of left_bench itself

Made by `python benchmarks/engine.py`, `overhead.py`, `scale.py` and `dequantize.py` with `--out reports/benchmarks`,
and `page.py`; the figures behind it lie beside the parts as JSON. Ratios are taken in pairs in one run; absolute times
are this machine's.
"""


def earlier(folder: Path) -> str:
    """What earlier runs of engine.py gave, kept as `engine_<date>.json`: the ratios hang on the machine's day."""
    told = []
    for path in sorted(folder.glob("engine_*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        ratios = {row["contender"]: row["packed_is_faster"] for row in result["rows"]}
        told.append(
            f"Run of {path.stem.removeprefix('engine_')}, when the machine's products peaked at "
            f"{result['facts']['peak_flops'] / 1e9:.0f} GFLOP/s: packed was {ratios['HF Trainer']:.2f} times as fast "
            f"as HF Trainer and {ratios['TRL']:.2f} times as TRL. Where products are slower they are more of "
            "everybody's step, and what a loop can save is less of it.\n"
        )
    return "\n".join(told)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "reports/benchmarks")
    parts = [folder / f"{name}.md" for name in ("engine", "overhead", "scale", "dequantize")]
    texts = {part.stem: part.read_text(encoding="utf-8") for part in parts if part.exists()}
    if "engine" in texts:
        texts["engine"] += "\n" + earlier(folder)
    text = "\n".join([HEAD, *texts.values()])
    folder.with_suffix(".md").write_text(text.rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Put the parts that the other benchmarks wrote onto one page: `python benchmarks/page.py [reports/benchmarks]`."""

from __future__ import annotations

import sys
from pathlib import Path

HEAD = """# Benchmarks of left_bench itself

Made by `python benchmarks/engine.py`, `overhead.py`, `scale.py` and `dequantize.py` with `--out reports/benchmarks`,
and `page.py`; the figures behind it lie beside the parts as JSON. Ratios are taken in pairs in one run; absolute times
are this machine's.
"""


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "reports/benchmarks")
    parts = [folder / f"{name}.md" for name in ("engine", "overhead", "scale", "dequantize")]
    text = "\n".join([HEAD, *(part.read_text(encoding="utf-8") for part in parts if part.exists())])
    folder.with_suffix(".md").write_text(text.rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

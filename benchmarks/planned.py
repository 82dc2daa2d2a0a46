"""Plans beside every committed record: `python benchmarks/planned.py [--records DIR] [--json FILE] [--markdown]`.

Each cell that ran (its seeds taken together) is planned, and its parts and its peak are held against the records'. It
ends with 1 where a part differs by a byte, or a measured peak lies outside the range that the plan tells. The default
model's files and rows have to be on the machine: run any cell of it first.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from left_bench.plan.peak import measured_range
from left_bench.plan.predict import Known, predict
from left_bench.report.load import read_runs
from left_bench.spec.cell import Cell, fingerprint
from left_bench.spec.record import Record

RECORDS = Path(__file__).parent.parent / "reports" / "records"
PARTS = ("weights", "adapter", "gradients", "optimizer")
MIB = 2**20
OLDER = {"adalora"}
"""Methods whose records were made when more of them was trained (AdaLoRA's numbers of ranks): no parts to compare."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--json", type=Path, help="a line for each cell")
    parser.add_argument("--markdown", action="store_true", help="the table as docs/plan.md has it")
    given = parser.parse_args()
    cells: dict[str, Cell] = {}
    runs: dict[str, list[Record]] = defaultdict(list)
    for record, _ in read_runs(given.records)[0]:
        if record.status == "ok" and "peak_memory_bytes" in record.metrics:
            cell = Cell.from_config(record.config, choices=record.choices)
            cells.setdefault(key := fingerprint(cell.identity | {"seed": None}), cell)
            runs[key].append(record)
    known = Known()
    rows, wrong = [], 0
    for number, (key, cell) in enumerate(cells.items(), start=1):
        start = time.perf_counter()
        plan = predict(cell, known=known)
        seconds = time.perf_counter() - start
        unlike = {
            part: [plan.parts.get(part), record.memory_breakdown.get(part)]
            for record in runs[key]
            for part in PARTS
            if plan.parts.get(part) != record.memory_breakdown.get(part) and cell.peft.name not in OLDER
        }
        peaks = sorted(int(record.metrics["peak_memory_bytes"]) for record in runs[key])
        least, most = measured_range(plan, cell) or (0, 0)
        held = least <= peaks[0] and peaks[-1] <= most
        wrong += bool(unlike) or not held
        rows.append(
            {
                "cell": cell.id,
                "training": cell.training.name,
                "planned_peak_bytes": plan.peak_bytes,
                "range_bytes": [least, most],
                "measured_peak_bytes": peaks,
                "parts": plan.parts,
                "unlike": unlike,
                "unknown": plan.unknown,
                "seconds": round(seconds, 1),
            }
        )
        print(
            f"{number}/{len(cells)} {cell.id} {cell.training.name}: planned {(plan.peak_bytes or 0) / MIB:.0f}, "
            f"range {least / MIB:.0f} to {most / MIB:.0f}, measured {peaks[0] / MIB:.0f} to {peaks[-1] / MIB:.0f} MiB"
            f"{'' if held else '  OUTSIDE'}{f'  PARTS {unlike}' if unlike else ''}",
            flush=True,
            file=sys.stderr,
        )
    if given.markdown:
        print("\n".join(table(rows)))
    if given.json:
        given.json.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} cells, {wrong} outside the range or with other parts", file=sys.stderr)
    return int(wrong > 0)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown, sizes in MiB; cells of one name are told apart by their id's end."""
    lines = ["| cell | training | planned | expected | measured |", "| --- | --- | ---: | ---: | ---: |"]
    for row in rows:
        ends = [[size / MIB for size in row[key]] for key in ("range_bytes", "measured_peak_bytes")]
        expected, measured = (
            " to ".join(dict.fromkeys(f"{size:,.0f}" for size in (item[0], item[-1]))) for item in ends
        )
        planned = f"{(row['planned_peak_bytes'] or 0) / MIB:,.0f}"
        lines.append(f"| `{row['cell']}` | {row['training']} | {planned} | {expected} | {measured} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())

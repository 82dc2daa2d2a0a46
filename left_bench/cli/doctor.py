"""`left-bench doctor`: what this machine has, and what of the grid it can run."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from left_bench.core.paths import cache_dir, config_root


def main(argv: list[str]) -> int:
    """Print machine, versions, files and what works; 1 when something that every run needs does not."""
    if argv:
        print("usage: left-bench doctor")
        return 0 if argv[0] in ("-h", "--help") else 2
    from left_bench.core.paths import versions_of
    from left_bench.measure.device import describe_machine, find_device, open_device
    from left_bench.measure.energy import open_cpu, open_gpu
    from left_bench.spec.record import RECORDED_PACKAGES

    console = Console()
    table = Table(box=None, show_header=False, pad_edge=False)
    device = open_device(find_device("auto"))
    machine = describe_machine(device)
    table.add_row("machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.1f} GiB")
    if sets := machine.get("instruction_sets"):
        table.add_row("instruction sets", ", ".join(sets))
    table.add_row("device", f"{device.kind} {device.name() or ''}".strip())
    table.add_row("peak memory", device.peak_source)
    table.add_row("python", f"{machine['python']} on {machine['platform']}")
    table.add_row(
        "versions", ", ".join(f"{name} {version}" for name, version in versions_of(RECORDED_PACKAGES).items())
    )
    table.add_row("conf and sweeps", str(config_root()))
    table.add_row("cache", f"{cache_dir()} ({_free(cache_dir()):.0f} GiB free)")
    table.add_row("default model", _default_model())
    table.add_row("wandb", _wandb())
    table.add_row("5-bit decoding", _five_bits(device.kind))
    gpu = open_gpu(device.kind)
    for name, counter in {"GPU energy": gpu, "CPU energy": open_cpu()}.items():
        table.add_row(name, counter.source if counter.readable else f"not read: {counter.source}")
    if facts := gpu.facts() | gpu.clocks():
        table.add_row("GPU", ", ".join(f"{name.replace('_', ' ')} {fact}" for name, fact in facts.items()))
    healthy = True
    for name, check in _CHECKS.items():
        try:
            verdict = check(device.kind)
        except Exception as error:
            verdict, healthy = f"does not work: {type(error).__name__}: {error}", False
        table.add_row(name, verdict)
    console.print(table)
    return 0 if healthy else 1


def _free(path: os.PathLike[str]) -> float:
    import pathlib

    existing = pathlib.Path(path)
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free / 2**30


def _default_model() -> str:
    models = cache_dir() / "models"
    made = sorted(models.glob("SmolLM2-135M-Instruct*")) if models.is_dir() else []
    return str(made[0]) if made else "not fetched yet; the first run does (92 MB from the package index)"


def _wandb() -> str:
    from left_bench.tracker import logged_in

    mode = os.environ.get("WANDB_MODE")
    return f"WANDB_MODE={mode}" if mode else ("online, logged in" if logged_in() else "offline: no login")


def _five_bits(device: str) -> str:
    import torch

    from left_bench.fivebit import Linear5bit, native

    found = Linear5bit(32, 32, compute_dtype=torch.bfloat16, device=device).decoded_by
    on_cpu = device == "cpu" and found == native.TORCH
    return f"{found} (pip install 'left-bench[five-bit]' makes it faster)" if on_cpu else found


def _matrix_product(device: str) -> str:
    """Measured peak of a square matrix product: what `model_flops_utilization` is a share of."""
    from left_bench.report.values import format_flops

    return ", ".join(f"{name} {format_flops(speed, speed)}" for name, speed in _speeds(device).items())


def _precision(device: str) -> str:
    from left_bench.measure.auto_precision import advice

    return advice(device, _speeds(device))


@functools.cache
def _speeds(device: str) -> dict[str, float]:
    from left_bench.measure.device import matrix_product_peak

    return {name: matrix_product_peak(device, name) for name in ("float32", "bfloat16")}


def _bitsandbytes(device: str) -> str:
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(64, 64, device=device)
    packed, state = quantize_4bit(weight, quant_type="nf4")
    error = ((dequantize_4bit(packed, state) - weight).norm() / weight.norm()).item()
    return f"nf4 on {device}: relative error {error:.3f}"


_CHECKS: dict[str, Callable[[str], str]] = {
    "matrix products": _matrix_product,
    "precision": _precision,
    "bitsandbytes": _bitsandbytes,
}

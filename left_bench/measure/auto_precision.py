"""`precision=auto`: the precision in which a machine is fast, found without torch; and what an emulated one costs.

The option file `conf/precision/auto.yaml` gets its fields from the resolver `${fast_precision:FIELD,DEVICE}`, so that
everything that refers to the precision (a quantization's compute dtype) follows.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from left_bench.core.paths import cache_dir, config_root, versions_of
from left_bench.measure.device import find_device
from left_bench.measure.instruction_sets import cpu_model, cuda_capability, instruction_sets, is_rocm, native_sets

AUTO = "auto"
_TELLING_SLOWDOWN = 1.1
_MEASURING_SECONDS = 120
# Besides the machine, these user-set limits on kernels and threads determine how fast a product is.
_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


class Choice(NamedTuple):
    """An option of the group `precision`, and why it was chosen."""

    option: str
    why: str


def fast_precision(device: str) -> Choice:
    """The precision that `precision=auto` means on a device of this machine (`auto`: the device that would be
    chosen)."""
    device = find_device(device)
    if device == "cuda":
        return precision_of_gpu(None if is_rocm() else cuda_capability(), rocm=is_rocm())
    if device == "cpu":
        return precision_of_cpu(instruction_sets())
    return Choice("fp32", f"no other precision has been measured on {device}")


def precision_of_cpu(sets: Sequence[str] | None) -> Choice:
    """The fast precision of a processor with these instruction sets."""
    if sets is None:
        return Choice("fp32", "this system does not report the processor's instruction sets")
    result = native_sets("bfloat16", sets)
    return Choice("bf16", ", ".join(result)) if result else Choice("fp32", "no bfloat16 instructions")


def precision_of_gpu(capability: tuple[int, int] | None, *, rocm: bool = False) -> Choice:
    """The fast precision of a GPU with the torch name cuda; for NVIDIA's, by compute capability."""
    if rocm:
        return Choice("bf16", "ROCm")
    if capability is None:
        return Choice("bf16", "no GPU is visible here; compute capability 8.0 or above is assumed")
    reason = "compute capability {}.{}".format(*capability)
    return Choice("bf16" if capability >= (8, 0) else "fp16_mixed", reason)


def field_of(name: str, device: str) -> Any:
    """A field of the chosen option: the resolver `${fast_precision:FIELD,DEVICE}`."""
    return _sections()[fast_precision(device).option][name]


@cache
def _sections() -> dict[str, dict[str, Any]]:
    from omegaconf import OmegaConf

    files = (config_root() / "conf" / "precision").glob("*.yaml")
    plain: dict[str, Any] = {file.stem: OmegaConf.to_container(OmegaConf.load(file)) for file in files}
    return plain


def resolved_choices(choices: Mapping[str, str], precision: Mapping[str, Any]) -> dict[str, str]:
    """The chosen options, with `auto` replaced by the precision it means here."""
    if choices["precision"] != AUTO:
        return dict(choices)
    return {**choices, "precision": str(precision["name"])}


def emulated(device: str, dtype: str) -> bool:
    """Whether this machine lacks instructions for products in a half-precision dtype and emulates them."""
    if dtype == "float32":
        return False
    if device == "cuda":
        capability = None if dtype == "float16" or is_rocm() else cuda_capability()
        return capability is not None and capability < (8, 0)
    sets = instruction_sets() if device == "cpu" else None
    return sets is not None and not native_sets(dtype, sets)


def emulation_note(device: str, dtype: str, options: Sequence[str]) -> str | None:
    """A note about options that compute in an emulated dtype; None if that is not slower."""
    speeds = product_speeds(device, dtype)
    how = "how much slower its matrix products are could not be measured"
    if speeds is not None:
        slower = speeds["float32"] / speeds[dtype]
        if slower < _TELLING_SLOWDOWN:
            return None
        how = f"its matrix products take {format_times(slower)} as long as float32's (measured here)"
    fast = fast_precision(device).option
    return (
        f"note: precision={','.join(options)}: {dtype} is emulated on this {_IN_WORDS.get(device, device)}, and {how}; "
        f"precision=auto chooses precision={fast} here"
    )


_IN_WORDS = {"cpu": "CPU", "cuda": "GPU"}


def format_times(ratio: float) -> str:
    """`13 times`, `1.4 times`."""
    return f"{ratio:.0f} times" if ratio >= 9.5 else f"{ratio:.1f} times"


def advice(device: str, speeds: Mapping[str, float]) -> str:
    """Which precision to use on this machine, in words, for measured FLOP/s by dtype (`left-bench doctor`)."""
    chosen = fast_precision(device)
    text = f"precision=auto, the default, is {chosen.option} here ({chosen.why})"
    slower = speeds["float32"] / speeds["bfloat16"]
    if emulated(device, "bfloat16"):
        return f"{text}; bfloat16 is emulated: a product takes {format_times(slower)} as long as in float32"
    if chosen.option == "bf16" and slower > _TELLING_SLOWDOWN:
        return f"{text}, but float32's products were {format_times(slower)} as fast just now: try precision=fp32"
    return text


def what_makes_it_fast() -> dict[str, Any]:
    """The processor and user-set limits; measured speeds are cached under these facts."""
    limits = {name: os.environ[name] for name in _LIMITS if name in os.environ}
    return {"cpu": cpu_model(), "cores": os.cpu_count(), "sets": instruction_sets(), "limits": limits}


def product_speeds(device: str, dtype: str) -> dict[str, float] | None:
    """FLOP/s of matrix products in float32 and in `dtype`, measured once per machine; None if that failed.

    Measured in a separate process, because the launching one has no torch: torch's import, then under a second.
    """
    from left_bench.core.files import write_atomically
    from left_bench.spec.cell import fingerprint

    facts = what_makes_it_fast() | {"device": device, "dtype": dtype}
    facts["capability"] = cuda_capability() if device == "cuda" else None
    path = cache_dir() / "speeds" / f"{fingerprint([facts, versions_of(['torch'])])}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        cached = json.loads(path.read_text(encoding="utf-8"))["flops_per_second"]
        return {name: float(cached[name]) for name in ("float32", dtype)}
    command = [sys.executable, "-m", "left_bench.measure.auto_precision", device, "float32", dtype]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_MEASURING_SECONDS, check=True)
        results = {str(name): float(speed) for name, speed in json.loads(done.stdout).items()}
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    with contextlib.suppress(OSError):  # only a cache
        write_atomically(path, json.dumps(facts | {"flops_per_second": results}) + "\n")
    return results


def main(argv: Sequence[str]) -> int:
    """`python -m left_bench.measure.auto_precision DEVICE DTYPE...`: measure, and print FLOP/s by dtype as JSON.

    On one thread, the better of two runs: threads waiting for a busy core would tell nothing about dtypes.
    """
    import torch

    from left_bench.measure.device import matrix_product_peak

    torch.set_num_threads(1)
    device, *dtypes = argv
    largest = 512 if device == "cpu" else 4096
    turns = [[matrix_product_peak(device, dtype, largest=largest, seconds=0.05) for dtype in dtypes] for _ in range(2)]
    print(json.dumps(dict(zip(dtypes, map(max, *turns), strict=True))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""How fast 5-bit weights are decoded beside bitsandbytes' CPU nf4: `python benchmarks/dequantize.py [--decoder torch]`.

Paired: each round times one call of bitsandbytes and one of ours, one after the other (A B A B), so that whatever else
the machine does falls on both. Printed: nanoseconds per weight (median) and the ratio of the pairs, median and
10th to 90th percentile. Needs no model: the weights are Gaussian, their shapes those of SmolLM2-135M and of a 1B
model, on a GPU (`--device cuda`) those of a 1B and of a 7B model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from left_bench.fivebit import Linear5bit, native

SHAPES = {"cpu": ((1536, 576), (5632, 2048)), "cuda": ((8192, 2048), (14336, 4096))}
_PER_READING = 20
_AHEAD = 10_000_000
"""Cycles that a GPU waits, some 5 ms."""
SCHEMES = {
    "nf5": ({"scheme": "nf5"}, False),
    "nf5_dq": ({"scheme": "nf5", "double_quant": True}, True),
    "int5": ({"scheme": "int5"}, False),
}


def seconds(call: Callable[[], object], calls: int) -> float:
    """Of one call; on a GPU the mean of several by its own clock, launched behind each other."""
    if calls > 1:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_AHEAD)  # the launches get ahead of the GPU, or their cost would be what is timed
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000 / calls
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def paired(ours: Callable[[], object], theirs: Callable[[], object], *, rounds: int, calls: int) -> dict[str, float]:
    """Median seconds of both, and the distribution of ours / theirs over the rounds."""
    for call in (ours, theirs) * 3:
        call()
    pairs = [(seconds(theirs, calls), seconds(ours, calls)) for _ in range(rounds)]
    ratios = [mine / other for other, mine in pairs]
    tenths = statistics.quantiles(ratios, n=10)
    return {
        "bitsandbytes_seconds": statistics.median(other for other, _ in pairs),
        "seconds": statistics.median(mine for _, mine in pairs),
        "ratio": statistics.median(ratios),
        "ratio_p10": tenths[0],
        "ratio_p90": tenths[-1],
    }


def measure(
    shape: tuple[int, int], scheme: str, dtype: torch.dtype, *, rounds: int, device: str = "cpu"
) -> dict[str, object]:
    options, double_quant = SCHEMES[scheme]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double_quant)
    layer = Linear5bit(shape[1], shape[0], False, compute_dtype=dtype, device=device, **options)  # type: ignore[arg-type]
    layer.quantize_(weight)
    calls = _PER_READING if device == "cuda" else 1
    result = paired(layer.dequantize, lambda: dequantize_4bit(packed, state), rounds=rounds, calls=calls)
    return {
        "scheme": scheme,
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "decoder": layer.decoded_by,
        "nanoseconds_per_weight": 1e9 * result["seconds"] / weight.numel(),
        "bitsandbytes_nanoseconds_per_weight": 1e9 * result["bitsandbytes_seconds"] / weight.numel(),
        **result,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--device", choices=list(SHAPES), default="cpu")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--decoder", choices=["torch"], help="default: the one-pass kernel, where llvmlite is there")
    arguments = parser.parse_args()
    if arguments.decoder:
        native.look_up = lambda: None  # type: ignore[assignment]  # as without llvmlite
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if not arguments.json:
        print(
            f"{'scheme':8}{'shape':>12}{'dtype':>10}{'threads':>9}{'decoder':>13}{'ns/weight':>11}{'nf4':>8}"
            "   ratio (p10 to p90)"
        )
    for shape in SHAPES[arguments.device]:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for scheme in SCHEMES:
                row = measure(shape, scheme, dtype, rounds=arguments.rounds, device=arguments.device)
                if arguments.json:
                    print(json.dumps(row), flush=True)
                    continue
                print(
                    f"{scheme:8}{'x'.join(map(str, shape)):>12}{row['dtype']:>10}{row['threads']:>9}"
                    f"{row['decoder']:>13}"
                    f"{row['nanoseconds_per_weight']:>11.3f}{row['bitsandbytes_nanoseconds_per_weight']:>8.3f}"
                    f"   {row['ratio']:.2f} ({row['ratio_p10']:.2f} to {row['ratio_p90']:.2f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()

"""The levels of the codes: NormalFloat for any number of bits, and plain integers."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from statistics import NormalDist

import pyarrow
import pyarrow.compute
import torch


def normal_float(bits: int) -> torch.Tensor:
    """The NormalFloat levels of QLoRA (Dettmers et al. 2023, section 3 and appendix E), sorted, float32, in [-1, 1].

    Quantiles of N(0, 1), evenly spaced in probability, with 2^(k-1) levels above zero, 2^(k-1) - 1 below it and zero
    itself, divided by the largest. The outermost probability follows bitsandbytes' value for k = 4: 0.9677083 = 1 -
    (1/30 + 1/32) / 2, the mean of the midpoints of the outermost of 15 and of 16 equally likely bins (Yoshida 2023,
    arXiv 2306.06965, eq. for delta). At k bits: 1 - (1/(2 (2^k - 1)) + 1/(2 2^k)) / 2, so 1 - (1/62 + 1/64) / 2 =
    0.9841230 for k = 5. k = 4 gives bitsandbytes' nf4 table.
    """
    half = 2 ** (bits - 1)
    outermost = 1 - (1 / (4 * half - 2) + 1 / (4 * half)) / 2
    above = _quantiles(outermost, half)
    below = [-value for value in _quantiles(outermost, half - 1)]
    return torch.tensor(sorted([*below, 0.0, *above]), dtype=torch.float64).div(max(above)).float()


def _quantiles(outermost: float, count: int) -> list[float]:
    """`count` quantiles of N(0, 1) at evenly spaced probabilities from `outermost` down to, and without, 1/2."""
    step = (outermost - 0.5) / count
    return [NormalDist().inv_cdf(outermost - index * step) for index in range(count)]


@cache
def levels(scheme: str, device: torch.device) -> torch.Tensor:
    """The 32 levels of a scheme, float32 [32]: `nf5` in [-1, 1], `int5` the integers 0 to 31."""
    result = normal_float(5) if scheme == "nf5" else torch.arange(32, dtype=torch.float32)
    return result.to(device)


@cache
def level_pairs(device: torch.device) -> torch.Tensor:
    """For each of the 1024 pairs of `nf5` codes (first + 32 * second) both levels, two float32 in one int64 [1024].

    One table for all layers, 8 KiB; looking up two weights at once costs as much as looking up one.
    """
    item = levels("nf5", device)
    index = torch.arange(1024, device=device)
    return torch.stack([item[index % 32], item[index // 32]], dim=1).view(torch.int64).view(-1)


def look_up(pairs: torch.Tensor) -> Iterable[torch.Tensor]:
    """The float32 `nf5` levels of pairs of codes, int16 [rows, n]: [some rows, 2 n] at a time, in order.

    On a CPU it uses Arrow's `take`, which reads 16-bit indices directly. torch's look-ups need wider indices, and then
    take 1.3 times (`index_select`) to 4 times (`take`) as long. Arrow uses one thread per call, so the rows are divided
    among as many threads as torch uses.
    """
    if pairs.device.type != "cpu":
        result = level_pairs(pairs.device).index_select(0, pairs.view(-1).int())
        return [result.view(torch.float32).view(len(pairs), -1)]
    threads = min(len(pairs), torch.get_num_threads())
    return [_take(pairs)] if threads == 1 else pool(threads, os.getpid()).map(_take, pairs.chunk(threads))


def _take(pairs: torch.Tensor) -> torch.Tensor:
    buffer = pyarrow.py_buffer(pairs.numpy())
    indices = pyarrow.Array.from_buffers(pyarrow.uint16(), pairs.numel(), [None, buffer])
    # no bounds check: ten bits cannot point outside the table
    result = pyarrow.compute.array_take(_arrow_table(), indices, boundscheck=False)
    return torch.frombuffer(result.buffers()[1], dtype=torch.float32, count=2 * len(result)).view(len(pairs), -1)


@cache
def _arrow_table() -> pyarrow.Array:
    return pyarrow.array(level_pairs(torch.device("cpu")).numpy())


@cache
def pool(threads: int, process: int) -> ThreadPoolExecutor:
    """A thread pool per process: a fork inherits the pool object without its threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="decode")

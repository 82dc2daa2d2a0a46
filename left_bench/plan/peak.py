"""From the bytes of a plan to what a run's record will say: the kernel and an allocator count more than tensors.

The numbers are those of the committed records (`benchmarks/planned.py` holds every one of them against its plan) and,
for CUDA, of `reports/gpu.md`.
"""

from __future__ import annotations

from typing import NamedTuple

from left_bench.plan.result import Plan
from left_bench.spec.cell import Cell

_MIB = 2**20


class _Beside(NamedTuple):
    """What a CPU's resident set holds beside a step's tensors, as shares of the planned activations."""

    least: float
    most: float


# code and workspaces of kernels, whatever the model: the smallest model takes 53 MiB beside its 4
_LEAST_BYTES, _MOST_BYTES = 40 * _MIB, 280 * _MIB
# the rest is the allocator's: what it keeps of freed tensors, the more the more of them there are in each layer
_PLAIN = _Beside(0.45, 1.0)
_COMPILED = _Beside(0.0, 1.0)  # planned as not compiled
_PACKED = _Beside(0.45, 1.4)  # masks of attention within each row
_INT8 = _Beside(0.45, 2.0)  # 8-bit copies of inputs and 32-bit sums
_DORA_DECODED = _Beside(0.45, 2.0)  # each layer's weights decoded, and widened for their norms

_CUDA_PLANNED_OVER_MEASURED = (0.99, 1.04)
_CUDA_INT8_PLANNED_OVER_MEASURED = (0.90, 1.04)
_CUDA_CONTEXT_BYTES = 1024 * _MIB
"""The context of CUDA and what its allocator reserves beyond what it has given out: in no record's peak."""


def measured_range(plan: Plan, cell: Cell) -> tuple[int, int] | None:
    """The least and the most bytes that `peak_memory_bytes` of a run's record is expected to say; None: not known."""
    if plan.peak_bytes is None:
        return None
    eight_bits = bool(cell.quantization.config.get("load_in_8bit"))
    if cell.device_type == "cuda":
        least, most = _CUDA_INT8_PLANNED_OVER_MEASURED if eight_bits else _CUDA_PLANNED_OVER_MEASURED
        return int(plan.peak_bytes / most), int(plan.peak_bytes / least)
    if cell.device_type != "cpu":
        return None
    shares = [_PLAIN]
    shares += [_COMPILED] if cell.training.compile else []
    shares += [_PACKED] if cell.training.batching == "packed" else []
    shares += [_INT8] if eight_bits else []
    shares += [_DORA_DECODED] if cell.quantization.target is not None and cell.peft.config.get("use_dora") else []
    activations = plan.parts["activations_and_workspace"]
    least, most = min(share.least for share in shares), max(share.most for share in shares)
    low, high = _LEAST_BYTES + int(least * activations), _MOST_BYTES + int(most * activations)
    return plan.peak_bytes + low, plan.peak_bytes + high


def room_needed(plan: Plan, cell: Cell) -> int | None:
    """Bytes of memory that a cell surely has enough of; None where its peak is not known."""
    between = measured_range(plan, cell)
    if cell.device_type == "cpu" or plan.peak_bytes is None:
        return between and between[1]
    return (between[1] if between else plan.peak_bytes) + _CUDA_CONTEXT_BYTES


def certain_need(plan: Plan, cell: Cell) -> int:
    """Bytes of memory that a cell surely needs, of what is known of it."""
    between, held = measured_range(plan, cell), sum(plan.parts.values())
    return held if between is None else min(held, between[0])


def verdict(plan: Plan, limit: int | None, *, cell: Cell) -> str:
    """`yes`, `no`, `perhaps` where it depends on what lies beside the tensors, `?` where peak or limit is not known.

    What is known can be too much already.
    """
    if limit is None:
        return "?"
    if certain_need(plan, cell) > limit:
        return "no"
    needed = room_needed(plan, cell)
    if needed is None:
        return "?"
    return "yes" if needed <= limit else "perhaps"

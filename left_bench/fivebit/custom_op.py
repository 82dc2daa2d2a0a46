"""The GPU decoder as a torch operator, so that torch.compile does not break its graph."""

from __future__ import annotations

from collections.abc import Mapping

import torch

_NAME = "decode_five_bits"
_LIBRARY = torch.library.Library("left_bench", "DEF")
_LIBRARY.define(
    f"{_NAME}(Tensor packed, Tensor scale, Tensor? second, Tensor? mean, Tensor? after, *, "
    "str scheme, int block_size, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def decode(
    packed: torch.Tensor,
    constants: Mapping[str, torch.Tensor],
    *,
    scheme: str,
    block_size: int,
    dtype: torch.dtype,
    after: torch.Tensor | None,
) -> torch.Tensor:
    """All stored weights, padding included, flat; only valid if `native.by_triton` is true.

    Args:
        after: a tensor that is computed first. Without this dependency a compiler could decode all weights of a model
            at once, or keep what the forward pass decoded for the backward pass.
    """
    second = constants.get("nested_scale", constants.get("zero_point"))
    result: torch.Tensor = getattr(torch.ops.left_bench, _NAME)(
        packed,
        constants["scale"],
        second,
        constants.get("nested_mean"),
        after,
        scheme=scheme,
        block_size=block_size,
        dtype=dtype,
    )
    return result


def _on_gpu(
    packed: torch.Tensor,
    scale: torch.Tensor,
    second: torch.Tensor | None,
    mean: torch.Tensor | None,
    after: torch.Tensor | None,
    *,
    scheme: str,
    block_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    from left_bench.fivebit import on_gpu

    out = _like(packed, dtype=dtype)
    on_gpu.decode(packed, scale, second, mean, out, scheme=scheme, block_size=block_size)
    return out


def _like(packed: torch.Tensor, *_: object, dtype: torch.dtype, **__: object) -> torch.Tensor:
    return packed.new_empty(packed.shape[0] * 8 // 5, dtype=dtype)


_LIBRARY.impl(_NAME, _on_gpu, "CUDA")  # also AMD's GPUs
torch.library.register_fake(f"left_bench::{_NAME}", _like, lib=_LIBRARY)

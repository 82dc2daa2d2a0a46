"""Tensors on their way to the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def moved_to(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The tensor on another device; not waited for where that is CUDA."""
    import torch

    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    # from pageable memory the copy would wait for all that is queued on the device
    return tensor.pin_memory().to(device, non_blocking=True)

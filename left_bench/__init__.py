"""left_bench: which way of fine-tuning gives the best quality per byte and per second, measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from left_bench.report import load_records

__version__ = "0.1.0"
__all__ = ["__version__", "load_records"]


def __getattr__(name: str) -> Any:
    if name == "load_records":  # brings pandas, which `--help` can do without
        from left_bench.report import load_records

        return load_records
    raise AttributeError(f"module 'left_bench' has no attribute '{name}'")

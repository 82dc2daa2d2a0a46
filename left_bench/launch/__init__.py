"""The launching process: checks cells, runs them one by one or in parallel, writes records and the summary.

Imports all rooms except `cli`; never torch.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "Launch":  # the name in configurations of earlier versions
        from left_bench.launch.earlier_callback import Launch

        return Launch
    raise AttributeError(f"module 'left_bench.launch' has no attribute '{name}'")

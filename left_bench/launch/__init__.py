"""The launching process: cells checked, run one by one or together, their records written, the end summed up.

Imports all rooms but `cli`; never torch.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "Launch":  # the name that configurations of earlier versions hold
        from left_bench.launch.earlier_callback import Launch

        return Launch
    raise AttributeError(f"module 'left_bench.launch' has no attribute '{name}'")

"""The estimate of a launch's duration, shown before its first cell runs.

`calibrate` times a base model on this machine and counts the rows' tokens, once, in a separate process; `arithmetic`
computes a cell's seconds from that; `experience` corrects them by cells that have run here before; `tell` prints the
result. Workers import none of it, and only the calibrating process imports torch.
"""

from __future__ import annotations

from left_bench.launch.estimate.tell import Planned, say_estimate

__all__ = ["Planned", "say_estimate"]

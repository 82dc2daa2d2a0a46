"""What a launch will take, told before its first cell runs.

`calibrate` times a base model on this machine and counts the rows' tokens, once, in a process of its own; `arithmetic`
adds a cell's seconds up from that; `experience` corrects them by the cells that have run here before; `tell` puts it
into a line. Nothing of it is imported by a worker, and nothing but the calibrating process imports torch.
"""

from __future__ import annotations

from left_bench.launch.estimate.tell import Planned, say_estimate

__all__ = ["Planned", "say_estimate"]

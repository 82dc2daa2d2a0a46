"""Trackers: where a cell's configuration, steps and record go besides the disk.

They live in the parent and are fed from the cell's events, so that a tracker can neither slow nor end a measured run.
Disk is the truth: a tracker that fails costs its own data and a warning, and `left-bench track` tells it all again.
`kinds` has a module for each tracker, `base` says what they are told; packages of others add theirs by entry point.
"""

from __future__ import annotations

from left_bench.tracker.base import Attempt, Comparison, Feed, NoTracker, Tracker, launch_id
from left_bench.tracker.choose import TRACKERS, check_trackers, open_tracker
from left_bench.tracker.kinds.wandb import logged_in
from left_bench.tracker.several import Shielded, Together

__all__ = [
    "TRACKERS",
    "Attempt",
    "Comparison",
    "Feed",
    "NoTracker",
    "Shielded",
    "Together",
    "Tracker",
    "check_trackers",
    "launch_id",
    "logged_in",
    "open_tracker",
]

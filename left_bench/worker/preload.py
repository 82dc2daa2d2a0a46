"""The imports of every run, which the fork server does once. Importing computes nothing and starts no thread."""

from __future__ import annotations

import gc

import left_bench.worker.reload_check
import left_bench.worker.stages  # noqa: F401

# freeze the million imported objects, so that collections, one before each phase, need not traverse them
gc.collect()
gc.freeze()

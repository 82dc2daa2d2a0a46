"""What every run imports, for the fork server to import once. Importing computes nothing and starts no thread."""

from __future__ import annotations

import gc

import left_bench.worker.reload_check
import left_bench.worker.stages  # noqa: F401

# what was imported stays: every later collection, one before each phase, would go through a million such objects
gc.collect()
gc.freeze()

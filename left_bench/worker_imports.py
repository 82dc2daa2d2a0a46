"""What every run imports, for the fork server to import once. Importing computes nothing and starts no thread."""

from __future__ import annotations

import gc

import left_bench.base
import left_bench.flops
import left_bench.merge
import left_bench.neighbours
import left_bench.packing
import left_bench.quantization
import left_bench.quantized_cache
import left_bench.reload  # noqa: F401

# what was imported stays: every later collection, one before each phase, would go through a million such objects
gc.collect()
gc.freeze()

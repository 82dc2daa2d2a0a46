"""What every run imports, for the fork server to import once. Importing computes nothing and starts no thread."""

from __future__ import annotations

import gc

import left_bench.evaluation.merge_check
import left_bench.evaluation.shared_baseline
import left_bench.measure.cpu_contention
import left_bench.model.quantization_error
import left_bench.model.quantized_cache
import left_bench.training.flops
import left_bench.training.packing
import left_bench.worker.reload_check  # noqa: F401

# what was imported stays: every later collection, one before each phase, would go through a million such objects
gc.collect()
gc.freeze()

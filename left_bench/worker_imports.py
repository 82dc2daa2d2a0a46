"""What every run imports, for the fork server to import once. Importing computes nothing and starts no thread."""

from __future__ import annotations

import left_bench.base
import left_bench.merge
import left_bench.quantization
import left_bench.reload  # noqa: F401

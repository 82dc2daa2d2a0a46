"""Records -> tables, plots, Markdown. Reports read records and nothing else, so torch is never imported here."""

from __future__ import annotations

from left_bench.report.command import main, write_report
from left_bench.report.frame import load_records
from left_bench.report.load import read_runs, read_sweeps
from left_bench.report.terminal import print_summary
from left_bench.report.values import format_value

__all__ = ["format_value", "load_records", "main", "print_summary", "read_runs", "read_sweeps", "write_report"]

"""Measurements: device, memory, seconds, joules, other load on the machine.

Imports `core`, `spec` and `processes`. The worker opens a `Meter`, whose phases go into the record.
"""

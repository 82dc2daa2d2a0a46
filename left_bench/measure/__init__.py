"""What is measured, and of which machine: device, memory, seconds, joules, what else ran.

Imports `core`, `spec` and `processes`. The worker opens a `Meter`, whose phases become the record's.
"""

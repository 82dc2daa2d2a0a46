"""Processes and what each may take: starting them, ranks of one cell, cores and accelerators, memory limits.

Imports `core` and `spec`. A cell's worker is started here.
"""

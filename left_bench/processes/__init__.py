"""Processes and their resources: starting workers, the ranks of a cell, cores and accelerators, memory limits.

Imports `core` and `spec`. Workers are started here.
"""

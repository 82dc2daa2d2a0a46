"""Held-out rows: loss, answers and their scores; what a sweep's cells share; whether merging changes anything.

Imports the rooms up to `training`. A run's stage before and after training.
"""

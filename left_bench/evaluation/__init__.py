"""Evaluation on held-out rows: loss, answers and their scores; shared baselines; the check of merged models.

Imports the rooms up to `training`. A run's stage before and after training.
"""

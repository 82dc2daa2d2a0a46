"""The training loop, its loss and objective, packing, checkpoints, sharding.

Imports the rooms up to `methods`. A run's third stage, between attaching and evaluating.
"""

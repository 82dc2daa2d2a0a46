"""From the command line to cells: composing with Hydra, refusing invalid input, listing a sweep's jobs.

Imports the rooms up to `measure`, and torch-free parts of others (names and checks); no torch.
"""

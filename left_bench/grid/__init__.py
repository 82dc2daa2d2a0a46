"""From what was typed to cells: composing with Hydra, what is refused, which jobs a sweep has.

Imports the rooms up to `measure`, and of others what tells names and shapes; no torch.
"""

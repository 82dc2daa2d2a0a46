"""One cell in its own process: read `run.work` from top to bottom.

Imports the rooms up to `evaluation`; leaves `outcome.json` for the launching process.
"""

"""One cell in its own process: read `run.work` from top to bottom.

Imports the rooms up to `evaluation`; writes `outcome.json` for the launching process.
"""

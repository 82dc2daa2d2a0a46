"""What a cell trained, in the user's hands: loaded again from its run folder, written for other programs.

Imports the rooms up to `report`. A run is over when it comes here; `left-bench chat`, `export` and `train` ask it.
"""

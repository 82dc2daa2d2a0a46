"""What a cell will need of memory, worked out before anything is run.

`predict` puts a cell together from `shapes` alone and takes one step of them, which `follow` watches; `peak` knows
what a run will measure. Imports the rooms up to `training`; `left-bench plan` (`cli.plan`) and the preflight ask it.
"""

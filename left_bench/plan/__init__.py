"""What a cell will need of memory, worked out before anything is run.

`predict` puts a cell together from shapes alone and runs one step of them; `formats` knows what a quantized layer
stores. Imports the rooms up to `training`; `left-bench plan` (`cli.plan`) and the preflight ask it.
"""

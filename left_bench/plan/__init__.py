"""`left-bench plan`: what a cell will need of memory, worked out before anything is run.

`command` composes the cells and prints; `predict` puts a cell together from shapes alone and runs one step of them;
`formats` knows what a quantized layer stores.
"""

from left_bench.plan.command import main

__all__ = ["main"]

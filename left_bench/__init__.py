"""left_bench: which way of fine-tuning gives the best quality per byte and per second, measured."""

__version__ = "0.1.0"

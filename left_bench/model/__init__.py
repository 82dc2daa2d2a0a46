"""The base model: loading, quantizing, caching; its quantization error, positions and kernels.

Imports the rooms up to `measure`, `pretrained` and the formats. A run's first stage.
"""

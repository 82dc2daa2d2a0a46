"""The base model: loaded, quantized, kept; what its quantization cost; which positions and kernels it has.

Imports the rooms up to `measure`, `pretrained` and the formats. A run's first stage.
"""

"""Weights stored in 5 bits, trainable through adapters: NormalFloat (`nf5`) and plain integers (`int5`).

No other backend that can be trained stores 5 bits: torchao's int5 and HQQ's 5-bit both take up a byte per weight.
Importing this package makes its quantization known to transformers, which is also what reloading a saved model needs.
"""

from left_bench.fivebit.linear import Linear5bit
from left_bench.fivebit.quantizer import FiveBitConfig, FiveBitHfQuantizer

__all__ = ["FiveBitConfig", "FiveBitHfQuantizer", "Linear5bit"]

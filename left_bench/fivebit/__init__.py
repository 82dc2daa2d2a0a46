"""Weights stored in 5 bits, trainable through adapters: NormalFloat (`nf5`) and plain integers (`int5`).

No other trainable backend stores 5 bits: torchao's int5 and HQQ's 5-bit both use a byte per weight. Importing this
package registers its quantization with transformers, which reloading a saved model also needs.
`left_bench.quantization.five_bit` is its backend.
"""

from left_bench.fivebit.linear import Linear5bit
from left_bench.fivebit.quantizer import FiveBitConfig, FiveBitHfQuantizer

__all__ = ["FiveBitConfig", "FiveBitHfQuantizer", "Linear5bit"]

"""Fine-tuning methods that peft lacks: bottleneck adapters, BitFit, and training only the last layers."""

from left_bench.methods.attached import Attached, Method, load_attached, method_in
from left_bench.methods.bottleneck import BottleneckConfig
from left_bench.methods.partial import BitFitConfig, LayerFreezeConfig

__all__ = ["Attached", "BitFitConfig", "BottleneckConfig", "LayerFreezeConfig", "Method", "load_attached", "method_in"]

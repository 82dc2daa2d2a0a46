"""Bottleneck adapters: small two-layer networks in series with the frozen sublayers."""

from __future__ import annotations

import dataclasses
import re
from typing import ClassVar, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from left_bench.core.errors import UserError, nearest
from left_bench.methods.attached import Method

Placement = Literal["houlsby", "pfeiffer"]
NonLinearity = Literal["gelu", "relu", "silu", "swish", "tanh"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "tanh": nn.Tanh,
}
_LLAMA = ("self_attn.o_proj", "mlp.down_proj")
# model type -> the modules inside a layer that output the attention's and the feed-forward's result
_OUTPUTS = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "opt": ("self_attn.out_proj", "fc2"),
    "bert": ("attention.output.dense", "output.dense"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BottleneckConfig(Method):
    """h + up(f(down(h))) on a sublayer's output h, before the residual addition.

    If the model has dropout on the sublayer's output (OPT, BERT), it comes after the adapter. Normalization weights
    stay frozen. In models whose attention and feed-forward run in parallel (GPT-NeoX), the adapters are at the same two
    places and change the two terms of one sum.
    """

    mergeable: ClassVar[bool] = False

    placement: Placement = "pfeiffer"
    """`houlsby`: after attention and feed-forward (Houlsby et al. 2019); `pfeiffer`: only after the feed-forward
    (Pfeiffer et al. 2020)."""
    reduction_factor: float = 16
    """Hidden width of the model / width of the bottleneck."""
    non_linearity: NonLinearity = "gelu"

    def __post_init__(self) -> None:
        _check("placement", self.placement, get_args(Placement))
        _check("non_linearity", self.non_linearity, get_args(NonLinearity))
        if self.reduction_factor <= 0:
            raise UserError(f"peft.config.reduction_factor={self.reduction_factor}: give a number above 0, such as 16")

    def prepare(self, model: PreTrainedModel, *, adapter_dtype: torch.dtype) -> None:
        family, width = model.config.model_type, model.config.hidden_size
        if family not in _OUTPUTS:
            raise UserError(
                f"peft: bottleneck adapters do not support model type '{family}'; they support {', '.join(_OUTPUTS)}"
            )
        attention, feed_forward = _OUTPUTS[family]
        places = (attention, feed_forward) if self.placement == "houlsby" else (feed_forward,)
        # the layer's number comes directly before the name: `.0.output.dense`, not BERT's `.0.attention.output.dense`
        pattern = re.compile(rf"\.\d+\.({'|'.join(map(re.escape, places))})$")
        results = [name for name, _ in model.named_modules() if pattern.search(name)]
        expected = len(places) * model.config.num_hidden_layers
        if len(results) != expected:
            raise UserError(
                f"peft: this model of type '{family}' has {len(results)} modules named {' or '.join(places)} in its "
                f"layers instead of the expected {expected}; bottleneck adapters do not fit it"
            )
        for name in results:
            parent = model.get_submodule(name.rpartition(".")[0])
            adapted = Bottleneck(
                model.get_submodule(name),
                width=width,
                bottleneck=max(1, int(width / self.reduction_factor)),
                non_linearity=self.non_linearity,
                dtype=adapter_dtype,
            )
            setattr(parent, name.rpartition(".")[2], adapted)


class Bottleneck(nn.Module):
    """A frozen layer of any kind, possibly quantized, followed by a bottleneck adapter.

    The adapter computes in its own weights' dtype, whatever the base model's is. It starts as the identity, because its
    up-projection is zero.
    """

    def __init__(
        self, base_layer: nn.Module, *, width: int, bottleneck: int, non_linearity: str, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        device = next(base_layer.parameters()).device
        self.down = nn.Linear(width, bottleneck, device=device, dtype=dtype)
        self.activation = _ACTIVATIONS[non_linearity]()
        self.up = nn.Linear(bottleneck, width, device=device, dtype=dtype)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.train(base_layer.training)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.base_layer(hidden)
        change = self.up(self.activation(self.down(hidden.to(self.down.weight.dtype))))
        return (hidden + change).to(hidden.dtype)


def _check(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        hint = nearest(value, known) or f"; choose {', '.join(known)}"
        raise UserError(f"peft.config.{key}={value!r}: no such choice{hint}")

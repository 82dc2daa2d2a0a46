"""A linear layer whose weight is stored in 5 bits and decoded at every use."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from left_bench.compat.peft import AskedToDequantize
from left_bench.compat.torch import MovedNotCast
from left_bench.fivebit import blocks, native


class Linear5bit(AskedToDequantize, MovedNotCast, nn.Linear):
    """`nn.Linear` over a frozen 5-bit weight; gradients flow to the input and the bias.

    `weight` holds the packed codes, uint8 and one-dimensional; the constants are buffers. It is zero at first;
    `quantize_` or a checkpoint fills it. Because it is one-dimensional, the packed weight can never be added to a dense
    one: merging an adapter into it raises an error instead of corrupting it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scheme: str = "nf5",
        block_size: int = 64,
        double_quant: bool = False,
        compute_dtype: torch.dtype = torch.float32,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.scheme, self.block_size, self.double_quant = scheme, block_size, double_quant
        self.compute_dtype = compute_dtype
        numel = in_features * out_features
        stored = blocks.padded_numel(numel, block_size) * 5 // 8
        self.weight = nn.Parameter(torch.zeros(stored, dtype=torch.uint8, device=device), requires_grad=False)
        shapes = blocks.constant_shapes(numel, scheme=scheme, block_size=block_size, double_quant=double_quant)
        for name, (length, kind) in shapes.items():
            self.register_buffer(name, torch.zeros(length, dtype=kind, device=device))
        self.constant_names = tuple(shapes)
        values = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", values)

    @property
    def constants(self) -> dict[str, torch.Tensor]:
        """The quantization constants by name."""
        return {name: getattr(self, name) for name in self.constant_names}

    @property
    def decoded_by(self) -> str:
        """The decoder used for its products; a record's `effective.five_bit_decoder`."""
        return native.decoder(block_size=self.block_size, dtype=self.compute_dtype, device=self.weight.device)

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors this layer stores for a dense weight [out, in]: `weight` and the constants."""
        packed, constants = blocks.quantize(
            weight, scheme=self.scheme, block_size=self.block_size, double_quant=self.double_quant
        )
        return {"weight": packed, **constants}

    def quantize_(self, weight: torch.Tensor) -> Linear5bit:
        """Quantize and store a dense weight [out, in]."""
        for name, value in self.encode(weight).items():
            setattr(self, name, nn.Parameter(value, requires_grad=False) if name == "weight" else value)
        return self

    def dequantize(self, dtype: torch.dtype | None = None, *, after: torch.Tensor | None = None) -> torch.Tensor:
        """The dense weight [out, in] that this layer computes with, by default in its compute dtype.

        Args:
            after: a tensor that a compiled graph computes first; without it, it may decode all weights of a model at
                once.

        Raises:
            RuntimeError: the packed weight was overwritten.
        """
        stored = blocks.padded_numel(self.in_features * self.out_features, self.block_size) * 5 // 8
        if self.weight.shape != (stored,) or self.weight.dtype != torch.uint8:
            raise RuntimeError(
                f"the packed 5-bit weight was overwritten with {self.weight.dtype} {tuple(self.weight.shape)}; "
                "adapters cannot be merged into it: reload the model, and call model.dequantize() before attaching"
            )
        return blocks.dequantize(
            self.weight,
            self.constants,
            shape=(self.out_features, self.in_features),
            scheme=self.scheme,
            block_size=self.block_size,
            dtype=dtype or self.compute_dtype,
            after=after,
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The product in the compute dtype (autocast's if it is on), returned in the input's dtype."""
        kind = input.device.type
        autocast = torch.is_autocast_enabled(kind)
        compute = torch.get_autocast_dtype(kind) if autocast else self.compute_dtype
        out: torch.Tensor = _Product.apply(input.to(compute), self)
        if self.bias is not None:
            out = out + self.bias.to(compute)
        return out if autocast else out.to(input.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scheme={self.scheme}, block_size={self.block_size}"

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        self._annotate_weight()

    def after_moving(self) -> None:
        self._annotate_weight()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._annotate_weight()  # copying a parameter drops its attributes

    def _annotate_weight(self) -> None:
        weight = getattr(self, "weight", None)
        if weight is not None:
            state = QuantState(self)
            weight.quant_state = state
            weight.left_dequantize = state.dequantize  # for left_bench.model.quantization_error


class QuantState:
    """The constants and shape of a packed weight, read from its layer, under bitsandbytes' attribute names, so that
    code that counts bytes and elements of 4-bit weights also counts these."""

    def __init__(self, layer: Linear5bit | None = None) -> None:
        self._layer = weakref.ref(layer) if layer is not None else lambda: None

    def __reduce__(self) -> tuple[type[QuantState], tuple[()]]:
        return QuantState, ()  # the layer replaces it by its own

    def dequantize(self) -> torch.Tensor:
        """The dense float32 weight [out, in]."""
        layer = self._layer()
        if layer is None:
            raise RuntimeError("the layer of this packed weight, which holds its constants, no longer exists")
        return layer.dequantize(torch.float32)

    @property
    def shape(self) -> torch.Size | None:
        layer = self._layer()
        return None if layer is None else torch.Size((layer.out_features, layer.in_features))

    @property
    def absmax(self) -> torch.Tensor | None:
        return self._constant("scale")

    @property
    def offset(self) -> torch.Tensor | None:
        return self._constant("zero_point")

    @property
    def state2(self) -> SimpleNamespace:
        return SimpleNamespace(absmax=self._constant("nested_scale"), offset=self._constant("nested_mean"))

    def _constant(self, name: str) -> torch.Tensor | None:
        layer = self._layer()
        return None if layer is None else layer.constants.get(name)


class _Product(torch.autograd.Function):
    """x W^T, decoding W in the forward and again in the backward pass, so that no dense weight is kept between them."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, layer: Linear5bit) -> torch.Tensor:
        ctx.layer = layer
        return nn.functional.linear(input, layer.dequantize(input.dtype, after=input))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        return grad @ ctx.layer.dequantize(grad.dtype, after=grad), None

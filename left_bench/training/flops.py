"""Floating-point operations that a training step needs: the numerator of `model_flops_utilization`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from left_bench.measure.meter import Step, logical_numel
from left_bench.model.load import layers_of
from left_bench.spec.task import probe_inputs


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """FLOPs of a step per unit; only matrix products count, as is usual (Chowdhery et al. 2022, app. B)."""

    per_token: float
    per_label: float
    """Each labelled token goes through the output head."""
    per_pair: float
    """Attention, per squared token count of each row; a causal mask needs half of the products."""

    def of(self, steps: Iterable[Step]) -> float:
        """FLOPs of the steps, without padding, recomputed activations and logits that are not needed."""
        return sum(
            step.tokens * self.per_token + step.answer_tokens * self.per_label + step.pairs * self.per_pair
            for step in steps
        )


def step_flops(model: Any) -> StepFlops | None:
    """Count a model's FLOPs, including its adapter, by a pass over two tokens; None if that is not meaningful.

    In an encoder-decoder a token passes through only one of the two, and a step does not record which; an image has no
    tokens; a recurrent model compares no pairs of tokens.

    A matrix product costs 2 FLOPs per weight and token in the forward pass; in the backward pass as many for the
    gradient of its input, if there is one (not below the first trainable layer), and as many for that of its weight, if
    it is trained. That is why a LoRA step costs two thirds of a full fine-tuning step.
    """
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder or model.main_input_name != "input_ids":
        return None
    layers = layers_of(model)
    if not getattr(config, "num_attention_heads", None) or len(layers) != config.num_hidden_layers:
        return None  # a recurrent model compares no pairs of tokens; without its layers nothing can be counted
    head = model.get_output_embeddings()
    in_head = {id(part) for part in head.modules()} if head is not None else set()
    cost = {"token": 0.0, "label": 0.0}
    backward = {"layers": 0}

    def product(module: Any, inputs: Any) -> None:
        passes = 1 + bool(inputs[0].requires_grad) + bool(module.weight.requires_grad)
        cost["label" if id(module) in in_head else "token"] += 2.0 * _weights(module) * passes

    def layer(_module: Any, _inputs: Any, output: Any) -> None:
        backward["layers"] += (output if isinstance(output, torch.Tensor) else output[0]).requires_grad

    with contextlib.ExitStack() as hooks, torch.enable_grad():
        for module in model.modules():
            if _weights(module):
                hooks.enter_context(module.register_forward_pre_hook(product))
        for module in layers:
            hooks.enter_context(module.register_forward_hook(layer))
        model(**probe_inputs(model))
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # two products, half of each masked: 2 x 2 x (n^2 / 2) x width x heads; backward two for each
    passes = config.num_hidden_layers + 2 * backward["layers"]
    per_pair = 2.0 * width * config.num_attention_heads * passes
    return StepFlops(per_token=cost["token"], per_label=cost["label"], per_pair=per_pair)


def _weights(module: Any) -> int:
    """Number of weights of a layer that is a matrix product; 0 for others (embeddings, norms, wrappers)."""
    if isinstance(module, torch.nn.Embedding) or next(module.children(), None) is not None:
        return 0
    weight = getattr(module, "weight", None)
    if weight is not None and hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features * module.out_features)
    return logical_numel(weight) if isinstance(weight, torch.Tensor) and weight.dim() == 2 else 0

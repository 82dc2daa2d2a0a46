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
    """What a step costs for each thing it has; matrix products alone, as is usual (Chowdhery et al. 2022, app. B)."""

    per_token: float
    per_label: float
    """Each labelled token goes through the output head."""
    per_pair: float
    """For each row, its tokens squared: attention, of which a causal mask needs half."""

    def of(self, steps: Iterable[Step]) -> float:
        """FLOPs of the steps; padding, recomputed activations and logits that nobody asked for are not counted."""
        return sum(
            step.tokens * self.per_token + step.answer_tokens * self.per_label + step.pairs * self.per_pair
            for step in steps
        )


def step_flops(model: Any) -> StepFlops | None:
    """Count a model, with whatever is attached to it, by a pass over two tokens; None where that tells nothing.

    It is information, and no reason for a cell to fail. In an encoder with a decoder a token goes through one of the
    two alone, and a step does not say how many went where; a picture has no tokens; a recurrence compares no pairs.

    A matrix product costs 2 FLOPs per weight and token forward; backward as many for the gradient of its input, where
    one flows (not below the first trainable layer), and as many again for its weight's, where that is trained. That is
    why LoRA's step costs two thirds of full fine-tuning's.
    """
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder or model.main_input_name != "input_ids":
        return None
    layers = layers_of(model)
    if not getattr(config, "num_attention_heads", None) or len(layers) != config.num_hidden_layers:
        return None  # a recurrence's work is no pairs of tokens; and where layers are not found, none can be counted
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
    """Weights of a matrix product's own layer; 0 for what is none (embeddings, norms, wrappers around a layer)."""
    if isinstance(module, torch.nn.Embedding) or next(module.children(), None) is not None:
        return 0
    weight = getattr(module, "weight", None)
    if weight is not None and hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features * module.out_features)
    return logical_numel(weight) if isinstance(weight, torch.Tensor) and weight.dim() == 2 else 0

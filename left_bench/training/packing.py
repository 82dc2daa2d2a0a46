"""Packed batches: the rows of a pass end to end, each attending only to itself, without computing masked products."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from left_bench.compat.transformers import attention_kernel
from left_bench.data import Example, collate
from left_bench.methods.attach import has_virtual_tokens
from left_bench.model.load import autocast
from left_bench.spec.cell import Cell
from left_bench.training.loss import AnswerLoss

SEGMENTS = "segments"
"""The kernel's name for `set_attn_implementation`, and in a record's `effective.attention`."""


# Methods that the trial cannot detect, because an untrained adapter changes nothing: peft's class, or its argument.
_READS_WHOLE_ROWS = {
    "alora_invocation_tokens": "an activated LoRA looks for its invocation once per row of the pass",
    "LilyConfig": "Lily's router averages over the tokens of a pass",
}


class NotPackable(RuntimeError):
    """The model's attention needs something that segments do not support."""


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each of the concatenated rows.

    With a block-diagonal mask over the packed row, which transformers builds from restarting positions, the products
    between all pairs of rows are computed and most of them discarded.

    Args:
        query: [1, heads, tokens, width]; `key` and `value` may have fewer heads (grouped-query attention).
        cu_seq_lens_q: int32 [rows + 1], where each row begins, and the end.
        max_length_q: tokens of the longest row; None: all of them, an upper bound.

    Returns:
        [1, tokens, heads, width], and no attention weights.

    Raises:
        NotPackable: no row boundaries were given, or the layer needs a cache, a bias, soft-capping or sinks.
    """
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # rotary positions in float32 leave queries wider than values
        query, key, value = (part.to(torch.get_autocast_dtype(kind)) for part in (query, key, value))
    wanted = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if wanted or cu_seq_lens_q is None or attention_mask is not None or query.shape[2] != key.shape[2]:
        raise NotPackable(f"attention with {wanted[0] if wanted else 'a mask or a cache'}, which segments lack")
    if dropout == 0 and _one_kernel_for_all_rows(query, value):
        longest = query.shape[2] if max_length_q is None else max_length_q
        return _variable_length(query, key, value, cu_seq_lens_q, longest, scaling, sliding_window), None
    return _row_by_row(query, key, value, cu_seq_lens_q, scaling, dropout, sliding_window), None


@torch.compiler.disable  # the rows' lengths differ at every step, and each would be compiled as a new graph
def _row_by_row(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
) -> torch.Tensor:
    boundaries = _on_host(cu_seq_lens)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type == "cpu" and dropout == 0 and query.dtype != torch.float16:
        out: torch.Tensor = _Segments.apply(query, key, value, boundaries, scaling, sliding_window)
        return out
    lengths = [end - start for start, end in itertools.pairwise(boundaries)]
    # `split` instead of slices: each slice's gradient would be a tensor of zeros as long as all rows together
    parts = [
        scaled_dot_product_attention(
            *part,
            attn_mask=_window(part[0].shape[2], sliding_window, query.device),
            is_causal=sliding_window is None or part[0].shape[2] <= sliding_window,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        ).transpose(1, 2)
        for part in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(parts, dim=1)


def _on_host(boundaries: torch.Tensor) -> list[int]:
    """The boundaries as numbers; a pass's first layer fetches them from the device, waiting for it, and caches them."""
    known: list[int] | None = getattr(boundaries, "left_on_host", None)
    if known is None:
        known = boundaries.tolist()
        boundaries.left_on_host = known  # type: ignore[attr-defined]
    return known


class _Segments(torch.autograd.Function):
    """Attention of each row as plain matrix products; the probabilities are recomputed in the backward pass.

    torch's CPU FlashAttention takes three to five times as long on rows of 60 to 300 tokens in bfloat16, nearly all of
    it in the backward pass (torch 2.13, AVX-512). Heads that share a key are rows of one product, so grouped-query
    attention needs no copies of keys and values.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        boundaries: list[int],
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        _, heads, tokens, _ = query.shape
        out = query.new_empty(1, tokens, heads, value.shape[-1])
        for start, end in itertools.pairwise(boundaries):
            q, k, v = (_by_key_head(tensor[0, :, start:end], key.shape[1]) for tensor in (query, key, value))
            products = torch.bmm(_probabilities(q, k, scaling, window), v)
            out[0, start:end] = products.view(heads, end - start, -1).transpose(0, 1)
        ctx.save_for_backward(query, key, value, out)
        ctx.settings = boundaries, scaling, window
        return out

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:
        query, key, value, out = ctx.saved_tensors
        boundaries, scaling, window = ctx.settings
        slopes = [torch.empty_like(tensor) for tensor in (query, key, value)]
        groups = key.shape[1]
        for start, end in itertools.pairwise(boundaries):
            q, k, v = (_by_key_head(tensor[0, :, start:end], groups) for tensor in (query, key, value))
            o, slope = (_by_key_head(tensor[0, start:end].transpose(0, 1), groups) for tensor in (out, outer[0]))
            probabilities = _probabilities(q, k, scaling, window)
            # softmax: the slope of the scores is p (dp - sum p dp), and sum p dp is slope . out
            scores = torch.bmm(slope, v.transpose(1, 2)).sub_((slope * o).sum(-1, keepdim=True))
            scores.mul_(probabilities).mul_(scaling)
            result = (
                torch.bmm(scores, k),
                torch.bmm(scores.transpose(1, 2), q),
                torch.bmm(probabilities.transpose(1, 2), slope),
            )
            for whole, part in zip(slopes, result, strict=True):
                whole[0, :, start:end] = part.view(whole.shape[1], end - start, -1)
        return *slopes, None, None, None


def _by_key_head(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """[heads, tokens, width] with the heads of one key stacked: [groups, heads / groups x tokens, width]."""
    return tensor.reshape(groups, -1, tensor.shape[-1])


def _probabilities(query: torch.Tensor, key: torch.Tensor, scaling: float, window: int | None) -> torch.Tensor:
    length = key.shape[1]
    scores = torch.bmm(query, key.transpose(1, 2)).mul_(scaling)
    scores.view(len(key), -1, length, length).add_(_causal_mask(length, window, scores.dtype))
    return torch.softmax(scores, dim=-1)


def _causal_mask(length: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """0 where a token may attend, minus infinity elsewhere: a corner of a cached mask that fits most rows."""
    return _cached_mask(-(-length // 256) * 256, window, dtype)[:length, :length]


@functools.lru_cache(maxsize=8)
def _cached_mask(length: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    position = torch.arange(length)
    distance = position[:, None] - position[None, :]
    visible = (distance >= 0) & (distance < (window or length))
    return torch.zeros(length, length, dtype=dtype).masked_fill_(~visible, float("-inf"))


def _window(length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    """The mask for a row longer than the layer's window, else None."""
    if sliding_window is None or length <= sliding_window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < sliding_window)


def _one_kernel_for_all_rows(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch's variable-length FlashAttention supports these heads: 16 bits, on Ampere and later.

    The limits are the kernel's (torch/nn/attention/varlen.py, aten's flash_api.cpp): widths are multiples of 8 up to
    256, and equal for keys and values.
    """
    width = query.shape[-1]
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and width == value.shape[-1]
        and width % 8 == 0
        and width <= 256
        and _has_variable_length(query.device.index)
    )


@functools.cache
@torch.compiler.assume_constant_result
def _has_variable_length(device: int) -> bool:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:  # torch before 2.10
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
@torch.compiler.assume_constant_result
def _knows_grouped_queries() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.12 and later


def _variable_length(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    longest: int,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """torch's variable-length FlashAttention: one kernel for all rows, without waiting for the device."""
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if _knows_grouped_queries():
            grouped["enable_gqa"] = True
        else:
            copies = query.shape[1] // key.shape[1]
            key, value = (tensor.repeat_interleave(copies, dim=1) for tensor in (key, value))
    query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    out: Any = varlen_attn(
        query,
        key,
        value,
        boundaries,
        boundaries,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        **grouped,
    )
    return out.unsqueeze(0)


class Layout(NamedTuple):
    """The layout of the rows of a pass in training."""

    packed: bool
    effective: dict[str, str]
    """For the record: the effective `batching`, `batching_fallback` if it is not the requested one, `attention`."""


@contextmanager
def laid_out(
    model: Any, loss: AnswerLoss, rows: Sequence[Example], cell: Cell, *, pad_id: int, device: str
) -> Iterator[Layout]:
    """The requested layout, or `padded` if the model or method does not support it; sets attention accordingly."""
    requested, kernel = cell.training.batching, cell.training.attention
    if requested != "packed":
        yield Layout(False, {"batching": requested})
        return
    with autocast(cell, device=device):
        reason = why_not_packed(model, loss, rows, kernel=kernel, pad_id=pad_id, device=device)
    if reason is not None:
        yield Layout(False, {"batching": "padded", "batching_fallback": reason})
        return
    with attending_in_segments(model, kernel=kernel):
        yield Layout(True, {"batching": "packed", "attention": kernel or SEGMENTS})


def why_not_packed(
    model: Any, loss: AnswerLoss, rows: Sequence[Example], *, kernel: str | None, pad_id: int, device: str
) -> str | None:
    """Why this model, with its adapter, cannot use packed rows; None if two rows have the same loss packed and padded.

    This is tried instead of looked up: whether restarting positions reach the position embedding, and whether every
    attention layer takes its kernel from transformers' table, depends on the architecture and the method.
    """
    if hasattr(rows[0], "collate"):  # not an `Example`
        return str(getattr(rows[0], "not_packed", "rows of this task are not text"))
    if model.config.is_encoder_decoder:
        return "an encoder and a decoder have separate rows"
    if has_virtual_tokens(model):
        return "virtual tokens come before each row"
    settings = getattr(model, "active_peft_config", None)
    for name, why in _READS_WHOLE_ROWS.items():
        if name == type(settings).__name__ or getattr(settings, name, None):
            return why
    pair = [_brief(rows[index % len(rows)]) for index in (0, 1)]
    in_training = [module for module in model.modules() if module.training]
    model.eval()  # dropout would make the two differ
    padded = collate(pair, pad_id=pad_id).to(device)
    try:
        with torch.no_grad():
            with attending_in_segments(model, kernel=kernel):
                together = loss.of_tokens(collate(pair, pad_id=pad_id, packed=True).to(device))
            narrowed = torch.is_autocast_enabled(device)
            dtype = torch.get_autocast_dtype(device) if narrowed else next(model.parameters()).dtype
            in_float32 = dtype == torch.float32
            # nats; rounding is far smaller in float32, and in 16 bits with the same kernel
            allowed = 1e-3 if in_float32 else 0.2
            own = attention_kernel(model)
            # two kernels' rounding may differ by more in 16 bits, so compare with plain products on both sides first
            for padded_kernel in (own,) if in_float32 or kernel else ("eager", own):
                with attending_in_segments(model, kernel=padded_kernel):
                    change = _largest(together, loss.of_tokens(padded))
                if change <= allowed:
                    break
    except torch.OutOfMemoryError:
        raise
    except (NotPackable, TypeError, ValueError, ImportError, RuntimeError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        for module in in_training:
            module.training = True
    return None if change <= allowed else f"a token's loss changes by {change:.2g} nats when rows are packed"


def _largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


def _brief(row: Example) -> Example:
    return dataclasses.replace(row, prompt_ids=row.prompt_ids[-16:], answer_ids=row.answer_ids[:16], unlabelled=None)


@contextmanager
def attending_in_segments(model: Any, *, kernel: str | None) -> Iterator[None]:
    """Inside the context, `model` attends in segments, or with `kernel` if one was requested (it builds a block mask).

    Raises:
        NotPackable: the model's attention layers do not take their kernel from transformers' table.
    """
    before = attention_kernel(model)
    _set_kernel(model, kernel or SEGMENTS)
    try:
        yield
    finally:
        _set_kernel(model, before)


def _set_kernel(model: Any, name: str) -> None:
    model.set_attn_implementation(name)
    if attention_kernel(model) != name:  # transformers only logs this and continues
        raise NotPackable(f"{type(model).__name__} does not support another attention kernel")


AttentionInterface.register(SEGMENTS, segment_attention)  # has no mask function, so no mask is built

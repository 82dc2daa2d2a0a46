"""Packed rows lose what padded rows lose, and get the same gradients; what cannot be packed says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from left_bench.data import collate
from left_bench.data.tokens import Example
from left_bench.methods.attach import attach_adapter
from left_bench.training import packing
from left_bench.training.loop import embedding_noise
from left_bench.training.loss import AnswerLoss
from left_bench.training.packing import SEGMENTS, attending_in_segments, laid_out, segment_attention, why_not_packed

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@settings(max_examples=40)
@given(lengths=lengths, groups=st.sampled_from([1, 2]), window=st.sampled_from([None, 3]), kernels=st.booleans())
def test_segments_are_causal_attention_under_a_block_mask(lengths, groups, window, kernels):
    torch.manual_seed(0)
    total, heads, width = sum(lengths), 2, 8
    query = torch.randn(1, heads, total, width, dtype=torch.float64, requires_grad=True)
    key, value = (
        torch.randn(1, heads // groups, total, width, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.cat([torch.arange(length) for length in lengths])
    distance = position[:, None] - position[None, :]
    mask = (row[:, None] == row[None, :]) & (distance >= 0) & (distance < (window or total + 1))
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    ours, _ = segment_attention(
        # vanishing dropout: what is taken where there is any, and on other devices, torch's own kernels row by row
        *(torch.nn.Identity(), query, key, value, None),
        cu_seq_lens_q=boundaries,
        sliding_window=window,
        dropout=1e-300 if kernels else 0.0,
    )
    theirs = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), attn_mask=mask
    )
    torch.testing.assert_close(ours, theirs.transpose(1, 2))
    slope = torch.randn_like(ours)
    expected = torch.autograd.grad(theirs.transpose(1, 2), (query, key, value), slope)
    for result, wanted in zip(torch.autograd.grad(ours, (query, key, value), slope), expected, strict=True):
        torch.testing.assert_close(result, wanted)


@settings(max_examples=40)
@given(sizes=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=1, max_size=5))
def test_both_layouts_hold_the_same_tokens_and_labels(sizes):
    examples = [Example([9] * before, list(range(10, 10 + answer)), "", "") for before, answer in sizes]
    padded, packed = collate(examples, pad_id=0), collate(examples, pad_id=0, packed=True)
    assert packed.input_ids.shape == (1, packed.tokens)
    assert packed.tokens == padded.tokens
    assert packed.answer_lengths == padded.answer_lengths
    assert torch.equal(packed.targets, padded.targets)
    assert torch.equal(packed.input_ids[0], padded.input_ids[padded.attention_mask.bool()])
    # a row's first token has no predecessor: it must not be predicted from the row before it
    starts = set(packed.boundaries.tolist())
    assert not starts & {int(position) + 1 for position in packed.label_positions}
    assert packed.position_ids[0].tolist() == [i for example in examples for i in range(example.length)]


def attached(tiny_cell: Any, load_tiny: Any, rows: Any, *overrides: str) -> tuple[Any, Any]:
    cell = tiny_cell("training.batching=packed", *overrides)
    model, tokenizer = load_tiny(cell)
    return cell, attach_adapter(model, cell, tokenizer=tokenizer, rows=rows)


def loss_and_gradients(loss: AnswerLoss, rows: Any, *, packed: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Of the mean over the answers' tokens, as a step takes it."""
    model = loss.model
    model.zero_grad()
    result = loss.summed(collate(rows, pad_id=0, packed=packed)) / sum(len(row.answer_ids) for row in rows)
    result.backward()
    return result.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_neox", "tiny_opt"])
@pytest.mark.parametrize("peft", ["full", "lora", "ia3", "houlsby"])
def test_packed_is_padded(name, peft, tiny_cell, load_tiny, addition_rows):
    cell, model = attached(tiny_cell, load_tiny, addition_rows, f"model={name}", f"peft={peft}")
    loss = AnswerLoss(model)
    padded, expected = loss_and_gradients(loss, addition_rows, packed=False)
    with laid_out(model, loss, addition_rows, cell, pad_id=0, device="cpu") as layout:
        assert layout.effective == {"batching": "packed", "attention": SEGMENTS}
        packed, result = loss_and_gradients(loss, addition_rows, packed=True)
    assert packed == pytest.approx(padded, rel=1e-5)
    assert result.keys() == expected.keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for key, gradient in result.items():
        torch.testing.assert_close(gradient, expected[key], atol=1e-5, rtol=1e-4, msg=key)
    assert model.config._attn_implementation != SEGMENTS  # evaluation is padded again


def test_checkpointed_activations_are_computed_again_in_segments(tiny_cell, load_tiny, addition_rows):
    cell, model = attached(tiny_cell, load_tiny, addition_rows, "training.activation_checkpointing=true")
    loss = AnswerLoss(model.train())  # transformers recomputes in training alone
    with laid_out(model, loss, addition_rows, cell, pad_id=0, device="cpu") as layout:
        assert layout.packed
        packed, _ = loss_and_gradients(loss, addition_rows, packed=True)
    padded, _ = loss_and_gradients(loss, addition_rows, packed=False)
    assert packed == pytest.approx(padded, rel=1e-5)


@pytest.mark.parametrize("peft", ["prompt_tuning", "prefix_tuning", "p_tuning"])
def test_virtual_tokens_fall_back_and_say_so(peft, tiny_cell, load_tiny, addition_rows):
    cell, model = attached(tiny_cell, load_tiny, addition_rows, f"peft={peft}")
    loss = AnswerLoss(model)
    with laid_out(model, loss, addition_rows, cell, pad_id=0, device="cpu") as layout:
        assert not layout.packed
        assert layout.effective["batching"] == "padded"
        assert "virtual tokens" in layout.effective["batching_fallback"]


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_a_kernel_asked_for_by_name_packs_under_its_own_mask(kernel, tiny_cell, load_tiny, addition_rows):
    cell, model = attached(tiny_cell, load_tiny, addition_rows, f"training.attention={kernel}")
    loss = AnswerLoss(model)
    padded, _ = loss_and_gradients(loss, addition_rows, packed=False)
    with laid_out(model, loss, addition_rows, cell, pad_id=0, device="cpu") as layout:
        assert layout.effective == {"batching": "packed", "attention": kernel}
        packed, _ = loss_and_gradients(loss, addition_rows, packed=True)
    assert packed == pytest.approx(padded, rel=1e-5)


@pytest.mark.parametrize(("kernel", "words"), [("eager", "nats"), (None, "does not support another attention kernel")])
def test_an_architecture_that_mixes_rows_is_found_out(kernel, words, addition_rows):
    """Bloom's positions are biases made of the attention mask: packed, a row would go on where the last one ended."""
    import transformers

    config = transformers.BloomConfig(vocab_size=256, hidden_size=32, n_layer=2, n_head=2)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    reason = why_not_packed(model, AnswerLoss(model), addition_rows, kernel=kernel, pad_id=0, device="cpu")
    assert reason is not None
    assert words in reason


def test_soft_capped_attention_is_not_packed(addition_rows):
    import transformers

    config = transformers.Gemma2Config(
        vocab_size=256,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        head_dim=16,
        num_key_value_heads=1,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    reason = why_not_packed(model, AnswerLoss(model), addition_rows, kernel=None, pad_id=0, device="cpu")
    assert "softcap" in str(reason)
    assert model.config._attn_implementation != SEGMENTS


def test_a_packed_cell_from_start_to_end(tiny_cell, work_in_process):
    result = work_in_process(tiny_cell("training=packed", "training.steps=3", "eval.generate=false"))
    effective = result["environment"]["effective"]
    assert effective["batching"] == "packed"
    assert effective["attention"] == SEGMENTS
    plain = work_in_process(tiny_cell("training.steps=3", "eval.generate=false"))
    assert result["metrics"]["train_loss"] == pytest.approx(plain["metrics"]["train_loss"], rel=1e-4)
    assert result["metrics"]["train_tokens"] == plain["metrics"]["train_tokens"]


def test_attention_is_put_back_after_an_error(tiny_cell, load_tiny, addition_rows):
    _, model = attached(tiny_cell, load_tiny, addition_rows)
    before = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), attending_in_segments(model, kernel=None):
        raise ZeroDivisionError
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("precision", ["bf16_mixed", "fp16_mixed"])
@pytest.mark.parametrize("peft", ["full", "lora"])
def test_packed_rows_train_under_autocast(peft, precision, tiny_cell, work_in_process):
    """Rotary positions leave float32 queries beside 16-bit values: only a backward pass shows it."""
    overrides = [f"peft={peft}", f"precision={precision}", "training.steps=3", "eval=loss", "eval.forgetting=false"]
    result = work_in_process(tiny_cell("training=packed", *overrides))
    assert result["environment"]["effective"]["batching"] == "packed", result["environment"]["effective"]
    plain = work_in_process(tiny_cell(*overrides))
    assert result["metrics"]["train_loss"] == pytest.approx(plain["metrics"]["train_loss"], rel=2e-3)


@pytest.mark.parametrize("peft", ["alora", "lily"])
def test_what_reads_whole_rows_falls_back(peft, tiny_cell, load_tiny, addition_rows):
    """Nothing that a trial before training could see: what these add is still zero then."""
    cell, model = attached(tiny_cell, load_tiny, addition_rows, f"peft={peft}")
    with laid_out(model, AnswerLoss(model), addition_rows, cell, pad_id=0, device="cpu") as layout:
        assert layout.effective["batching"] == "padded" and layout.effective["batching_fallback"]


def test_noise_on_packed_rows_goes_by_each_rows_length(tiny_cell, load_tiny):
    model, _ = load_tiny(tiny_cell())
    rows = [Example([7] * length, [8] * length, "", "") for length in (8, 32)]
    batch, seen = collate(rows, pad_id=0, packed=True), []
    embedding = model.get_input_embeddings()
    plain = embedding(batch.input_ids)
    with embedding_noise(model.train(), 5.0), torch.no_grad():
        embedding.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        with attending_in_segments(model, kernel=None):
            model(**batch.inputs())
    noise, width = (seen[0] - plain)[0].abs(), plain.shape[-1]
    for part, length in ((noise[:16], 16), (noise[16:], 64)):
        bound = 5 / (length * width) ** 0.5
        assert 0.95 * bound < part.max() <= 1.001 * bound


@pytest.mark.parametrize("knows", [True, False])
def test_keys_are_expanded_where_the_kernel_does_not_know_grouped_queries(knows, monkeypatch):
    """torch 2.11's variable-length kernel has no argument for them, and would refuse it."""
    import torch.nn.attention.varlen as varlen

    asked: dict[str, Any] = {}

    def kernel(
        query, key, value, starts, ends, longest_query, longest_key, *, scale=None, window_size=(-1, -1), **more
    ):
        asked.update(more, heads=(query.shape[1], key.shape[1], value.shape[1]), longest=longest_query)
        return query

    def newer(query, key, value, *others, enable_gqa=False, **more):
        return kernel(query, key, value, *others, enable_gqa=enable_gqa, **more)

    monkeypatch.setattr(varlen, "varlen_attn", newer if knows else kernel)
    packing._knows_grouped_queries.cache_clear()
    boundaries = torch.tensor([0, 3, 5], dtype=torch.int32)
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    out = packing._variable_length(query, key, key, boundaries, 3, None, None)
    packing._knows_grouped_queries.cache_clear()
    assert out.shape == (1, 5, 4, 8)
    assert asked["longest"] == 3
    assert asked["heads"] == ((4, 2, 2) if knows else (4, 4, 4))
    assert asked.get("enable_gqa", False) is knows


def test_boundaries_are_fetched_once_for_all_layers(monkeypatch):
    boundaries = torch.tensor([0, 2, 5], dtype=torch.int32)
    fetched = []
    monkeypatch.setattr(
        torch.Tensor, "tolist", lambda tensor, known=torch.Tensor.tolist: fetched.append(1) or known(tensor)
    )
    part = torch.randn(1, 2, 5, 8)
    for _layer in range(3):
        segment_attention(torch.nn.Identity(), part, part, part, None, cu_seq_lens_q=boundaries)
    assert len(fetched) == 1


def test_a_kernel_that_fails_makes_rows_padded_and_is_told(tiny_cell, load_tiny, addition_rows, monkeypatch):
    cell, model = attached(tiny_cell, load_tiny, addition_rows)

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

    monkeypatch.setattr(packing, "_row_by_row", refuse)
    with laid_out(model, AnswerLoss(model), addition_rows, cell, pad_id=0, device="cpu") as layout:
        assert layout.effective["batching"] == "padded"
        assert "Ampere" in layout.effective["batching_fallback"]


@pytest.mark.parametrize("grouped", [True, False])
def test_attention_by_one_kernel_is_traced_whole(grouped, monkeypatch):
    """torch.compile then needs no break in a layer, and no new graph for rows of other lengths."""
    pytest.importorskip("torch.nn.attention.varlen")
    traced = []

    def backend(graph: Any, _inputs: Any) -> Any:
        traced.append(graph)
        return lambda *_: (torch.zeros(1, 5, 4, 8, dtype=torch.bfloat16),)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(packing, "_one_kernel_for_all_rows", lambda *_: packing._has_variable_length(0))
    packing._has_variable_length.cache_clear()

    def attend(query: Any, key: Any, boundaries: Any, longest: int) -> Any:
        named = {"cu_seq_lens_q": boundaries, "max_length_q": longest}
        return segment_attention(torch.nn.Identity(), query, key, key, None, **named)[0]

    compiled = torch.compile(attend, backend=backend, fullgraph=True, dynamic=True)
    query, key = (torch.randn(1, heads, 5, 8, dtype=torch.bfloat16) for heads in (4, 2 if grouped else 4))
    for longest in (3, 4, 5):
        compiled(query, key, torch.tensor([0, longest, 5], dtype=torch.int32), longest)
    packing._has_variable_length.cache_clear()
    assert len(traced) == 1

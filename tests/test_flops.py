"""FLOPs counted from shapes are what torch counts while a step runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from left_bench.data import collate
from left_bench.measure.meter import Step
from left_bench.methods.attach import attach_adapter
from left_bench.training.flops import step_flops


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_neox", "tiny_opt"])
@pytest.mark.parametrize("peft", ["full", "lora", "ln_tuning", "layer_freeze", "pfeiffer"])
def test_counted_from_shapes_is_counted_by_torch(name, peft, tiny_cell, load_tiny, addition_rows):
    overrides = ["peft.config.last_layers=1"] if peft == "layer_freeze" else []
    cell = tiny_cell(f"model={name}", f"peft={peft}", *overrides)
    model, tokenizer = load_tiny(cell)
    model = attach_adapter(model, cell, tokenizer=tokenizer, rows=addition_rows)
    row = addition_rows[3]
    batch = collate([row, row], pad_id=0)  # no padding: it is no work of the model's
    with FlopCounterMode(display=False) as counter:  # the model's own loss: its head runs at every position
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss.backward()
    flops = step_flops(model)
    step = Step(seconds=1, tokens=batch.tokens, answer_tokens=batch.tokens, rows=2, loss=0, pairs=2 * row.length**2)
    attention = step.pairs * flops.per_pair  # torch counts the masked half, and the scores again in the backward pass
    counts = counter.get_flop_counts()["Global"]
    theirs = sum(value for kind, value in counts.items() if "attention" not in str(kind))
    assert flops.of([step]) - attention == pytest.approx(theirs, rel=0.02)
    assert attention > 0


def test_loras_step_costs_two_thirds(tiny_cell, load_tiny, addition_rows):
    cell = tiny_cell("peft=lora")
    model, tokenizer = load_tiny(cell)
    full = step_flops(attach_adapter(load_tiny(cell)[0], tiny_cell("peft=full"), tokenizer=tokenizer, rows=[]))
    frozen = model.requires_grad_(False)
    frozen.get_input_embeddings().weight.requires_grad_(True)
    assert step_flops(frozen).per_token / full.per_token == pytest.approx(2 / 3)


def test_virtual_tokens_send_gradients_through_every_layer(tiny_cell, load_tiny, addition_rows):
    cell = tiny_cell("peft=prompt_tuning")
    model, tokenizer = load_tiny(cell)
    plain = step_flops(model.requires_grad_(False)).per_token
    tuned = step_flops(attach_adapter(model, cell, tokenizer=tokenizer, rows=addition_rows)).per_token
    assert tuned == 2 * plain


def test_what_else_runs_is_noticed():
    import multiprocessing
    import time

    from left_bench.measure.cpu_contention import Neighbours

    def spin() -> None:
        while True:
            pass

    quiet = Neighbours()
    time.sleep(0.3)
    before = quiet.share()
    if before is None:
        pytest.skip("this system does not tell")
    other = multiprocessing.get_context("fork").Process(target=spin, daemon=True)
    other.start()
    loud = Neighbours()
    time.sleep(0.5)
    share = loud.share()
    other.kill()
    other.join()
    assert share is not None
    assert 0.1 < share <= 1 or torch.get_num_threads() > 8  # one core of many is a small share


@pytest.mark.parametrize("kind", ["openai-gpt", "mamba", "rwkv"])
def test_where_nothing_can_be_counted_nothing_fails(kind):
    """No layers by name, or no attention heads: the count is information."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = AutoConfig.for_model(kind, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    assert step_flops(model) is None

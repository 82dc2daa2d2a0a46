"""Methods that start from training rows, and methods for several tasks: they begin as said, learn, and come back."""

from __future__ import annotations

import pytest
import torch

from left_bench.core.errors import UserError
from left_bench.data import Example, collate
from left_bench.methods.attach import (
    after_optimizer_step,
    attach_adapter,
    let_autocast_convert,
    load_trained,
    regularization,
    save_trained,
    trainable_parameters,
)
from left_bench.methods.data_init import START_NAME, context_of, invocation_of
from left_bench.model.load import autocast

MOVES_THE_BASE = ["lora_ga", "corda"]
WITHOUT_ROWS = ["poly", "multitask_prompt_tuning"]


def row(prompt_ids: list[int], answer_ids: list[int]) -> Example:
    return Example(prompt_ids=prompt_ids, answer_ids=answer_ids, prompt="", reference="")


@pytest.fixture
def attached(tiny_cell, load_tiny, addition_rows):
    """`attached(name, *overrides)`: the method on a fresh tiny model, and that model's folder-mate to load into."""

    def attached(name: str, *overrides: str):
        cell = tiny_cell(f"peft={name}", *overrides)
        base, tokenizer = load_tiny(cell)
        return attach_adapter(base, cell, tokenizer=tokenizer, rows=addition_rows), load_tiny(cell)[0]

    return attached


def logits(model, rows):
    batch = collate(rows, pad_id=0)
    with torch.no_grad():
        return model.eval()(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


def learn(model, rows, *, steps: int = 5) -> list[float]:
    from left_bench.training.loss import AnswerLoss

    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-2)
    loss, batch, losses = AnswerLoss(model), collate(rows, pad_id=0), []
    model.train()
    for _ in range(steps):
        total = loss.summed(batch)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    return losses


@pytest.mark.parametrize("name", [*MOVES_THE_BASE, *WITHOUT_ROWS, "cpt", "alora", "kasa", "osf"])
def test_it_learns_and_comes_back_bit_for_bit(name, attached, addition_rows, tmp_path):
    model, fresh = attached(name)
    losses = learn(model, addition_rows)
    assert losses[-1] < losses[0]
    trained = logits(model, addition_rows)
    size = save_trained(model, tmp_path)
    assert (tmp_path / START_NAME).is_file() == (name in MOVES_THE_BASE)
    assert size == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert not torch.equal(logits(fresh, addition_rows), trained[:, -logits(fresh, addition_rows).shape[1] :])
    again = logits(load_trained(fresh, tmp_path), addition_rows)
    # CPT projects its embeddings anew in every pass, and they move by a rounding
    torch.testing.assert_close(again, trained, atol=1e-5 if name == "cpt" else 0, rtol=0)


@pytest.mark.parametrize("name", MOVES_THE_BASE)
def test_what_is_taken_out_of_the_base_is_in_the_adapter(name, attached, addition_rows):
    model, fresh = attached(name, "peft.config.r=4")
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    dense = fresh.model.layers[0].mlp.up_proj.weight
    moved = (layer.weight - dense).norm() / dense.norm()
    assert moved > 1e-3
    torch.testing.assert_close(layer.weight + layer.get_delta_weight("default"), dense, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits(model, addition_rows), logits(fresh, addition_rows), atol=1e-4, rtol=1e-3)


def test_lora_gas_first_a_spans_the_gradient(attached, tiny_cell, load_tiny, addition_rows):
    """Its rows are right singular vectors of the loss's gradient by the layer's weight on those rows."""
    model, fresh = attached("lora_ga", "peft.config.r=4", "training.batch_size=8")
    weight = fresh.model.layers[1].mlp.down_proj.weight
    batch = collate(addition_rows, pad_id=0)
    fresh(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss.backward()
    a = model.base_model.model.model.layers[1].mlp.down_proj.lora_A["default"].weight.detach()
    leading = torch.linalg.svd(weight.grad).Vh[:4]
    assert torch.linalg.svdvals(a / a.norm(dim=1, keepdim=True) @ leading.T).min() > 0.95


def test_cpts_context_is_the_first_rows_with_their_answers_frozen(attached, addition_rows):
    result = context_of([row([5, 6], [7]), row([8], [9, 1])])
    assert result["cpt_token_ids"] == [5, 6, 7, 8, 9, 1]
    assert [kind % 4 for kind in result["cpt_tokens_type_mask"]] == [2, 2, 0, 2, 0, 0]
    assert result["cpt_tokens_type_mask"] == [2, 2, 4, 6, 8, 8]
    model, _ = attached("cpt")
    learn(model, addition_rows, steps=2)
    change = model.prompt_encoder["default"].delta_embedding.weight.detach().norm(dim=1)
    kinds = torch.tensor(model.active_peft_config.cpt_tokens_type_mask)
    assert (change[kinds % 4 == 2] > 0).all()
    assert change[kinds % 4 == 0].abs().max() < 1e-6


def test_aloras_invocation_is_the_prompts_common_end():
    assert invocation_of([row([1, 2, 3, 4], [5]), row([7, 9, 3, 4], [5]), row([3, 4], [5])]) == [3, 4]
    with pytest.raises(UserError, match=r"alora_invocation_tokens.*do not end with the same tokens"):
        invocation_of([row([1, 2], [5]), row([1, 3], [5])])


def test_before_aloras_invocation_the_model_is_the_base_model(attached, addition_rows):
    model, fresh = attached("alora")
    learn(model, addition_rows)
    length = model.active_peft_config.alora_invocation_tokens
    item = addition_rows[:1]
    before = len(item[0].prompt_ids) - len(length)
    trained, base = logits(model, item), logits(fresh, item)
    assert torch.equal(trained[:, :before], base[:, :before])
    assert not torch.equal(trained[:, before:], base[:, before:])


@pytest.mark.parametrize("name", ["kasa", "monteclora"])
def test_the_regularization_that_peft_leaves_to_the_loop(name, attached):
    model, _ = attached(name)
    own = {"kasa": "_get_kasa_loss", "monteclora": "_get_monteclora_loss"}[name]
    model.train()
    result = regularization(model)
    assert result is not None and result.requires_grad and result.item() > 0
    if name == "kasa":  # beta ||sigma||^2 + gamma (||B^T B - I|| + ||A A^T - I||) over the layers
        torch.testing.assert_close(result, getattr(model.base_model, own)())
        eye = torch.eye(16)
        expected = 0.0
        for layer in (
            module for module in model.modules() if hasattr(module, "lora_diag") and "default" in module.lora_diag
        ):
            a, b, sigma = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_diag["default"]
            expected += 1e-4 * sigma.square().sum() + 1e-3 * ((b.T @ b - eye).norm() + (a @ a.T - eye).norm())
        torch.testing.assert_close(result, expected)


def test_adalora_over_bfloat16_comes_back_bit_for_bit(tiny_cell, load_tiny, addition_rows, tmp_path):
    """peft trains the number of ranks, which it does not save, and rounds what it loads to the base weights' dtype."""
    cell = tiny_cell("peft=adalora", "precision=bf16", "training.steps=10")
    base, tokenizer = load_tiny(cell)
    model = attach_adapter(base, cell, tokenizer=tokenizer, rows=addition_rows)
    assert not [name for name, parameter in model.named_parameters() if "ranknum" in name and parameter.requires_grad]
    batch, optimizer = collate(addition_rows, pad_id=0), torch.optim.AdamW(trainable_parameters(model), lr=1e-2)
    for step in range(cell.training.steps):
        with autocast(cell, device="cpu"):
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss.backward()
        optimizer.step()
        after_optimizer_step(model, step)
        optimizer.zero_grad()
    save_trained(model, tmp_path)
    again = load_trained(load_tiny(cell)[0], tmp_path)
    let_autocast_convert(again)
    with autocast(cell, device="cpu"):
        assert torch.equal(logits(again, addition_rows), logits(model, addition_rows))

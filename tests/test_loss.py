"""The loss of answer tokens: the model's own number and gradient, with the head at labelled positions, in chunks."""

from __future__ import annotations

import weakref

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import left_bench.training.loss
from left_bench.data import collate
from left_bench.methods.attach import attach_adapter, virtual_positions
from left_bench.training.loss import AnswerLoss

SMALL = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CLOSE = {"cpu": 1e-4, "cuda": 1e-3}  # of gradients up to 30; kernels add in another order
FAMILIES = {
    "llama, tied": ("LlamaConfig", {"intermediate_size": 48, "tie_word_embeddings": True}),
    "gpt_neox": ("GPTNeoXConfig", {"intermediate_size": 48}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gemma2, soft-capped": ("Gemma2Config", {"intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 16}),
    "granite, scaled": ("GraniteConfig", {"intermediate_size": 48, "num_key_value_heads": 1, "logits_scaling": 3.0}),
    "cohere, scaled": ("CohereConfig", {"intermediate_size": 48, "num_key_value_heads": 1, "logit_scale": 0.2}),
}


@pytest.fixture
def small_chunks(monkeypatch):
    """Five rows of logits at a time, so that a batch takes several chunks and the last is not full."""
    monkeypatch.setattr(left_bench.training.loss, "chunk_logits", lambda kind: 5 * 256)


def family(name: str) -> torch.nn.Module:
    kind, arguments = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2, **arguments)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # larger logits: soft-capping then does something
    return model


def own_loss(model, batch):
    """The model's own loss over labels, summed over the answer tokens."""
    result = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    return result * batch.answer_tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_the_models_own(name, addition_rows, small_chunks, device):
    model = family(name).to(device)
    loss, batch = AnswerLoss(model), collate(addition_rows, pad_id=0).to(device)
    assert loss.output_head == "labelled positions, in chunks"
    theirs = own_loss(model, batch)
    theirs.backward()
    gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    ours = loss.summed(batch)
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6 if device == "cpu" else 1e-5)
    assert any(gradient.abs().max() > 0.1 for gradient in gradients.values())
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key], atol=CLOSE[device], rtol=1e-5, msg=key)
    with torch.no_grad():
        assert loss.of_tokens(batch).sum().item() == pytest.approx(ours.item(), rel=1e-5)


@pytest.mark.parametrize("peft", ["full", "lora", "prompt_tuning", "p_tuning", "prefix_tuning", "llama_adapter"])
def test_every_method_has_the_models_own_loss(peft, tiny_cell, load_tiny, addition_rows, small_chunks):
    cell = tiny_cell(f"peft={peft}")
    model, tokenizer = load_tiny(cell)
    model = attach_adapter(model, cell, tokenizer=tokenizer, rows=addition_rows).eval()
    batch = collate(addition_rows, pad_id=0)
    with torch.no_grad():
        own = AnswerLoss(model).of_tokens(batch)
        theirs = own_loss(model, batch)
    assert own.dtype == torch.float32
    assert own.shape == (batch.answer_tokens,)
    assert own.sum().item() == pytest.approx(theirs.item(), abs=1e-4)


@pytest.mark.parametrize(
    "trained",
    [
        ["peft=lora", "peft.config.target_modules=[lm_head,q_proj]"],
        ["peft=lora", "++peft.config.modules_to_save=[lm_head]"],
        [
            "peft=trainable_tokens",
            "peft.config.token_indices=[3,4,5,6]",
            "model.config.tie_word_embeddings=true",
        ],  # of a tied embedding
    ],
    ids=["lora", "modules_to_save", "trainable_tokens"],
)
def test_an_adapter_on_the_head_gets_its_gradient(trained, tiny_cell, load_tiny, addition_rows, small_chunks, device):
    """The head is then no plain matrix: what is run chunk by chunk is the module with its adapter."""
    cell = tiny_cell(*trained)
    model, tokenizer = load_tiny(cell)
    model = attach_adapter(model, cell, tokenizer=tokenizer, rows=addition_rows).eval().to(device)
    batch = collate(addition_rows, pad_id=0).to(device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    own_loss(model, batch).backward()
    theirs = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    AnswerLoss(model).summed(batch).backward()
    assert any("lm_head" in name or "trainable_tokens" in name for name in theirs)
    assert all(gradient.abs().max() > 0 for gradient in theirs.values())
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    for name, parameter in model.named_parameters():
        if name in theirs:
            torch.testing.assert_close(parameter.grad, theirs[name], atol=CLOSE[device] / 10, rtol=1e-5, msg=name)


def test_logits_exist_at_labelled_positions_alone_and_never_whole(addition_rows, small_chunks):
    model = family("llama, tied")
    loss, batch = AnswerLoss(model), collate(addition_rows, pad_id=0)
    seen = []
    with model.lm_head.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape[:-1].numel())):
        loss.summed(batch)
    assert max(seen) <= 5 < batch.answer_tokens
    assert sum(seen) == batch.answer_tokens


def test_a_chunks_logits_are_gone_before_the_next_are_made(addition_rows, small_chunks):
    model = family("llama, tied")
    loss, batch = AnswerLoss(model), collate(addition_rows, pad_id=0)
    made: list[weakref.ref[torch.Tensor]] = []
    alive = []

    def look(_module, _inputs, output):
        alive.append(sum(item() is not None for item in made))
        made.append(weakref.ref(output))

    states = loss._states(batch)
    with model.lm_head.register_forward_hook(look):
        loss._weighted(states, batch.targets, torch.ones(batch.answer_tokens))
    assert len(alive) > 2
    assert max(alive) == 0


def test_a_chunk_is_made_for_its_device(device):
    model = family("gpt_neox").to(device)
    wanted = {"cpu": 2**23 // 256, "cuda": 2**25 // 256}
    assert AnswerLoss(model)._chunk == wanted[device]
    # a plan is made of shapes that are on no device, for the one that the cell names
    assert {kind: AnswerLoss.assumed(model, kind=kind)._chunk for kind in wanted} == wanted


def test_what_is_done_to_logits_unknown_to_us_the_model_does_itself(addition_rows):
    class Odd(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            result = super().forward(*args, **kwargs)
            result.logits = result.logits + 0.1 * result.logits.abs().sqrt()
            return result

    torch.manual_seed(0)
    model = Odd(transformers.LlamaConfig(**SMALL, intermediate_size=48)).eval()
    loss, batch = AnswerLoss(model), collate(addition_rows, pad_id=0)
    assert loss.output_head == "labelled positions"
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    expected = torch.nn.functional.cross_entropy(logits[batch.label_rows, batch.label_positions], batch.targets)
    ours = loss.summed(batch) / batch.answer_tokens
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    ours.backward()
    assert model.lm_head.weight.grad.abs().max() > 0


def test_all_positions_where_asked_for(addition_rows):
    model = family("gpt_neox")
    everywhere, batch = AnswerLoss(model, everywhere=True), collate(addition_rows, pad_id=0)
    assert everywhere.output_head == "all positions"
    torch.testing.assert_close(everywhere.of_tokens(batch), AnswerLoss(model).of_tokens(batch))


def test_gain_scales_the_gradient_before_it_is_rounded(addition_rows, device):
    """float16 holds nothing below 6e-8: a loss scale that came after the chunk's gradient would come too late."""
    model = family("llama, tied").half().to(device)
    loss, batch = AnswerLoss(model), collate(addition_rows, pad_id=0).to(device)

    def share_above_zero(gain):
        model.zero_grad()
        loss.summed(batch, gain=gain).backward()
        return (model.model.layers[0].mlp.up_proj.weight.grad != 0).float().mean()

    assert share_above_zero(1e-10) < 0.5
    assert share_above_zero(1e-10 * 2**16) > 0.9


def test_a_rows_loss_does_not_depend_on_its_neighbours(tiny_cell, load_tiny, addition_rows):
    model, _ = load_tiny(tiny_cell())
    loss = AnswerLoss(model)
    with torch.no_grad():
        together = loss.of_tokens(collate(addition_rows, pad_id=0))
        apart = torch.cat([loss.of_tokens(collate([row], pad_id=0)) for row in addition_rows])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("peft", "positions"), [("full", 0), ("lora", 0), ("prompt_tuning", 16), ("prefix_tuning", 0)])
def test_virtual_positions(peft, positions, tiny_cell, load_tiny, addition_rows):
    cell = tiny_cell(f"peft={peft}")
    model, tokenizer = load_tiny(cell)
    assert virtual_positions(attach_adapter(model, cell, tokenizer=tokenizer, rows=addition_rows)) == positions


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_cuda_nothing_waits_for_the_device(addition_rows, small_chunks):
    model = family("llama, tied").to("cuda")
    loss = AnswerLoss(model)
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = collate(addition_rows, pad_id=0).to("cuda")
        whole = torch.randn(*batch.input_ids.shape, 32, device="cuda", requires_grad=True)
        loss._states = lambda batch: batch.labelled(whole)  # the model's own pass is not asked about here
        loss.summed(batch, gain=0.5).backward()
        loss.of_rows(batch, lambda sums: (sums * 2).sum()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert whole.grad.abs().max() > 0

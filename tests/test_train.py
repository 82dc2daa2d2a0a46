"""The loss, the gradients and the loop, on two-layer models in float32."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from left_bench.core.errors import UserError
from left_bench.core.paths import config_root
from left_bench.data import collate
from left_bench.grid.rules import why_unsupported
from left_bench.measure.compile_timer import Compiling
from left_bench.measure.device import CpuDevice
from left_bench.measure.meter import Meter, PhaseCounts
from left_bench.methods.attach import attach_adapter, regularization, trainable_parameters
from left_bench.model.load import autocast
from left_bench.spec.events import EventReader, EventWriter
from left_bench.training.loop import Diverged, embedding_noise, make_optimizer, train
from left_bench.training.loss import AnswerLoss
from left_bench.training.objective import RightAnswers

# what a two-layer model of width 64 is too small for, in the option's own arguments
SMALLER = {
    "custom": [
        "peft._target_=peft.OFTConfig",
        "peft.config.oft_block_size=16",
        "peft.config.target_modules=all-linear",
    ],
    "vera": ["peft.config.r=8"],
    "pvera": ["peft.config.r=8"],
    "vblora": ["peft.config.vector_length=32", "peft.config.num_vectors=16"],
    "fourierft": ["peft.config.n_frequency=100"],
    "trainable_tokens": ["peft.config.token_indices=[34,89]"],  # a space and a W, which the prompts hold
}
OPTIONS = sorted(path.stem for path in (config_root() / "conf" / "peft").glob("*.yaml"))


@pytest.fixture
def run(load_tiny, addition_rows, tmp_path):
    """`run(cell)`: attach, unless that is done, and train; the model, the meter and the step events."""

    def run(cell: Any, rows: Any = None, *, attached: Any = None) -> tuple[Any, Meter, list[dict[str, Any]]]:
        adapted = attached
        if adapted is None:
            model, tokenizer = load_tiny(cell)
            adapted = attach_adapter(model, cell, tokenizer=tokenizer, rows=addition_rows)
        meter = Meter(CpuDevice(), EventWriter(tmp_path / "events.jsonl"))
        counts = PhaseCounts()
        with autocast(cell, device="cpu"):
            loss = AnswerLoss(adapted)
        objective = RightAnswers(loss=loss, pad_id=0)
        train(adapted, rows or addition_rows, cell, objective=objective, meter=meter, counts=counts)
        assert counts.steps == cell.training.steps == len(meter.steps)
        assert counts.tokens == sum(step.tokens for step in meter.steps)
        return (
            adapted,
            meter,
            [event for event in EventReader(tmp_path / "events.jsonl").new() if event["event"] == "step"],
        )

    return run


def losses(meter: Meter) -> list[float]:
    return [step.loss for step in meter.steps]


# --- gradients ---


def gradients(cell: Any, load_tiny: Any, addition_rows: Any, monkeypatch: Any, tmp_path: Path) -> list[torch.Tensor]:
    """Of the first step, as the optimizer would see them."""
    model, tokenizer = load_tiny(cell)
    model = attach_adapter(model, cell, tokenizer=tokenizer, rows=addition_rows)
    kept: list[torch.Tensor] = []

    class Keep(torch.optim.SGD):
        def step(self, closure=None):
            kept.extend(p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None)

    monkeypatch.setattr(
        "left_bench.training.loop.make_optimizer", lambda *a, **k: Keep(trainable_parameters(model), lr=0.1)
    )
    meter = Meter(CpuDevice(), EventWriter(tmp_path / "events.jsonl"))
    objective = RightAnswers(loss=AnswerLoss(model), pad_id=0)
    train(model, addition_rows, cell, objective=objective, meter=meter, counts=PhaseCounts())
    return kept


@pytest.mark.parametrize("peft", ["full", "lora"])
@pytest.mark.parametrize(("size", "passes", "batching"), [(2, 4, "padded"), (2, 4, "grouped"), (1, 8, "padded")])
def test_accumulated_gradients_are_one_big_batchs(
    peft, size, passes, batching, tiny_cell, load_tiny, addition_rows, monkeypatch, tmp_path
):
    common = [f"peft={peft}", "training.steps=1", "training.max_grad_norm=null"]
    whole = tiny_cell(*common, "training.batch_size=8", "training.gradient_accumulation=1")
    parts = [f"training.batch_size={size}", f"training.gradient_accumulation={passes}", f"training.batching={batching}"]
    one = gradients(whole, load_tiny, addition_rows, monkeypatch, tmp_path)
    other = gradients(tiny_cell(*common, *parts), load_tiny, addition_rows, monkeypatch, tmp_path)
    assert len(one) == len(other) > 0
    assert any(gradient.abs().max() > 1e-3 for gradient in one)
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=0)


def test_activation_checkpointing_changes_no_number(tiny_cell, run):
    plain, kept = run(tiny_cell("training.steps=3"))[1], run(tiny_cell("training.steps=3", "training=checkpointing"))[1]
    assert losses(kept) == pytest.approx(losses(plain), abs=1e-6)


def test_gradients_are_clipped(tiny_cell, load_tiny, addition_rows, monkeypatch, tmp_path):
    cell = tiny_cell("peft=full", "training.steps=1", "training.max_grad_norm=0.01")
    clipped = gradients(cell, load_tiny, addition_rows, monkeypatch, tmp_path)
    assert math.sqrt(sum(float((g**2).sum()) for g in clipped)) == pytest.approx(0.01, rel=1e-3)


def test_adaloras_regularization_is_what_peft_adds(tiny_cell, load_tiny, addition_rows):
    cell = tiny_cell("peft=adalora", "training.steps=10")
    model, tokenizer = load_tiny(cell)
    model = attach_adapter(model, cell, tokenizer=tokenizer, rows=addition_rows).eval()
    batch = collate(addition_rows, pad_id=0)
    with torch.no_grad():
        plain = AnswerLoss(model).of_tokens(batch).sum() / batch.answer_tokens
        theirs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        ours = regularization(model)
    assert ours is not None
    assert ours.item() > 0.01
    assert ours.item() == pytest.approx((theirs - plain).item(), rel=1e-4)


def test_eva_has_answer_tokens_enough_in_every_batch_or_says_so(tiny_cell, load_tiny, addition_rows):
    """peft skips a batch that has fewer answer tokens than EVA seeks directions, and goes through the rows for ever."""
    cell = tiny_cell("peft=eva", "training.batch_size=1", "peft.config.r=16")
    model, tokenizer = load_tiny(cell)
    attach_adapter(model, cell, tokenizer=tokenizer, rows=addition_rows)
    hungry = tiny_cell("peft=eva", "training.batch_size=1", "peft.config.r=32")
    with pytest.raises(UserError, match=r"peft\.config\.r: .* 32 directions .* lower the rank"):
        attach_adapter(load_tiny(hungry)[0], hungry, tokenizer=tokenizer, rows=addition_rows)


def test_other_methods_have_no_regularization(tiny_cell, load_tiny, addition_rows):
    cell = tiny_cell()
    model, tokenizer = load_tiny(cell)
    assert regularization(model) is None
    assert regularization(attach_adapter(model, cell, tokenizer=tokenizer, rows=addition_rows)) is None


# --- the loop ---


def test_a_seed_repeats_bit_by_bit_and_another_differs(tiny_cell, run):
    cell = tiny_cell("training.steps=5", "training.batch_size=2", "peft.config.lora_dropout=0.1")
    unlike = tiny_cell("seed=1", "training.steps=5", "training.batch_size=2", "peft.config.lora_dropout=0.1")
    first, again, other = (run(one)[1] for one in (cell, cell, unlike))
    assert losses(first) == losses(again)
    assert losses(first) != losses(other)


def test_training_learns(tiny_cell, run):
    _, meter, _ = run(
        tiny_cell("training.steps=30", "training.batch_size=8", "peft=full", "training.learning_rate=1e-2")
    )
    assert losses(meter)[0] == pytest.approx(math.log(512), abs=0.5)  # random weights: every token as likely
    assert losses(meter)[-1] < 2
    assert meter.memory_breakdown["gradients"] == 4 * 139_584
    assert 8 * 139_584 <= meter.memory_breakdown["optimizer"] < 8.1 * 139_584  # two float32 moments


def test_steps_are_counted_by_hand(tiny_cell, run, addition_rows):
    _, meter, _ = run(tiny_cell("training.steps=1", "training.batch_size=4", "training.gradient_accumulation=2"))
    [step] = meter.steps
    assert step.rows == 8
    assert step.tokens == sum(row.length for row in addition_rows)
    assert step.answer_tokens == sum(len(row.answer_ids) for row in addition_rows)
    assert step.seconds > 0


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0.0, [1, 1, 1, 1, 1]),
        ("linear", 0.0, [1, 0.8, 0.6, 0.4, 0.2]),
        ("linear", 0.4, [0, 0.5, 1, 2 / 3, 1 / 3]),
        ("cosine", 0.0, [(1 + math.cos(math.pi * i / 5)) / 2 for i in range(5)]),
        ("cosine", 0.2, [0, *((1 + math.cos(math.pi * i / 4)) / 2 for i in range(4))]),
    ],
)
def test_the_schedule(schedule, warmup, expected, tiny_cell, run):
    cell = tiny_cell(
        "training.steps=5",
        f"training.schedule={schedule}",
        f"training.warmup_ratio={warmup}",
        "training.learning_rate=0.01",
    )
    _, _, events = run(cell)
    assert [event["learning_rate"] for event in events] == pytest.approx([0.01 * part for part in expected])


def test_a_constant_schedule_is_warmed_up_when_that_is_asked_for(tiny_cell, run):
    cell = tiny_cell("training.steps=4", "training.schedule=constant", "training.warmup_ratio=0.5")
    _, _, events = run(cell)
    rate = cell.learning_rate
    assert [event["learning_rate"] for event in events] == pytest.approx([0, rate / 2, rate, rate])


@pytest.mark.parametrize(
    ("option", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("adafactor", torch.optim.Adafactor)]
)
def test_optimizers_of_torch(option, kind, tiny_cell, run, load_tiny):
    cell = tiny_cell(
        f"optimizer={option}", "optimizer.config.weight_decay=0.01", "training.learning_rate=0.004", "peft=full"
    )
    model, _ = load_tiny(cell)
    optimizer = make_optimizer(model, cell, device="cpu")
    assert type(optimizer) is kind
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {(0.004, 0.01)}
    _, meter, _ = run(cell)
    assert all(math.isfinite(loss) for loss in losses(meter))


def test_a_loss_that_is_no_number_ends_the_run_with_its_step(tiny_cell, run):
    cell = tiny_cell(
        "peft=full", "optimizer=sgd", "training.learning_rate=1e30", "training.max_grad_norm=null", "training.steps=9"
    )
    with pytest.raises(Diverged, match=r"^loss \S+, gradient norm \S+ at step [2-4] of 9$"):
        run(cell)


def test_neftune_disturbs_by_its_formula_and_only_inside(tiny_cell, load_tiny):
    model, _ = load_tiny(tiny_cell())
    embedding, ids = model.get_input_embeddings(), torch.arange(32).repeat(4, 1)
    plain = embedding(ids)
    with embedding_noise(model.eval(), 5.0):
        assert torch.equal(embedding(ids), plain)  # a validation loss is without noise
    with embedding_noise(model.train(), 5.0):
        noise = embedding(ids) - plain
    bound = 5 / math.sqrt(32 * 64)
    assert bound * 0.95 < noise.abs().max() <= bound * 1.001
    assert noise.mean().abs() < bound / 20
    assert torch.equal(embedding(ids), plain)
    with embedding_noise(model, None):
        assert torch.equal(embedding(ids), plain)


@pytest.mark.parametrize(
    ("overrides", "mixed"),
    [
        (["precision=fp32"], False),
        (["precision=bf16"], True),  # the adapter's weights are float32
        (["precision=bf16", "precision.adapter_dtype=bfloat16"], False),
        (["precision=bf16", "peft=full"], False),
        (["precision=bf16_mixed"], True),
        (["precision=fp16_mixed"], True),
    ],
)
def test_precisions(overrides, mixed, tiny_cell, run):
    cell = tiny_cell(*overrides, "training.steps=3")
    assert cell.autocast == mixed
    with autocast(cell, device="cpu"):
        product = torch.ones(2, 2, dtype=torch.float32) @ torch.ones(2, 2, dtype=torch.float32)
    assert (product.dtype != torch.float32) == mixed
    _, meter, _ = run(cell)
    assert losses(meter)[0] == pytest.approx(math.log(512), abs=0.5)
    assert all(math.isfinite(loss) for loss in losses(meter))


# --- every method ---


@pytest.mark.parametrize("name", OPTIONS)
def test_a_method_trains(name, tiny_cell, run, load_tiny, addition_rows):
    cell = tiny_cell("training.steps=4", f"peft={name}", *SMALLER.get(name, []))  # AdaLoRA's phases take four
    refusal = why_unsupported(cell)
    if refusal is not None:
        pytest.skip(refusal)
    base, tokenizer = load_tiny(cell)
    start = attach_adapter(base, cell, tokenizer=tokenizer, rows=addition_rows)
    before = {key: parameter.detach().clone() for key, parameter in start.named_parameters()}
    trained = [key for key, parameter in start.named_parameters() if parameter.requires_grad]
    model, meter, _ = run(cell, attached=start)
    assert all(math.isfinite(loss) for loss in losses(meter))
    after = dict(model.named_parameters())
    assert [key for key in trained if not torch.equal(before[key], after[key])], "nothing moved"
    for key in set(before) - set(trained):  # and what is frozen stays
        assert torch.equal(before[key], after[key]), key


def test_prefix_tuning_starts_near_the_base_model(tiny_cell, run):
    base = losses(run(tiny_cell("peft=full", "training.steps=1"))[1])[0]
    prefix = losses(run(tiny_cell("peft=prefix_tuning", "training.steps=1"))[1])[0]
    assert prefix == pytest.approx(base, abs=0.1)


# --- torch.compile ---


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_layers_lose_what_eager_ones_lose_and_compile_nothing_while_training(tiny_cell, work_in_process):
    """Packed rows are the harder case: their attention is not compiled, and every step has another length."""
    common = ["training.batching=packed", "training.steps=4", "eval.generate=false", "data.train_rows=16"]
    eager, compiled = (work_in_process(tiny_cell(*common, *more)) for more in ([], ["training.compile=true"]))
    for metric in ("first_train_loss", "train_loss"):
        assert compiled["metrics"][metric] == pytest.approx(eager["metrics"][metric], abs=1e-4)
    assert compiled["environment"]["effective"]["batching"] == "packed"
    seconds = {phase.name: phase.seconds for phase in compiled["phases"]}
    assert 0 < compiled["metrics"]["compile_seconds"] <= seconds["compile"]  # so none while it trained
    assert 2 <= compiled["metrics"]["compiled_graphs"] <= 16
    assert "compile_seconds" not in eager["metrics"]


def test_what_compiles_within_a_step_is_no_part_of_its_seconds():
    compiling = Compiling()
    compiling.watch()
    torch.compile(lambda x: x + 1, backend="eager", dynamic=True)(torch.ones(3))
    assert compiling.graphs == 1
    assert compiling.take() == compiling.seconds > 0
    assert compiling.take() == 0


def test_adaloras_budget_outlives_an_overflow(tiny_cell, run, monkeypatch):
    """Loss scaling skips the step; gradients that overflowed are no measure of what is important."""
    cell = tiny_cell("peft=adalora", "precision=fp16_mixed", "training.steps=20", "training.warmup_ratio=0")
    calls = []

    def overflowing_once(model):
        calls.append(model)
        return regularization(model) * (math.inf if len(calls) == 3 else 1.0)

    monkeypatch.setattr("left_bench.training.loop.regularization", overflowing_once)
    model, _, events = run(cell)
    assert [event["step"] for event in events if not math.isfinite(event["gradient_norm"])] == [3]
    values = torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_E" in name])
    assert (values == 0).sum() > 0  # the budget was cut

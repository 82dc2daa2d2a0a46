"""Classification of pictures: what is read, the new output layer that every method trains, accuracy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from left_bench.core.errors import UserError
from left_bench.data import collate
from left_bench.grid.rules import why_unsupported
from left_bench.methods.attach import attach_adapter, trainable_parameters
from left_bench.model.load import load_model, load_rows_of, open_pretrained
from left_bench.spec.run_files import CELL_NAME
from left_bench.spec.task import new_layers_of
from left_bench.training.loss import AnswerLoss
from left_bench.worker import reload_check

VIT = ("model=tiny_vit", "data=digits")
METHODS = ["full", "lora", "dora", "vera", "ln_tuning", "bitfit", "layer_freeze", "oft"]


def splits_of(cell):
    folder, processor = open_pretrained(cell)
    return load_rows_of(cell, processor, folder=folder), folder


def load(cell):
    splits, folder = splits_of(cell)
    model, _ = load_model(cell, folder=folder, device="cpu", classes=splits.classes)
    return model, splits


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A local folder with a small vision transformer that has another classifier: as one is published."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=3)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def test_pictures_are_made_as_the_models_processor_makes_them(tiny_cell):
    cell = tiny_cell(*VIT, "data.train_rows=20", "data.test_rows=5")
    splits, _ = splits_of(cell)
    assert (len(splits.train), len(splits.test)) == (20, 5)
    assert splits.classes == list("0123456789")
    picture = splits.train[3]
    assert picture.pixels.shape == (3, 16, 16)
    assert picture.pixels.dtype == np.float32
    assert -1 <= picture.pixels.min() < picture.pixels.max() <= 1  # (x - 0.5) / 0.5
    assert picture.reference == splits.classes[picture.label]
    assert picture.length == 16  # patches
    again, _ = splits_of(cell)
    assert again.fingerprint == splits.fingerprint
    assert np.array_equal(again.train[3].pixels, picture.pixels)


def test_test_pictures_do_not_depend_on_the_training_pictures(tiny_cell):
    few, many = (splits_of(tiny_cell(*VIT, f"data.train_rows={n}", "data.test_rows=6"))[0] for n in (4, 40))
    assert [item.prompt for item in few.test] == [item.prompt for item in many.test]
    seen = {item.prompt for item in many.train}
    assert not seen & {item.prompt for item in many.test}


def test_loss_is_the_models_own(tiny_cell):
    model, splits = load(tiny_cell(*VIT))
    batch = collate(splits.train[:5], pad_id=0)
    theirs = model(**batch.inputs(), labels=batch.targets).loss
    ours = AnswerLoss(model).summed(batch)
    assert ours.item() == pytest.approx(5 * theirs.item(), rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_the_output_layer(method, tiny_cell):
    cell = tiny_cell(*VIT, f"peft={method}")
    model, splits = load(cell)
    assert new_layers_of(model) == ["classifier"]
    adapted = attach_adapter(model, cell, tokenizer=None, rows=splits.train)
    objective = AnswerLoss(adapted).summed(collate(splits.train[:4], pad_id=0))
    objective.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("classifier" in name and name.endswith("weight") for name in trained)
    assert not any("classifier" in name and "lora" in name for name in trained)
    assert len(trainable_parameters(adapted)) > 2


def test_the_output_layer_is_the_seeds(tiny_cell):
    first, again, other = (load(tiny_cell(*VIT, f"seed={seed}"))[0].classifier.weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("method", ["full", "lora", "bitfit"])
def test_a_published_model_learns_digits(method, published, tiny_cell, work_in_process):
    cell = tiny_cell(
        *("model=vit_base", f"model.name_or_path={published}", "data=digits", f"peft={method}"),
        *(f"training.steps={200 if method == 'full' else 40}", f"quantization={'nf4' if method == 'lora' else 'none'}"),
        *("training.batch_size=32", "training.learning_rate=1e-3"),
        *("data.train_rows=512", "data.test_rows=64", "training.schedule=constant"),
    )
    result = work_in_process(cell)
    metrics, effective = result["metrics"], result["environment"]["effective"]
    scores = {score.metric: score for score in result["scores"]}
    assert metrics["train_loss"] < metrics["first_train_loss"] - 0.01
    assert scores["accuracy"].value > (0.5 if method == "full" else 0)  # of ten classes

    assert metrics["accuracy"] == scores["accuracy"].value
    assert scores["accuracy"].base_value is None  # a new output layer knows nothing
    assert "generate_tokens_per_second" not in metrics
    assert effective["architecture"] == "ViTForImageClassification"
    run_dir = result["run_dir"]
    (run_dir / CELL_NAME).write_text(cell.model_dump_json(by_alias=True), encoding="utf-8")
    assert reload_check.compare_losses(run_dir) == reload_check.EQUAL
    if method == "lora":
        assert metrics["quantized_modules"] == 12  # six linear layers in each of two; the output layer is whole
        assert metrics["merge_max_abs_difference"] < 0.5


def test_pictures_from_folders(tiny_cell, tmp_path):
    from PIL import Image

    for kind, shade in (("dark", 10), ("light", 240)):
        (tmp_path / kind).mkdir()
        for i in range(4):
            Image.new("L", (9, 7), shade + i).save(tmp_path / kind / f"{i}.png")
    folder = ("model=tiny_vit", "data=image_folder", f"data.path={tmp_path}", "data.train_rows=5", "data.test_rows=3")
    splits, _ = splits_of(tiny_cell(*folder))
    assert splits.classes == ["dark", "light"]
    for picture in [*splits.train, *splits.test]:
        assert (picture.pixels.mean() > 0) == (picture.reference == "light")
    for wrong, words in (
        ("data.train_rows=9", "data.train_rows=9"),
        ("data.test_rows=8", "data.test_rows=8"),
        ("data.path=/nowhere", "data.path=/nowhere"),
    ):
        key = wrong.partition("=")[0]
        with pytest.raises(UserError, match=words):
            splits_of(tiny_cell(*(item for item in folder if not item.startswith(f"{key}=")), wrong))


@pytest.mark.parametrize(
    "choice",
    [
        ("model=tiny_vit",),
        ("model=tiny_llama", "data=digits"),
        (*VIT, "peft=prompt_tuning"),
        (*VIT, "peft=prefix_tuning"),
        (*VIT, "quantization=hqq_4"),
        (*VIT, "peft=ia3"),
    ],
)
def test_what_cannot_be_has_a_rule(choice, tiny_cell):
    assert why_unsupported(tiny_cell(*choice))
    assert why_unsupported(tiny_cell(*VIT)) is None

"""Models that tell the tag of each word: where a word's tag is told, entities as seqeval counts them, a run."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest
import torch

from left_bench.core.errors import UserError
from left_bench.data import collate
from left_bench.grid.rules import why_unsupported
from left_bench.methods.attach import attach_adapter
from left_bench.model.load import load_model, load_rows_of, open_pretrained
from left_bench.spec.record import outcome_of
from left_bench.spec.row_scores import ANSWER_METRICS, entities
from left_bench.spec.run_files import CELL_NAME
from left_bench.training.loss import AnswerLoss
from left_bench.worker import reload_check

BERT = ("model=tiny_bert", "model.task=token_classification", "data=jsonl", "data.shape=tags", "training.max_length=64")
LLAMA = ("model=tiny_llama", *BERT[1:])


def tagged(rows: int) -> list[dict[str, list[str]]]:
    draw = random.Random(2)
    kinds = {"zz": "B-ROCK", "qq": "B-BIRD", "the": "O", "of": "O", "and": "O"}
    result = []
    for _ in range(rows):
        words = draw.choices(list(kinds), k=draw.randint(3, 7))
        result.append({"tokens": [*words, "end"], "tags": [*(kinds[word] for word in words), "O"]})
    return [row for number, row in enumerate(result) if row not in result[:number]]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "tags.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in tagged(300)), encoding="utf-8")
    return path


def splits_of(cell):
    folder, reader = open_pretrained(cell)
    return load_rows_of(cell, reader, folder=folder), reader, folder


# --- metrics: known values, made with seqeval 1.2.2 ---


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-A I-A O B-B", {("A", 0, 1), ("B", 3, 3)}),
        ("I-A I-A O", {("A", 0, 1)}),  # IOB1: begun by an I
        ("B-A I-B I-B", {("A", 0, 0), ("B", 1, 2)}),  # another type ends an entity
        ("B-A B-A", {("A", 0, 0), ("A", 1, 1)}),
        ("S-A O B-B I-B E-B", {("A", 0, 0), ("B", 2, 4)}),  # IOBES
        ("O O", set()),
        ("B-A-C I-A-C", {("A-C", 0, 1)}),
        ("B I O", {("_", 0, 1)}),  # no type
    ],
)
def test_entities_are_those_of_seqeval(tags, expected):
    assert entities(tags.split(" ")) == expected


def test_f1_counts_entities_of_all_texts_together():
    right = ["O O B-MISC I-MISC B-MISC O O", "B-PER I-PER O"]
    told = ["O O B-MISC I-MISC B-MISC I-MISC O", "B-PER I-PER O"]
    metric = ANSWER_METRICS["entity_f1"].of_answers
    assert metric(told, right) == pytest.approx(2 / 3)  # two of three told, two of three there
    assert metric(right, right) == 1.0
    assert metric(["O O"], ["O O"]) == 0.0
    assert metric(["O O O O O O O", "O O O"], right) == 0.0
    assert ANSWER_METRICS["tag_accuracy"].of_answer(told[0], right[0]) == pytest.approx(6 / 7)


# --- rows ---


def test_the_first_token_of_a_word_tells_its_tag(tiny_cell, file):
    splits, reader, _ = splits_of(tiny_cell(*BERT, f"data.path={file}"))
    assert splits.classes == ["B-BIRD", "B-ROCK", "O"]
    row = splits.train[0]
    words = row.prompt.split(" ")
    assert [splits.classes[tag] for tag in row.tags] == row.reference.split(" ")
    assert len(row.places) == len(words) == row.labels
    texts = [reader.decode(row.ids[place:]) for place in row.places]
    assert all(text.lstrip().startswith(word) for text, word in zip(texts, words, strict=True))


def test_a_decoder_tells_it_by_the_last_for_it_has_not_seen_the_rest_before(tiny_cell, file):
    splits, reader, _ = splits_of(tiny_cell(*LLAMA, f"data.path={file}"))
    row = splits.train[0]
    texts = [reader.decode(row.ids[: place + 1]) for place in row.places]
    assert all(text.endswith(word) for text, word in zip(texts, row.prompt.split(" "), strict=True))


def test_words_that_are_cut_off_have_no_tag(tiny_cell, tmp_path):
    path = tmp_path / "long.jsonl"
    rows = [{"tokens": [f"word{number}{i}" for i in range(12)], "tags": ["O", "B-A"] * 6} for number in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    splits, _, _ = splits_of(tiny_cell(*BERT[:-1], "training.max_length=40", f"data.path={path}"))
    for row in splits.train:
        whole = row.prompt.encode()[:40].count(b" ")
        assert whole <= len(row.places) == len(row.reference.split(" ")) < 12
        assert max(row.places) < len(row.ids) == 40
    assert splits.truncated_rows == len(splits.train)


def test_tags_may_be_classes_of_a_data_set_or_words_between_blanks(tiny_cell, tmp_path):
    import datasets

    rows = tagged(30)
    names = ["O", "B-ROCK", "B-BIRD"]
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(datasets.ClassLabel(names=names))}
    )
    made = [{"tokens": row["tokens"], "ner_tags": [names.index(tag) for tag in row["tags"]]} for row in rows]
    datasets.Dataset.from_list(made, features=features).save_to_disk(str(tmp_path / "set"))
    lines = [f"{' '.join(row['tokens'])},{' '.join(row['tags'])}\n" for row in rows]
    (tmp_path / "tags.csv").write_text("words,tags\n" + "".join(lines), encoding="utf-8")
    prints = [
        splits_of(tiny_cell(*BERT, f"data.path={tmp_path / name}"))[0].fingerprint for name in ("set", "tags.csv")
    ]
    assert prints[0] == prints[1]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "has 2 words and 1 tags; give each word one"),
        ({"tokens": ["a"], "tag": ["O"]}, "data.answer_column='tags': no such column.*did you mean 'tag'"),
        ({"tokens": ["a"], "tags": 3}, "column 'tags' holds a number, not a list"),
    ],
)
def test_words_without_tags_are_refused_in_one_sentence(row, words, tiny_cell, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=words) as refused:
        splits_of(tiny_cell(*BERT, f"data.path={path}"))
    assert "\n" not in str(refused.value)


def test_one_tag_alone_is_refused(tiny_cell, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"tokens": ["a", str(number)], "tags": ["O", "O"]} for number in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(UserError, match="all words have the one tag 'O'"):
        splits_of(tiny_cell(*BERT, f"data.path={path}"))


def test_people_of_stories_are_tagged(tiny_cell):
    cell = tiny_cell("model=tiny_bert", "model.task=token_classification", "data=kinship_people")
    assert why_unsupported(cell) is None
    splits, _, _ = splits_of(cell)
    assert splits.classes == ["B-MAN", "B-WOMAN", "O"]
    row = splits.train[0]
    people = [word for word, tag in zip(row.prompt.split(" "), row.reference.split(" "), strict=True) if tag != "O"]
    assert len(people) > 2 and all(name.istitle() for name in people)


def test_the_hubs_option_has_its_columns(tiny_cell):
    cell = tiny_cell("model=minilm_l6", "model.task=token_classification", "data=wikiann", "training.max_length=64")
    assert (cell.data.prompt_column, cell.data.answer_column, cell.data.shape) == ("tokens", "ner_tags", "tags")
    assert why_unsupported(cell) is None


# --- loss, methods, a run ---


@pytest.mark.parametrize("options", [BERT, LLAMA], ids=["encoder", "decoder"])
@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "prefix_tuning"])
def test_virtual_tokens_and_padding_move_no_label(method, options, tiny_cell, file):
    cell = tiny_cell(*options, f"data.path={file}", f"peft={method}")
    splits, reader, folder = splits_of(cell)
    model, _ = load_model(cell, folder=folder, device="cpu", classes=splits.classes)
    if method == "lora":
        batch = collate(splits.train, pad_id=reader.pad_token_id)
        labels = torch.full_like(batch.arguments["input_ids"], -100)
        labels[batch.label_rows, batch.label_positions] = batch.targets
        theirs = model.eval()(**batch.inputs(), labels=labels).loss
        assert AnswerLoss(model).summed(batch).item() == pytest.approx(batch.answer_tokens * theirs.item(), rel=1e-5)
    adapted = attach_adapter(model, cell, tokenizer=reader, rows=splits.train).eval()
    with torch.no_grad():
        together = AnswerLoss(adapted).of_tokens(collate(splits.train, pad_id=reader.pad_token_id))
        alone = [AnswerLoss(adapted).of_tokens(collate([row], pad_id=reader.pad_token_id)) for row in splits.train]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


@pytest.fixture(scope="module")
def learned(tiny_cell, work_in_process, file, tmp_path_factory):
    from left_bench.pretrained import model_folder

    folder = tmp_path_factory.mktemp("bert") / "published"
    shutil.copytree(model_folder(tiny_cell("model=tiny_bert").model, dtype="float32"), folder)
    cell = tiny_cell(
        *(*BERT, f"model.name_or_path={folder}", f"data.path={file}", "peft=lora", "training.steps=60"),
        *("training.batch_size=16", "training.learning_rate=1e-2", "data.metrics=[entity_f1,tag_accuracy]"),
        *("data.train_rows=150", "data.test_rows=40", "data.validation_rows=16"),
    )
    result = work_in_process(cell)
    run_dir = result.pop("run_dir")
    (run_dir / CELL_NAME).write_text(cell.model_dump_json(by_alias=True), encoding="utf-8")
    return outcome_of(cell, "ok", None, started_at="2026-01-01T00:00:00Z", measured=result), run_dir


def test_a_published_encoder_learns_the_tags(learned):
    record, run_dir = learned
    scores = {score.metric: score for score in record.scores}
    assert scores["entity_f1"].value > 0.8
    assert scores["tag_accuracy"].value > 0.8 and scores["tag_accuracy"].stderr is not None
    lines = [json.loads(line) for line in (run_dir / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert np.mean([line["scores"]["entity_f1"] for line in lines]) == pytest.approx(scores["entity_f1"].value)
    assert all(len(line["prediction"].split(" ")) == line["answer_tokens"] for line in lines)
    assert record.metrics["merge_max_abs_difference"] < 1e-3


def test_what_was_saved_tells_the_same_tags(learned):
    assert reload_check.compare_losses(learned[1]) == reload_check.EQUAL

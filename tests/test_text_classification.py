"""Models that read a text and name its class: rows, labels, the new output layer, methods, commands."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from left_bench.core.errors import UserError
from left_bench.data import collate
from left_bench.evaluation.text_metrics import row_parts
from left_bench.grid.rules import why_unsupported
from left_bench.methods.attach import attach_adapter, load_trained, save_trained
from left_bench.model.load import load_model, load_rows_of, open_pretrained
from left_bench.report.uncertainty import crossed_spread
from left_bench.spec.record import outcome_of
from left_bench.spec.row_scores import ANSWER_METRICS
from left_bench.spec.run_files import CELL_NAME
from left_bench.spec.task import TASKS, new_layers_of
from left_bench.training.loss import AnswerLoss
from left_bench.worker import reload_check

BERT = (
    "model=tiny_bert",
    "data=jsonl",
    "data.prompt_column=text",
    "data.answer_column=label",
    "training.max_length=64",
)
LLAMA = ("model=tiny_llama", "model.task=sequence_classification", *BERT[1:])
FEW = ("data.train_rows=8", "data.test_rows=4", "training.batch_size=4")
NAMES = ("cold", "mild", "warm")
WORDS = {"cold": ("zzzz", "qqqq"), "mild": ("kkkk", "xxxx"), "warm": ("jjjj", "vvvv")}


def weather(rows: int = 40) -> list[dict[str, str]]:
    """Texts of unlike lengths whose class is told by one of their words, by letters that no other word has."""
    draw = random.Random(0)
    result = []
    for number in range(rows):
        label = NAMES[number % 3]
        words = [*draw.choices(("the", "a", "day", "of", "much"), k=draw.randint(1, 8)), draw.choice(WORDS[label])]
        draw.shuffle(words)
        result.append({"text": f"{' '.join(words)} {number}", "label": label, "other": f"seen {number % 7}"})
    return result


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "weather.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in weather()), encoding="utf-8")
    return path


def splits_of(cell):
    folder, reader = open_pretrained(cell)
    return load_rows_of(cell, reader, folder=folder), reader, folder


def loaded(cell):
    splits, reader, folder = splits_of(cell)
    model, _ = load_model(cell, folder=folder, device="cpu", classes=splits.classes)
    return model, splits, reader


# --- metrics ---


@pytest.mark.parametrize("classes", [2, 4])
def test_scores_of_classes_are_those_of_scikit_learn(classes):
    metrics = pytest.importorskip("sklearn.metrics")
    draw = random.Random(classes)
    right = [draw.choice("abcd"[:classes]) for _ in range(60)]
    told = [name if draw.random() < 0.6 else draw.choice("abcd"[:classes]) for name in right]
    theirs = {
        "accuracy": metrics.accuracy_score(right, told),
        "macro_f1": metrics.f1_score(right, told, average="macro"),
        "matthews": metrics.matthews_corrcoef(right, told),
    }
    assert ANSWER_METRICS["macro_f1"].of_answers(told, right) == pytest.approx(theirs["macro_f1"])
    assert ANSWER_METRICS["matthews"].of_answers(told, right) == pytest.approx(theirs["matthews"])
    accuracy = ANSWER_METRICS["accuracy"].of_answer
    assert np.mean([accuracy(*pair) for pair in zip(told, right, strict=True)]) == theirs["accuracy"]


def test_scores_of_one_class_alone_are_known():
    right, told = ["a"] * 4, ["a", "a", "b", "a"]
    assert ANSWER_METRICS["macro_f1"].of_answers(told, right) == pytest.approx((6 / 7 + 0) / 2)
    assert ANSWER_METRICS["matthews"].of_answers(told, right) == 0.0


def test_a_rows_parts_have_the_scores_mean_and_the_jackknifes_error():
    draw = random.Random(3)
    right = [draw.choice("abc") for _ in range(90)]
    told = [name if draw.random() < 0.7 else draw.choice("abc") for name in right]
    metric = ANSWER_METRICS["macro_f1"]
    parts = row_parts(metric, told, right)
    assert np.mean(parts) == pytest.approx(metric.of_answers(told, right))
    left_out = [metric.of_answers(told[:i] + told[i + 1 :], right[:i] + right[i + 1 :]) for i in range(90)]
    jackknife = 89 / 90 * np.sum((np.array(left_out) - np.mean(left_out)) ** 2)
    spread = crossed_spread(np.array([parts]), np.ones(90))
    assert spread.variance == pytest.approx(jackknife)
    drawn = [draw.choices(range(90), k=90) for _ in range(400)]
    bootstrap = np.std([metric.of_answers([told[i] for i in rows], [right[i] for i in rows]) for rows in drawn])
    assert spread.variance**0.5 == pytest.approx(bootstrap, rel=0.2)


def test_parts_of_many_rows_are_left_out_together(monkeypatch):
    draw = random.Random(5)
    right = [draw.choice("ab") for _ in range(400)]
    told = [name if draw.random() < 0.8 else draw.choice("ab") for name in right]
    metric = ANSWER_METRICS["matthews"]
    alone = crossed_spread(np.array([row_parts(metric, told, right)]), np.ones(400))
    monkeypatch.setattr("left_bench.evaluation.text_metrics._MOST_LEFT_OUT", 80)
    together = crossed_spread(np.array([row_parts(metric, told, right)]), np.ones(400))
    assert together.variance**0.5 == pytest.approx(alone.variance**0.5, rel=0.25)


# --- rows ---


def test_rows_are_texts_with_the_number_of_their_class(tiny_cell, file):
    splits, reader, _ = splits_of(tiny_cell(*BERT, f"data.path={file}", "data.validation_rows=6"))
    assert splits.classes == list(NAMES)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [8, 6, 4]
    known = {row["text"]: row["label"] for row in weather()}
    for row in [*splits.train, *splits.validation, *splits.test]:
        assert known[row.prompt] == row.reference == splits.classes[row.label]
        assert row.ids == reader(row.prompt)["input_ids"]
    prompts = [row.prompt for part in (splits.train, splits.validation, splits.test) for row in part]
    assert len(set(prompts)) == 18


def test_validation_rows_change_no_other_row(tiny_cell, file):
    few, many = (splits_of(tiny_cell(*BERT, f"data.path={file}", f"data.validation_rows={rows}"))[0] for rows in (0, 9))
    assert few.fingerprint == many.fingerprint
    assert not few.validation and len(many.validation) == 9


def test_a_batch_is_padded_at_the_right_and_no_row_sees_the_others(tiny_cell, file):
    for options in (BERT, LLAMA):
        model, splits, reader = loaded(tiny_cell(*options, f"data.path={file}"))
        batch = collate(splits.train, pad_id=reader.pad_token_id)
        lengths = [row.length for row in splits.train]
        assert batch.arguments["attention_mask"].sum(1).tolist() == lengths
        assert batch.tokens == sum(lengths)
        assert len(set(lengths)) > 1
        model.eval()
        with torch.no_grad():
            together = AnswerLoss(model).of_tokens(batch)
            alone = [AnswerLoss(model).of_tokens(collate([row], pad_id=reader.pad_token_id)) for row in splits.train]
        assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_the_loss_is_the_models_own(tiny_cell, file):
    model, splits, reader = loaded(tiny_cell(*BERT, f"data.path={file}"))
    batch = collate(splits.train, pad_id=reader.pad_token_id)
    theirs = model.eval()(**batch.inputs(), labels=batch.targets).loss
    assert AnswerLoss(model).summed(batch).item() == pytest.approx(8 * theirs.item(), rel=1e-5)


def test_a_decoder_that_is_handed_embeddings_reads_its_last_token_and_no_padding(tiny_cell, file):
    cell = tiny_cell(*LLAMA, f"data.path={file}", "peft=prompt_tuning", "peft.config.num_virtual_tokens=4")
    model, splits, reader = loaded(cell)
    assert all(row.at_left for row in splits.train)
    adapted = attach_adapter(model, cell, tokenizer=reader, rows=splits.train).eval()

    def moved_by_padding(rows):
        with torch.no_grad():
            together = AnswerLoss(adapted).of_tokens(collate(rows, pad_id=reader.pad_token_id))
            alone = [AnswerLoss(adapted).of_tokens(collate([row], pad_id=reader.pad_token_id)) for row in rows]
        return (together - torch.cat(alone)).abs().max().item()

    at_right = [dataclasses.replace(row, at_left=False) for row in splits.train]
    # the virtual tokens stand before the padding, farther from the text by as much
    assert moved_by_padding(splits.train) < 0.005 < 0.02 < moved_by_padding(at_right)
    encoder, _, _ = splits_of(tiny_cell(*BERT, f"data.path={file}", "peft=prompt_tuning"))
    assert not any(row.at_left for row in encoder.train)


def test_long_texts_are_cut_and_counted(tiny_cell, tmp_path):
    path = tmp_path / "long.jsonl"
    rows = [
        {"text": f"{number} " + "x" * (100 if number % 2 else 5), "label": "ab"[number % 2]} for number in range(20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    splits, _, _ = splits_of(
        tiny_cell(*BERT[:-1], "training.max_length=32", f"data.path={path}", "data.train_rows=null")
    )
    cut = [row for row in splits.train if row.reference == "b"]
    assert {row.length for row in cut} == {32}
    assert splits.truncated_rows == len(cut) > 0
    assert splits.truncated_test_rows == sum(row.reference == "b" for row in splits.test)
    assert splits.longest_row > 100
    assert all(row.prompt.endswith("x" * 100) for row in cut)  # a reader sees the whole text


def test_virtual_tokens_leave_room_in_the_positions(tiny_cell, tmp_path):
    path = tmp_path / "long.jsonl"
    rows = [{"text": f"{number} " + "x" * 600, "label": "ab"[number % 2]} for number in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    longest = {
        peft: max(row.length for row in splits_of(cell)[0].train)
        for peft, cell in (
            (peft, tiny_cell(*BERT[:-1], "training.max_length=492", f"data.path={path}", f"peft={peft}"))
            for peft in ("lora", "p_tuning")
        )
    }
    assert longest == {"lora": 492, "p_tuning": 492}


@pytest.mark.parametrize("kind", ["csv", "parquet", "columns", "folder"])
def test_a_label_may_be_a_number_a_word_or_a_class_of_a_data_set(kind, tiny_cell, tmp_path):
    import datasets

    rows, path = weather(30), tmp_path / f"weather.{kind}"
    told = [{"text": row["text"], "label": NAMES.index(row["label"])} for row in rows]
    if kind == "csv":
        path.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in told), encoding="utf-8")
    elif kind == "parquet":
        datasets.Dataset.from_list([{"text": row["text"], "label": row["label"]} for row in rows]).to_parquet(str(path))
    elif kind == "columns":
        path = tmp_path / "weather.jsonl"
        path.write_text("".join(json.dumps({"a": r["text"], "b": r["label"]}) + "\n" for r in rows), encoding="utf-8")
    else:
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(NAMES))}
        )
        datasets.Dataset.from_list(told, features=features).save_to_disk(str(path))
    named = ("data.prompt_column=a", "data.answer_column=b") if kind == "columns" else ()
    cell = tiny_cell("model=tiny_bert", "data=jsonl", f"data.path={path}", "training.max_length=64", *named)
    splits, _, _ = splits_of(cell)
    assert splits.classes == (["0", "1", "2"] if kind == "csv" else list(NAMES))
    assert splits.shape == (None if named else "texts and their labels")


def test_hub_classes_have_their_names_and_withheld_answers_are_dropped(tiny_cell, monkeypatch):
    import datasets

    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = [{"sentence": f"text {i}", "label": -1 if i == 3 else i % 2} for i in range(30)]
    made = datasets.Dataset.from_list(rows, features=features)
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *given, **named: (asked.append((given, named)), made)[1])
    splits, _, _ = splits_of(tiny_cell("model=tiny_bert", "data=sst2", "data.test_rows=5", "training.max_length=64"))
    assert splits.classes == ["no", "yes"]
    assert splits.dropped_rows == 1
    assert asked[0] == (("nyu-mll/glue",), {"split": "train", "name": "sst2"})
    assert all(row.reference == ["no", "yes"][int(row.prompt.split()[1]) % 2] for row in splits.train)


@pytest.mark.parametrize(
    ("data", "columns", "metric"),
    [
        ("sst2", ("sentence", None, "label"), "accuracy"),
        ("mrpc", ("sentence1", "sentence2", "label"), "accuracy"),
        ("cola", ("sentence", None, "label"), "matthews"),
        ("ag_news", ("text", None, "label"), "accuracy"),
    ],
)
def test_names_of_the_hub_have_their_columns_and_metrics(data, columns, metric, tiny_cell):
    cell = tiny_cell("model=minilm_l6", f"data={data}", "training.max_length=64")
    assert (cell.data.prompt_column, cell.data.second_column, cell.data.answer_column) == columns
    assert cell.eval.metrics[0] == metric
    assert why_unsupported(cell) is None


def test_two_texts_are_read_together(tiny_cell, file, tmp_path):
    from transformers import BertTokenizerFast

    cell = tiny_cell(*BERT, f"data.path={file}", "data.second_column=other")
    splits, _, folder = splits_of(cell)
    row = splits.train[0]
    _, second = row.prompt.split("\n")
    assert second.startswith("seen ")
    assert row.types is None  # bytes have no separator: a line break stands between the two
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "seen", "day"]))
    own = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"))
    splits = load_rows_of(cell, own, folder=folder)
    row = splits.train[0]
    assert row.ids == own(*row.prompt.split("\n"))["input_ids"]
    assert row.types == own(*row.prompt.split("\n"))["token_type_ids"]
    assert set(row.types) == {0, 1}
    batch = collate(splits.train[:3], pad_id=own.pad_token_id)
    assert batch.inputs()["token_type_ids"].shape == batch.inputs()["input_ids"].shape


def test_a_pair_is_not_one_with_another_second_text(tiny_cell, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"text": "same", "other": f"{number}", "label": "ab"[number % 2]} for number in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    splits, _, _ = splits_of(tiny_cell(*BERT, f"data.path={path}", "data.second_column=other"))
    assert len(splits.train) == 8 and len(splits.test) == 4


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("data.answer_column=labl", "data.answer_column='labl': no such column.*did you mean 'label'"),
        ("data.prompt_column=txt", "data.prompt_column='txt': no such column.*did you mean 'text'"),
        ("data.second_column=othr", "data.second_column='othr': no such column.*did you mean 'other'"),
        ("data.answer_column=same", "data.answer_column='same': all rows have the same answer 'x'"),
        ("data.answer_column=own", "data.answer_column='own': 250 different answers in 250 rows are texts"),
    ],
)
def test_what_holds_no_classes_is_refused_in_one_sentence(wrong, words, tiny_cell, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [row | {"same": "x", "own": row["text"]} for row in weather(250)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = [item for item in BERT if not item.startswith(wrong.partition("=")[0])]
    with pytest.raises(UserError, match=words) as refused:
        splits_of(tiny_cell(*options, f"data.path={path}", "data.train_rows=null", wrong))
    assert "\n" not in str(refused.value)


def test_a_second_text_is_for_models_that_read_pairs(compose_cell, file):
    with pytest.raises(UserError, match=r"model\.task=causal_lm reads one text"):
        from left_bench.grid.compose import check_cell

        check_cell(compose_cell("data=jsonl", f"data.path={file}", "data.second_column=other"))


# --- methods ---


@pytest.mark.parametrize("options", [BERT, LLAMA], ids=["encoder", "decoder"])
@pytest.mark.parametrize("method", ["full", "lora", "ia3", "bitfit", "pfeiffer", "prompt_tuning", "prefix_tuning"])
def test_every_method_trains_the_output_layer_and_saves_it(method, options, tiny_cell, file, tmp_path):
    cell = tiny_cell(*options, f"data.path={file}", f"peft={method}")
    if why_unsupported(cell) is not None:
        assert method == "bitfit" and options is LLAMA  # which has no biases
        return
    model, splits, reader = loaded(cell)
    (head,) = new_layers_of(model)
    before = model.get_submodule(head).weight.detach().clone()
    adapted = attach_adapter(model, cell, tokenizer=reader, rows=splits.train)
    optimizer = torch.optim.SGD([item for item in adapted.parameters() if item.requires_grad], lr=0.1)
    batch = collate(splits.train, pad_id=reader.pad_token_id)
    AnswerLoss(adapted).summed(batch).backward()
    optimizer.step()
    adapted.eval()
    with torch.no_grad():
        losses = AnswerLoss(adapted).of_tokens(batch)
    save_trained(adapted, tmp_path / "saved", tokenizer=reader)
    fresh, _, _ = loaded(cell)
    assert torch.equal(fresh.get_submodule(head).weight, before)  # drawn by the cell's seed
    again = load_trained(fresh, tmp_path / "saved").eval()
    heads = [
        p for name, p in again.named_parameters() if re.search(rf"{head}\.(modules_to_save\.default\.)?weight", name)
    ]
    assert any(not torch.equal(weight, before) for weight in heads)
    with torch.no_grad():
        assert torch.equal(AnswerLoss(again).of_tokens(batch), losses)


@pytest.mark.parametrize("task", ["sequence_classification", "regression", "token_classification", "embeddings"])
def test_an_encoder_may_be_quantized_and_its_new_layer_is_whole(task, tiny_cell, work_in_process):
    data = {"token_classification": "kinship_people", "embeddings": "letter_counting", "regression": "letter_counting"}
    cell = tiny_cell(
        *("model=tiny_bert", f"model.task={task}", f"data={data.get(task, 'family_relationships')}"),
        *("quantization=nf4", "peft=lora", "precision=fp32", "data.train_rows=24", "data.test_rows=12"),
    )
    assert why_unsupported(cell) is None
    result = work_in_process(cell)
    assert result["metrics"]["quantized_modules"] >= 12  # six linear layers in each of two
    assert result["metrics"]["train_steps"] == 2
    assert "merge_max_abs_difference" in result["metrics"]


def test_the_output_layer_is_the_seeds(tiny_cell, file):
    first, again, other = (
        loaded(tiny_cell(*BERT, f"data.path={file}", f"seed={seed}"))[0].classifier.weight for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


# --- a whole run ---


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, compose_cell) -> Path:
    """A small BERT in a folder, as encoders are published."""
    from left_bench.pretrained import model_folder

    tiny = compose_cell("model=tiny_bert", "precision=fp32", "tracker=none")
    folder = tmp_path_factory.mktemp("bert") / "published"
    shutil.copytree(model_folder(tiny.model, dtype="float32"), folder)
    return folder


@pytest.fixture(scope="module")
def learned(encoder, tiny_cell, work_in_process, tmp_path_factory):
    """A cell that has learned, its record and its folder as a launch leaves them."""
    path = tmp_path_factory.mktemp("rows") / "weather.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in weather(200)), encoding="utf-8")
    cell = tiny_cell(
        *(*BERT, f"model.name_or_path={encoder}", f"data.path={path}", "peft=lora", "training.batching=packed"),
        *("training.steps=100", "training.batch_size=32", "training.learning_rate=1e-2", "eval.points=2"),
        *("data.train_rows=120", "data.test_rows=40", "data.validation_rows=20"),
        *("data.metrics=[accuracy,macro_f1,matthews]",),
    )
    result = work_in_process(cell)
    run_dir = result.pop("run_dir")
    (run_dir / CELL_NAME).write_text(cell.model_dump_json(by_alias=True), encoding="utf-8")
    record = outcome_of(cell, "ok", None, started_at="2026-01-01T00:00:00Z", measured=result)
    record.write(run_dir)
    return record, run_dir


def test_a_published_encoder_learns_its_classes_and_is_scored(learned):
    record, run_dir = learned
    scores = {score.metric: score for score in record.scores}
    assert scores["accuracy"].value > 0.8  # of three classes
    assert record.metrics["eval_loss"] < 0.6 and record.metrics["validation_loss"] < 0.8
    assert {"accuracy", "macro_f1", "matthews"} <= scores.keys()
    assert all(score.base_value is None for score in scores.values())  # a new output layer knows nothing
    assert all(scores[name].stderr > 0 for name in ("accuracy", "macro_f1", "matthews"))
    assert "generate_tokens_per_second" not in record.metrics
    assert [point.validation_loss for point in record.curve] == sorted(
        (point.validation_loss for point in record.curve), reverse=True
    )
    sample = record.samples[0]
    assert sample.reference in NAMES and sample.prediction in NAMES
    lines = [json.loads(line) for line in (run_dir / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert np.mean([line["scores"]["macro_f1"] for line in lines]) == pytest.approx(scores["macro_f1"].value)


def test_rows_of_classes_are_never_packed_and_the_record_says_why(learned):
    record, _ = learned
    effective = record.environment["effective"]
    assert effective["batching"] == "padded"
    assert "packed rows are one row" in effective["batching_fallback"]


def test_what_was_saved_is_the_same_model_again(learned):
    _, run_dir = learned
    assert reload_check.compare_losses(run_dir) == reload_check.EQUAL


def test_merging_changes_rounding_alone(learned):
    record, _ = learned
    assert record.environment["effective"]["merge"].startswith("merged")
    assert record.metrics["merge_max_abs_difference"] < 1e-3


def test_the_report_shows_the_scores(learned, left_bench, tmp_path):
    _, run_dir = learned
    assert left_bench("report", str(run_dir.parent), "--out", str(tmp_path)).code == 0
    (report,) = tmp_path.glob("*.md")
    text = report.read_text(encoding="utf-8")
    assert all(name in text for name in ("accuracy", "macro-F1", "Matthews", "eval loss"))
    assert "output_head" not in text  # there is none to be asked for


def test_the_merged_export_is_the_trained_model_for_transformers(learned, left_bench, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    record, run_dir = learned
    done = left_bench("export", str(run_dir), "--to", "merged", str(tmp_path / "model"))
    assert done.code == 0, done.err
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    lines = [json.loads(line) for line in (run_dir / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    for sample, line in zip(record.samples, lines, strict=False):
        with torch.no_grad():
            answer = model(**tokenizer(sample.prompt, return_tensors="pt")).logits.argmax(-1).item()
        assert model.config.id2label[answer] == line["prediction"] == sample.prediction
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "text-classification" in card and "macro_f1" in card


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("chat", "--prompt", "hello"), "it writes nothing, and so answers no question"),
        (("export", "--to", "gguf", "OUT", "--llama-cpp", "LLAMA"), "--to gguf is for decoders"),
    ],
)
def test_what_wants_a_model_that_writes_is_refused_in_one_sentence(command, words, learned, left_bench, tmp_path):
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "convert_hf_to_gguf.py").touch()
    given = [{"OUT": str(tmp_path / "out"), "LLAMA": str(tmp_path / "llama")}.get(word, word) for word in command]
    done = left_bench(given[0], str(learned[1]), *given[1:])
    assert done.code == 2
    assert words in done.err and len(done.err.strip().splitlines()) == 1


def test_the_best_cell_of_a_folder_is_told(learned, left_bench):
    record, run_dir = learned
    done = left_bench("best", str(run_dir.parent))
    assert done.code == 0, done.err
    assert record.cell_id in done.out


def test_a_plan_says_what_it_counts_and_what_it_does_not(left_bench, file):
    done = left_bench("plan", *BERT, f"data.path={file}", *FEW, "precision=fp32", "hardware=cpu", "--json")
    (planned,) = json.loads(done.out)
    assert planned["weights_bytes"] > 500_000
    assert planned["trainable_params"] > 0
    assert "only a decoder's supervised fine-tuning is followed" in json.dumps(planned)


def test_rows_are_shown_before_a_run(left_bench, file):
    done = left_bench("data", *BERT, f"data.path={file}", *FEW, "precision=fp32", "hardware=cpu", "--json")
    assert done.code == 0, done.err
    (told,) = [json.loads(done.out)] if isinstance(json.loads(done.out), dict) else json.loads(done.out)
    assert told["classes"] == list(NAMES)
    assert {row["answer"] for row in told["read"]} <= set(NAMES) and told["read"][0]["tokens"] > 5
    shown = left_bench("data", *BERT, f"data.path={file}", *FEW, "precision=fp32", "hardware=cpu").out
    assert "3 classes: cold, mild, warm" in shown and f"→ {told['read'][0]['answer']}" in shown


def test_what_a_launch_will_take_is_estimated(tiny_cell, file):
    from left_bench.launch.estimate.arithmetic import seconds_of
    from left_bench.launch.estimate.calibrate import count_rows, measure

    cell = tiny_cell(*BERT, f"data.path={file}")
    splits, reader, folder = splits_of(cell)
    rows = count_rows(cell, splits, reader)
    assert [row.prompt for row in rows.train] == [row.length for row in splits.train]
    rates = measure(cell, splits, reader, folder=folder, seconds=0.2)
    seconds = seconds_of(cell, rates, rows)
    assert seconds["train"] > 0 and seconds["evaluate"] > 0 and "evaluate_base" not in seconds


# --- which method serves which task ---


def test_the_table_of_methods_says_what_the_rules_say(left_bench):
    done = left_bench("list", "methods", "--json")
    served = {line["option"]: line["tasks"] for line in json.loads(done.out)}
    with_example = [name for name, task in TASKS.items() if task.example is not None]
    assert served["lora"] == dict.fromkeys(with_example, None)
    assert "virtual tokens" in served["prompt_tuning"]["image_classification"]
    assert "no biases" in served["bitfit"]["causal_lm"] or "layers have none" in served["bitfit"]["causal_lm"]
    assert served["bitfit"]["sequence_classification"] is None
    shown = left_bench("list", "methods").out.splitlines()
    assert shown[1].split() == sorted(with_example)
    row = next(line.split("  ") for line in shown if line.strip().startswith("bitfit"))
    assert [cell.strip()[:2] for cell in row if cell.strip()][1] == "no"


def test_a_wheels_rows_are_fetched_once_and_read(tiny_cell, tmp_path, monkeypatch):
    senses = "".join(
        f'<word form="w{number}" pos="JJ" sense="of kind {number}" polarity="{number % 3 - 1}" subjectivity="0.5" />'
        for number in range(30)
    )
    fetched = []

    def download(requirement, sha256, into, *, key, instead):
        fetched.append((requirement, sha256))
        with zipfile.ZipFile(into / "textblob.whl", "w") as wheel:
            wheel.writestr(
                "textblob/en/en-sentiment.xml", f'<sentiment><word form="w" polarity="0.1" />{senses}</sentiment>'
            )
        return into / "textblob.whl"

    monkeypatch.setattr("left_bench.data.published.download_wheel", download)
    monkeypatch.setattr("left_bench.data.published.cache_dir", lambda: tmp_path)
    cell = tiny_cell("model=tiny_bert", "data=sense_feelings", "training.max_length=64")
    splits, again = (splits_of(cell)[0] for _ in range(2))
    assert splits.fingerprint == again.fingerprint and len(fetched) == 1
    assert splits.classes == ["negative", "neutral", "positive"]
    assert splits.train[0].prompt.startswith("w") and ": of kind " in splits.train[0].prompt
    for row in splits.train:
        assert splits.classes.index(row.reference) == int(row.prompt.split()[-1]) % 3
    assert [path.name for path in (tmp_path / "data" / "published").iterdir()] == ["f957699169a3e7b9-en-sentiment.xml"]
    with pytest.raises(UserError, match=r"data\.task='word_sense': no wheel.*did you mean 'word_senses'"):
        splits_of(tiny_cell("model=tiny_bert", "data=sense_feelings", "data.task=word_sense", "training.max_length=64"))

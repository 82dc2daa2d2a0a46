"""The result in your hands: the cell to take, its model as a folder, a chat with it, its recipe on all rows."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from recorded.build import make_record, write_runs
from recorded.build import peft as method
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from left_bench.evaluation.evaluate import end_tokens, greedy_answers
from left_bench.evaluation.merge_check import answer_logits
from left_bench.grid import command_line
from left_bench.grid.rules import why_unsupported
from left_bench.methods import attach
from left_bench.methods.data_init import START_NAME
from left_bench.model import load as models
from left_bench.report.cells import row_of
from left_bench.report.recommend import recommend
from left_bench.spec.record import Record, read_record
from left_bench.spec.run_files import ADAPTER_NAME, CELL_NAME, ROWS_NAME
from left_bench.worker.adapter_readme import write_readme

RECORDED = Path(__file__).parent / "recorded"


@pytest.fixture(autouse=True)
def loud_again():
    """The commands silence libraries for the rest of their process, which is pytest's here."""
    with warnings.catch_warnings():
        yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def finished(tiny_cell, work_in_process, tmp_path_factory):
    """`finished(*overrides)`: the folder of a finished run, as a launch leaves it."""
    runs = tmp_path_factory.mktemp("finished") / "runs"
    done: dict[tuple[str, ...], Path] = {}

    def finished(*overrides: str) -> Path:
        if overrides in done:
            return done[overrides]
        cell = tiny_cell(*overrides, "training.steps=6", "training.learning_rate=0.01")
        result = work_in_process(cell)
        folder = shutil.copytree(result.pop("run_dir"), runs / cell.id)
        (folder / CELL_NAME).write_text(cell.model_dump_json(by_alias=True))
        record = Record(
            cell_id=cell.id,
            status="ok",
            started_at="2026-01-01T00:00:00+00:00",
            finished_at="2026-01-01T00:01:00+00:00",
            choices=cell.choices,
            config=cell.sections(),
            **result,
        )
        record.write(folder)
        done[overrides] = folder
        return folder

    return finished


def blocks_of_readme(folder: Path) -> list[str]:
    return [part.partition("```")[0] for part in (folder / "README.md").read_text().split("```python\n")[1:]]


def run_readme(folder: Path, *, asking: bool = False) -> dict:
    """What the code in a folder's README leaves, run as it is printed; `said` is what it printed."""
    loading, ask = blocks_of_readme(folder)
    names: dict = {}
    with contextlib.chdir(folder) if sys.version_info >= (3, 11) else _chdir(folder):
        exec(compile(loading, "README", "exec"), names)  # noqa: S102 - our own README, and this is the test of it
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            if asking:
                exec(compile(ask, "README", "exec"), names)  # noqa: S102
    return names | {"said": said.getvalue()}


@contextlib.contextmanager
def _chdir(folder: Path):
    before = Path.cwd()
    os.chdir(folder)
    yield
    os.chdir(before)


def rows_and_logits(cell, model):
    folder, tokenizer = models.open_pretrained(cell)
    rows = models.load_rows_of(cell, tokenizer, folder=folder).test[:4]
    return answer_logits(model, rows, cell, pad_id=0, device="cpu")


# --- best ---


def test_best_is_the_reports_recommendation(left_bench, tmp_path):
    bounds = ["--name", "peft_methods", "--budget-memory", "64GiB"]
    folder = str(RECORDED / "methods")
    answer = left_bench("best", folder, *bounds)
    assert answer.code == 0, answer
    reported = left_bench("report", folder, *bounds, "--out", str(tmp_path)).out.splitlines()[0]
    assert reported.startswith("peft_methods: Take ")
    assert f"why:    {reported.removeprefix('peft_methods: ')}\n" in answer.out
    lines = dict(line.split(maxsplit=1) for line in answer.out.splitlines() if ": " in line)
    run_dir = Path(lines["folder:"].split(" (")[0])
    assert read_record(run_dir / "record.json").cell_id == lines["cell:"]
    assert f"  left-bench export {run_dir} --to merged my_model\n" in answer.out


def test_best_goes_by_the_score_that_is_asked_for(left_bench, tmp_path):
    right = make_record(changes=method("lora"), exact_match=0.9, eval_loss=0.9)
    likely = make_record(changes=method("ia3"), exact_match=0.1, eval_loss=0.1)
    write_runs(tmp_path, [right, likely])
    assert f"cell:   {right.cell_id}" in left_bench("best", str(tmp_path)).out
    assert f"cell:   {likely.cell_id}" in left_bench("best", str(tmp_path), "--metric", "eval-loss").out


def test_best_says_by_how_much_nothing_fits(left_bench, tmp_path):
    write_runs(tmp_path, [make_record(changes=method("lora"), peak_mib=900)])
    answer = left_bench("best", str(tmp_path), "--budget-memory", "1MiB")
    assert answer.code == 1
    assert "No cell fits" in answer.out and "900 MiB" in answer.out


def test_of_several_seeds_the_first_is_named_and_not_the_luckiest(left_bench, tmp_path):
    records = [make_record(changes=method("lora") | {"seed": seed}, exact_match=0.4 + seed / 10) for seed in (0, 1, 2)]
    write_runs(tmp_path, records)
    answer = left_bench("best", str(tmp_path))
    assert f"cell:   {records[0].cell_id}" in answer.out
    assert "exact match 0.500 ±" in answer.out and "the mean of 3 seeds; the cell is seed 0" in answer.out


# --- the adapter's folder ---


def tried_with_plain_peft(name: str) -> bool:
    return name not in ("custom", "full")


@pytest.mark.parametrize("name", [name for name in command_line.options("peft") if tried_with_plain_peft(name)])
def test_an_adapters_readme_loads_it_as_it_was(name, tiny_cell, load_tiny, tmp_path):
    """By plain peft, for every method that peft has; the others say in their README what loads them."""
    steps = "training.steps=40" if name == "adalora" else "training.steps=2"
    model = "model=tiny_opt" if name == "bitfit" else "model=tiny_llama"  # its layers have biases
    cell = tiny_cell(model, f"peft={name}", steps)
    if (refusal := why_unsupported(cell)) is not None:
        pytest.skip(refusal)
    folder, tokenizer = models.open_pretrained(cell)
    rows = models.load_rows_of(cell, tokenizer, folder=folder)
    base, _ = load_tiny(cell)
    model = attach.attach_adapter(base, cell, tokenizer=tokenizer, rows=rows.train)
    torch.manual_seed(1)
    for parameter in attach.trainable_parameters(model):
        parameter.data += 0.02 * torch.randn_like(parameter)
    attach.save_trained(model, tmp_path, tokenizer=tokenizer)
    write_readme(tmp_path, cell, base=folder, tokenizer=tokenizer, ends=end_tokens(base, tokenizer))
    names = run_readme(tmp_path, asking=name in ("lora", "poly", "multitask_prompt_tuning"))
    again = names["model"]
    assert isinstance(again, peft.PeftModel) or not cell.peft.target.startswith("peft.")
    ours = not cell.peft.target.startswith("peft.") or (tmp_path / START_NAME).is_file()
    assert ("load_trained" in blocks_of_readme(tmp_path)[0]) is ours
    if not ours:
        attach._use_one_task(again)  # what `task_ids` does in a call of the user's own
    torch.testing.assert_close(rows_and_logits(cell, again), rows_and_logits(cell, model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "lora_ga", "corda"])
def test_an_exported_adapter_is_plain_pefts(name, finished, tiny_cell, load_tiny, left_bench, tmp_path):
    run_dir = finished(f"peft={name}")
    out = tmp_path / "out"
    answer = left_bench("export", str(run_dir), "--to", "adapter", str(out))
    assert answer.code == 0, answer
    assert not (out / START_NAME).exists()
    cell = json.loads((run_dir / CELL_NAME).read_text())
    base, _ = load_tiny(tiny_cell(f"peft={name}"))
    plain = peft.PeftModel.from_pretrained(base, out).eval()
    trained = attach.load_trained(load_tiny(tiny_cell(f"peft={name}"))[0], run_dir / ADAPTER_NAME).eval()
    wanted = rows_and_logits(tiny_cell(f"peft={name}"), trained)
    torch.testing.assert_close(rows_and_logits(tiny_cell(f"peft={name}"), plain), wanted, rtol=1e-4, atol=1e-5)
    assert len(AutoTokenizer.from_pretrained(out)) > 100
    assert "model-index" not in (out / "README.md").read_text()  # random weights have no scores
    assert cell["peft"]["name"] in (out / "README.md").read_text()
    assert "PeftModel.from_pretrained" in blocks_of_readme(out)[0]


def test_full_fine_tuning_leaves_a_model_and_says_so(finished, left_bench, tmp_path):
    run_dir = finished("peft=full")
    names = run_readme(run_dir / ADAPTER_NAME, asking=True)
    ids = names["tokenizer"]("12", add_special_tokens=False)["input_ids"]
    assert len(ids) == 2 and names["model"](torch.tensor([ids])).logits.shape[:2] == (1, 2)
    refused = left_bench("export", str(run_dir), "--to", "adapter", str(tmp_path / "out"))
    assert refused.code == 2 and "take --to merged" in refused.err
    assert left_bench("export", str(run_dir), "--to", "merged", str(tmp_path / "out")).code == 0
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    trained = names["model"].state_dict()
    assert all(torch.equal(saved[name], trained[name]) for name in trained)


# --- merged ---


@pytest.mark.parametrize("overrides", [("peft=lora",), ("peft=qlora",), ("quantization=nf5", "peft=lora")])
def test_a_merged_folder_is_a_plain_model_with_the_trained_models_logits(overrides, finished, tiny_cell, left_bench,
                                                                         tmp_path):  # fmt: skip
    run_dir = finished(*overrides)
    out = tmp_path / "out"
    answer = left_bench("export", str(run_dir), "--to", "merged", str(out))
    assert answer.code == 0, answer
    assert "its logits differ from the trained model's by at most" in answer.out
    model, result = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(result.values()) and not hasattr(model.config, "quantization_config")
    cell = tiny_cell(*overrides)
    folder, tokenizer = models.open_pretrained(cell)
    base, _ = models.load_model(cell, folder=folder, device="cpu")
    trained = attach.load_trained(base, run_dir / ADAPTER_NAME).eval()
    merged = rows_and_logits(cell.without_adapter(), model.eval())
    torch.testing.assert_close(merged, rows_and_logits(cell, trained), rtol=1e-3, atol=1e-4)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == tokenizer.get_vocab()
    ends = GenerationConfig.from_pretrained(out).eos_token_id
    assert set(ends if isinstance(ends, list) else [ends]) == end_tokens(model, tokenizer)
    assert (out / "README.md").read_text().startswith("---\n")
    assert "library_name: transformers" in (out / "README.md").read_text()
    run_readme(out, asking=True)


def test_a_merge_that_is_another_model_is_not_written(finished, left_bench, tmp_path, monkeypatch):
    from left_bench.evaluation import merge_check

    fold_in = merge_check.fold_in

    def fold_in_wrongly(model):
        merged = fold_in(model)
        merged.get_output_embeddings().weight.data *= 1.01
        return merged

    monkeypatch.setattr("left_bench.evaluation.merge_check.fold_in", fold_in_wrongly)
    answer = left_bench("export", str(finished("peft=lora")), "--to", "merged", str(tmp_path / "out"))
    assert answer.code == 1
    assert "not written" in answer.err and "float32" in answer.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [(["peft=prompt_tuning"], "virtual tokens are no weights"), (["peft=houlsby"], "cannot be merged")],
)
def test_what_has_no_merge_says_so_and_leaves_nothing(overrides, words, finished, left_bench, tmp_path):
    answer = left_bench("export", str(finished(*overrides)), "--to", "merged", str(tmp_path / "out"))
    assert answer.code == 2 and words in answer.err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_replaced_only_when_told(finished, left_bench, tmp_path):
    run_dir, out = finished("peft=lora"), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "model-00001-of-00002.safetensors").write_text("an earlier export's")
    refused = left_bench("export", str(run_dir), "--to", "adapter", str(out))
    assert refused.code == 2 and "is not empty" in refused.err and len(list(out.iterdir())) == 2
    assert left_bench("export", str(run_dir), "--to", "adapter", str(out), "--force").code == 0
    assert (out / "notes.txt").read_text() == "mine" and not list(out.glob("model-*"))
    for inside in (run_dir, run_dir / ADAPTER_NAME, run_dir.parent):
        assert (
            "the run itself lies there"
            in left_bench("export", str(run_dir), "--to", "adapter", str(inside), "--force").err
        )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_where_the_rows_are_gone_general_text_is_compared(finished, left_bench, tmp_path, monkeypatch):
    from left_bench.core.errors import UserError

    def gone(*_, **__):
        raise UserError("data.path=rows.jsonl: there is no such file")

    monkeypatch.setattr("left_bench.model.load.load_rows_of", gone)
    answer = left_bench("export", str(finished("peft=lora")), "--to", "merged", str(tmp_path / "out"))
    assert answer.code == 0 and "on passages of general text" in answer.out


# --- gguf, the hub ---


def test_gguf_is_llama_cpps_converter_run_on_the_merged_model(finished, left_bench, tmp_path):
    run_dir = finished("peft=lora")
    refused = left_bench("export", str(run_dir), "--to", "gguf", str(tmp_path / "out"))
    assert refused.code == 2
    assert all(word in refused.err for word in ("convert_hf_to_gguf.py", "llama-quantize", "--llama-cpp"))
    source = tmp_path / "llama.cpp"
    source.mkdir()
    converter = source / "convert_hf_to_gguf.py"
    converter.write_text(
        "import json, sys\nfrom pathlib import Path\nfolder, out = Path(sys.argv[1]), Path(sys.argv[3])\n"
        "assert sys.argv[2] == '--outfile' and (folder / 'model.safetensors').is_file()\n"
        "out.write_text(json.loads((folder / 'config.json').read_text())['model_type'])\n"
    )
    done = left_bench("export", str(run_dir), "--to", "gguf", str(tmp_path / "out"), "--llama-cpp", str(source))
    assert done.code == 0, done
    assert (tmp_path / "out" / "model.gguf").read_text() == "llama"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "model.gguf"]
    converter.write_text("raise SystemExit('Model LlamaForCausalLM is not supported')")
    failed = left_bench("export", str(run_dir), "--to", "gguf", str(tmp_path / "no"), "--llama-cpp", str(source))
    assert failed.code == 2 and "is not supported" in failed.err and not (tmp_path / "no").exists()


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("LLAMA_CPP"), reason="LLAMA_CPP names no folder of llama.cpp's source")
def test_gguf_of_the_default_model_is_the_trained_model(left_bench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ["peft=lora", "training.steps=2", "data.test_rows=4", "data.train_rows=16", "tracker=none"]
    assert left_bench(*common, "eval.generate=false", "eval.forgetting=false", "precision=fp32").code == 0
    [run_dir] = [path.parent for path in tmp_path.glob("runs/*/record.json")]
    for kind in ("merged", "gguf"):
        answer = left_bench("export", str(run_dir), "--to", kind, kind, "--llama-cpp", os.environ["LLAMA_CPP"])
        assert answer.code == 0, answer
    merged = AutoModelForCausalLM.from_pretrained("merged")
    converted = AutoModelForCausalLM.from_pretrained("gguf", gguf_file="model.gguf", dtype=torch.float32)
    ids = torch.tensor([[1, 43, 7, 99]])
    torch.testing.assert_close(converted(ids).logits, merged(ids).logits, rtol=0.02, atol=0.2)


class FakeHub:
    calls: list[tuple[str, dict]] = []  # noqa: RUF012 - the test's own, emptied by it

    def create_repo(self, **named):
        self.calls.append(("create_repo", named))

    def upload_folder(self, **named):
        files = sorted(path.name for path in Path(named["folder_path"]).iterdir())
        self.calls.append(("upload_folder", named | {"files": files}))


def test_push_uploads_the_folder_with_its_card_and_sees_no_token(finished, left_bench, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setenv("HF_TOKEN", "hf_a_secret_of_some_length")
    FakeHub.calls.clear()
    command = ["export", str(finished("peft=lora")), "--to", "merged", str(tmp_path / "out"), "--push", "me/sums"]
    answer = left_bench(*command)
    assert answer.code == 0, answer
    (_, made), (_, sent) = FakeHub.calls
    assert made == {"repo_id": "me/sums", "private": True, "exist_ok": True}
    assert sent["repo_id"] == "me/sums" and {"README.md", "model.safetensors", "config.json"} <= set(sent["files"])
    everything = answer.out + answer.err + repr(FakeHub.calls) + (tmp_path / "out" / "README.md").read_text()
    assert "hf_a_secret" not in everything

    def refuse(self, **_):
        raise OSError("401 for url with hf_a_secret_of_some_length")

    monkeypatch.setattr(FakeHub, "create_repo", refuse)
    refused = left_bench(*command, "--force")
    assert refused.code == 2 and "hf auth login" in refused.err and "hf_a_secret" not in refused.err


def test_an_adapter_whose_base_is_not_on_the_hub_is_not_pushed(finished, left_bench, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", SimpleNamespace)  # would fail when called
    answer = left_bench(
        "export", str(finished("peft=lora")), "--to", "adapter", str(tmp_path / "out"), "--push", "me/sums"
    )
    assert answer.code == 2 and "is not on the hub" in answer.err and not (tmp_path / "out").exists()


# --- chat ---


@pytest.mark.parametrize("name", ["lora", "lora_ga", "prompt_tuning", "full", "houlsby"])
def test_chat_answers_as_both_models_were_evaluated(name, finished, tiny_cell, load_tiny, left_bench):
    run_dir = finished(f"peft={name}")
    cell = tiny_cell(f"peft={name}")
    base, tokenizer = load_tiny(cell)
    row = models.load_rows_of(cell, tokenizer, folder=models.open_pretrained(cell)[0]).test[0]
    [ids] = greedy_answers(base, tokenizer, [row], cell, device="cpu")
    recorded = json.loads((run_dir / ROWS_NAME).read_text().splitlines()[0])
    answer = left_bench("chat", str(run_dir), "--prompt", row.prompt)
    assert answer.code == 0, answer

    def shown(text: str) -> str:
        from left_bench.report.values import clean

        return clean(text).strip()

    of_base = shown(tokenizer.decode(ids, skip_special_tokens=True))
    assert answer.out == f"base:    {of_base}\nadapted: {shown(recorded['prediction'])}\n"
    assert left_bench("chat", str(run_dir), "--prompt", row.prompt, "--only", "base").out == f"{of_base}\n"


def test_chat_reads_questions_from_a_pipe_until_exit(finished, left_bench, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 1 + 1?\n\nWhat is 2 + 2?\nexit\nWhat is 3 + 3?\n"))
    answer = left_bench("chat", str(finished("peft=lora")), "--only", "adapted", "--max-new-tokens", "2")
    assert answer.code == 0 and answer.out.count("\n") >= 2
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 1 + 1?\n"))
    drawn = left_bench("chat", str(finished("peft=lora")), "--conversation", "--temperature", "1")
    assert drawn.code == 0 and drawn.out.startswith("base: ") and "\nadapted: " in drawn.out


def test_a_question_is_put_as_rows_are(tiny_cell, load_tiny):
    from left_bench.data import prompt_of

    cell = tiny_cell("data.template='Sum: {prompt}'", "data.instruction='Be brief.'")
    _, tokenizer = load_tiny(cell)
    row = models.load_rows_of(cell, tokenizer, folder=models.open_pretrained(cell)[0]).test[0]
    assert row.prompt.startswith("Sum: ")
    assert prompt_of(row.prompt.removeprefix("Sum: "), cell.data, tokenizer) == row.prompt_ids


# --- which cell ---


def test_a_models_own_code_runs_only_where_the_command_line_says_so(finished, left_bench, tmp_path):
    run_dir = shutil.copytree(finished("peft=lora"), tmp_path / "run")
    cell = json.loads((run_dir / CELL_NAME).read_text())
    cell["model"]["trust_remote_code"] = True
    (run_dir / CELL_NAME).write_text(json.dumps(cell))
    for command in (["chat", str(run_dir), "--prompt", "?"], ["train", str(run_dir), "--all-rows"],
                    ["export", str(run_dir), "--to", "merged", str(tmp_path / "out")]):  # fmt: skip
        answer = left_bench(*command)
        assert answer.code == 2 and "--trust-remote-code" in answer.err


def test_an_adapter_over_other_weights_than_it_was_trained_on_is_refused(finished, left_bench, tmp_path):
    run_dir = shutil.copytree(finished("peft=lora"), tmp_path / "run")
    merged = tmp_path / "base"
    assert left_bench("export", str(run_dir), "--to", "merged", str(merged)).code == 0
    cell = json.loads((run_dir / CELL_NAME).read_text())
    cell["model"] |= {"weights": "pretrained", "config": None, "name_or_path": str(merged), "content": "0" * 64}
    (run_dir / CELL_NAME).write_text(json.dumps(cell))
    answer = left_bench("chat", str(run_dir), "--prompt", "?")
    assert answer.code == 2 and "are others than those it was trained on" in answer.err


def test_a_cell_without_its_weights_is_no_model(finished, left_bench, tmp_path):
    run_dir = shutil.copytree(finished("peft=lora"), tmp_path / "run")
    shutil.rmtree(run_dir / ADAPTER_NAME)
    answer = left_bench("export", str(run_dir), "--to", "merged", str(tmp_path / "out"))
    assert answer.code == 2 and "holds no weights" in answer.err


# --- train ---


def test_a_recipe_on_all_rows_is_scored_nowhere_and_ranked_nowhere(finished, left_bench, tmp_path, monkeypatch):
    run_dir = finished("peft=lora")
    monkeypatch.chdir(tmp_path)
    answer = left_bench("train", str(run_dir), "--all-rows", "--steps", "2")
    assert answer.code == 0, answer
    [path] = tmp_path.glob("trained/*/record.json")
    record = read_record(path)
    assert record.metrics["train_rows"] == 12 and record.metrics["test_rows"] == 0  # 8 and 4 before
    assert record.metrics["train_steps"] == 2
    assert "no rows" in record.environment["effective"]["held_out"] and record.config["data"]["hold_out"] is False
    assert record.scores == [] and record.samples == [] and not (path.parent / ROWS_NAME).exists()
    assert not {"eval_loss", "exact_match", "base_eval_loss"} & record.metrics.keys()
    assert record.metrics["merge_max_abs_difference"] < 1e-4
    assert record.provenance["command"] == f"left-bench train {run_dir} --all-rows --steps 2"
    beside = [row_of(record), row_of(make_record(changes=method("lora"), exact_match=0.01, eval_loss=9.0))]
    chosen = recommend(beside)
    assert chosen is not None and chosen.chosen is beside[1] and list(chosen.fitting) == [beside[1]]
    assert left_bench("chat", str(path.parent), "--prompt", "What is 1 + 1?").code == 0


def test_train_refuses_what_would_be_the_same_run_or_the_same_folder(finished, left_bench):
    run_dir = finished("peft=lora")
    assert "--all-rows, --steps N or both" in left_bench("train", str(run_dir)).err
    same = left_bench("train", str(run_dir), "--all-rows", "--out", str(run_dir.parent))
    assert same.code == 2 and "the cells that are compared lie there" in same.err
    assert left_bench("train", str(run_dir), "--steps", "0").code == 2


def test_steps_take_a_methods_schedule_with_them(tiny_cell):
    from left_bench.cli.train import recipe_of

    cell = tiny_cell("peft=adalora", "training.steps=40")
    longer = recipe_of(cell, all_rows=False, steps=100)
    assert [longer.peft.config[name] for name in ("total_step", "tinit", "tfinal", "deltaT")] == [100, 20, 25, 5]
    assert longer.data == cell.data and longer.id != cell.id


def test_all_rows_are_those_of_the_test_file_too(compose_cell, tmp_path):
    from left_bench.data.rows import split_rows

    rows = [{"prompt": f"What is {number}?", "answer": str(number)} for number in range(10)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows[:7])))
    (tmp_path / "held_out.jsonl").write_text("\n".join(map(json.dumps, rows[5:])))
    chats = [
        [("user", name), ("assistant", "first"), ("user", f"and {name}?"), ("assistant", "second")] for name in "xyz"
    ]
    messages = [[{"role": role, "content": text} for role, text in chat] for chat in chats]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": turns}) for turns in messages))
    files = compose_cell("data=jsonl", f"data.path={tmp_path}/rows.jsonl", f"data.test_path={tmp_path}/held_out.jsonl")
    result = split_rows(files.data.model_copy(update={"hold_out": False}))
    assert len(result.train) == 12 and result.test == []
    chat = compose_cell("data=jsonl", f"data.path={tmp_path}/chat.jsonl", "data.test_rows=1").data
    apart, together = split_rows(chat), split_rows(chat.model_copy(update={"hold_out": False}))
    # the turns of a conversation that is held out are left out of training; now they are in it
    assert (len(apart.train), len(apart.test), len(together.train)) == (2, 1, 3)
    assert all(len(row.earlier) == 1 for row in together.train) and together.repeated == 0


def test_a_cell_of_a_comparison_has_held_out_rows(left_bench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = left_bench("data.hold_out=false", "tracker=none")
    assert answer.code == 2 and "left-bench train CELL --all-rows" in answer.err

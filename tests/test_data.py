from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from left_bench.core.errors import UserError
from left_bench.data import Example, collate, load_data, load_rows, split_passes, step_rows
from left_bench.data.rendering import fit
from left_bench.spec.cell import Data
from left_bench.spec.record import METRICS

ROOT = Path(__file__).resolve().parents[1]
CONF = sorted((ROOT / "conf" / "data").glob("*.yaml"))
LAMINI = ROOT.parent / "shared" / "data" / "lamini_docs.jsonl"
GENERATED = ["chain_sum", "family_relationships", "letter_counting", "gsm_symbolic"]

CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT_WITHOUT_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT
CHAT_DROPPING_SYSTEM = CHAT.replace("for m in messages", "for m in messages if m['role'] != 'system'")


def section(**changes: Any) -> Data:
    return Data(**{"name": "mine", "source": "jsonl", "test_rows": 2, **changes})


def option(name: str, **changes: Any) -> Data:
    plain = yaml.safe_load((ROOT / "conf" / "data" / f"{name}.yaml").read_text())
    return Data.model_validate({**plain, **changes})


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def numbered(n: int) -> list[dict[str, Any]]:
    return [{"prompt": f"question {i}", "answer": f"answer {i}"} for i in range(n)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LEFT_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def byte_tokenizer(*, chat_template: str | None = None, adds_bos: bool = True, eos: str | None = "</s>") -> Any:
    """A real tokenizer of single bytes: every text goes there and back."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", "<pad>")])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token="<pad>")
    tokenizer.chat_template = chat_template
    return tokenizer


# --- conf ---


@pytest.mark.parametrize("path", CONF, ids=lambda path: path.stem)
def test_every_option_is_a_valid_section(path: Path) -> None:
    text = path.read_text()
    plain = yaml.safe_load(text)
    for base in plain.pop("defaults", []):
        plain = yaml.safe_load((path.parent / f"{base}.yaml").read_text()) | plain
    data = Data.model_validate(plain)
    assert data.name == path.stem
    assert set(data.metrics) <= METRICS.keys()
    assert text.startswith("# ") and not text.splitlines()[1].startswith("#")


def test_there_are_the_options_promised() -> None:
    names = {path.stem for path in CONF}
    assert names >= {*GENERATED, "lamini_docs", "alpaca", "gsm8k", "dolly", "jsonl"}


# --- rows: generated ---


@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.parametrize("seed", [0, 1])
def test_generated_rows_are_as_many_as_asked_and_never_shared(name: str, seed: int) -> None:
    data = option(name, train_rows=300, test_rows=60, seed=seed)
    train, test = load_rows(data)
    questions = [row.prompt for row in train + test]
    assert (len(train), len(test)) == (300, 60)
    assert len(set(questions)) == 360
    assert all(row.answer for row in train + test)
    assert load_rows(data) == (train, test)


def test_neighbouring_seeds_draw_other_questions() -> None:
    drawn = [{row.prompt for row in chain(*load_rows(option("letter_counting", seed=seed)))} for seed in (0, 1)]
    assert len(drawn[0] & drawn[1]) < 10


def test_train_and_test_are_of_one_distribution() -> None:
    train, test = load_rows(option("chain_sum"))
    short = [
        sum(len(row.prompt.split(": ")[1]) == len("1 + 5 =") for row in rows) / len(rows) for rows in (train, test)
    ]
    assert 0.1 < short[0] < 0.9
    assert abs(short[0] - short[1]) < 0.1  # rare questions are found last: unshuffled, the test rows would be those


def test_an_exhausted_generator_says_how_many_there_are() -> None:
    config = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    with pytest.raises(UserError, match=r"data\.train_rows=5000: .* set data\.train_rows=\d+") as raised:
        load_rows(option("chain_sum", train_rows=5000, config=config))
    most = int(str(raised.value).split("set data.train_rows=")[1].split()[0])
    train, test = load_rows(option("chain_sum", train_rows=most, config=config))
    assert (len(train), len(test)) == (most, 128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "chain_sun"}, r"data\.task='chain_sun'.*did you mean 'chain_sum'"),
        ({"task": None}, r"data\.task is missing"),
        ({"train_rows": None}, r"data\.train_rows=null"),
        ({"config": {"min_term": 2}}, r"data\.config\.min_term: .*did you mean 'min_terms'"),
        ({"config": {"seed": 2}}, r"data\.config\.seed: .*use data\.seed"),
        ({"config": {"min_terms": 0}}, r"data\.config=.*min_terms must be positive"),
        ({"prompt_column": "questoin"}, r"data\.prompt_column='questoin'.*did you mean 'question'"),
    ],
)
def test_generator_errors_name_key_and_mend(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_rows(option("chain_sum", **changes))


# --- rows: files ---


def test_a_file_is_read_with_the_standard_library_alone(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", numbered(10))
    code = (
        "import sys; from left_bench.spec.cell import Data; from left_bench.data import load_rows;"
        f"load_rows(Data(name='x', source='jsonl', path={path!r}, test_rows=2));"
        "print([m for m in ('torch', 'transformers', 'datasets', 'numpy', 'reasoning_gym') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@settings(max_examples=50)
@given(
    questions=st.lists(st.integers(0, 12), min_size=1, max_size=40),
    test_rows=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_question_is_on_both_sides(
    tmp_path_factory: pytest.TempPathFactory, questions: list[int], test_rows: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"prompt": f"q{q}{' ' * (i % 3)}?", "answer": f"{i}"} for i, q in enumerate(questions)]
    data = section(path=jsonl(folder / "rows.jsonl", rows), test_rows=test_rows, seed=seed)
    different = len({" ".join(row["prompt"].split()) for row in rows})
    if different <= test_rows:
        with pytest.raises(UserError):
            load_rows(data)
        return
    train, test = load_rows(data)
    asked, held = ({" ".join(row.prompt.split()) for row in part} for part in (train, test))
    assert train and not asked & held
    assert len(test) == len(held) == test_rows
    assert asked | held == {" ".join(row["prompt"].split()) for row in rows}
    assert {row.answer for row in train} == {r["answer"] for r in rows if " ".join(r["prompt"].split()) not in held}


def test_seed_changes_the_split_and_train_rows_does_not(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", numbered(50))
    whole = load_rows(section(path=path, test_rows=10))
    assert load_rows(section(path=path, test_rows=10)) == whole
    assert load_rows(section(path=path, test_rows=10, train_rows=5)) == (whole[0][:5], whole[1])
    assert load_rows(section(path=path, test_rows=10, seed=1))[1] != whole[1]


def test_columns_template_numbers_and_blank_answers(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"q": " What? ", "context": "", "a": 4},
        {"q": "Who {x}?", "context": "A\u2028text", "a": " Ann "},
        {"q": "Why?", "context": None, "a": True},
        {"q": "Blank?", "context": "", "a": "  "},
        {"q": "Null?", "context": "", "a": None},
    ]
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\ufeff" + "\r\n\n".join(lines), encoding="utf-8")  # a mark, blank lines, no last line end
    data = section(path=str(path), prompt_column="q", answer_column="a", template="{prompt}\n{context}", test_rows=1)
    train, test = load_rows(data)
    assert {(row.prompt, row.answer) for row in train + test} == {
        ("What?", "4"),
        ("Who {x}?\nA\u2028text", " Ann"),
        ("Why?", "true"),
    }


def test_a_path_takes_the_place_of_any_source(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"question": f"q{i}", "answer": "a"} for i in range(5)])
    for name in ("chain_sum", "lamini_docs"):
        train, test = load_rows(option(name, path=path, train_rows=None, test_rows=2))
        assert (len(train), len(test)) == (3, 2)


GOOD = '{"prompt": "p", "answer": "a"}\n'


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (b"", {}, r"rows\.jsonl: is empty"),
        (b"\n\n", {}, r"rows\.jsonl: is empty"),
        (GOOD + "{oops}\n", {}, r"line 2 is not JSON"),
        (GOOD + "\n[1, 2]\n", {}, r"line 3 is a list, not an object"),
        ("[" * 100_000, {}, r"line 1 is not JSON"),
        (GOOD.encode() + b'{"prompt": "caf\xe9", "answer": "a"}\n', {}, r"line 2 is not UTF-8"),
        (GOOD.encode("utf-16"), {}, r"line 1 is not UTF-8"),
        (GOOD + '{"promt": "p", "answer": "a"}\n', {}, r"data\.prompt_column='prompt'.*line 2.*did you mean 'promt'"),
        (GOOD, {"answer_column": "answr"}, r"data\.answer_column='answr'.*prompt, answer; did you mean 'answer'"),
        (GOOD, {"template": "{prompt} {inptu}"}, r"data\.template=.*'\{inptu\}' is not a column"),
        (GOOD, {"template": "{prompt"}, r"data\.template=.*brace"),
        (GOOD, {"template": "{prompt.__class__}"}, r"data\.template=.*is not a column"),
        (GOOD, {"template": "{prompt:>9}"}, r"data\.template=.*column's name"),
        (GOOD, {"template": "hello"}, r"data\.template=.*no placeholder"),
        ('{"prompt": ["p"], "answer": "a"}\n', {}, r"line 1 .*column 'prompt' holds a list, not text"),
        ('{"prompt": "p", "answer": {"x": 1}}\n', {}, r"column 'answer' holds an object, not text"),
        ('{"prompt": "p", "answer": "\\ud800"}\n', {}, r"line 1 .*surrogate"),
        ('{"prompt": "p", "answer": " "}\n', {}, r"data\.answer_column='answer': none of the 1 rows"),
        (GOOD, {}, r"one question with an answer"),
        (GOOD + GOOD.replace('"p"', '"s"'), {"test_rows": 9}, r"data\.test_rows=9: .*rows\.jsonl.*data\.test_rows=1"),
        (GOOD + GOOD.replace('"p"', '"s"'), {"test_rows": 1, "train_rows": 3}, r"data\.train_rows=3: .*null for all"),
    ],
)
def test_file_errors_name_key_file_and_mend(
    tmp_path: Path, content: str | bytes, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=message) as raised:
        load_rows(section(path=str(path), **changes))
    assert "\n" not in str(raised.value)


def test_too_few_rows_says_how_low_test_rows_must_be(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", numbered(5))
    with pytest.raises(UserError, match=r"set data\.test_rows=4 or lower"):
        load_rows(section(path=path, test_rows=5))
    assert len(load_rows(section(path=path, test_rows=4))[0]) == 1


def test_path_errors(tmp_path: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", numbered(5))
    with pytest.raises(UserError, match=r"data\.path is missing"):
        load_rows(option("jsonl"))
    with pytest.raises(UserError, match=r"no such file; did you mean 'rows\.jsonl'"):
        load_rows(section(path=str(tmp_path / "row.jsonl")))
    with pytest.raises(UserError, match=r"no such file"):
        load_rows(section(path=str(tmp_path / "nowhere" / "row.jsonl")))
    with pytest.raises(UserError, match=r"is a folder; .*rows\.jsonl"):
        load_rows(section(path=str(tmp_path)))


# --- rows: the hub ---


def test_the_hub_out_of_reach_points_at_a_local_file(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"data\.hub_id=nobody/nothing: .*data\.path="):
        load_rows(section(source="hub", hub_id="nobody/nothing"))


def test_a_hub_dataset_goes_through_the_same_checks(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    jsonl(folder / "train.jsonl", numbered(9))
    hub = {"source": "hub", "hub_id": str(folder), "config": {"cache_dir": str(tmp_path / "hf")}}
    train, test = load_rows(section(**hub))
    assert (len(train), len(test)) == (7, 2)
    assert {row.prompt for row in train + test} == {f"question {i}" for i in range(9)}
    with pytest.raises(UserError, match=r"data\.answer_column='anser'.*did you mean 'answer'"):
        load_rows(section(**hub, answer_column="anser"))
    with pytest.raises(UserError, match=r"data\.config="):
        load_rows(section(**{**hub, "config": {**hub["config"], "split": "dev"}}))
    with pytest.raises(UserError, match=r"data\.hub_id is missing"):
        load_rows(section(source="hub"))


# --- tokens ---


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (CHAT, "<s><system>Be brief.\n<user>{}\n<assistant>"),
        (CHAT_WITHOUT_SYSTEM, "<s><user>Be brief.\n\n{}\n<assistant>"),
        (CHAT_DROPPING_SYSTEM, "<s><user>Be brief.\n\n{}\n<assistant>"),
        (None, "<s>Be brief.\n{}\n"),
    ],
)
def test_prompts_are_rendered_as_the_model_knows_them(tmp_path: Path, template: str | None, prompt: str) -> None:
    tokenizer = byte_tokenizer(chat_template=template)
    data = section(path=jsonl(tmp_path / "rows.jsonl", numbered(6)), instruction="Be brief.")
    splits = load_data(data, tokenizer, max_length=128)
    assert (len(splits.train), len(splits.test), splits.truncated_rows) == (4, 2, 0)
    for example in chain(splits.train, splits.test):
        assert tokenizer.decode(example.prompt_ids) == prompt.format(example.prompt)
        assert tokenizer.decode(example.answer_ids) == example.reference + "</s>"
        assert example.reference == example.prompt.replace("question", "answer")


def test_a_plain_tokenizer_without_a_start_token_gets_none(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(adds_bos=False)
    splits = load_data(section(path=jsonl(tmp_path / "r.jsonl", numbered(3))), tokenizer, max_length=64)
    assert tokenizer.decode(splits.train[0].prompt_ids) == splits.train[0].prompt + "\n"


def test_the_prompt_does_not_depend_on_the_day(tmp_path: Path) -> None:
    dated = "{% if date_string is not defined %}{% set date_string = strftime_now('%c') %}{% endif %}"
    tokenizer = byte_tokenizer(chat_template=dated + CHAT + "{{ date_string }}")
    splits = load_data(section(path=jsonl(tmp_path / "r.jsonl", numbered(3))), tokenizer, max_length=64)
    assert tokenizer.decode(splits.train[0].prompt_ids).endswith("26 Jul 2024")


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path: Path) -> None:
    data = section(path=jsonl(tmp_path / "rows.jsonl", numbered(6)))
    with pytest.raises(UserError, match=r"model\.name_or_path=.*end token"):
        load_data(data, byte_tokenizer(eos=None), max_length=64)


def test_a_template_that_renders_nothing_is_refused(tmp_path: Path) -> None:
    data = section(path=jsonl(tmp_path / "rows.jsonl", numbered(6)))
    with pytest.raises(UserError, match=r"chat template cannot render.*never"):
        load_data(data, byte_tokenizer(chat_template="{{ raise_exception('never') }}"), max_length=64)


@given(
    prompt=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    answer=st.lists(st.integers(10, 19), min_size=1, max_size=40),
    max_length=st.integers(8, 64),
)
def test_fit_keeps_the_answers_start_and_the_prompts_end(prompt: list[int], answer: list[int], max_length: int) -> None:
    head = min(prompt[0], 3) if len(prompt) > 3 else 0  # what a template writes before the user's text
    cut_prompt, cut_answer = fit(prompt, answer, max_length=max_length, text=(head, len(prompt)))
    assert len(cut_prompt) + len(cut_answer) == min(max_length, len(prompt) + len(answer))
    assert cut_prompt and cut_answer and cut_answer == answer[: len(cut_answer)]
    tail = cut_prompt[head:]
    assert cut_prompt[:head] == prompt[:head] and tail == prompt[len(prompt) - len(tail) :]
    assert len(cut_answer) >= min(len(answer), max_length // 2)
    assert len(cut_prompt) >= min(len(prompt), max_length // 2)


def test_cut_training_rows_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "answer": "x" * (5 if i % 2 else 500)} for i in range(40)]
    splits = load_data(section(path=jsonl(tmp_path / "rows.jsonl", rows)), byte_tokenizer(), max_length=32)
    cut = [example for example in splits.train if len(example.reference) == 500]
    assert splits.truncated_rows == len(cut) and 0 < len(cut) < len(splits.train)
    eos = byte_tokenizer().eos_token_id
    assert all(example.length == 32 and eos not in example.answer_ids for example in cut)


# --- the cache ---


def test_tokens_come_from_the_cache_without_the_generator(cache: Path) -> None:
    data = option("chain_sum", train_rows=20, test_rows=5)
    first = load_data(data, byte_tokenizer(chat_template=CHAT), max_length=256)
    code = (
        "import sys; sys.path.insert(0, 'tests'); from test_data import *;"
        "s = load_data(option('chain_sum', train_rows=20, test_rows=5), byte_tokenizer(chat_template=CHAT),"
        " max_length=256); print(s.fingerprint, s.train[0].prompt, 'reasoning_gym' in sys.modules, sep='|')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().split("|") == [first.fingerprint, first.train[0].prompt, "False"]
    assert len(list((cache / "data").iterdir())) == 1


def test_what_changes_the_tokens_changes_the_key(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "rows.jsonl"
    data = section(path=jsonl(path, numbered(9)))
    tokenizer = byte_tokenizer()

    def folders() -> int:
        return len(list((cache / "data").iterdir()))

    first = load_data(data, tokenizer, max_length=64)
    scored = data.model_copy(update={"name": "other", "metrics": ["f1"], "max_new_tokens": 9})
    load_data(scored, tokenizer, max_length=64)
    tokenizer(["a", "bc"], padding=True, truncation=True, max_length=9)  # leaves its mark on the tokenizer's backend
    load_data(data, tokenizer, max_length=64)
    moved = section(path=jsonl(tmp_path / "moved.jsonl", numbered(9)))
    assert load_data(moved, tokenizer, max_length=64).fingerprint == first.fingerprint
    assert folders() == 1
    load_data(data, tokenizer, max_length=65)
    load_data(data.model_copy(update={"seed": 1}), tokenizer, max_length=64)
    load_data(data, byte_tokenizer(chat_template=CHAT), max_length=64)
    jsonl(path, numbered(10))
    assert load_data(data, tokenizer, max_length=64).fingerprint != first.fingerprint
    assert folders() == 5


def test_a_damaged_cache_is_made_anew(tmp_path: Path, cache: Path) -> None:
    data = section(path=jsonl(tmp_path / "rows.jsonl", numbered(9)))
    first = load_data(data, byte_tokenizer(), max_length=64)
    (folder,) = (cache / "data").iterdir()
    for arrow in (folder / "train").glob("*.arrow"):
        arrow.unlink()
    again = load_data(data, byte_tokenizer(), max_length=64)
    assert again.fingerprint == first.fingerprint and list(again.train) == list(first.train)


def test_two_cells_at_once_share_one_folder(tmp_path: Path, cache: Path) -> None:
    data = section(path=jsonl(tmp_path / "rows.jsonl", numbered(200)))
    with ThreadPoolExecutor(4) as pool:
        splits = list(pool.map(lambda _: load_data(data, byte_tokenizer(), max_length=64), range(4)))
    assert len({split.fingerprint for split in splits}) == 1
    assert [len(split.train) for split in splits] == [198] * 4
    assert len(list((cache / "data").iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LEFT_BENCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"LEFT_BENCH_CACHE=.*cannot be written"):
        load_data(section(path=jsonl(tmp_path / "r.jsonl", numbered(5))), byte_tokenizer(), max_length=64)


def test_examples_are_a_sequence(tmp_path: Path) -> None:
    train = load_data(section(path=jsonl(tmp_path / "r.jsonl", numbered(9))), byte_tokenizer(), max_length=64).train
    assert list(train) == [train[i] for i in range(7)] == train[:]
    assert train[-1] == train[6] and train[1:3] == [train[1], train[2]] and train[3] in train
    with pytest.raises(IndexError):
        train[7]


@pytest.mark.skipif(not LAMINI.is_file(), reason="the lamini_docs rows are not beside the checkout")
def test_lamini_docs() -> None:
    train, test = load_rows(option("lamini_docs", path=str(LAMINI)))
    assert len(test) == 128 and len(train) > 1200
    assert not {row.prompt for row in train} & {row.prompt for row in test}
    splits = load_data(option("lamini_docs", path=str(LAMINI)), byte_tokenizer(chat_template=CHAT), max_length=512)
    assert len(splits.train) == len(train) and splits.truncated_rows > 0


# --- steps, passes, batches ---


@given(
    n_rows=st.integers(1, 30),
    rows_per_step=st.integers(1, 12),
    steps=st.integers(0, 20),
    seed=st.integers(0, 2**63),
)
def test_every_row_is_seen_equally_often(n_rows: int, rows_per_step: int, steps: int, seed: int) -> None:
    plan = list(step_rows(n_rows, rows_per_step=rows_per_step, steps=steps, seed=seed))
    assert [len(step) for step in plan] == [rows_per_step] * steps
    assert plan == list(step_rows(n_rows, rows_per_step=rows_per_step, steps=steps, seed=seed))
    order = list(chain(*plan))
    times = Counter(order)
    assert all(0 <= row < n_rows for row in order)
    whole, rest = divmod(len(order), n_rows)
    assert sorted(times[row] for row in range(n_rows)) == [whole] * (n_rows - rest) + [whole + 1] * rest
    for start in range(0, whole * n_rows, n_rows):
        assert sorted(order[start : start + n_rows]) == list(range(n_rows))


@given(seed=st.integers(0, 2**32 - 1), other=st.integers(0, 2**32 - 1))
def test_another_seed_is_another_order(seed: int, other: int) -> None:
    plans = [list(step_rows(100, rows_per_step=10, steps=10, seed=s)) for s in (seed, other)]
    assert (plans[0] == plans[1]) == (seed == other)


def test_epochs_differ_and_steps_straddle_them() -> None:
    order = list(chain(*step_rows(50, rows_per_step=20, steps=5, seed=0)))
    assert order[:50] != order[50:] and sorted(order[:50]) == sorted(order[50:])
    with pytest.raises(ValueError, match="no rows"):
        list(step_rows(0, rows_per_step=1, steps=1, seed=0))


token_ids = st.lists(st.integers(0, 99), min_size=1, max_size=12)
examples_strategy = st.lists(
    st.builds(Example, prompt_ids=token_ids, answer_ids=token_ids, prompt=st.just("p"), reference=st.just("r")),
    min_size=1,
    max_size=9,
)


@given(examples=examples_strategy, batch_size=st.integers(1, 4))
def test_passes_hold_every_row_once(examples: list[Example], batch_size: int) -> None:
    padded = split_passes(examples, batch_size=batch_size, batching="padded")
    grouped = split_passes(examples, batch_size=batch_size, batching="grouped")
    assert list(chain(*padded)) == examples
    lengths = [example.length for example in chain(*grouped)]
    assert lengths == sorted((example.length for example in examples), reverse=True)
    for passes in (padded, grouped):
        assert [len(part) for part in passes[:-1]] == [batch_size] * (len(passes) - 1)
        assert 1 <= len(passes[-1]) <= batch_size

    def volume(passes: list[list[Example]]) -> int:
        return sum(len(part) * max(example.length for example in part) for part in passes)

    assert volume(grouped) <= volume(padded) or len(examples) % batch_size


@given(examples=examples_strategy, pad_id=st.integers(0, 99))
def test_collate_masks_exactly_prompt_and_padding(examples: list[Example], pad_id: int) -> None:
    batch = collate(examples, pad_id=pad_id)
    longest = max(example.length for example in examples)
    assert batch.input_ids.shape == batch.attention_mask.shape == batch.labels.shape == (len(examples), longest)
    for i, example in enumerate(examples):
        padding = longest - example.length
        assert batch.input_ids[i].tolist() == example.prompt_ids + example.answer_ids + [pad_id] * padding
        assert batch.attention_mask[i].tolist() == [1] * example.length + [0] * padding
        assert batch.labels[i].tolist() == [-100] * len(example.prompt_ids) + example.answer_ids + [-100] * padding
    assert batch.tokens == int(batch.attention_mask.sum())
    assert batch.answer_tokens == int((batch.labels != -100).sum())


def test_a_batch_moves_whole() -> None:
    batch = collate([Example([1, 2], [3], "p", "r")], pad_id=0).to("meta")
    assert {t.device.type for t in (batch.input_ids, batch.attention_mask, batch.labels)} == {"meta"}
    assert (batch.tokens, batch.answer_tokens) == (3, 1)


# --- what ends a turn ---

MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ '<|end|>\n' if m.role == 'assistant' else '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def marked_tokenizer() -> Any:
    tokenizer = byte_tokenizer(chat_template=MARKED)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]})
    return tokenizer


def test_an_answer_ends_as_the_template_ends_an_assistants_turn(tmp_path: Path) -> None:
    tokenizer = marked_tokenizer()
    splits = load_data(section(path=jsonl(tmp_path / "r.jsonl", numbered(3))), tokenizer, max_length=64)
    assert tokenizer.convert_ids_to_tokens(splits.train[0].answer_ids[-1:]) == ["<|end|>"]
    assert tokenizer.eos_token_id not in splits.train[0].answer_ids


def test_a_long_prompt_is_cut_inside_the_users_text_and_the_template_stays_whole(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} " + "x" * 100 + "?", "answer": "yes"} for i in range(6)]
    data = section(path=jsonl(tmp_path / "r.jsonl", rows), instruction="Be brief.")
    splits = load_data(data, marked_tokenizer(), max_length=48)
    text = marked_tokenizer().decode(splits.train[0].prompt_ids)
    assert splits.train[0].length == 48
    assert text.startswith("<|system|>Be brief.\n<|user|>x") and text.endswith("x?\n<|assistant|>")


def test_code_keeps_its_first_lines_indent(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "answer": "\n    return x\n"} for i in range(6)]
    splits = load_data(section(path=jsonl(tmp_path / "r.jsonl", rows)), byte_tokenizer(), max_length=64)
    assert splits.train[0].reference == "    return x"


def test_a_local_file_behind_a_hub_builder_is_known_by_its_content(tmp_path: Path) -> None:
    from left_bench.data.files import with_content

    (tmp_path / "r.csv").write_text("prompt,answer\na,b\n", encoding="utf-8")
    data = section(source="hub", hub_id="csv", config={"data_files": str(tmp_path / "*.csv")})
    before = with_content(data).content
    (tmp_path / "r.csv").write_text("prompt,answer\na,c!\n", encoding="utf-8")
    assert None is not before != with_content(data).content


def test_rows_that_are_left_out_are_counted_by_their_reason(tmp_path: Path) -> None:
    rows = [*numbered(6), *({"prompt": f"none {i}", "answer": None} for i in range(10))]
    splits = load_data(section(path=jsonl(tmp_path / "r.jsonl", rows)), byte_tokenizer(), max_length=64)
    assert (len(splits.train) + len(splits.test), splits.dropped_rows, splits.repeated_rows) == (6, 10, 0)
    twice = [{**row, "answer": f"{row['answer']}{end}"} for row in numbered(6) for end in "ab"]
    again = load_data(section(path=jsonl(tmp_path / "s.jsonl", twice)), byte_tokenizer(), max_length=64)
    assert again.repeated_rows == len(again.test)  # each test question's other row is not trained on

"""The labels of conversations, held against those of another library, token for token.

TRL's SFTTrainer prepares the same rows with `assistant_only_loss`, by the marks that its training templates put around
an assistant's turn. Llama 3, Qwen 3 and Gemma 3 have their templates in TRL. SmolLM2's is the one of the default model
with the marks put in; Mistral's writes what its model cards document. Tokenizers are trained here, each with its
family's markers and way of splitting, for those of the hub cannot be had offline.

Two things differ by intent, and are taken off TRL's side: it counts the line break that a template writes after the end
of a turn, which no model is ever asked for once it has ended its turn; and of Qwen 3 the empty thoughts, which here
stand in the prompt (`enable_thinking=false`).
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from test_conversations import labelled
from test_data import section

from left_bench.data import load_data

trl = pytest.importorskip("trl", reason="needs left-bench[benchmarks]")

_IM = ["<|im_start|>", "<|im_end|>"]
_BREAKS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)


class Family(NamedTuple):
    """What sets a family's tokenizer and template apart."""

    template: str
    """A name in TRL's folder of templates, or the template."""
    markers: list[str]
    bos: str | None
    eos: str
    end: str
    """What ends a turn."""
    splits: str = "lines"
    """`lines`: line breaks are pieces of their own; `gpt2`: that model's way; `words`: SentencePiece's; `first`: the
    same, with a space put before the first word of a text."""
    system: bool = True
    thoughts: str = ""
    """What TRL counts before an answer."""
    original: str | None = None
    """The template that models come with, in TRL's folder."""


FAMILIES = {
    "llama3": Family(
        *(
            "llama3_training",
            ["<|start_header_id|>", "<|end_header_id|>"],
            "<|begin_of_text|>",
            "<|eot_id|>",
            "<|eot_id|>",
        ),
        original="llama3",
    ),
    "qwen3": Family(
        *("qwen3_training", _IM, None, "<|im_end|>", "<|im_end|>"), thoughts="<think>\n\n</think>\n\n", original="qwen3"
    ),
    "gemma3": Family(
        *("gemma3_training", ["<start_of_turn>"], "<bos>", "<eos>", "<end_of_turn>", "words"), original="gemma3"
    ),
    "mistral": Family(_MISTRAL, ["[INST]", "[/INST]"], "<s>", "</s>", "</s>", "words", system=False),
    "mistral_first": Family(_MISTRAL, ["[INST]", "[/INST]"], "<s>", "</s>", "</s>", "first", system=False),
    "smollm2": Family(_SMOLLM2, _IM, None, "<|im_end|>", "<|im_end|>", "gpt2"),
}
TALKS = [
    [
        {"role": "user", "content": "What is a cell?\nTell me briefly."},
        {"role": "assistant", "content": "One point of the grid.\n\n    indented code\n1234567 é ✓"},
    ],
    [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "And another,  please?"},
        {"role": "assistant", "content": "Red, of course."},
        {"role": "user", "content": "Thanks!"},
        {"role": "assistant", "content": "You're welcome."},
    ],
]


def template_of(name: str) -> str:
    folder = Path(trl.__file__).parent / "chat_templates"
    return name if "{%" in name else (folder / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer_of(family: Family, folder: Path) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(byte_fallback=False, unk_token=None))
    letters = pre_tokenizers.ByteLevel.alphabet()
    if family.splits in ("words", "first"):
        scheme: Any = "never" if family.splits == "words" else "first"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
        letters = sorted({*"".join(turn["content"] for talk in TALKS for turn in talk), *"▁\n"})
    else:
        by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=family.splits == "gpt2")
        lines = [pre_tokenizers.Split(Regex(_BREAKS), "isolated")] if family.splits == "lines" else []
        backend.pre_tokenizer = pre_tokenizers.Sequence([*lines, by_bytes])
        backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=letters, show_progress=False)
    said = [turn["content"] for talk in TALKS for turn in talk] + [
        "system user model assistant\n\n<think>\n\n</think>\n\n"
    ]
    backend.train_from_iterator(said * 3, trainer)
    backend.add_special_tokens(
        [
            AddedToken(fromkey, special=True)
            for fromkey in dict.fromkeys(
                [*family.markers, *filter(None, [family.bos]), family.eos, family.end, "<pad>"]
            )
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=family.bos, eos_token=family.eos, pad_token="<pad>"
    )
    tokenizer.chat_template = template_of(family.template)
    tokenizer.save_pretrained(folder)
    return tokenizer


def by_trl(talks: list[Any], tokenizer: Any, folder: Path) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of each conversation, as SFTTrainer has them."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    trainer = trl.SFTTrainer(
        model=LlamaForCausalLM(config),
        args=trl.SFTConfig(
            output_dir=str(folder),
            assistant_only_loss=True,
            max_length=None,
            report_to="none",
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_list([{"messages": talk} for talk in talks]),
        processing_class=tokenizer,
    )
    results = []
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        results.append((batch["input_ids"][0].tolist(), batch["labels"][0].tolist()))
    return results


def wanted(rows: list[tuple[list[int], list[int]]], family: Family, tokenizer: Any) -> Counter[tuple[Any, int]]:
    """TRL's labelled tokens with what stands before each, less what differs by intent."""
    end = tokenizer.convert_tokens_to_ids(family.end)
    thoughts = tokenizer(family.thoughts, add_special_tokens=False)["input_ids"] if family.thoughts else []
    result: Counter[tuple[Any, int]] = Counter()
    for ids, labels in rows:
        for of_answer, places in itertools.groupby(range(len(ids)), key=lambda place: labels[place] != -100):
            run = list(places)
            if not of_answer:
                continue
            assert [ids[place] for place in run] == [labels[place] for place in run]
            if thoughts:
                assert [ids[place] for place in run[: len(thoughts)]] == thoughts
            ends = next(number for number, place in enumerate(run) if ids[place] == end)
            assert tokenizer.decode([ids[place] for place in run[ends + 1 :]]) in ("", "\n")
            for place in run[len(thoughts) : ends + 1]:
                result[tuple(ids[:place]), ids[place]] += 1
    return result


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LEFT_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path


def rows_here(talks: list[Any], tokenizer: Any, folder: Path) -> Any:
    """The same conversations as this package has them; one more is held out, for there must be one."""
    extra = [{"role": "user", "content": "Held out?"}, {"role": "assistant", "content": "Yes."}]
    train, test = folder / "train.jsonl", folder / "test.jsonl"
    train.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks), encoding="utf-8")
    test.write_text(json.dumps({"messages": extra}), encoding="utf-8")
    return load_data(section(path=str(train), test_path=str(test), test_rows=1), tokenizer, max_length=512).train


@pytest.mark.parametrize("with_system", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_labels_are_those_of_trl_token_for_token(name, with_system, cache):
    family = FAMILIES[name]
    talks = [[{"role": "system", "content": "Be brief."}, *talk] if with_system else talk for talk in TALKS]
    if with_system and not family.system:
        pytest.skip("the template has no system message: here it stands before the first question, TRL drops it")
    tokenizer = tokenizer_of(family, cache / "tokenizer")
    rows = rows_here(talks, tokenizer, cache)
    assert len(rows) == len(talks)  # each in one row
    assert labelled(rows) == wanted(by_trl(talks, tokenizer, cache / "trl"), family, tokenizer)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.original])
def test_the_template_that_a_model_comes_with_teaches_the_same_answers(name, cache):
    """Qwen 3's own forgets the thoughts of earlier turns: later answers follow another text, and are rows apart."""
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family, cache / "tokenizer")
    for_training = labelled(rows_here(TALKS, tokenizer, cache))
    tokenizer.chat_template = template_of(str(family.original))
    rows = rows_here(TALKS, tokenizer, cache)
    if not family.thoughts:
        assert labelled(rows) == for_training and len(rows) == len(TALKS)
        return
    assert len(rows) == sum(turn["role"] == "assistant" for talk in TALKS for turn in talk)
    assert Counter(token for _, token in labelled(rows).elements()) == Counter(
        token for _, token in for_training.elements()
    )

"""Each rule in both directions: what it refuses really fails when it is forced, and its nearest neighbour runs."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from left_bench.core.errors import NotInForce
from left_bench.core.paths import is_installed
from left_bench.grid.rules import EXTRAS, RULES, loses_virtual_tokens, model_type, why_unsupported
from left_bench.launch.supervise import run_isolated

linux = pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked on Linux")
BF16 = ["precision=bf16"]
ALL_BF16 = [*BF16, "precision.adapter_dtype=bfloat16"]
NF4, INT8, NF5, HQQ = (["quantization=nf4"], ["quantization=int8"], ["quantization=nf5"], ["quantization=hqq_4"])
NEEDED = {
    "quantization=quanto_int8": "optimum.quanto",
    "quantization=hqq_4": "hqq",
    "quantization=torchao_int8": "torchao",
    "optimizer=galore": "galore_torch",
    "optimizer=apollo": "apollo_torch",
}
CHEAP = ["training.steps=2", "eval.generate=false", "eval.check_reload=false"]
NEOX, T5, VIT = ["model=tiny_neox"], ["model=tiny_t5"], ["model=tiny_vit"]
BERT = ["model=tiny_bert", "data=family_relationships", "data.instruction=null"]
NUMBERS = ["model=tiny_bert", "model.task=regression", "data=letter_counting"]
TAGS = ["model=tiny_bert", "model.task=token_classification"]
VECTORS = ["model=tiny_bert", "model.task=embeddings", "data=chain_sum"]
SUM_PAIRS = ["data=chain_sum_pairs"]
TWO = ["hardware.processes=2"]
FSDP2 = [*TWO, "hardware.sharding=fsdp2"]
GRPO = ["training=grpo", "training.group_size=2", "training.sft_steps=0"]

# what is refused; words of the reason; the nearest neighbour that is not
PAIRS: list[tuple[list[str], str, list[str]]] = [
    (["peft=full", *NF4], "full fine-tuning", ["peft=full"]),
    (["peft=full", *INT8], "full fine-tuning", ["peft=lora", *INT8]),
    (["precision=tf32"], "TF32", ["precision=fp32"]),
    (["model=tiny_t5", "data.shape=text"], "plain text", ["model=tiny_t5"]),
    (["model=tiny_t5", "data.train_on=all"], "carries no loss", ["model=tiny_t5"]),
    (["peft=llama_adapter", *NEOX], "LLaMA-Adapter", ["peft=llama_adapter"]),
    (["optimizer=paged_adamw_8bit"], "paged", ["optimizer=adamw_8bit"]),
    (["training.attention=flash_attention_2"], "FlashAttention", ["training.attention=sdpa"]),
    (["training.attention=flash_attention_3"], "FlashAttention", ["training.attention=sdpa"]),
    (["training.kernels=liger"], "Triton", []),
    (["training.kernels=liger", *NEOX], "Triton", NEOX),
    (["training.output_head=liger"], "Triton", []),
    (["training.output_head=liger", *VIT, "data=digits"], "Triton", [*VIT, "data=digits"]),
    (["training.output_head=liger", "training=dpo", "training.sft_steps=1", *SUM_PAIRS], "Triton", []),
    (["training.output_head=liger", "precision=fp16_mixed"], "Triton", []),
    (["training.float8=true", "peft=full", *BF16], "8-bit floating point", ["peft=full", *BF16]),
    (["training.float8=true", "peft=lora", *BF16], "8-bit floating point", ["peft=lora", *BF16]),
    (["training.float8=true", "peft=full", "precision=fp32"], "8-bit floating point", ["peft=full"]),
    (["peft=loftq"], "LoftQ", ["peft=lora"]),
    (["peft=dora", *INT8, *BF16], "DoRA", ["peft=dora", *NF4, *BF16]),
    (["peft=dora", *INT8], "DoRA", ["peft=dora"]),
    (["peft=pissa", *NF4], "floating-point weights", ["peft=pissa"]),
    (["peft=delora", *NF4], "floating-point weights", ["peft=delora"]),
    (["peft=psoft", *NF4], "floating-point weights", ["peft=psoft"]),
    (["peft=tinylora", *NF4], "floating-point weights", ["peft=tinylora"]),
    (["peft=glora", *NF4], "floating-point weights", ["peft=glora"]),
    (["peft=supertuning", *NF4], "floating-point weights", ["peft=supertuning"]),
    (["peft=velora", *NF4], "floating-point weights", ["peft=velora"]),
    # silently wrong but for `left_bench.methods.verify`
    (["peft=hra", *INT8], "stored integers", ["peft=hra"]),
    (["peft=hra", *NF4], "stored integers", ["peft=hra"]),
    (["peft=deft", *INT8], "stored integers", ["peft=deft"]),
    (["peft=peanut", *INT8], "stored integers", ["peft=peanut"]),
    (["peft=unilora", *NF4], "stored integers", ["peft=unilora"]),
    (["peft=loha", *NF5], "5-bit", ["peft=loha", *INT8]),
    (["peft=lokr", *NF5], "5-bit", ["peft=lokr"]),
    (["peft=shira", *NF5], "5-bit", ["peft=shira"]),
    (["peft=hira", *NF5], "5-bit", ["peft=hira"]),
    (["peft=olora", *NF5], "5-bit", ["peft=olora", *NF4]),
    (["peft=lora_orthogonal", *NF5], "floating-point weights", ["peft=lora", *NF5]),
    (["peft=lora_orthogonal", *INT8], "floating-point weights", ["peft=lora_orthogonal"]),
    (["peft=mica", *NF4], "floating-point weights", ["peft=mica"]),
    (["peft=lora_ga", *NF4], "floating-point weights", ["peft=lora_ga"]),
    (["peft=lora_ga", *INT8], "floating-point weights", ["peft=lora_ga"]),
    (["peft=corda", *INT8], "floating-point weights", ["peft=corda"]),
    (["peft=osf", *INT8], "floating-point weights", ["peft=osf"]),
    (["peft=frod", *NF4], "floating-point weights", ["peft=frod"]),
    # plain LoRA without a word but for `left_bench.methods.verify`
    (["peft=kasa", *NF4], "plain LoRA", ["peft=kasa"]),
    (["peft=kasa", *NF5], "plain LoRA", ["peft=kasa"]),
    (["peft=bdlora", *INT8], "plain LoRA", ["peft=bdlora"]),
    (["peft=monteclora", *INT8], "plain LoRA", ["peft=monteclora", *NF5]),
    (["peft=loha", *HQQ], "HQQ layers", ["peft=loha", *INT8]),
    (["peft=olora", *HQQ], "HQQ layers", ["peft=lora", *HQQ]),
    (["peft=loha", *NF4], "packed 4-bit", ["peft=loha", *INT8]),
    (["peft=lokr", *NF4], "packed 4-bit", ["peft=lokr"]),
    (["peft=ia3", *NF4, *ALL_BF16], "dtypes", ["peft=ia3", *NF4, *BF16]),
    (["peft=randlora", *NF4, *ALL_BF16], "dtypes", ["peft=randlora", *NF4, *BF16]),
    (["peft=shira", *INT8, *ALL_BF16], "dtypes", ["peft=shira", *INT8, *BF16]),
    (["peft=c3a", *INT8, *NEOX], "bias", ["peft=c3a", *INT8]),
    (["peft=gralora", *NF4, *NEOX], "bias", ["peft=gralora", *NEOX]),
    (
        ["peft=layer_freeze", *NF4, "peft.config.last_layers=1"],
        "whole layers",
        ["peft=layer_freeze", "peft.config.last_layers=1"],
    ),
    (["peft=bitfit"], "BitFit", ["peft=bitfit", *NEOX]),
    (["peft=bitfit", *T5], "BitFit", ["peft=layer_freeze", "peft.config.last_layers=1", *T5]),
    (["peft=pfeiffer", *T5], "bottleneck", ["peft=pfeiffer"]),
    (["peft=eva", *T5], "training rows", ["peft=lora", *T5]),
    (["peft=cpt", *T5], "training rows", ["peft=prompt_tuning", *T5]),
    ([*VIT, "data=digits", "peft=corda"], "training rows", [*VIT, "data=digits", "peft=pissa"]),
    ([*BERT, "peft=beft"], "as decoders call them", [*BERT, "peft=pfeiffer"]),
    ([*BERT, "peft=bdlora"], "as decoders call them", [*BERT, "peft=lora_attention"]),
    ([*BERT, "peft=shadow"], "an encoder has none", [*BERT, "peft=prefix_tuning"]),
    ([*BERT, "peft=poly"], "one vector", [*TAGS, "data=kinship_people", "peft=poly"]),
    ([*BERT, "peft=trainable_tokens"], "as it was drawn", VECTORS),
    (
        ["peft=llama_adapter", "model.task=sequence_classification", *BERT[1:]],
        "as it was drawn",
        ["peft=llama_adapter"],
    ),
    ([*BERT, "peft=llama_adapter"], "LLaMA-Adapter", [*BERT, "peft=ln_tuning"]),
    ([*BERT, "data.pairs=true"], "a class belongs to one text", BERT),
    ([*NUMBERS, "data.pairs=true"], "a number is told of one text", NUMBERS),
    ([*TAGS, *BERT[1:]], "tags are told of words", [*TAGS, "data=kinship_people"]),
    ([*VECTORS, "data.pairs=true"], "vectors are compared", VECTORS),
    (VIT, "images need an image classifier", [*VIT, "data=digits"]),
    (["data=digits"], "images need an image classifier", []),
    ([*VIT, "data=digits", "peft=prompt_tuning"], "virtual tokens", [*VIT, "data=digits", "peft=ln_tuning"]),
    ([*VIT, "data=digits", "peft=prefix_tuning"], "virtual tokens", []),
    ([*VIT, "data=digits", "peft=ia3"], "target_modules", [*VIT, "data=digits", "peft=bitfit"]),
    ([*VIT, "data=digits", *HQQ], "output layer", [*VIT, "data=digits", *NF4]),
    (["training=dpo", "training.sft_steps=1"], "data.pairs", ["training=dpo", "training.sft_steps=1", *SUM_PAIRS]),
    (["data=digits", *VIT, "data.pairs=true", "training=orpo"], "written answers", [*VIT, "data=digits"]),
    (["training=reward"], "better and a worse", ["training=reward", *SUM_PAIRS]),
    (["training=reward", *SUM_PAIRS, *T5, "model.task=seq2seq_lm"], "model.task out", []),
    ([*GRPO, "data=jsonl"], "what an answer is worth", GRPO),
    (["training=orpo"], "data.pairs", ["training=orpo", *SUM_PAIRS]),
    (["training=kto", "training.sft_steps=0"], "good or bad", ["training=kto", "training.sft_steps=0", *SUM_PAIRS]),
    # forced in this process, which is one: neighbours that are several are in test_ranks.py
    (["hardware.processes=3"], "training.batch_size", ["training.batch_size=3"]),
    ([*TWO, "hardware=cuda", "hardware.device=mps"], "MPS has only one", []),
    (["hardware.sharding=fsdp2"], "more than one", []),
]
# what validation along training does not go with; words of the reason; the nearest neighbour
ALONG_TRAINING: list[tuple[list[str], str, list[str]]] = [
    (["training.stop_patience=1", *FSDP2], "keeps whole weights", ["training.stop_patience=1"]),
    (["training.stop_patience=1", "eval.points=0"], "set eval.points", ["training.stop_patience=1", "eval.points=2"]),
    (["training.max_seconds=5", "peft=adalora"], "plans its ranks", ["training.max_seconds=5"]),
    (["eval.curve_scores=true", "training=packed"], "padded rows", ["eval.curve_scores=true"]),
]
# rows whose answers are good or bad, and what else is asked; words of the reason; the nearest neighbour
LABELLED: list[tuple[list[str], str, list[str]]] = [
    (["training=grpo", "training.group_size=2", *T5], "a decoder's are", ["training=grpo", "training.group_size=2"]),
    ([*GRPO, "training.batch_size=4", *TWO], "one process", GRPO),
    ([*GRPO, "training.compile=true"], "compiled, float8 and packed", ["training.compile=true"]),
    ([*GRPO, "training.batching=packed"], "compiled, float8 and packed", ["training.batching=packed"]),
    ([*GRPO, "training.updates_per_sample=2", "training.checkpoint_every=1"], "no sampled answers", GRPO),
    (["training=grpo", "training.group_size=3"], "multiple of training.group_size", GRPO),
    (["training.updates_per_sample=2"], "belong to", [*GRPO, "training.updates_per_sample=2"]),
    (["data=jsonl", "eval.verifier=true", "eval.generate=true"], "its own questions", ["data=jsonl"]),
    (["eval.verifier=true"], "its own questions", ["eval.verifier=true", "eval.generate=true"]),
    (["model.task=reward_model", *SUM_PAIRS], "trained by", ["training=reward", *SUM_PAIRS]),
    (["data.margin_column=by"], "reward models", ["data.margin_column=by", "training=reward", *SUM_PAIRS]),
    (["training=reward", *SUM_PAIRS, "eval.curve_scores=true"], "writes no answers", ["training=reward", *SUM_PAIRS]),
    (["training=reward", *SUM_PAIRS, "training.sft_steps=1"], "writes no answers", []),
    (["data.label_column=ok"], "kto alone", []),
    (["data.label_column=ok", "training=kto", "training.sft_steps=0", "data.pairs=true"], "kto alone", []),
    (
        ["data.label_column=ok", "training=kto"],
        "training.sft_steps=0",
        ["data.label_column=ok", "training=kto", "training.sft_steps=0"],
    ),
]
# on two processes of the CPU: what is refused over shards, words of the reason, what the forced cell says
SHARDED: list[tuple[list[str], str, str]] = [
    (INT8, "divide these quantized weights", "no attribute 'CB'"),
    (["quantization=torchao_int8"], "divide these quantized weights", "Int8Tensor"),
    (["training.checkpoint_every=1"], "checkpoint_every", "invalid python storage"),
    (["peft=adalora", "training.steps=10"], "whole gradients", "mixed torch.Tensor and DTensor"),
    (["peft=full", "optimizer=apollo", "optimizer.matrices.rank=8"], "whole gradients", "seed"),
    (["optimizer=adamw_8bit"], "sharded weights", "sharding strategy"),
    # hangs; and under loss scaling a rank would skip the steps that overflow in its own shard alone
    (["training.compile=true", "hardware.timeout=12"], "loss scaling and compiled", "in phase compile"),
]
# what CUDA could run, but not with this: the rules of the CPU come first above
ON_CUDA: list[tuple[list[str], str, list[str]]] = [
    (["training.kernels=liger", *NEOX], "of this family", ["training.kernels=liger"]),
    (
        ["training.output_head=liger", *VIT, "data=digits"],
        "a classifier has classes",
        ["training.output_head=liger", *T5],
    ),
    (["training.output_head=liger", "training=dpo", *SUM_PAIRS], "weight pairs", ["training.output_head=liger"]),
    (["training.output_head=liger", "precision=fp16_mixed"], "float16", ["training.output_head=liger", *BF16]),
    (["training.output_head=liger", *FSDP2], "whole weight", ["training.output_head=liger", *TWO]),
    (["training.float8=true", "peft=lora", *BF16], "full fine-tuning", ["training.float8=true", "peft=full", *BF16]),
    (["training.float8=true", "peft=full", "precision=bf16_mixed"], "precision=bf16", []),
    (
        ["training.float8=true", "peft=full", *BF16, *FSDP2],
        "sharding=null",
        ["training.float8=true", "peft=full", *BF16, *TWO],
    ),
    (["training.attention=flash_attention_2", *BF16], "flash-attn", ["training.attention=sdpa"]),
    (["training.attention=flash_attention_3", *BF16], "flash-attn-3", ["training.attention=sdpa"]),
]
# an option that a package must be installed for, by the package's module
WANTING = {
    "torchao": ["quantization=torchao_int8"],
    "hqq": HQQ,
    "optimum.quanto": ["quantization=quanto_int8"],
    "galore_torch": ["peft=full", "optimizer=galore", "optimizer.matrices.rank=8"],
    "apollo_torch": ["peft=full", "optimizer=apollo", "optimizer.matrices.rank=8"],
}
# config.json's entry of a checkpoint that comes quantized
CHECKPOINTS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]},
    "spqr": {"quant_method": "spqr", "bits": 3, "beta1": 16, "beta2": 16, "shapes": {}},
}
# these two lose what a method puts before the input while they generate
LOSING = {"transformers": "5.24.0", "peft": "0.21.2"}
VIRTUAL = [
    *("prefix_tuning", "prompt_tuning", "multitask_prompt_tuning", "p_tuning", "cartridge", "cpt", "shadow"),
]
# and what shards do not mind
OVER_SHARDS = [NF4, NF5, HQQ, ["peft=full", "optimizer=galore", "optimizer.matrices.rank=8"]]
ALLOWED = list(dict.fromkeys(tuple(pair[2]) for pair in PAIRS))


def names(pair: tuple) -> str:
    return "+".join(pair[0])


def skip_without_packages(overrides) -> None:
    for override in overrides:
        if not is_installed(NEEDED.get(override, "json")):
            pytest.skip(f"{NEEDED[override]} is not installed")


@pytest.mark.parametrize(("refused", "words", "allowed"), PAIRS, ids=map(names, PAIRS))
def test_a_refused_cell_fails_when_it_is_forced(refused, words, allowed, tiny_cell, work_in_process):
    cell = tiny_cell(*CHEAP, *refused)
    skip_without_packages(refused)
    reason = why_unsupported(cell)
    assert reason is not None
    assert words in reason
    with pytest.raises(Exception):  # noqa: B017 - whatever torch, peft or bitsandbytes say; the next test runs the neighbour
        work_in_process(cell)


@pytest.mark.parametrize("allowed", ALLOWED, ids="+".join)
def test_the_nearest_neighbour_runs(allowed, tiny_cell, work_in_process):
    skip_without_packages(allowed)
    cell = tiny_cell(*CHEAP, *allowed)
    assert why_unsupported(cell) is None
    result = work_in_process(cell)
    assert result["metrics"]["train_steps"] == cell.training.steps


def losses_of(cell, run_dir) -> tuple[str, str, list[float]]:
    """A cell's status, reason and step losses, in processes of its own."""
    seen: list[dict] = []
    record = run_isolated(cell, run_dir, on_event=seen.append)
    return record.status, record.reason or "", [event["loss"] for event in seen if event["event"] == "step"]


@linux
@pytest.mark.parametrize(("refused", "words", "says"), SHARDED, ids=map(names, SHARDED))
def test_a_cell_that_shards_refuse_fails_over_them(refused, words, says, tiny_cell, tmp_path):
    skip_without_packages(refused)
    cell = tiny_cell("eval.generate=false", "data.train_rows=24", *refused, *FSDP2)
    assert words in str(why_unsupported(cell))
    assert why_unsupported(tiny_cell(*refused, *TWO)) is None
    status, reason, _ = losses_of(cell, tmp_path / "run")
    assert status in ("failed", "timeout"), status
    assert says in reason


@linux
@pytest.mark.parametrize("overrides", OVER_SHARDS, ids="+".join)
def test_what_shards_do_not_mind_learns_the_same(overrides, tiny_cell, tmp_path):
    skip_without_packages(overrides)
    common = ["eval.generate=false", "data.train_rows=24", "training.steps=3", *overrides]
    sharded = tiny_cell(*common, *FSDP2)
    assert why_unsupported(sharded) is None
    results = [losses_of(cell, tmp_path / name) for name, cell in (("s", sharded), ("one", tiny_cell(*common)))]
    assert [status for status, _, _ in results] == ["ok", "ok"], results
    assert results[0][2] == pytest.approx(results[1][2], rel=2e-6)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["peft=hra", *INT8], "reads the stored integers of"),
        (["peft=deft", *INT8], "reads the stored integers of"),
        (["peft=peanut", *INT8], "reads the stored integers of"),
        (["peft=unilora", *NF4], "no trainable parameter received a gradient"),
        (["peft=kasa", *INT8], "does not support kasa_config and is plain LoRA"),
        (["peft=bdlora", *NF4], "does not support use_bdlora and is plain LoRA"),
        (["peft=monteclora", *NF4], "does not support monteclora_config and is plain LoRA"),
    ],
    ids=["hra", "deft", "peanut", "unilora", "kasa", "bdlora", "monteclora"],
)
def test_what_would_go_wrong_silently_says_what_is_wrong(overrides, words, tiny_cell, work_in_process):
    with pytest.raises(NotInForce, match=words):
        work_in_process(tiny_cell(*CHEAP, *overrides))


@pytest.mark.parametrize("method", CHECKPOINTS)
def test_a_quantized_checkpoint_fails_on_the_cpu(method, tiny_cell, work_in_process, tmp_path):
    """A checkpoint that says so of itself: its quantizer looks for its kernels before it looks at the weights."""
    from left_bench.pretrained import model_folder

    plain = tiny_cell(*CHEAP)
    shutil.copytree(model_folder(plain.model, dtype="float32"), tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(settings | {"quantization_config": CHECKPOINTS[method]}), encoding="utf-8")
    cell = tiny_cell(*CHEAP, f"quantization={method}", f"model.name_or_path={tmp_path / 'model'}")
    assert "only on CUDA" in str(why_unsupported(cell))
    with pytest.raises(Exception):  # noqa: B017 - a missing package, a missing device, or weights that are not in force
        work_in_process(cell)
    assert why_unsupported(tiny_cell(f"quantization={method}", "hardware=cuda")) is None


@pytest.mark.parametrize("module", WANTING)
def test_a_missing_package_fails_when_it_is_forced(module, tiny_cell, work_in_process, monkeypatch):
    """The package is hidden: importing it raises as if it were not there."""
    hidden = [name for name in sys.modules if name == module or name.startswith(f"{module}.")]
    cell = tiny_cell(*CHEAP, *WANTING[module])
    for name in {module, *hidden}:
        monkeypatch.setitem(sys.modules, name, None)
    (what,) = {what for _, needed, what in EXTRAS if needed == module}
    assert f"pip install {what}" in str(why_unsupported(cell))
    forget_what_is_there()
    try:
        with pytest.raises(Exception):  # noqa: B017 - ours or the library's words for it
            work_in_process(cell)
    finally:
        forget_what_is_there()


def forget_what_is_there() -> None:
    """transformers remembers for good whether a package was there when it first asked: a hidden one stays missing."""
    from transformers.utils import import_utils

    for name, ask in vars(import_utils).items():
        if name.startswith("is_") and hasattr(ask, "cache_clear"):
            ask.cache_clear()


@pytest.mark.parametrize("module", WANTING)
def test_an_installed_package_runs(module, tiny_cell, work_in_process):
    if not is_installed(module):
        pytest.skip(f"{module} is not installed")
    cell = tiny_cell(*CHEAP, *WANTING[module])
    assert why_unsupported(cell) is None
    assert work_in_process(cell)["metrics"]["train_steps"] == 2


@pytest.mark.parametrize(
    ("refused", "words", "allowed"), ALONG_TRAINING + LABELLED, ids=map(names, ALONG_TRAINING + LABELLED)
)
def test_what_goes_with_no_training_of_the_kind_is_refused(refused, words, allowed, tiny_cell):
    assert words in str(why_unsupported(tiny_cell(*CHEAP, *refused)))
    assert why_unsupported(tiny_cell(*CHEAP, *allowed)) is None


def going_on(cell):
    training = cell.training.model_copy(update={"start_from": "runs/earlier"})
    return cell.model_copy(update={"training": training})


def rewarded_twice(cell):
    training = cell.training.model_copy(update={"reward": "mine:score", "reward_model": "runs/earlier"})
    return cell.model_copy(update={"training": training})


def combining(cell):
    training = cell.training.model_copy(update={"objective": "combine", "combine": ["runs/one", "runs/other"]})
    return cell.model_copy(update={"training": training})


def test_two_rewards_are_one_too_many(tiny_cell):
    assert "give one of them" in str(why_unsupported(rewarded_twice(tiny_cell(*CHEAP, *GRPO))))


def test_every_rule_is_tried_in_both_directions(tiny_cell, monkeypatch):
    """A new rule must come with a cell that it refuses, here or among the checkpoints and packages above."""
    cells = [tiny_cell(*CHEAP, *refused) for refused, _, _ in PAIRS]
    cells += [tiny_cell(*CHEAP, *refused, *FSDP2) for refused, _, _ in SHARDED]
    cells += [tiny_cell(*CHEAP, f"quantization={method}") for method in CHECKPOINTS]
    cells += [tiny_cell("hardware=cuda", *refused) for refused, _, _ in ON_CUDA]
    cells += [tiny_cell(*CHEAP, *refused) for refused, _, _ in ALONG_TRAINING + LABELLED]
    cells += [going_on(tiny_cell("peft=adalora"))]  # more in test_start_from.py
    cells += [rewarded_twice(tiny_cell(*GRPO))]
    cells += [combining(tiny_cell("peft=ia3")), combining(tiny_cell("training=dpo", *SUM_PAIRS))]
    refused_by = {index for index, (refuses, _) in enumerate(RULES) for cell in cells if refuses(cell)}
    monkeypatch.setattr("left_bench.grid.rules.is_installed", lambda module: False)
    wanting = [tiny_cell(*CHEAP, *overrides) for overrides in WANTING.values()]
    monkeypatch.setattr("left_bench.grid.rules.versions_of", lambda packages: LOSING)
    wanting.append(tiny_cell("peft=prompt_tuning"))
    wanting += cells  # what a rule says of a package that is there elsewhere
    refused_by |= {index for index, (refuses, _) in enumerate(RULES) for cell in wanting if refuses(cell)}
    untried = [reason for index, (_, reason) in enumerate(RULES) if index not in refused_by]
    assert not untried
    assert set(WANTING) == {module for _, module, _ in EXTRAS}


@pytest.mark.parametrize(
    "overrides", [["hardware=cuda", "precision=tf32"], ["hardware=cuda", "optimizer=paged_adamw_8bit"]]
)
def test_rules_of_the_cpu_do_not_bind_cuda(overrides, tiny_cell):
    assert why_unsupported(tiny_cell(*overrides)) is None


@pytest.mark.parametrize(("refused", "words", "allowed"), ON_CUDA, ids=map(names, ON_CUDA))
def test_what_cuda_runs_it_does_not_run_with_everything(refused, words, allowed, tiny_cell, monkeypatch):
    """What a refused cell would do there, nobody has seen; that the rule is not wider than meant is what is held."""
    there = {"liger_kernel", "torchao"}
    monkeypatch.setattr("left_bench.grid.rules.is_installed", lambda module: module in there)
    assert words in str(why_unsupported(tiny_cell("hardware=cuda", *refused)))
    assert why_unsupported(tiny_cell("hardware=cuda", *allowed)) is None


@pytest.mark.parametrize(
    ("overrides", "package"),
    [
        (["training.kernels=liger"], "left-bench[liger]"),
        (["training.output_head=liger"], "left-bench[liger]"),
        (["training.float8=true", "peft=full", *BF16], "left-bench[torchao]"),
    ],
)
def test_a_training_option_names_its_extra(overrides, package, tiny_cell, monkeypatch):
    cell = tiny_cell("hardware=cuda", *overrides)
    monkeypatch.setattr("left_bench.grid.rules.is_installed", lambda module: True)
    assert why_unsupported(cell) is None
    monkeypatch.setattr("left_bench.grid.rules.is_installed", lambda module: False)
    assert package in str(why_unsupported(cell))


@pytest.mark.parametrize(
    ("transformers", "peft", "lost"),
    [
        ("5.23.0", "0.21.2", False),
        ("5.24.0.dev0", "0.21.2", True),
        ("5.24.0", "0.21.0", True),
        ("6.0", "0.21.2", True),
        ("5.24.0", "0.22.0", False),
        ("5.24.0", "1.0", False),
        ("4.57.6", "0.19.1", False),
    ],
)
def test_which_versions_lose_virtual_tokens(transformers, peft, lost):
    assert loses_virtual_tokens({"transformers": transformers, "peft": peft}) is lost
    assert not loses_virtual_tokens({"transformers": transformers})


@pytest.mark.parametrize("peft", VIRTUAL)
def test_methods_whose_virtual_tokens_are_lost_are_refused(peft, tiny_cell, monkeypatch):
    monkeypatch.setattr("left_bench.grid.rules.versions_of", lambda packages: LOSING)
    assert "transformers<5.24" in str(why_unsupported(tiny_cell(f"peft={peft}")))
    assert why_unsupported(tiny_cell(f"peft={peft}", "eval.generate=false")) is None
    assert why_unsupported(tiny_cell("peft=lora")) is None
    monkeypatch.setattr("left_bench.grid.rules.versions_of", lambda packages: LOSING | {"transformers": "5.23.0"})
    assert why_unsupported(tiny_cell(f"peft={peft}")) is None


def test_every_prompt_method_of_pefts_is_among_them(compose_cell):
    from peft.config import PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    targets = {compose_cell(f"peft={name}").peft.target for name in VIRTUAL}
    learning = {kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING.values() if issubclass(kind, PromptLearningConfig)}
    missing = {f"peft.{kind.__name__}" for kind in learning} - targets
    assert missing <= {"peft.AdaptionPromptConfig"}  # reads no cache


def test_flash_attention_is_taken_from_the_package_or_the_hub(tiny_cell, monkeypatch):
    cell = tiny_cell("hardware=cuda", "training.attention=flash_attention_3", *BF16)
    for there in ("flash_attn_interface", "kernels"):
        monkeypatch.setattr("left_bench.grid.rules.is_installed", lambda module, there=there: module == there)
        assert why_unsupported(cell) is None


def test_every_reason_is_one_line_and_every_rule_a_tuple():
    for refuses, reason in RULES:
        assert callable(refuses)
        assert "\n" not in reason
        assert 20 < len(reason) < 200


def test_installed():
    assert is_installed("json")
    assert not is_installed("no_such_package")
    assert not is_installed("no_such_package.inside")


def test_the_family_is_read_from_a_local_folder(compose_cell, tmp_path):
    cell = compose_cell(f"model.name_or_path={tmp_path}")
    assert model_type(cell) is None
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox"}')
    assert model_type(cell) == "gpt_neox"
    refused = compose_cell(f"model.name_or_path={tmp_path}", "peft=llama_adapter")
    assert "LLaMA-Adapter" in str(why_unsupported(refused))


def test_the_family_of_a_hub_model_is_not_known_and_not_refused(compose_cell):
    cell = compose_cell("model.name_or_path=someone/some-model", "peft=llama_adapter")
    assert model_type(cell) is None
    assert why_unsupported(cell) is None


def test_a_forced_cell_leaves_a_record(tiny_cell, tmp_path):
    record = run_isolated(tiny_cell(*CHEAP, "peft=full", "quantization=nf4"), tmp_path, on_event=lambda event: None)
    assert record.status == "failed"
    assert "gradient" in str(record.reason) or "grad" in record.provenance["log_tail"]

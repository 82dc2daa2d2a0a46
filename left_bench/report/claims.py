"""The field's usual sentences beside numbers measured here: what is compared, the rule, and the verdict that follows.

`CLAIMS` is the whole of it: a sentence, the cells it speaks of, and a rule in numbers. `sweeps/claims.yaml` runs the
cells. A rule is written down before it is applied, and what is missing is "not measured".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from left_bench.report.cells import Row, option
from left_bench.report.master_weights import has_master_weights, without_master_weights
from left_bench.report.statistics import Difference, Interval, difference, ratio, ratio_of_seeds, seed_values
from left_bench.report.values import format_difference, format_ratio, format_value, is_number, significant

Word = Literal["holds", "holds in part", "does not hold here", "not measured"]
HOLDS: Word = "holds"
IN_PART: Word = "holds in part"
NOT_HERE: Word = "does not hold here"
NOT_MEASURED: Word = "not measured"

QUALITY_MARGIN = 0.05
"""A loss of exact match that still counts as the same quality."""
_MASTERS = "full, float32 weights"
CLEAR = 1.05
"""A ratio of memory or speed below which nobody would notice."""


class Verdict(NamedTuple):
    word: Word
    measured: str
    """The numbers that decide, in one sentence of plain text."""


class Missing(Exception):
    """What a claim needs is not there; the message says what."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A claim's cells by name, equal in all that the claim does not speak of."""

    cells: Mapping[str, Row]
    beside: Sequence[Row] = ()
    """Every ok row of the same context."""

    def row(self, name: str) -> Row:
        if name not in self.cells:
            raise Missing(f"there is no record of {name}")
        row = self.cells[name]
        if not row.ok:
            raise Missing(f"{name} is {row.status}")
        return row

    def value(self, name: str, metric: str) -> float:
        value = self.row(name).value(metric)
        if value is None or not is_number(value):
            raise Missing(f"{metric} of {name} was not measured")
        return value

    def ratio(self, over: str, under: str, metric: str) -> float:
        below = self.value(under, metric)
        if below == 0:
            raise Missing(f"{metric} of {under} is zero")
        return self.value(over, metric) / below

    def difference(self, a: str, b: str, metric: str) -> Difference:
        self.value(a, metric), self.value(b, metric)
        result = difference(self.row(a), self.row(b), metric)
        if result is None:
            raise Missing(f"{metric} of {a} and {b} cannot be compared")
        return result

    def measured_ratio(self, over: str, under: str, metric: str) -> tuple[float, Interval | None]:
        """A ratio of what varies from run to run, with its interval where seeds or steps tell it."""
        value = self.ratio(over, under, metric)
        result = ratio(self.row(over), self.row(under), metric)
        return value, result[1] if result else None

    def memory(self, over: str, under: str) -> tuple[float, Interval | None]:
        return self.measured_ratio(over, under, "peak_memory_bytes")

    def speed(self, over: str, under: str) -> tuple[float, Interval | None]:
        return self.measured_ratio(over, under, "train_tokens_per_second")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence, and what is asked of the records before it is believed."""

    sentence: str
    cells: Mapping[str, Mapping[str, str]]
    """Name -> options other than those of unquantized bfloat16 LoRA, `training=default`; the first is the reference."""
    metrics: Sequence[str]
    """What the table shows."""
    rule: str
    judge: Callable[[Evidence], Verdict]


DEFAULT = {"quantization": "none", "peft": "lora", "precision": "bf16", "training": "default"}


def _stored(of: str, *, whole: float) -> Callable[[Evidence], Verdict]:
    """The rule of "`of` loading saves up to N× memory": `whole` is the ratio from which it holds."""

    def judge(evidence: Evidence) -> Verdict:
        against32 = evidence.ratio("float32", of, "weights_bytes")
        against16 = evidence.ratio("bfloat16", of, "weights_bytes")
        bits = evidence.value(of, "quantized_bits_per_param")
        peaks = [_told_ratio(*evidence.memory(of, name)) for name in ("float32", "bfloat16")]
        told = (
            f"stored weights are {format_ratio(against32)} smaller than in float32 and {format_ratio(against16)} "
            f"smaller than in bfloat16; the quantized layers alone take {significant(bits)} bits a parameter, "
            f"{format_ratio(32 / bits)} less than float32; the peak in training is {peaks[0]} that of float32 and "
            f"{peaks[1]} that of bfloat16"
        )
        return Verdict(HOLDS if against32 >= whole else IN_PART if against32 >= 1.5 else NOT_HERE, told)

    return judge


def _quality_rule(of: str, reference: str) -> str:
    """What `_keeps_quality` does, in words."""
    return (
        f"Holds: the 95 % interval of {of} exact match minus {reference} lies above −{QUALITY_MARGIN}. Does not: the "
        "whole interval is below zero. In part: anything between."
    )


def _keeps_quality(of: str, reference: str) -> Callable[[Evidence], Verdict]:
    def judge(evidence: Evidence) -> Verdict:
        apart = evidence.difference(of, reference, "exact_match")
        told = f"exact match differs by {_told(apart)}"
        if all(evidence.row(name).value("eval_loss") is not None for name in (of, reference)):
            told += f"; held-out loss by {_told(evidence.difference(of, reference, 'eval_loss'))}"
        if apart.interval is None:
            raise Missing(f"{told}, without a measure of the noise")
        if apart.interval.low >= -QUALITY_MARGIN:
            return Verdict(HOLDS, told)
        if apart.interval.high < 0:
            return Verdict(NOT_HERE, told)
        return Verdict(IN_PART, f"{told}; a loss of exact match above {QUALITY_MARGIN} is not ruled out")

    return judge


def _matches_full(evidence: Evidence) -> Verdict:
    """Against full fine-tuning with float32 weights; held against bfloat16 ones alone the sentence is not shown."""
    masters = evidence.cells.get(_MASTERS)
    if masters is not None and masters.ok:
        return _keeps_quality("LoRA", _MASTERS)(evidence)
    verdict = _keeps_quality("LoRA", "full")(evidence)
    unfair = without_master_weights(evidence.row("full")) and has_master_weights(evidence.row("LoRA"))
    if verdict.word != HOLDS or not unfair:
        return verdict
    return Verdict(IN_PART, f"{verdict.measured}; but full fine-tuning had no float32 master weights, and LoRA had")


def _double_quantization(evidence: Evidence) -> Verdict:
    saved = evidence.value("NF4", "quantized_bits_per_param") - evidence.value(_DQ, "quantized_bits_per_param")
    fewer = evidence.value("NF4", "weights_bytes") - evidence.value(_DQ, "weights_bytes")
    told = (
        f"{significant(saved)} bits per quantized parameter fewer, {format_value('weights_bytes', fewer)} of stored "
        f"weights (QLoRA's paper: 0.373 bits)"
    )
    return Verdict(NOT_HERE if fewer <= 0 else HOLDS if saved >= 0.3 else IN_PART, told)


def _prefix_parameters(evidence: Evidence) -> Verdict:
    ratio = evidence.ratio("full", "prefix tuning", "trainable_params")
    files = evidence.ratio("full", "prefix tuning", "adapter_file_bytes")
    told = f"{significant(ratio)} times fewer parameters, a file {significant(files)} times smaller"
    return Verdict(HOLDS if ratio >= 1000 else IN_PART if ratio >= 100 else NOT_HERE, told)


def _merged_latency(evidence: Evidence) -> Verdict:
    merged, bare = (
        seed_values(evidence.row(name), metric)
        for name, metric in (
            ("LoRA", "merged_generate_tokens_per_second"),
            ("no adapter", "generate_tokens_per_second"),
        )
    )
    shared = [seed for seed in merged if bare.get(seed)]
    if not shared:
        raise Missing("the speed of generating, merged and without an adapter, was not measured under one seed")
    speed = sum(merged[seed] for seed in shared) / sum(bare[seed] for seed in shared)
    interval = ratio_of_seeds({seed: merged[seed] for seed in shared}, {seed: bare[seed] for seed in shared})
    gained = evidence.value("LoRA", "merged_generate_tokens_per_second") / evidence.value(
        "LoRA", "generate_tokens_per_second"
    )
    told = (
        f"merged LoRA generates at {_told_ratio(speed, interval)} the speed of the model without an adapter, and at "
        f"{format_ratio(gained)} that of the attached adapter"
    )
    if (speed if interval is None else interval.low) >= 1 / CLEAR:
        return Verdict(HOLDS, told)
    return Verdict(IN_PART if speed >= 1 / CLEAR or gained >= CLEAR else NOT_HERE, told)


def _fewest_parameters(evidence: Evidence) -> Verdict:
    counts = {
        option(row, "peft") or "": row.value("trainable_params") or 0.0
        for row in evidence.beside
        if row.value("trainable_params")
        and all(option(row, group) == DEFAULT[group] for group in ("quantization", "precision", "training"))
    }
    if len(counts) < 4 or not {"ia3", "prompt_tuning"} <= set(counts):
        raise Missing(f"this needs IA3, prompt tuning and two other methods; there are {', '.join(counts) or 'none'}")
    order = sorted(counts, key=lambda name: counts[name])
    told = "fewest first: " + ", ".join(f"{name} {format_value('trainable_params', counts[name])}" for name in order)
    named = {"ia3", "prompt_tuning"} & set(order[:2])
    return Verdict(HOLDS if len(named) == 2 else IN_PART if named else NOT_HERE, told)


def _mixed_precision(evidence: Evidence) -> Verdict:
    memory, speed = evidence.memory("bf16 mixed", "float32"), evidence.speed("bf16 mixed", "float32")
    told = f"{_told_ratio(*memory)} the peak memory and {_told_ratio(*speed)} the tokens per second of float32"
    gains = (memory[0] <= 1 / CLEAR and _clear(memory[1])) + (speed[0] >= CLEAR and _clear(speed[1]))
    return Verdict((NOT_HERE, IN_PART, HOLDS)[gains], told)


def _accumulation(evidence: Evidence) -> Verdict:
    memory, speed = evidence.memory("accumulated", "at once"), evidence.speed("accumulated", "at once")
    told = f"{_told_ratio(*memory)} the peak memory and {_told_ratio(*speed)} the tokens per second"
    if memory[0] > 1 / CLEAR or not _clear(memory[1]):
        return Verdict(NOT_HERE, told)
    return Verdict(HOLDS if speed[0] <= 1 / CLEAR and _clear(speed[1]) else IN_PART, told)


def _not_always_faster(evidence: Evidence) -> Verdict:
    speeds = {}
    for name in ("8-bit", "NF4", _DQ):
        if name in evidence.cells and evidence.cells[name].ok:
            speeds[name] = evidence.speed(name, "bfloat16")
    if not speeds:
        raise Missing("there is no quantized cell")
    told = "; ".join(f"{name} trains at {_told_ratio(*speed)} the speed of bfloat16" for name, speed in speeds.items())
    slower = [name for name, (ratio, interval) in speeds.items() if ratio <= 1 / CLEAR and _clear(interval)]
    level = [name for name, (ratio, interval) in speeds.items() if ratio < CLEAR or not _clear(interval)]
    return Verdict(HOLDS if slower else IN_PART if level else NOT_HERE, told)


_DQ = "NF4, double quantization"
_QUANTIZED = {
    "bfloat16": {},
    "8-bit": {"quantization": "int8"},
    "NF4": {"quantization": "nf4"},
    _DQ: {"quantization": "nf4_dq"},
}
_STORED = ("weights_bytes", "stored_bits_per_param", "quantized_bits_per_param", "peak_memory_bytes")
_SCORED = ("exact_match", "eval_loss")

CLAIMS: tuple[Claim, ...] = (
    Claim(
        sentence="8-bit loading saves up to 4× memory",
        cells={"float32": {"precision": "fp32"}, "bfloat16": {}, "8-bit": {"quantization": "int8"}},
        metrics=_STORED,
        rule="Holds: the stored weights of the whole model are at least 3.6 times smaller than in float32. In part: at "
        "least 1.5 times. Embeddings and norms are not quantized; with a large vocabulary they are much of a small "
        "model.",
        judge=_stored("8-bit", whole=3.6),
    ),
    Claim(
        sentence="4-bit NF4 keeps quality",
        cells={name: _QUANTIZED[name] for name in ("bfloat16", "NF4", _DQ)},
        metrics=(*_SCORED, "quantization_error"),
        rule=_quality_rule("NF4's", "bfloat16's"),
        judge=_keeps_quality("NF4", "bfloat16"),
    ),
    Claim(
        sentence="double quantization reduces memory further",
        cells={name: _QUANTIZED[name] for name in ("NF4", _DQ)},
        metrics=_STORED,
        rule="Holds: fewer stored bytes, and at least 0.3 bits per quantized parameter fewer. In part: fewer bytes.",
        judge=_double_quantization,
    ),
    Claim(
        sentence="prefix tuning stores 1000× fewer parameters than full fine-tuning",
        cells={"full": {"peft": "full"}, "prefix tuning": {"peft": "prefix_tuning"}},
        metrics=("trainable_params", "adapter_file_bytes"),
        rule="Holds: at least 1,000 times fewer trained parameters. In part: at least 100 times.",
        judge=_prefix_parameters,
    ),
    Claim(
        sentence="LoRA adds no inference latency once merged",
        cells={"no adapter": {"peft": "full"}, "LoRA": {}},
        metrics=("generate_tokens_per_second", "merged_generate_tokens_per_second"),
        rule="Holds: the merged model generates at no less than 0.95 times the speed of the same model that never had "
        "an adapter (the fully fine-tuned one), the whole interval where there is one. In part: the interval reaches "
        "below, or it is slower than that but at least 1.05 times as fast as with the adapter attached.",
        judge=_merged_latency,
    ),
    Claim(
        sentence="LoRA matches full fine-tuning",
        cells={"full": {"peft": "full"}, _MASTERS: {"peft": "full", "precision": "bf16_mixed"}, "LoRA": {}},
        metrics=(*_SCORED, "forgetting_nats"),
        rule=_quality_rule("LoRA's", "full fine-tuning's")
        + " Full fine-tuning is that with float32 master weights, as LoRA has them; without a record of it, in part at "
        "most.",
        judge=_matches_full,
    ),
    Claim(
        sentence="IA3 and prompt tuning need the fewest parameters",
        cells={
            "LoRA": {},
            "IA3": {"peft": "ia3"},
            "prompt tuning": {"peft": "prompt_tuning"},
            "LayerNorm tuning": {"peft": "ln_tuning"},
            "prefix tuning": {"peft": "prefix_tuning"},
        },
        metrics=("trainable_params", "adapter_file_bytes", "exact_match"),
        rule="Holds: they are the two with the fewest trained parameters of all methods run. In part: one of them is "
        "among the two.",
        judge=_fewest_parameters,
    ),
    Claim(
        sentence="mixed precision saves memory and time",
        cells={"float32": {"precision": "fp32"}, "bf16 mixed": {"precision": "bf16_mixed"}, "bfloat16": {}},
        metrics=("peak_memory_bytes", "train_tokens_per_second", "exact_match"),
        rule="Holds: autocast over float32 weights takes at most 0.95 of float32's peak memory and trains at least "
        "1.05 times as fast, no interval reaching 1. In part: one of the two.",
        judge=_mixed_precision,
    ),
    Claim(
        sentence="gradient accumulation trades time for memory",
        cells={"at once": {}, "accumulated": {"training": "accumulate"}},
        metrics=("peak_memory_bytes", "train_tokens_per_second", "exact_match"),
        rule="Holds: at most 0.95 of the peak memory, and at most 0.95 of the speed, no interval reaching 1. In part: "
        "the memory without the "
        "loss of speed. The rows of a step are the same, 8 at once against 4 times 2.",
        judge=_accumulation,
    ),
    Claim(
        sentence="quantized weights are not always faster",
        cells=_QUANTIZED,
        metrics=("train_tokens_per_second", "generate_tokens_per_second"),
        rule="Holds: one quantization trains at 0.95 of bfloat16's speed or less, its interval below 1. In part: one "
        "is not clearly faster.",
        judge=_not_always_faster,
    ),
    Claim(
        sentence="4-bit loading saves up to 8× memory",
        cells={"float32": {"precision": "fp32"}, **{name: _QUANTIZED[name] for name in ("bfloat16", "NF4", _DQ)}},
        metrics=_STORED,
        rule="Holds: NF4's stored weights of the whole model are at least 7.2 times smaller than in float32. In part: "
        "at least 1.5 times.",
        judge=_stored("NF4", whole=7.2),
    ),
)


def _clear(interval: Interval | None) -> bool:
    """Whether a ratio is not 1 by its interval; without one, its size has to do."""
    return interval is None or 1 not in interval


def _told(apart: Difference) -> str:
    if apart.interval is None:
        return format_difference(apart.value)
    low, high = map(format_difference, apart.interval)
    beside = "" if apart.resolved else ", not resolved"
    return f"{format_difference(apart.value)} [{low}, {high}], over {apart.how}{beside}"


def _told_ratio(ratio: float, interval: Interval | None) -> str:
    if interval is None:
        return format_ratio(ratio)
    return f"{format_ratio(ratio)} [{interval.low:.2f}, {interval.high:.2f}]"

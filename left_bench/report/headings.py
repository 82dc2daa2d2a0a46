"""What a metric is called at the head of a column."""

from __future__ import annotations

from left_bench.spec.record import SCORER_PREFIX, TASK_PREFIX

_HEADINGS = {
    "exact_match": "exact match",
    "eval_loss": "eval loss (nats)",
    "eval_perplexity": "perplexity",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU",
    "f1": "F1",
    "macro_f1": "macro-F1",
    "matthews": "Matthews",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "entity_f1": "entity F1",
    "tag_accuracy": "tag accuracy",
    "recall_at_1": "recall at 1",
    "recall_at_5": "recall at 5",
    "ndcg_at_10": "nDCG at 10",
    "number_match": "number match",
    "verifier_score": "verifier's score",
    "judge_win_rate": "judge prefers it to the base",
    "preference_accuracy": "prefers the right answer",
    "preference_margin_nats": "preference margin (nats)",
    "validation_loss": "validation loss",
    "forgetting_nats": "forgetting (nats)",
    "quantization_error": "quantization error",
    "peak_memory_bytes": "peak memory",
    "weights_bytes": "base weights",
    "stored_bits_per_param": "bits/param",
    "quantized_bits_per_param": "bits/quantized param",
    "trainable_params": "trainable params",
    "adapter_file_bytes": "adapter file",
    "train_tokens_per_second": "train tokens/s",
    "generate_tokens_per_second": "generate tokens/s",
    "merged_generate_tokens_per_second": "merged generate tokens/s",
    "model_flops_utilization": "FLOPs utilization",
    "wall_seconds": "wall time",
    "train_joules": "training energy",
    "joules_per_1000_tokens": "energy/1,000 tokens",
    "train_watts": "training power",
    "cell_joules": "cell's energy",
    "cpu_train_joules": "CPUs' training energy",
    "cpu_joules_per_1000_tokens": "CPUs' energy/1,000 tokens",
    "cpu_train_watts": "CPUs' training power",
    "cpu_cell_joules": "CPUs' energy",
    "cell_cost": "cost",
    "cost_per_point": "cost of a point",
    "cell_energy_cost": "cost of energy",
    "cell_hours_cost": "cost of hours",
}


def heading(metric: str) -> str:
    """A metric's column heading."""
    if metric.startswith(SCORER_PREFIX):
        return f"{metric.removeprefix(SCORER_PREFIX).replace('_', ' ')} (own scorer)"
    if metric.startswith(TASK_PREFIX):
        return f"{metric.removeprefix(TASK_PREFIX).replace('_', ' ')} (lm-eval)"
    return _HEADINGS.get(metric, metric)

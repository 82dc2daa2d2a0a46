"""A decoder-only language model."""

from left_bench.spec.task import Task

TASK = Task(auto_class="AutoModelForCausalLM", peft_type="CAUSAL_LM", example=("smollm2_135m", "chain_sum"))

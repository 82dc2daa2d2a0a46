"""A model that reads a question with an answer and says how good the answer is: one number, from a new output layer.

`training=reward` makes a decoder into one; the reward of `training=grpo` may come from it.
"""

from left_bench.spec.task import Task

TASK = Task(
    auto_class="AutoModelForSequenceClassification",
    peft_type="SEQ_CLS",
    writes=False,
    load_rows="left_bench.model.rows:answer_pair_rows",
    predict="left_bench.evaluation.evaluate:no_answers",
    hub_task=("text-classification", "Text Classification"),
    rules=(
        (
            lambda cell: cell.training.objective != "reward",
            "model.task=reward_model is trained by training.objective=reward (training=reward) and no other",
        ),
        (
            lambda cell: not cell.data.pairs,
            "a reward model learns from a better and a worse answer: data.pairs=true, as in data=preferences",
        ),
        (
            lambda cell: cell.eval.curve_scores or cell.eval.scorer is not None or cell.eval.judge is not None,
            "a reward model writes no answers: leave out eval.curve_scores, eval.scorer and eval.judge",
        ),
    ),
)

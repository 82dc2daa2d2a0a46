"""A model whose vectors of texts are compared: questions are to lie close to their answers, and far from others'."""

from left_bench.spec.task import Task

TASK = Task(
    auto_class="AutoModel",
    peft_type="FEATURE_EXTRACTION",
    writes=False,
    embeds=True,
    open_reader="left_bench.pretrained:load_text_reader",
    load_rows="left_bench.model.rows:text_pair_rows",
    predict="left_bench.evaluation.reading:ranks",
    hub_task=("sentence-similarity", "Sentence Similarity"),
    example=("minilm_l6", "reverse_dictionary"),
    rules=(
        (
            lambda cell: cell.data.shape == "text" or cell.data.pairs,
            "vectors are compared of questions and their answers: neither plain text nor pairs of answers have them",
        ),
    ),
)

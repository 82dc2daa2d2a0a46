"""A model that reads a text and tells the tag of each word, with an output layer made new for the data's tags."""

from left_bench.spec.task import Task

TASK = Task(
    auto_class="AutoModelForTokenClassification",
    peft_type="TOKEN_CLS",
    writes=False,
    open_reader="left_bench.pretrained:load_text_reader",
    load_rows="left_bench.model.rows:tagged_text_rows",
    predict="left_bench.evaluation.reading:tags",
    hub_task=("token-classification", "Token Classification"),
    example=("minilm_l6", "kinship_people"),
    rules=(
        (
            lambda cell: cell.data.shape != "tags",
            "tags are told of words: data.shape=tags, with a column of words and one of their tags, as in "
            "data=kinship_people",
        ),
    ),
)

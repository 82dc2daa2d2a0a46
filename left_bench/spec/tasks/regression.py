"""A model that reads a text and tells a number, with an output layer of one number made new; the loss is its squared
error."""

from left_bench.spec.task import Task

TASK = Task(
    auto_class="AutoModelForSequenceClassification",
    peft_type="SEQ_CLS",
    writes=False,
    likelihood=False,
    reads_pairs=True,
    open_reader="left_bench.pretrained:load_text_reader",
    load_rows="left_bench.model.rows:scored_text_rows",
    predict="left_bench.evaluation.reading:numbers",
    hub_task=("text-classification", "Text Classification"),
    example=("minilm_l6", "sense_polarity"),
    rules=(
        (
            lambda cell: cell.data.shape == "text" or cell.data.pairs,
            "a number is told of one text: neither plain text nor pairs of answers have one",
        ),
    ),
)

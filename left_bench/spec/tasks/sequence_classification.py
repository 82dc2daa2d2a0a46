"""A model that reads a text and names its class, with an output layer made new for the data's classes.

Encoders (BERT, RoBERTa, DeBERTa) and decoders, which answer from their last token's state.
"""

from left_bench.spec.task import Task

TASK = Task(
    auto_class="AutoModelForSequenceClassification",
    peft_type="SEQ_CLS",
    writes=False,
    reads_pairs=True,
    open_reader="left_bench.pretrained:load_text_reader",
    load_rows="left_bench.model.rows:classified_text_rows",
    predict="left_bench.evaluation.evaluate:classify",
    hub_task=("text-classification", "Text Classification"),
    example=("minilm_l6", "sense_feelings"),
    rules=(
        (
            lambda cell: cell.data.shape == "text" or cell.data.pairs,
            "a class is told of one text: neither plain text nor pairs of answers have one",
        ),
    ),
)

"""A model that reads a text and predicts its class, with a new output layer for the data's classes.

Encoders (BERT, RoBERTa, DeBERTa) and decoders, which classify from the last token's hidden state.
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
            "a class belongs to one text; plain text and pairs of answers have no classes",
        ),
    ),
)

"""An encoder that reads the prompt with a decoder that writes the answer."""

from left_bench.spec.task import Task

TASK = Task(
    auto_class="AutoModelForSeq2SeqLM",
    peft_type="SEQ_2_SEQ_LM",
    has_encoder=True,
    load_rows="left_bench.model.rows:encoder_rows",
    example=("flan_t5_small", "chain_sum"),
    rules=(
        (
            lambda cell: cell.data.shape == "text",
            "plain text is for models that go on with it: an encoder with a decoder wants questions and answers",
        ),
        (
            lambda cell: cell.data.train_on == "all",
            "an encoder's prompt carries no loss, so there is nothing but answers to train on; leave out "
            "data.train_on=all",
        ),
    ),
)

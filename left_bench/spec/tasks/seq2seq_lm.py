"""An encoder-decoder model: the encoder reads the prompt, the decoder writes the answer."""

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
            "plain text is for decoder-only models; an encoder-decoder needs questions and answers",
        ),
        (
            lambda cell: cell.data.train_on == "all",
            "an encoder's prompt carries no loss, so only answers can be trained on; leave out data.train_on=all",
        ),
    ),
)
